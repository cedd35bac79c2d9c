"""What a method does with each role of a parameter. The methods themselves are `bam_ray.settings.methods`."""

from bam_ray.families import FFN_ROLES, Role
from bam_ray.settings import MixtureSettings, Operation

QUERY_SIDE = frozenset({Role.QUERY, Role.QUERY_BIAS, Role.QUERY_NORM, Role.OUTPUT, Role.OUTPUT_BIAS})
KEY_SIDE = frozenset({Role.KEY, Role.KEY_BIAS, Role.KEY_NORM, Role.VALUE, Role.VALUE_BIAS})


def operation_on(role: Role, settings: MixtureSettings) -> Operation:
    """Return what becomes of a role's tensors in a mixture layer."""
    if role in FFN_ROLES:
        return settings.ffn
    if role in QUERY_SIDE:
        return settings.query
    return settings.key if role in KEY_SIDE else Operation.AVERAGE

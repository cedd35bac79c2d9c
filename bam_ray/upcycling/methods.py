"""The methods, as rows: what becomes of attention and FFN. Norms, embeddings and head are always averaged.

| method | sources | FFN | query, output | key, value | paper |
| --- | --- | --- | --- | --- | --- |
| bam, kv_experts | seed and branches | stacked | stacked | stacked | arXiv 2408.08274 |
| bam, kv_shared | seed and branches | stacked | stacked | averaged | arXiv 2408.08274 |
| btx | seed and branches | stacked | averaged | averaged | arXiv 2403.07816 |
| sparse | seed | stacked copies | kept | kept | arXiv 2212.05055, Drop-Upcycling 2502.19261 |
| split | seed | partitioned | kept | kept | LLaMA-MoE, arXiv 2406.16554 |
| split, groups | seed | partitioned | partitioned | partitioned | LLaMA-MoE v2, arXiv 2411.15708 |
"""

from dataclasses import dataclass
from enum import StrEnum

from bam_ray.families import FFN_ROLES, Role
from bam_ray.settings import MixtureSettings

QUERY_SIDE = frozenset({Role.QUERY, Role.QUERY_BIAS, Role.QUERY_NORM, Role.OUTPUT, Role.OUTPUT_BIAS})
KEY_SIDE = frozenset({Role.KEY, Role.KEY_BIAS, Role.KEY_NORM, Role.VALUE, Role.VALUE_BIAS})


class Operation(StrEnum):
    """What becomes of a role's tensors."""

    STACK = "stack"  # one slice an expert, each from its model
    AVERAGE = "average"  # one for all: the mean over the models (of one model: itself)
    PARTITION = "partition"  # one slice an expert, all cut from one model


@dataclass(frozen=True)
class Method:
    """One row. `attention_experts` is the mixture's setting of that name."""

    ffn: Operation
    query: Operation
    key: Operation
    attention_experts: str

    def operation(self, role: Role) -> Operation:
        """What becomes of a role in a mixture layer."""
        if role in FFN_ROLES:
            return self.ffn
        if role in QUERY_SIDE:
            return self.query
        return self.key if role in KEY_SIDE else Operation.AVERAGE

    @property
    def has_attention_experts(self) -> bool:
        """Whether there is an attention router."""
        return self.attention_experts != "averaged"


_STACK, _AVERAGE, _PARTITION = Operation.STACK, Operation.AVERAGE, Operation.PARTITION

METHODS = {
    ("bam", "kv_experts"): Method(_STACK, _STACK, _STACK, "kv_experts"),
    ("bam", "kv_shared"): Method(_STACK, _STACK, _AVERAGE, "kv_shared"),
    ("btx", "averaged"): Method(_STACK, _AVERAGE, _AVERAGE, "averaged"),
    ("sparse", "averaged"): Method(_STACK, _AVERAGE, _AVERAGE, "averaged"),
    ("split", "averaged"): Method(_PARTITION, _AVERAGE, _AVERAGE, "averaged"),
    ("split", "kv_experts"): Method(_PARTITION, _PARTITION, _PARTITION, "kv_experts"),
}


def method_of(settings: MixtureSettings) -> Method:
    """The row that `settings` asks for."""
    if settings.method == "bam":
        return METHODS["bam", settings.attention_experts]
    groups = settings.method == "split" and settings.split.attention == "groups"
    return METHODS[settings.method, "kv_experts" if groups else "averaged"]

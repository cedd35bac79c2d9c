"""The methods, as rows: what happens to each role.

FFNs are always stacked into experts, and norms, embeddings and head averaged; methods differ in attention.

| method | query, output | key, value | source |
| --- | --- | --- | --- |
| bam, kv_experts | stacked | stacked | arXiv 2408.08274 |
| bam, kv_shared | stacked | averaged | arXiv 2408.08274 |
| btx | averaged | averaged | arXiv 2403.07816 |
"""

from dataclasses import dataclass
from enum import StrEnum

from bam_ray.families import Role
from bam_ray.settings import MixtureSettings


class Operation(StrEnum):
    """How one output tensor comes from the models' tensors."""

    STACK = "stack"  # one slice a model
    AVERAGE = "average"  # the uniform mean over all models, computed in fp32
    NEW = "new"  # drawn from a seeded normal distribution


@dataclass(frozen=True)
class Method:
    """One row. `attention` says what becomes of the attention's roles; `attention_experts` is the mixture's setting."""

    attention_experts: str
    attention: dict[Role, Operation]

    @property
    def has_attention_experts(self) -> bool:
        """Whether there is an attention router."""
        return Operation.STACK in self.attention.values()


def _attention(query_output: Operation, key_value: Operation) -> dict[Role, Operation]:
    return {
        **dict.fromkeys((Role.QUERY, Role.QUERY_BIAS, Role.QUERY_NORM, Role.OUTPUT, Role.OUTPUT_BIAS), query_output),
        **dict.fromkeys((Role.KEY, Role.KEY_BIAS, Role.KEY_NORM, Role.VALUE, Role.VALUE_BIAS), key_value),
    }


METHODS = {
    ("bam", "kv_experts"): Method("kv_experts", _attention(Operation.STACK, Operation.STACK)),
    ("bam", "kv_shared"): Method("kv_shared", _attention(Operation.STACK, Operation.AVERAGE)),
    ("btx", "averaged"): Method("averaged", _attention(Operation.AVERAGE, Operation.AVERAGE)),
}


def method_of(settings: MixtureSettings) -> Method:
    """The row that `settings` asks for."""
    return METHODS[settings.method, settings.attention_experts if settings.method == "bam" else "averaged"]

"""OLMo2: norms after attention and FFN, before the residual is added.

Queries and keys are normalized over all heads together.
"""

from typing import Any

from bam_ray.families.family import Family, ParameterTemplate, Role
from bam_ray.families.llama import LLAMA_LAYOUT, llama_block
from bam_ray.families.names import PLAIN_NAMES


def _block(config: dict[str, Any]) -> dict[str, Any]:
    return {**llama_block(config), "norm_placement": "after", "qk_norm": "full"}


OLMO2 = Family(
    "olmo2",
    tuple(
        ParameterTemplate(PLAIN_NAMES[Role.POST_FFN_NORM], Role.POST_FFN_NORM)
        if weight.role is Role.INPUT_NORM
        else weight
        for weight in LLAMA_LAYOUT
    ),
    _block,
)

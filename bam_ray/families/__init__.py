"""The supported dense architectures, each a table of parameter names and roles; adding one takes one file."""

from typing import Any

from bam_ray.errors import FamilyError
from bam_ray.families.cohere import COHERE
from bam_ray.families.cohere2 import COHERE2
from bam_ray.families.family import (
    SHARED_SETTINGS,
    SIZE_SETTINGS,
    DenseParameter,
    Family,
    ParameterTemplate,
    Role,
)
from bam_ray.families.gpt_neox import GPT_NEOX
from bam_ray.families.llama import LLAMA
from bam_ray.families.mistral import MISTRAL
from bam_ray.families.names import (
    EMBEDDING_ROUTERS,
    FFN_ROLES,
    PRIOR_PAIRS,
    PRIOR_TOKENS,
    expert_name,
    is_stacked,
    plain_name,
    router_names,
    shared_name,
)
from bam_ray.families.olmo2 import OLMO2
from bam_ray.families.qwen2 import QWEN2
from bam_ray.families.qwen3 import QWEN3
from bam_ray.families.weights import check_weights

__all__ = [
    "EMBEDDING_ROUTERS",
    "FAMILIES",
    "FFN_ROLES",
    "PRIOR_PAIRS",
    "PRIOR_TOKENS",
    "SHARED_SETTINGS",
    "SIZE_SETTINGS",
    "DenseParameter",
    "Family",
    "ParameterTemplate",
    "Role",
    "check_weights",
    "expert_name",
    "family_of",
    "is_stacked",
    "plain_name",
    "router_names",
    "shared_name",
]

FAMILIES = {family.model_type: family for family in (COHERE, COHERE2, GPT_NEOX, LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3)}


def family_of(config: dict[str, Any], uri: str) -> Family:
    """Return the family of a Hugging Face `config.json`.

    Raises:
        FamilyError: The architecture or one of its settings is not supported; the message names `uri`.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise FamilyError(f"{uri} has architecture {model_type!r}: supported are {sorted(FAMILIES)}")
    family = FAMILIES[model_type]
    family.check(config, uri)
    return family

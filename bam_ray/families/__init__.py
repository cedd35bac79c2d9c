"""Dense architectures: one table each, of its parameters' names and roles. Adding one is one file."""

from bam_ray.errors import FamilyError
from bam_ray.families.cohere import COHERE
from bam_ray.families.family import Family, Role, Weight
from bam_ray.families.llama import LLAMA
from bam_ray.families.mistral import MISTRAL

__all__ = ["FAMILIES", "Family", "Role", "Weight", "family_of"]

FAMILIES = {family.model_type: family for family in (COHERE, LLAMA, MISTRAL)}


def family_of(config: dict[str, object], where: str) -> Family:
    """The family of a Hugging Face `config.json`; raises `FamilyError` naming `where`."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise FamilyError(f"{where} is of architecture {model_type!r}: supported are {sorted(FAMILIES)}")
    family = FAMILIES[model_type]
    family.check(config, where)
    return family

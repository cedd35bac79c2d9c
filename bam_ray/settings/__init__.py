"""The recipe: everything a run is told, as strict frozen models."""

from bam_ray.settings.load import load_recipe, parse_recipe
from bam_ray.settings.recipe import (
    Blend,
    BranchSettings,
    DataSettings,
    DomainSettings,
    EvaluateSettings,
    Losses,
    MixSettings,
    MixtureSettings,
    Needs,
    Recipe,
    Scratch,
    SeedSettings,
    ServeSettings,
    StoreSettings,
    TokenizerSettings,
    TrainingSettings,
    UpcycleSettings,
)

__all__ = [
    "Blend",
    "BranchSettings",
    "DataSettings",
    "DomainSettings",
    "EvaluateSettings",
    "Losses",
    "MixSettings",
    "MixtureSettings",
    "Needs",
    "Recipe",
    "Scratch",
    "SeedSettings",
    "ServeSettings",
    "StoreSettings",
    "TokenizerSettings",
    "TrainingSettings",
    "UpcycleSettings",
    "load_recipe",
    "parse_recipe",
]

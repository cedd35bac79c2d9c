"""The recipe: the settings of a run as strict, frozen pydantic models. Neither torch nor Ray is imported here."""

from bam_ray.settings.adapters import ALL_TEXT, RANDOM, AdapterSettings
from bam_ray.settings.blends import PRESETS, DynamicBlend
from bam_ray.settings.compare import (
    DILOCO,
    PRIOR_CONTROLS,
    CompareSettings,
    DiLoCoSettings,
    PriorForm,
    control_name,
    dense_multiple,
    domain_tables,
)
from bam_ray.settings.consistency import divisors
from bam_ray.settings.data import DataSettings, DiscoverSettings, DomainSettings, TokenizerSettings
from bam_ray.settings.dense import BranchOverride, BranchSettings, Scratch, SeedSettings
from bam_ray.settings.load import apply_override, load_as, load_recipe, mixture_settings, parse_recipe, validated
from bam_ray.settings.methods import (
    AnyMixture,
    AverageSettings,
    BamSettings,
    BranchedMixture,
    BtxSettings,
    MixtureSettings,
    Operation,
    PartitionSettings,
    RoutedMixture,
    RouterSettings,
    SoupSettings,
    SparseSettings,
    SplitSettings,
    StackedMixture,
)
from bam_ray.settings.mix import MixSettings
from bam_ray.settings.mixing import Losses, Mixing, Ramp
from bam_ray.settings.outputs import EvaluateSettings, MetricsSettings, ReplicaRange, RoutingSettings, ServeSettings
from bam_ray.settings.recipe import Recipe, StoreSettings
from bam_ray.settings.resources import Demand, Needs
from bam_ray.settings.seeds import with_training_seed
from bam_ray.settings.serve_adapters import ServeAdapterSettings
from bam_ray.settings.strict import Blend, Count, Identity, Name, Strict
from bam_ray.settings.topics import EmbedderName, TopicsSettings
from bam_ray.settings.training import Spike, TrainingSettings
from bam_ray.settings.upcycle import QuorumSettings, UpcycleSettings

__all__ = [
    "ALL_TEXT",
    "DILOCO",
    "PRESETS",
    "PRIOR_CONTROLS",
    "RANDOM",
    "AdapterSettings",
    "AnyMixture",
    "AverageSettings",
    "BamSettings",
    "Blend",
    "BranchOverride",
    "BranchSettings",
    "BranchedMixture",
    "BtxSettings",
    "CompareSettings",
    "Count",
    "DataSettings",
    "Demand",
    "DiLoCoSettings",
    "DiscoverSettings",
    "DomainSettings",
    "DynamicBlend",
    "EmbedderName",
    "EvaluateSettings",
    "Identity",
    "Losses",
    "MetricsSettings",
    "MixSettings",
    "Mixing",
    "MixtureSettings",
    "Name",
    "Needs",
    "Operation",
    "PartitionSettings",
    "PriorForm",
    "QuorumSettings",
    "Ramp",
    "Recipe",
    "ReplicaRange",
    "RoutedMixture",
    "RouterSettings",
    "RoutingSettings",
    "Scratch",
    "SeedSettings",
    "ServeAdapterSettings",
    "ServeSettings",
    "SoupSettings",
    "SparseSettings",
    "Spike",
    "SplitSettings",
    "StackedMixture",
    "StoreSettings",
    "Strict",
    "TokenizerSettings",
    "TopicsSettings",
    "TrainingSettings",
    "UpcycleSettings",
    "apply_override",
    "control_name",
    "dense_multiple",
    "divisors",
    "domain_tables",
    "load_as",
    "load_recipe",
    "mixture_settings",
    "parse_recipe",
    "validated",
    "with_training_seed",
]

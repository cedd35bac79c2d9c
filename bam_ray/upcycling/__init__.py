"""Upcycling: a seed and branches become a mixture at step 0, and mixtures are edited and verified without training.

| module | content |
| --- | --- |
| `preflight` | checks that the sources fit each other, their drift from the seed, and the estimated cost |
| `methods` | the experts of a mixture, and the operation on each role of a parameter |
| `plan`, `plan_config` | each tensor of the result as an expression over the sources' tensors, and its configuration |
| `expressions`, `averaging` | these expressions, which are evaluated chunk by chunk |
| `split` | the assignment of the neurons of one dense FFN to experts |
| `routers` | routers that are fitted to text without training, and how well they separate the domains |
| `upcycle` | all of this in order, from sources to a plan |
| `write`, `card` | a planned model is written to a store, with its lineage, model card and digests |
| `edit_experts` | experts are added, removed and replaced |
| `dense`, `verify` | dense models are rebuilt from a mixture, and the mixture is compared with them |
| `domain_priors` | the seed with a prior over domains and without experts: the start of dense controls |
| `inspect` | a summary of a model folder |
| `export`, `loading` | a mixture is written as Mixtral; a model is loaded into memory |
"""

from bam_ray.upcycling.dense import mixture_config_of
from bam_ray.upcycling.edit_experts import (
    EditOptions,
    ExpertEdit,
    add_expert,
    remove_expert,
    replace_expert,
    write_edited_mixture,
)
from bam_ray.upcycling.export import export_mixtral
from bam_ray.upcycling.loading import load_model
from bam_ray.upcycling.upcycle import DomainText, plan, upcycle
from bam_ray.upcycling.verify import CheckResult, verify
from bam_ray.upcycling.write import ProgressCallback, Upcycled, UpcyclingPhase, write_model

__all__ = [
    "CheckResult",
    "DomainText",
    "EditOptions",
    "ExpertEdit",
    "ProgressCallback",
    "Upcycled",
    "UpcyclingPhase",
    "add_expert",
    "export_mixtral",
    "load_model",
    "mixture_config_of",
    "plan",
    "remove_expert",
    "replace_expert",
    "upcycle",
    "verify",
    "write_edited_mixture",
    "write_model",
]

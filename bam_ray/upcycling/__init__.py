"""Upcycling: seed and branches in, a mixture at step 0 out; and what is done to mixtures without training.

preflight      whether the sources fit, how far they drifted, what the work takes
methods        rows: what becomes of each role of a parameter
plan           every tensor of the mixture as an expression over the sources' tensors
expressions    those expressions, evaluated chunk by chunk
routers        routers fitted to text without training, and how well they tell domains apart
slices         which neurons go to which expert where one model is split
write          a planned mixture into a store, lineage and digests beside it
lifecycle      an expert added, removed, replaced
receipts       proofs that a mixture is what it says
export         a mixture as Mixtral
"""

from bam_ray.upcycling.dense import mixture_config_of
from bam_ray.upcycling.edit_experts import Change, absorbed, change, removed, replaced
from bam_ray.upcycling.export import export_mixtral
from bam_ray.upcycling.loading import load_model
from bam_ray.upcycling.upcycle import plan, upcycle
from bam_ray.upcycling.verify import Receipt, verify
from bam_ray.upcycling.write import Progress, Upcycled, write_mixture

__all__ = [
    "Change",
    "Progress",
    "Receipt",
    "Upcycled",
    "absorbed",
    "change",
    "export_mixtral",
    "load_model",
    "mixture_config_of",
    "plan",
    "removed",
    "replaced",
    "upcycle",
    "verify",
    "write_mixture",
]

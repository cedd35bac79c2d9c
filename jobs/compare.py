"""Train the controls of a recipe, dense models to compare mixtures with, and the seed if it is missing."""

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job

if __name__ == "__main__":
    run_job([ArtifactKind.CONTROLS], deepspeed_engine)

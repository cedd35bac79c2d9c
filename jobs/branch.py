"""Branch: train the seed, if it is not committed yet, and one branch per domain."""

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job

if __name__ == "__main__":
    run_job([ArtifactKind.BRANCHES], deepspeed_engine)

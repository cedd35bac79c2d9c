"""Mix: train the mixtures, with their experts spread over DeepSpeed processes."""

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job

if __name__ == "__main__":
    run_job([ArtifactKind.MIXTURES], deepspeed_engine)

"""Train the adapters of a recipe, one for each topic, and find the topics if they are missing."""

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job

if __name__ == "__main__":
    run_job([ArtifactKind.TOPICS, ArtifactKind.ADAPTERS], deepspeed_engine)

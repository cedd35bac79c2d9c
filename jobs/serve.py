"""Serve: deploy the recipe's mixture behind an OpenAI-compatible endpoint and print sample completions."""

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job, serve_and_ask

if __name__ == "__main__":
    run_job([ArtifactKind.MIXTURES], deepspeed_engine, serve_and_ask)

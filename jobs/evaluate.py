"""Evaluate: score every model of the run on every domain, write the report and print the table."""

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job, show_results

if __name__ == "__main__":
    run_job([ArtifactKind.REPORTS], deepspeed_engine, show_results)

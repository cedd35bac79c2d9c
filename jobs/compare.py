"""Run a recipe up to its report for each training seed of `compare.seeds`, and compare its models over the seeds.

A job that is submitted again continues where the last one stopped. Models that are committed are used again.
"""

from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import compare_job

if __name__ == "__main__":
    compare_job(deepspeed_engine)

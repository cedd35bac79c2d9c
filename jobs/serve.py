"""Serve the model of a recipe at an OpenAI-compatible endpoint, and print sample completions."""

from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job, serve_and_ask
from bam_ray.on_ray.serve_app import served_kinds, without_controls

if __name__ == "__main__":
    run_job(served_kinds, deepspeed_engine, serve_and_ask, without_controls)

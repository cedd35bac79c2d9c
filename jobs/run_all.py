"""Run all stages of a recipe: corpus, seed, branches, controls, upcycling, mixing, evaluation and the endpoint.

A job that is submitted again resumes the run.
"""

from rich.console import Console

from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job, serve_and_ask, show_results
from bam_ray.pipeline.run import PipelineRun


def show_results_and_serve(run: PipelineRun, console: Console) -> None:
    """Print the results of a finished run, serve what it made and print sample completions."""
    show_results(run, console)
    serve_and_ask(run, console)


if __name__ == "__main__":
    run_job(None, deepspeed_engine, show_results_and_serve)

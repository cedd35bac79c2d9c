"""Run everything: corpus, seed, branches, upcycling, mixing, evaluation and the endpoint. Resumes if run again."""

from rich.console import Console

from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job, serve_and_ask, show_results
from bam_ray.pipeline.run import PipelineRun


def show(run: PipelineRun, console: Console) -> None:
    """Print the results, then serve the mixture."""
    show_results(run, console)
    serve_and_ask(run, console)


if __name__ == "__main__":
    run_job(None, deepspeed_engine, show)

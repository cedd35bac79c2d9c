"""The whole story: corpus, seed, branches, upcycling, mixing, evaluation, endpoint. Submitted again, it goes on."""

from rich.console import Console

from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import run_job, serve_and_ask, show_results
from bam_ray.settings import Recipe


def end(recipe: Recipe, console: Console) -> None:
    """What a person waited for."""
    show_results(recipe, console)
    serve_and_ask(recipe, console)


if __name__ == "__main__":
    run_job(None, deepspeed_engine, end)

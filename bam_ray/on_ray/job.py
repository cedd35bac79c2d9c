"""What the scripts in `jobs/` share: the command line, errors as one line, exit codes.

    python jobs/branch.py --recipe recipes/demo.yaml branch.training.tokens=2000000

0: everything asked for is committed. 1: something failed. 130: stopped; the same command goes on.
"""

import argparse
import sys
from collections.abc import Callable, Collection

from rich.console import Console

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import BamError
from bam_ray.on_ray.run import TABLE_WIDTH, connect, run_tasks
from bam_ray.on_ray.serve_app import deploy, mixture_of
from bam_ray.on_ray.submit import ENDING
from bam_ray.on_ray.work import EngineFactory
from bam_ray.settings import Recipe, load_recipe

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}


def run_job(
    kinds: Collection[ArtifactKind] | None,
    engine_factory: EngineFactory | None = None,
    ending: Callable[[Recipe, Console], None] | None = None,
) -> None:
    """Make all artifacts of `kinds` (None: all) by the recipe on the command line, then `ending`; exits."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--recipe", required=True, help="the recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the recipe's, with dots")
    arguments = parser.parse_args()
    console = Console(width=TABLE_WIDTH)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        outcome = run_tasks(recipe, kinds, engine_factory)
        if outcome == "finished" and ending is not None:
            console.print(ENDING, highlight=False)
            ending(recipe, console)
    except BamError as error:
        sys.exit(f"error: {error}")
    sys.exit(EXIT_CODES[outcome])


def serve_mixture(recipe: Recipe) -> tuple[str, str]:
    """Put the recipe's mixture behind the endpoint; returns its base URL and the model's name."""
    connect()
    mixture, name = mixture_of(recipe)
    return deploy(recipe.store.uri, recipe.store.endpoint, mixture.kind, mixture.id, name, recipe.serve), name


def show_results(recipe: Recipe, console: Console) -> None:
    """The perplexity table, and where the report lies."""
    from bam_ray.on_ray import run_summary  # torch and transformers: not before they are needed

    run_summary.show_results(recipe, open_store(recipe.store.uri, recipe.store.endpoint), console)


def serve_and_ask(recipe: Recipe, console: Console) -> None:
    """Serve the mixture, let it continue one text a domain, and print how to ask it."""
    from bam_ray.on_ray import run_summary

    url, name = serve_mixture(recipe)
    run_summary.stream_completions(recipe, open_store(recipe.store.uri, recipe.store.endpoint), url, name, console)
    console.print(f"{name} is served at {url}. Ask it:", highlight=False)
    body = f'{{"model": "{name}", "prompt": "The ", "max_tokens": 40}}'
    console.print(
        f"  curl {url}/completions -H 'Content-Type: application/json' -d '{body}'",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )

"""The part that all scripts in `jobs/` share: command line, one-line errors and exit codes.

    python jobs/branch.py --recipe recipes/demo.yaml branch.training.tokens=2000000

Exit codes: 0 if everything that was asked for is committed, 1 if something failed, 130 if the job was stopped. The same
command resumes a stopped job.
"""

import argparse
import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.controller import RunOutcome
from bam_ray.errors import BamError, one_line
from bam_ray.on_ray.follow import roll_back, serve_run
from bam_ray.on_ray.run import TABLE_WIDTH, connect, run_tasks
from bam_ray.on_ray.serve_app import served_name
from bam_ray.on_ray.submit import END_OF_RUN, TAKE_OVER
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import Recipe, load_recipe
from bam_ray.terminal import terminal_console

if TYPE_CHECKING:
    from bam_ray.training.engine import EngineFactory

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}


def run_job(
    kinds: Collection[ArtifactKind] | Callable[[Recipe], Collection[ArtifactKind]] | None,
    engine_factory: "EngineFactory | None" = None,
    show: Callable[[PipelineRun, Console], None] | None = None,
    reduce: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> None:
    """Make all artifacts of `kinds` with the recipe on the command line, call `show`, and exit.

    Args:
        kinds: Kinds of artifacts to make, together with everything that they are made from, or a function that returns
            them. None stands for all.
        engine_factory: Makes the engines of process groups.
        show: Called at the end of a run that finished. Its output is what `bam run` prints last.
        reduce: Returns the recipe without what the job does not need.
    """

    def work(recipe: Recipe, take_over: bool, console: Console) -> RunOutcome:
        recipe = reduce(recipe)
        wanted = kinds(recipe) if callable(kinds) else kinds
        outcome = run_tasks(recipe, wanted, engine_factory, take_over=take_over)
        if outcome == "finished" and show is not None:
            console.print(END_OF_RUN)
            show(run_of(recipe), console)
        return outcome

    exit_after(work)


def compare_job(engine_factory: "EngineFactory | None" = None) -> None:
    """Make the report of the recipe on the command line for each training seed, compare the reports, and exit.

    Args:
        engine_factory: Makes the engines of process groups.
    """
    from bam_ray.on_ray.comparison import compare_seeds

    def work(recipe: Recipe, take_over: bool, console: Console) -> RunOutcome:
        def make_report(seeded: Recipe) -> RunOutcome:
            return run_tasks(seeded, [ArtifactKind.REPORTS], engine_factory, take_over=take_over)

        return compare_seeds(recipe, make_report, console)

    exit_after(work)


def rollback_job() -> None:
    """Serve again what the endpoint of the recipe on the command line has served before, and exit."""

    def work(recipe: Recipe, take_over: bool, console: Console) -> RunOutcome:
        connect()
        models, url = roll_back(run_of(recipe))
        console.print(END_OF_RUN)
        console.print(f"{' + '.join(model.prefix for model in models)} is served again at {url}", soft_wrap=True)
        return "finished"

    exit_after(work)


def exit_after(work: Callable[[Recipe, bool, Console], RunOutcome]) -> NoReturn:
    """Call `work` with the recipe on the command line, and exit with the code of its outcome.

    Args:
        work: Receives the recipe, True if other drivers are to be replaced, and the console for its output.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--recipe", required=True, help="path of the recipe, a YAML file")
    parser.add_argument(TAKE_OVER, action="store_true", help="replace other drivers that work on the same store")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the recipe")
    arguments = parser.parse_args()
    console = terminal_console(width=TABLE_WIDTH)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        outcome = work(recipe, arguments.take_over, console)
    except (BamError, OSError) as error:
        sys.exit(f"error: {one_line(error, all_lines=True)}")
    sys.exit(EXIT_CODES[outcome])


def run_of(recipe: Recipe) -> PipelineRun:
    """Return the run of `recipe` over its own store."""
    return PipelineRun.of(recipe, open_store(recipe.store.uri, recipe.store.endpoint))


def show_results(run: PipelineRun, console: Console) -> None:
    """Print the perplexity table and the location of the report."""
    from bam_ray.on_ray import run_summary  # torch and transformers: not imported before they are needed

    run_summary.show_results(run, console)


def show_adapters(run: PipelineRun, console: Console) -> None:
    """Print the perplexity of the adapters of a recipe on each topic."""
    from bam_ray.on_ray import run_summary

    run_summary.show_adapters(run, console)


def serve_and_ask(run: PipelineRun, console: Console) -> None:
    """Serve the model, print its continuation of one text per domain, and print how to send a request.

    An endpoint with API keys is not asked, because only its clients know the keys.
    """
    from bam_ray.on_ray import run_summary

    connect()
    models, url = serve_run(run)
    name = served_name(run.recipe)
    if len(models) > 1:
        members = ", ".join(f"{model.kind}/{model.id}" for model in models)
        console.print(f"{name} is the ensemble of {members}", soft_wrap=True)
    header = " -H 'Authorization: Bearer API-KEY'"
    if run.recipe.serve.api_keys is None:
        run_summary.stream_completions(run, url, name, console)
        header = ""
    page = url.removesuffix("v1")
    console.print(f"{name} is served at {url}, and its page is {page}. Ask it:", soft_wrap=True)
    body = f'{{"model": "{name}", "prompt": "The ", "max_tokens": 40}}'
    console.print(f"  curl {url}/completions -H 'Content-Type: application/json'{header} -d '{body}'", soft_wrap=True)

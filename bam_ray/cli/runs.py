"""Commands that work on a recipe, or on the store of a run."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from pydantic import ValidationError
from rich.live import Live

from bam_ray.blobs import BlobStore, open_store
from bam_ray.blobs.check import open_checked_store
from bam_ray.checkpoint.manifest import ArtifactKind, read_manifest
from bam_ray.cli.app import app
from bam_ray.cli.console import console
from bam_ray.cli.options import EndpointOption, OutputOption, RunArgument, StoreOptions, with_shared_options
from bam_ray.control import status as run_status
from bam_ray.control.endpoint_record import read_endpoints
from bam_ray.control.status_table import render, render_domains, render_endpoints, render_history, render_storage
from bam_ray.control.storage import stored_bytes
from bam_ray.errors import CheckpointError, PlacementError, SettingsError
from bam_ray.settings import load_recipe
from bam_ray.units import format_bytes

if TYPE_CHECKING:
    from bam_ray.checkpoint.artifacts import Artifact

RecipeArgument = Annotated[Path, typer.Argument(help="The path of the recipe, a YAML file.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that override those of the recipe.")
]
TakeOverOption = Annotated[
    bool,
    typer.Option(
        "--take-over",
        help="Do not wait for other drivers that work on the same store. Their running tasks start again here, from "
        "their last checkpoints.",
    ),
]
REFRESH_SECONDS = 2.0
TRAINED_KINDS = ("seeds", "branches", "controls", "mixtures")


@app.command()
def run(recipe: RecipeArgument, overrides: OverridesArgument = None, take_over: TakeOverOption = False) -> None:
    """Run a whole recipe as a Ray job on the cluster at RAY_ADDRESS, and follow it. Ctrl-C stops the run cleanly."""
    _submit(recipe, overrides, "jobs/run_all.py", take_over)


@app.command()
def evaluate(recipe: RecipeArgument, overrides: OverridesArgument = None, take_over: TakeOverOption = False) -> None:
    """Run the missing stages of a recipe up to the report, and print the table of perplexities."""
    _submit(recipe, overrides, "jobs/evaluate.py", take_over)


@app.command()
def compare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    take_over: TakeOverOption = False,
    tasks: Annotated[
        str | None,
        typer.Option(help="The folder of lm-eval tasks on which all models are scored too (evaluate.lm_eval_tasks)."),
    ] = None,
) -> None:
    """Make all models of a recipe with several training seeds (compare.seeds), and compare them.

    Models that exist already are used again. Ctrl-C stops the run cleanly.
    """
    if tasks is not None:
        overrides = [*(overrides or ()), f"evaluate.lm_eval_tasks={Path(tasks).absolute()}"]
    _submit(recipe, overrides, "jobs/compare.py", take_over)


@app.command()
def serve(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    take_over: TakeOverOption = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Serve again what was served before. Runs no stages.")
    ] = False,
) -> None:
    """Run the missing stages of a recipe up to the models that it serves, and serve them."""
    _submit(recipe, overrides, "jobs/rollback.py" if rollback else "jobs/serve.py", take_over)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    cluster: Annotated[
        Path | None, typer.Option(help="The path of a cluster file. The run is simulated on this cluster.")
    ] = None,
) -> None:
    """Show the tasks of a recipe with the resources and the storage that they need. Starts nothing.

    With a cluster file, the plan also shows where and when each task would run.
    """
    from bam_ray.planning.cluster_file import load_cluster
    from bam_ray.planning.plan_table import render_plan
    from bam_ray.planning.planner import make_plan

    settings = load_recipe(recipe, overrides)
    planned = make_plan(settings, load_cluster(cluster) if cluster else None)
    console.print(render_plan(planned, console.width))
    if planned.failure:
        raise PlacementError(planned.failure)


@app.command()
def status(
    run: RunArgument,
    endpoint: EndpointOption = None,
    watch: Annotated[bool, typer.Option(help="Refresh the table until the run ends.")] = False,
) -> None:
    """Show the state of a run, from any machine that can access its store."""
    store = open_store(run, endpoint)
    current = _read_status(store)
    if not watch:
        endpoints = render_endpoints(read_endpoints(store))
        domains = render_domains(_corpus_facts(store, current))
        storage = render_storage(stored_bytes(store))
        console.print(render(current), render_history(current), domains, endpoints, storage)
        return
    with Live(render(current), console=console, auto_refresh=False) as live:
        while current.state == "running":
            time.sleep(REFRESH_SECONDS)
            current = _read_status(store)
            live.update(render(current), refresh=True)


@app.command()
@with_shared_options
def sweep(
    run: RunArgument,
    store: StoreOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed. Remove nothing.")] = False,
) -> None:
    """Remove from the store of a run what killed attempts have left. Safe while the run is in progress."""
    from bam_ray.toolbox import sweep as sweeping

    target = store.target(run)
    opened = open_store(run, store.endpoint) if dry_run else open_checked_store(target)[0]
    with console.status("reading"):
        result = sweeping.sweep(opened, dry_run)
    for driver in result.living:
        console.print(f"{driver} is alive: what it may be writing stays", soft_wrap=True)
    for group in result.removed:
        size = f"{group.blobs} files, {format_bytes(group.bytes)}"
        console.print(f"{group.what}: {size} ({group.why})", soft_wrap=True)
    for upload in result.uploads:
        console.print(f"{upload}: an unfinished upload", soft_wrap=True)
    if result.denied:
        console.print(f"unfinished uploads were not looked for: {result.denied}", soft_wrap=True)
    files = sum(group.blobs for group in result.removed)
    size = format_bytes(sum(group.bytes for group in result.removed))
    uploads = f" and {len(result.uploads)} unfinished uploads" if result.uploads else ""
    verb = "would be removed; unfinished uploads are not counted" if dry_run else "removed"
    console.print(f"{files} files with {size}{uploads} {verb}")


@app.command()
def report(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("report"),
    endpoint: EndpointOption = None,
) -> None:
    """Download the newest report of a run, and print its table of perplexities.

    If the run has a comparison over training seeds, the newest one is downloaded and printed too.
    """
    from bam_ray.evaluation.results import Results
    from bam_ray.evaluation.table import print_comparison, print_results
    from bam_ray.stages.compare import read_comparison

    store = open_store(run, endpoint)
    newest = _newest(store, ArtifactKind.REPORTS)
    if newest is None:
        raise CheckpointError(
            f"{run} has no report yet: run `bam evaluate RECIPE` to make one, or `bam status {run}` to see the run"
        )
    _download(newest, out)
    try:
        results = Results.model_validate_json((out / "results.json").read_bytes())
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise CheckpointError(f"{out}/results.json is not the result of an evaluation: {reason}") from None
    print_results(results, console)
    console.print(f"written: {out}/report.html and {out}/results.json", soft_wrap=True)
    comparison = _newest(store, ArtifactKind.COMPARISONS)
    if comparison is not None:
        _download(comparison, out / "comparison")
        print_comparison(read_comparison(comparison), console)
        console.print(f"written: {out}/comparison/index.html and {out}/comparison/comparison.json", soft_wrap=True)


@app.command()
@with_shared_options
def export_step(
    run: RunArgument,
    model: Annotated[
        str,
        typer.Argument(
            metavar="KIND/NAME", help="The model: seeds/seed, branches/DOMAIN, controls/NAME or mixtures/NAME."
        ),
    ],
    out: OutputOption,
    store: StoreOptions,
    step: Annotated[
        int | None, typer.Option(help="The step of the checkpoint. Default: the newest checkpoint.")
    ] = None,
) -> None:
    """Copy a training checkpoint of a run to a Hugging Face folder with its tokenizer. No model is loaded."""
    kind, _, name = model.partition("/")
    if kind not in TRAINED_KINDS or not name:
        raise SettingsError(f"{model!r} is not of the form KIND/NAME: KIND must be {' or '.join(TRAINED_KINDS)}")
    from bam_ray.toolbox.step_export import export_step as export_checkpoint

    manifest = export_checkpoint(
        open_store(run, store.endpoint), cast(ArtifactKind, kind), name, store.target(out), step
    )
    console.print(f"written: {out} ({model} at step {manifest.step}, attempt {manifest.attempt})", soft_wrap=True)


def _newest(store: BlobStore, kind: ArtifactKind) -> "Artifact | None":
    """Return the committed artifact of a kind that was created last; None if there is none."""
    from bam_ray.checkpoint.artifacts import Artifact

    found = [Artifact(store, kind, id) for id in {key.split("/")[1] for key in store.list(f"{kind}/")}]
    committed = [(manifest.created, each.id, each) for each in found if (manifest := each.manifest()) is not None]
    return max(committed, key=lambda entry: entry[:2])[-1] if committed else None


def _download(artifact: "Artifact", out: Path) -> None:
    """Copy the files of an artifact to the folder `out`."""
    folder = artifact.fetch()
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())


def _read_status(store: BlobStore) -> run_status.Status:
    status = run_status.read(store)
    if status is None:
        raise CheckpointError(
            f"{store.uri} has no run ({run_status.STATUS} does not exist): check the URI, or start one with `bam run`"
        )
    return status


def _corpus_facts(store: BlobStore, status: run_status.Status) -> dict[str, Any]:
    """Return the facts of the corpus of a run; empty while it is not committed."""
    ids = [row.id for row in status.rows if row.kind == ArtifactKind.CORPORA]
    manifest = read_manifest(store, f"{ArtifactKind.CORPORA}/{ids[0]}") if ids else None
    return manifest.facts if manifest else {}


def _submit(recipe: Path, overrides: list[str] | None, script: str, take_over: bool) -> None:
    """Submit a script as a Ray job, follow the job, and exit with its exit code."""
    from bam_ray.on_ray.submit import follow, submit

    settings = load_recipe(recipe, overrides)
    job_id = submit(recipe, overrides or [], script, take_over=take_over)
    sys.exit(follow(job_id, open_store(settings.store.uri, settings.store.endpoint)))

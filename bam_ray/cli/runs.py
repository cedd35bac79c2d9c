"""Runs: commands that work on a recipe, or on the store that a run lies in."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.cli.app import Endpoint, app, console
from bam_ray.control import status as statuses
from bam_ray.control.status_table import render, render_history, render_storage
from bam_ray.control.storage import stored_bytes
from bam_ray.errors import CheckpointError, PlacementError
from bam_ray.settings import load_recipe

RecipePath = Annotated[Path, typer.Argument(help="the recipe, a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over the recipe's")]
REFRESH_SECONDS = 2.0


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Run the whole recipe as a Ray job (address: RAY_ADDRESS) and follow it; Ctrl-C stops it cleanly."""
    _submit(recipe, overrides, "jobs/run_all.py")


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Make what is missing up to the report, and print the table."""
    _submit(recipe, overrides, "jobs/evaluate.py")


@app.command()
def serve(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Make what is missing up to the served mixture, and serve it."""
    _submit(recipe, overrides, "jobs/serve.py")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    cluster: Annotated[Path | None, typer.Option(help="a cluster file: simulate the run on it")] = None,
) -> None:
    """Show what a run would make, need and store, and with a cluster file where and for how long. Starts nothing."""
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
    run: Annotated[str, typer.Argument(help="where the run lies: its recipe's store.uri")],
    endpoint: Endpoint = None,
    watch: Annotated[bool, typer.Option(help="go on showing it until it ends")] = False,
) -> None:
    """Show how a run stands, from anywhere that reaches its store."""
    import time

    store = open_store(run, endpoint)
    now = _status(store)
    if not watch:
        console.print(render(now), render_history(now), render_storage(stored_bytes(store)))
        return
    with Live(render(now), console=console, auto_refresh=False) as live:
        while now.state == "running":
            time.sleep(REFRESH_SECONDS)
            now = _status(store)
            live.update(render(now), refresh=True)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="where the run lies: its recipe's store.uri")],
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("report"),
    endpoint: Endpoint = None,
) -> None:
    """Bring the newest report of a run here, and print its table."""
    from bam_ray.checkpoint.artifacts import Artifact
    from bam_ray.evaluation.results import Results
    from bam_ray.evaluation.table import print_results

    store = open_store(run, endpoint)
    found = sorted(
        (manifest.created, manifest.id)
        for id in {key.split("/")[1] for key in store.list("reports/")}
        if (manifest := Artifact(store, ArtifactKind.REPORTS, id).manifest()) is not None
    )
    if not found:
        raise CheckpointError(f"{run} has no report yet: `bam evaluate RECIPE` makes it, `bam status {run}` shows more")
    folder = Artifact(store, ArtifactKind.REPORTS, found[-1][1]).fetch()
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    results = Results.model_validate_json((out / "results.json").read_bytes())
    print_results(results, console)
    console.print(f"written: {out}/report.html and {out}/results.json", highlight=False)


def _status(store: BlobStore) -> statuses.Status:
    now = statuses.read(store)
    if now is None:
        raise CheckpointError(
            f"{store.uri} has no run (no {statuses.STATUS}): mend the URI or start one with `bam run`"
        )
    return now


def _submit(recipe: Path, overrides: list[str] | None, entry: str) -> None:
    """Submit a job and follow it; exits with its code."""
    from bam_ray.on_ray.submit import follow, submit

    settings = load_recipe(recipe, overrides)
    job_id = submit(recipe, overrides or [], entry)
    sys.exit(follow(job_id, open_store(settings.store.uri, settings.store.endpoint)))

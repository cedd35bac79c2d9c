"""`bam`: a run from the shell. Every command that works on a recipe takes overrides: `key.subkey=value`."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from bam_ray.blobs import BlobStore, open_store
from bam_ray.control import status as statuses
from bam_ray.control.storage import stored_bytes
from bam_ray.control.table import render, render_history, render_storage
from bam_ray.errors import BamError, CheckpointError, SettingsError
from bam_ray.settings import MixtureSettings, apply_override, load_recipe, validated

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()

RecipePath = Annotated[Path, typer.Argument(help="the recipe, a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over the recipe's")]
Endpoint = Annotated[str | None, typer.Option(help="URL of an S3 server other than AWS (default: AWS_ENDPOINT_URL)")]
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
    from bam_ray.control.cluster_file import load_cluster
    from bam_ray.control.plan_table import render_plan
    from bam_ray.control.planner import make_plan

    settings = load_recipe(recipe, overrides)
    console.print(render_plan(make_plan(settings, load_cluster(cluster) if cluster else None)))


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
        if (manifest := Artifact(store, "reports", id).manifest()) is not None
    )
    if not found:
        raise CheckpointError(f"{run} has no report yet: `bam evaluate RECIPE` makes it, `bam status {run}` shows more")
    folder = Artifact(store, "reports", found[-1][1]).fetch()
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    results = Results.model_validate_json((out / "results.json").read_bytes())
    print_results(results, console)
    console.print(f"written: {out}/report.html and {out}/results.json", highlight=False)


@app.command()
def upcycle(
    seed: Annotated[str, typer.Option(help="the seed's Hugging Face folder: a path or s3://")],
    branch: Annotated[list[str], typer.Option(help="NAME=URI, once a branch")],
    out: Annotated[str, typer.Option(help="where the mixture goes: a path or s3://")],
    method: Annotated[str, typer.Option(help="bam or btx")] = "bam",
    set: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the mixture's settings")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Turn a seed and branches into a mixture, without a cluster or a run."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    origins = {"seed": seed}
    for each in branch:
        name, separator, uri = each.partition("=")
        if not separator or name in origins:
            raise SettingsError(f"--branch {each!r} is not NAME=URI with a name of its own")
        origins[name] = uri
    plain: dict[str, object] = {"method": method}
    for each in set or []:
        if "=" not in each:
            raise SettingsError(f"--set {each!r} is not KEY=VALUE")
        apply_override(plain, each)
    settings = validated(MixtureSettings, plain, "mixture")
    target = open_store(out, endpoint)
    if any(True for _ in target.list()):
        raise CheckpointError(f"{out} is not empty: name a place where nothing lies yet")

    from bam_ray.checkpoint.tensors import TensorReader
    from bam_ray.upcycling import upcycle as upcycle_to

    sources = {name: TensorReader(open_store(uri, endpoint)) for name, uri in origins.items()}
    with tempfile.TemporaryDirectory(prefix="bam-upcycle-") as temporary:
        columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            job = bar.add_task("upcycling")
            upcycle_to(
                sources,
                settings,
                Path(temporary),
                progress=lambda done, total: bar.update(job, completed=done, total=total),
            )
        # The configuration goes last: a folder without it is no model
        names = sorted((path.name for path in Path(temporary).iterdir()), key=lambda name: name == "config.json")
        for name in names:
            target.put_file(name, Path(temporary) / name)
    console.print(f"written: {target.uri} ({len(origins)} experts: {', '.join(origins)})", highlight=False)


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


def main() -> None:
    """The entry point: errors of the user's making are one line and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except BamError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True, style="red")
        sys.exit(1)

"""Models: upcycling and its relatives on bare Hugging Face folders, a path or s3://, without a cluster or a run.

torch is imported inside the commands, so that the others start at once.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from bam_ray.cli.app import Endpoint, WeakStore, app, console, target
from bam_ray.errors import BamError, SettingsError
from bam_ray.settings import MixtureSettings, StoreSettings, apply_override, mixture_settings

if TYPE_CHECKING:
    from bam_ray.checkpoint.tensors import TensorReader
    from bam_ray.toolbox.folders import Changed, Flight
    from bam_ray.upcycling import Change
    from bam_ray.upcycling import Progress as Told

Out = Annotated[str, typer.Option(help="where the result goes: a path or s3://, nothing may lie there")]
Mixture = Annotated[str, typer.Argument(help="the mixture's folder: a path or s3://")]
Branch = Annotated[str, typer.Option(help="NAME=URI of the branch that comes")]
Expert = Annotated[str, typer.Option(help="the name of the expert that goes")]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="NAME=SOURCE, text of a domain: files, a URI, or package:NAME; NAME is the expert's"),
]
Sequences = Annotated[int, typer.Option(help="sequences taken of each text", min=2)]
Length = Annotated[int, typer.Option(help="tokens of a sequence", min=2)]
Weight = Annotated[
    float | None,
    typer.Option(
        help="the branch's weight in what experts share (default: 1/n; 0 leaves it as it is)", min=0.0, max=1.0
    ),
]


@app.command()
def upcycle(
    seed: Annotated[str, typer.Option(help="the seed's Hugging Face folder: a path or s3://")],
    out: Out = "",
    branch: Annotated[list[str] | None, typer.Option(help="NAME=URI, once a branch")] = None,
    method: Annotated[str, typer.Option(help="bam, btx, sparse or split")] = "bam",
    set: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the mixture's settings")] = None,
    text: Texts = None,
    length: Length = 256,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, measure drift, estimate; write nothing")] = False,
    endpoint: Endpoint = None,
    weak_store: WeakStore = False,
) -> None:
    """Turn a seed and branches into a mixture."""
    settings = _mixture_settings(method, set or [])
    origins = {"seed": seed, **_named(branch or [], "--branch", taken={"seed"})}
    if not out and not dry_run:
        raise SettingsError("say where the mixture goes with --out (or look first with --dry-run)")

    from bam_ray.toolbox.folders import make_mixture, open_model, preflight, texts_of
    from bam_ray.upcycling.routers.separation import separation_table

    sources = {name: open_model(uri, endpoint) for name, uri in origins.items()}
    texts = texts_of(_named(text or [], "--text"), sources["seed"], settings.text_sequences, length)
    if dry_run:
        _print_flight(preflight(sources, settings, texts))
        return
    with _bar("upcycling") as told:
        made = make_mixture(sources, settings, target(out, endpoint, weak_store), texts, told)
    if made.separation is not None:
        console.print(separation_table(made.separation))
    _print_written(out, list(made.experts))


@app.command()
def absorb(
    mixture: Mixture,
    branch: Branch,
    out: Out,
    text: Texts = None,
    average_weight: Weight = None,
    sequences: Sequences = 16,
    length: Length = 256,
    endpoint: Endpoint = None,
    weak_store: WeakStore = False,
) -> None:
    """Add a branch to a mixture, trained or not; its other experts stay as they are."""
    from bam_ray.toolbox.folders import open_model
    from bam_ray.upcycling import absorbed, mixture_config_of

    ((name, uri),) = _named([branch], "--branch").items()
    before = open_model(mixture, endpoint)
    what = absorbed(mixture_config_of(before), name)
    to = target(out, endpoint, weak_store)
    _change(before, what, open_model(uri, endpoint), to, text, average_weight, sequences, length)


@app.command()
def remove(
    mixture: Mixture,
    expert: Expert,
    out: Out,
    text: Texts = None,
    sequences: Sequences = 16,
    length: Length = 256,
    endpoint: Endpoint = None,
    weak_store: WeakStore = False,
) -> None:
    """Take an expert out of a mixture."""
    from bam_ray.toolbox.folders import open_model
    from bam_ray.upcycling import mixture_config_of, removed

    before = open_model(mixture, endpoint)
    what = removed(mixture_config_of(before), expert)
    _change(before, what, None, target(out, endpoint, weak_store), text, None, sequences, length)


@app.command()
def replace(
    mixture: Mixture,
    expert: Expert,
    branch: Branch,
    out: Out,
    text: Texts = None,
    average_weight: Weight = None,
    sequences: Sequences = 16,
    length: Length = 256,
    endpoint: Endpoint = None,
    weak_store: WeakStore = False,
) -> None:
    """Put a branch in the place of an expert; it takes over that expert's router rows."""
    from bam_ray.toolbox.folders import open_model
    from bam_ray.upcycling import mixture_config_of, replaced

    ((name, uri),) = _named([branch], "--branch").items()
    before = open_model(mixture, endpoint)
    what = replaced(mixture_config_of(before), expert, name)
    to = target(out, endpoint, weak_store)
    _change(before, what, open_model(uri, endpoint), to, text, average_weight, sequences, length)


@app.command()
def verify(
    mixture: Mixture,
    memory_gib: Annotated[float, typer.Option(help="memory for the layers that are compared at once", min=0.0)] = 4.0,
    endpoint: Endpoint = None,
) -> None:
    """Prove that a mixture is what it says: digests, lineage, and that its experts are the dense models they were."""
    from bam_ray.toolbox.folders import open_model
    from bam_ray.upcycling import verify as receipts_of

    with console.status("reading") as status:
        receipts = receipts_of(open_model(mixture, endpoint), int(memory_gib * (1 << 30)), status.update)
    table = Table(title=f"Receipts of {mixture}", title_justify="left")
    for column in ("receipt", "", "largest error", "on"):
        table.add_column(column, overflow="fold")
    for receipt in receipts:
        passed = "[green]pass[/green]" if receipt.passed else "[bold red]FAIL[/bold red]"
        table.add_row(receipt.name, passed, "" if receipt.error is None else f"{receipt.error:.1e}", receipt.detail)
    console.print(table)
    failed = [receipt.name for receipt in receipts if not receipt.passed]
    if failed:
        raise BamError(f"{mixture} is not what it says: {', '.join(failed)} failed")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="a model folder: a path or s3://")], endpoint: Endpoint = None
) -> None:
    """Show what a model folder holds: family, shapes, parameters, experts, lineage."""
    from bam_ray.toolbox.folders import open_model
    from bam_ray.upcycling.inspect import inspect as facts_of

    facts = facts_of(open_model(model, endpoint))
    total, active = facts.parameters
    table = Table(box=None, show_header=False, pad_edge=False, title=facts.uri, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("architecture", facts.architecture)
    table.add_row("parameters", f"{total:,}" + (f", of which a token meets {active:,}" if active != total else ""))
    table.add_row("weights", f"{decimal(facts.bytes)} in {len(facts.files)} files")
    for key, value in (facts.sizes | facts.mixture).items():
        if value is not None:
            table.add_row(key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    for number, step in enumerate(facts.history, start=1):
        verb, what = next(iter(step.items()))
        table.add_row(f"lineage {number}", f"{verb} of {step.get('of')} with {what}")
    console.print(table)


@app.command()
def export(
    mixture: Mixture,
    out: Out,
    format: Annotated[str, typer.Option(help="mixtral")] = "mixtral",
    endpoint: Endpoint = None,
    weak_store: WeakStore = False,
) -> None:
    """Write a mixture in another architecture's form, for runtimes that know only that."""
    if format != "mixtral":
        raise SettingsError(f"--format {format!r} is not known: use mixtral")
    from bam_ray.toolbox.folders import export as export_to
    from bam_ray.toolbox.folders import open_model

    with _bar("exporting") as told:
        export_to(open_model(mixture, endpoint), target(out, endpoint, weak_store), told)
    console.print(f"written: {out} (MixtralForCausalLM)", highlight=False)


def _change(
    mixture: "TensorReader",
    what: "Change",
    branch: "TensorReader | None",
    out: StoreSettings,
    text: list[str] | None,
    average_weight: float | None,
    sequences: int,
    length: int,
) -> None:
    from bam_ray.toolbox.folders import change_mixture, texts_of

    texts = texts_of(_named(text or [], "--text"), mixture, sequences, length)
    with _bar(what.verb) as told:
        changed = change_mixture(mixture, what, branch, out, average_weight, texts, told)
    _print_changed(changed)
    _print_written(out.uri, list(what.names))


def _mixture_settings(method: str, overrides: list[str]) -> MixtureSettings:
    plain: dict[str, object] = {"method": method}
    for each in overrides:
        if "=" not in each:
            raise SettingsError(f"--set {each!r} is not KEY=VALUE")
        apply_override(plain, each)
    return mixture_settings(plain)


def _named(pairs: list[str], option: str, taken: frozenset[str] | set[str] = frozenset()) -> dict[str, str]:
    """NAME=VALUE pairs, each with a name of its own."""
    named: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name or not value or name in named or name in taken:
            raise SettingsError(f"{option} {pair!r} is not NAME=VALUE with a name of its own")
        named[name] = value
    return named


@contextmanager
def _bar(what: str) -> Iterator["Told"]:
    """A progress bar with bytes, speed and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as bar:
        job = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(job, completed=done, total=total)


def _print_flight(flight: "Flight") -> None:
    table = Table(title="Drift from the seed, relative", title_justify="left")
    table.add_column("layer")
    for name in flight.drifts:
        table.add_column(name, justify="right")
    layers = next(iter(flight.drifts.values())).by_layer if flight.drifts else {}
    for layer in layers:
        cells = (f"{drift.by_layer[layer]:.4f}" for drift in flight.drifts.values())
        table.add_row("embeddings, head" if layer is None else str(layer), *cells)
    if flight.drifts:
        console.print(table)
    estimate = flight.estimate
    read = sum(drift.bytes for drift in flight.drifts.values())
    seconds = sum(drift.seconds for drift in flight.drifts.values())
    time = (
        f", about {(estimate.read + estimate.written) * seconds / read:.0f} s at the speed of this check"
        if read
        else ""
    )
    console.print(
        f"reads {decimal(estimate.read)}, writes {decimal(estimate.written)}, "
        f"holds {decimal(estimate.memory)} of whole tensors{time}; all checks passed, nothing written",
        highlight=False,
        soft_wrap=True,
    )


def _print_changed(changed: "Changed") -> None:
    if not changed.before:
        console.print("no --text was given: nothing was evaluated", highlight=False)
        return
    table = Table(title="Perplexity before and after", title_justify="left")
    for column in ("text", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, before in changed.before.items():
        after = changed.after[name]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}")
    console.print(table)


def _print_written(out: str, experts: list[str] | None) -> None:
    names = experts or []
    console.print(f"written: {out} ({len(names)} experts: {', '.join(names)})", highlight=False)

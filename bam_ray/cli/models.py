"""Commands that create, check and convert mixtures in bare Hugging Face folders, without a cluster or a run.

The commands import torch in their bodies, so that all other commands start without delay.
"""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from bam_ray.cli.app import app
from bam_ray.cli.console import console, print_mixture_written, progress_bar
from bam_ray.cli.options import (
    EndpointOption,
    MixtureArgument,
    OutputOption,
    StoreOptions,
    TextOptions,
    UpcycleOptions,
    named_values,
    with_shared_options,
)
from bam_ray.errors import BamError, SettingsError
from bam_ray.units import GIB, format_duration

if TYPE_CHECKING:
    from bam_ray.toolbox.folders import PreflightReport


@app.command()
@with_shared_options
def upcycle(
    *,
    seed: Annotated[str, typer.Option(help="The Hugging Face folder of the seed: a path or an s3:// URI.")],
    branch: Annotated[list[str] | None, typer.Option(help="NAME=URI of a branch, once per branch.")] = None,
    out: OutputOption = "",
    mixture: UpcycleOptions,
    texts: TextOptions,
    store: StoreOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs, measure drift and estimate the cost. Write nothing.")
    ] = False,
) -> None:
    """Create a mixture from a seed and branches."""
    settings = mixture.settings()
    uris = {"seed": seed, **named_values(branch or [], "--branch", reserved={"seed"})}
    if not out and not dry_run:
        raise SettingsError("no output folder is given: pass --out, or pass --dry-run to check the inputs only")

    from bam_ray.toolbox.folders import make_mixture, open_model, preflight
    from bam_ray.upcycling.routers.separation import separation_table

    sources = {name: open_model(uri, store.endpoint) for name, uri in uris.items()}
    text = texts.domain_text(sources["seed"], settings)
    if dry_run:
        _print_preflight(preflight(sources, settings, text))
        return
    with progress_bar("upcycling") as progress:
        upcycled = make_mixture(sources, settings, store.target(out), text, progress)
    if upcycled.separation is not None:
        console.print(separation_table(upcycled.separation))
    print_mixture_written(out, list(upcycled.experts))


@app.command()
def verify(
    mixture: MixtureArgument,
    memory_gib: Annotated[float, typer.Option(help="Memory for the layers that are compared, in GiB.", min=0.0)] = 4.0,
    endpoint: EndpointOption = None,
) -> None:
    """Verify a mixture: its digests, its lineage, and that its experts equal the dense models they were made from."""
    from bam_ray.toolbox.folders import open_model
    from bam_ray.upcycling import verify as verify_mixture

    with console.status("reading") as status:
        receipts = verify_mixture(
            open_model(mixture, endpoint), int(memory_gib * GIB), lambda text: status.update(Text(text))
        )
    table = Table(title=f"Verification of {mixture}", title_justify="left")
    for column in ("check", "result", "largest error", "details"):
        table.add_column(column, overflow="fold")
    for receipt in receipts:
        result = Text("pass", "green") if receipt.passed else Text("FAIL", "bold red")
        table.add_row(receipt.name, result, "" if receipt.error is None else f"{receipt.error:.1e}", receipt.detail)
    console.print(table)
    failed = [receipt.name for receipt in receipts if not receipt.passed]
    if failed:
        raise BamError(
            f"{mixture} did not pass verification ({', '.join(failed)} failed): restore an intact copy or create the "
            "mixture again"
        )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="The folder of a model: a path or an s3:// URI.")],
    endpoint: EndpointOption = None,
) -> None:
    """Show the contents of a model folder: family, shapes, parameters, experts and lineage."""
    from bam_ray.toolbox.folders import open_model
    from bam_ray.upcycling.inspect import inspect as inspect_model

    facts = inspect_model(open_model(model, endpoint))
    total, active = facts.parameters
    table = Table(box=None, show_header=False, pad_edge=False, title=facts.uri, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("architecture", facts.architecture)
    table.add_row("parameters", f"{total:,}" + (f" ({active:,} active per token)" if active != total else ""))
    table.add_row("weights", f"{decimal(facts.bytes)} in {len(facts.files)} files")
    for key, value in (facts.sizes | facts.mixture).items():
        if value is not None:
            table.add_row(key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    for number, step in enumerate(facts.history, start=1):
        verb, experts = next(iter(step.items()))
        table.add_row(f"lineage {number}", f"{verb} of {step.get('of')} with {experts}")
    console.print(table)


@app.command()
@with_shared_options
def export(
    mixture: MixtureArgument,
    out: OutputOption,
    store: StoreOptions,
    format: Annotated[str, typer.Option(help="The target architecture: mixtral.")] = "mixtral",
) -> None:
    """Convert a mixture to another architecture, for runtimes that do not support this one."""
    if format != "mixtral":
        raise SettingsError(f"--format {format!r} is not supported: use mixtral")
    from bam_ray.toolbox.folders import export as export_mixture
    from bam_ray.toolbox.folders import open_model

    with progress_bar("exporting") as progress:
        export_mixture(open_model(mixture, store.endpoint), store.target(out), progress)
    console.print(f"written: {out} (MixtralForCausalLM)", soft_wrap=True)


def _print_preflight(flight: "PreflightReport") -> None:
    """Print the drift of each branch by layer, and the estimated cost of the upcycling."""
    if flight.drifts:
        table = Table(title="Relative drift from the seed", title_justify="left")
        table.add_column("layer")
        for name in flight.drifts:
            table.add_column(name, justify="right")
        for layer in next(iter(flight.drifts.values())).by_layer:
            cells = (f"{drift.by_layer[layer]:.4f}" for drift in flight.drifts.values())
            table.add_row("embeddings, head" if layer is None else str(layer), *cells)
        console.print(table)
    estimate = flight.estimate
    checked_bytes = sum(drift.bytes for drift in flight.drifts.values())
    checked_seconds = sum(drift.seconds for drift in flight.drifts.values())
    duration = ""
    if checked_bytes:
        seconds = (estimate.read + estimate.written) * checked_seconds / checked_bytes
        duration = f" It takes about {format_duration(seconds)} at the speed of this check."
    console.print(
        f"All checks passed. The upcycling reads {decimal(estimate.read)}, writes {decimal(estimate.written)} and "
        f"holds {decimal(estimate.memory)} of tensors in memory.{duration} Dry run: nothing was written.",
        soft_wrap=True,
    )

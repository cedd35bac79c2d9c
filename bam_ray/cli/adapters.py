"""Commands for the adapters of a run: list, export, import and remove them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from bam_ray.blobs import open_store
from bam_ray.cli.app import app
from bam_ray.cli.console import console
from bam_ray.errors import SettingsError
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import Name, load_recipe

if TYPE_CHECKING:
    from bam_ray.adapters.run_adapters import RunAdapters

adapters_app = typer.Typer(no_args_is_help=True, help="List, export, import and remove the adapters of a run.")
app.add_typer(adapters_app, name="adapters")

RecipeOfRun = Annotated[Path, typer.Argument(metavar="RECIPE", help="The path of the recipe of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting that overrides that of the recipe; can be repeated."),
]
AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="The name of the adapter, such as topic-0003.")]


@adapters_app.command("list")
def list_adapters(recipe: RecipeOfRun, overrides: Overrides = None) -> None:
    """List the adapters that were trained so far, and those that were imported."""
    found = _adapters(recipe, overrides)
    table = Table()
    for column in ("adapter", "rank", "tokens", "first loss", "last loss", "from"):
        table.add_column(column, justify="left" if column in ("adapter", "from") else "right")
    for name, adapter in found.found.items():
        losses = [
            f"{adapter.entry.losses[key]:.3f}" if key in adapter.entry.losses else "" for key in ("first", "last")
        ]
        tokens = str(adapter.entry.tokens or "")
        origin = adapter.origin or str(adapter.index.manifest.name)
        table.add_row(name, str(adapter.index.file.rank), tokens, *losses, origin)
    console.print(table if found.found else "no adapters yet: run jobs/adapters.py, or import some", soft_wrap=True)
    for name, damaged in found.damaged.items():
        line = f"{name} is not available: {damaged.reason}; `bam adapters remove` deletes it"
        console.print(Text(line, "yellow"), soft_wrap=True)


@adapters_app.command("export")
def export_adapter(
    recipe: RecipeOfRun,
    out: Annotated[Path, typer.Option(help="The folder to write to. It must not exist, or must be empty.")],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The name of the adapter. Default: all, in a folder each.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write one adapter as a folder of peft, which PeftModel.from_pretrained loads, or all adapters."""
    adapters = _adapters(recipe, overrides)
    if name is None:
        adapters.export_all(out)
    else:
        adapters.export(name, out)
    console.print(f"written: {out}", soft_wrap=True)


@adapters_app.command("import")
def import_adapter(
    recipe: RecipeOfRun,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of peft with the adapter.")],
    name: Annotated[str, typer.Option(help="The name of the adapter in this run.")],
    overrides: Overrides = None,
) -> None:
    """Import a LoRA adapter of the run's seed from a folder of peft, after checking that it can be served."""
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise SettingsError(f"{name!r} is no name of an adapter: use small letters, digits, - and _") from None
    manifest = _adapters(recipe, overrides).add(name, folder)
    console.print(f"imported: {name} as {manifest.kind}/{manifest.id}", soft_wrap=True)


@adapters_app.command("remove")
def remove_adapter(recipe: RecipeOfRun, name: AdapterName, overrides: Overrides = None) -> None:
    """Remove an adapter from the run. An imported adapter is deleted; the files of a trained one stay in the store."""
    _adapters(recipe, overrides).remove(name)
    console.print(f"removed: {name}", soft_wrap=True)


def _adapters(recipe: Path, overrides: list[str] | None) -> "RunAdapters":
    from bam_ray.adapters.run_adapters import RunAdapters

    settings = load_recipe(recipe, overrides)
    return RunAdapters(PipelineRun.of(settings, open_store(settings.store.uri, settings.store.endpoint)))

"""What all commands share: the application, the console, and how errors end."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from bam_ray.errors import BamError
from bam_ray.settings import StoreSettings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Mixtures of experts from one pretrained language model. "
    "Every command that works on a recipe takes overrides: key.subkey=value.",
)
console = Console()

Endpoint = Annotated[str | None, typer.Option(help="URL of an S3 server other than AWS (default: AWS_ENDPOINT_URL)")]

WeakStore = Annotated[
    bool,
    typer.Option("--weak-store", help="write to an S3 server that has no conditional puts too, as store.promise=weak"),
]


def target(out: str, endpoint: str | None, weak_store: bool) -> StoreSettings:
    """Where a command writes to."""
    return StoreSettings(uri=out, endpoint=endpoint, promise="weak" if weak_store else "strict")


def main() -> None:
    """The entry point: errors of the user's making are one line and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except BamError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True, style="red")
        sys.exit(1)

"""The Typer application, and the entry point that turns errors into one line."""

import os
import sys

import typer
from rich.console import Console

from bam_ray.errors import BamError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a pretrained language model into a mixture of experts. "
    "Commands that take a recipe also take overrides of its settings, in the form key.subkey=value.",
)


def main() -> None:
    """Run the command line. A `BamError` is printed as one line, and the exit code is 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except BamError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True, style="red")
        sys.exit(1)

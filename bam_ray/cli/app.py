"""The Typer application, and the entry point that turns errors into one line."""

import os
import sys

import typer

from bam_ray.errors import BamError, one_line
from bam_ray.terminal import terminal_console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a pretrained language model into a mixture of experts. "
    "Commands that take a recipe also take overrides of its settings, in the form key.subkey=value.",
)


def main() -> None:
    """Run the command line. An error of a user, a file or a server is printed as one line, and the exit code is 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except (BamError, OSError) as error:
        message = f"error: {one_line(error, all_lines=True)}"
        terminal_console(stderr=True).print(message, soft_wrap=True, style="red")
        sys.exit(1)

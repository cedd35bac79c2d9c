"""The console of all commands, with a progress bar for commands that read and write models."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bam_ray.terminal import terminal_console

console = terminal_console()


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar with bytes, speed and remaining time.

    Yields an `upcycling.ProgressCallback`. While routers are fitted, the description names the layer.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(description, total=None)

        def update(done: int, total: int, phase: str) -> None:
            if phase == "writing":
                bar.update(task, completed=done, total=total)
            else:
                bar.update(task, description=f"{phase}: {done} of {total} layers")

        yield update


def print_mixture_written(out: str, experts: Sequence[str] | None) -> None:
    """Print where a mixture was written, and its experts. A model soup has none."""
    content = f"{len(experts)} experts: {', '.join(experts)}" if experts else "a dense model"
    console.print(f"written: {out} ({content})", soft_wrap=True)

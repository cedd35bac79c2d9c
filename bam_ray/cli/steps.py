"""Training checkpoints of a run."""

from typing import Annotated

import typer

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.cli.app import Endpoint, WeakStore, app, console, target
from bam_ray.errors import SettingsError

TRAINED = tuple(kind for kind in ArtifactKind if kind.trains)


@app.command()
def export_step(
    run: Annotated[str, typer.Argument(help="where the run lies: its recipe's store.uri")],
    what: Annotated[str, typer.Argument(metavar="KIND/NAME", help="seeds/seed, branches/DOMAIN or mixtures/NAME")],
    out: Annotated[str, typer.Option(help="where the folder is to lie: a path or s3://, nothing there yet")],
    step: Annotated[int | None, typer.Option(help="of which step (default: the newest checkpoint)")] = None,
    endpoint: Endpoint = None,
    weak_store: WeakStore = False,
) -> None:
    """Copy a training checkpoint out of a run, as a Hugging Face folder with its tokenizer; loads no model."""
    kind, _, name = what.partition("/")
    if kind not in TRAINED or not name:
        raise SettingsError(f"{what!r} is not KIND/NAME with a kind of {', '.join(TRAINED)}")
    from bam_ray.toolbox.step_export import export_step as export_to

    to = target(out, endpoint, weak_store)
    made = export_to(open_store(run, endpoint), ArtifactKind(kind), name, to, step)
    console.print(f"written: {out} ({what} at step {made.step}, attempt {made.attempt})", highlight=False)

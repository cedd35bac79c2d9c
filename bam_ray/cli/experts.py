"""Commands that add, remove and replace experts of a mixture in a bare Hugging Face folder."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bam_ray.cli.app import app
from bam_ray.cli.console import console, print_mixture_written, progress_bar
from bam_ray.cli.options import (
    EvaluationOptions,
    MixtureArgument,
    OutputOption,
    StoreOptions,
    named_values,
    with_shared_options,
)

if TYPE_CHECKING:
    from bam_ray.model import BamConfig
    from bam_ray.toolbox.folders import EditedMixture
    from bam_ray.upcycling import ExpertEdit

BranchOption = Annotated[str, typer.Option(help="NAME=URI of the branch to add.")]
ExpertOption = Annotated[str, typer.Option(help="The name of the expert to remove.")]
WeightOption = Annotated[
    float | None,
    typer.Option(
        help="The weight of the branch in the parameters that all experts share. "
        "The default is 1/n. With 0 these parameters do not change.",
        min=0.0,
        max=1.0,
    ),
]


@app.command()
@with_shared_options
def absorb(
    mixture: MixtureArgument,
    branch: BranchOption,
    out: OutputOption,
    evaluation: EvaluationOptions,
    store: StoreOptions,
    average_weight: WeightOption = None,
) -> None:
    """Add a branch to a mixture as a new expert. The existing experts do not change.

    If the mixture has a router prior, pass text of the branch: --text NAME=SOURCE with the name of the branch.
    """
    from bam_ray.upcycling import add_expert

    ((name, uri),) = named_values([branch], "--branch").items()
    _edit(mixture, lambda config: add_expert(config, name), uri, out, evaluation, store, average_weight)


@app.command()
@with_shared_options
def remove(
    mixture: MixtureArgument,
    expert: ExpertOption,
    out: OutputOption,
    evaluation: EvaluationOptions,
    store: StoreOptions,
) -> None:
    """Remove an expert from a mixture."""
    from bam_ray.upcycling import remove_expert

    _edit(mixture, lambda config: remove_expert(config, expert), None, out, evaluation, store, None)


@app.command()
@with_shared_options
def replace(
    mixture: MixtureArgument,
    expert: ExpertOption,
    branch: BranchOption,
    out: OutputOption,
    evaluation: EvaluationOptions,
    store: StoreOptions,
    average_weight: WeightOption = None,
) -> None:
    """Replace an expert of a mixture by a branch, which takes over the router rows of the expert.

    If the mixture has a router prior, pass text of the branch: --text NAME=SOURCE with the name of the branch.
    """
    from bam_ray.upcycling import replace_expert

    ((name, uri),) = named_values([branch], "--branch").items()
    _edit(mixture, lambda config: replace_expert(config, expert, name), uri, out, evaluation, store, average_weight)


def _edit(
    mixture: str,
    make_change: "Callable[[BamConfig], ExpertEdit]",
    branch: str | None,
    out: str,
    evaluation: EvaluationOptions,
    store: StoreOptions,
    average_weight: float | None,
) -> None:
    """Write a changed copy of a mixture to `out`, and print its perplexity before and after.

    `branch` is the URI of the branch that the change adds, if it adds one.
    """
    from bam_ray.toolbox.folders import change_mixture, open_model
    from bam_ray.upcycling import EditOptions, mixture_config_of

    reader = open_model(mixture, store.endpoint)
    change = make_change(mixture_config_of(reader))
    source = None if branch is None else open_model(branch, store.endpoint)
    rows = evaluation.token_rows(reader, evaluation.sequences)
    options = EditOptions(average_weight=average_weight, counts=evaluation.counts_of_branch(reader, change))
    with progress_bar(change.verb) as progress:
        changed = change_mixture(reader, change, source, store.target(out), options, rows, progress)
    _print_changed(changed)
    print_mixture_written(out, change.names)


def _print_changed(changed: "EditedMixture") -> None:
    """Print the perplexity of a mixture before and after a change."""
    if not changed.before:
        console.print("perplexity was not evaluated: pass --text to evaluate it", soft_wrap=True)
        return
    table = Table(title="Perplexity before and after", title_justify="left")
    for column in ("text", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, before in changed.before.items():
        after = changed.after[name]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}")
    console.print(table)

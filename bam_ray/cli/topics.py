"""The command that finds the topics of bare text."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bam_ray.cli.app import app
from bam_ray.cli.console import console
from bam_ray.cli.options import with_shared_options
from bam_ray.errors import SettingsError
from bam_ray.settings import TopicsSettings, validated

if TYPE_CHECKING:
    from bam_ray.adapters.find_topics import FoundTopics

TOPICS_SHOWN = 40
TERMS_SHOWN = 5


@dataclass(frozen=True)
class TopicsOptions:
    """The options that determine the topics."""

    count: Annotated[str, typer.Option(help="The number of topics, or auto.")] = "auto"
    embedder: Annotated[str, typer.Option(help="minilm, seed or tfidf.")] = "minilm"
    prefix_tokens: Annotated[int, typer.Option(help="The tokens at the beginning of a text that are embedded.")] = 64
    prototypes: Annotated[int, typer.Option(help="The vectors of each topic.")] = 1
    min_documents: Annotated[int, typer.Option(help="The fewest training documents of a topic.")] = 10
    random_seed: Annotated[int, typer.Option(help="The random seed of the split and of the clustering.")] = 0

    def settings(self) -> TopicsSettings:
        """Return the settings of the topics. Raises `SettingsError` if one is not valid."""
        plain = {**vars(self), "count": int(self.count) if self.count.isdecimal() else self.count}
        return validated(TopicsSettings, plain, "topics")


@app.command()
@with_shared_options
def topics(
    text: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...", help="Sources of text: a path, a glob, a URI or package:NAME, or NAME=SOURCE."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write to. It must not exist, or must be empty.")],
    options: TopicsOptions,
    seed: Annotated[Path | None, typer.Option(help="The model folder of the seed, for --embedder seed.")] = None,
    max_documents: Annotated[
        int | None, typer.Option(help="Read at most so many documents of each text.", min=2)
    ] = None,
) -> None:
    """Find the topics of text, and write them with a page that shows them. A tenth of each text is held out.

    The names of the texts are used only to check the topics: how often a topic has the text of one name.
    """
    settings = options.settings()
    if (settings.embedder == "seed") != (seed is not None):
        raise SettingsError(
            "the embedder seed needs a model, and only this one does: pass --embedder seed --seed FOLDER"
        )
    sources = _named_sources(text)
    from bam_ray.toolbox.topics import topics_of_text

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("topics", total=None)
        found = topics_of_text(
            sources,
            settings,
            out,
            lambda done, total, note: bar.update(task, completed=done, total=total, description=note),
            seed,
            max_documents,
        )
    _print_topics(found)
    console.print(f"written: {out} ({len(found.topics)} topics; open topics.html)", soft_wrap=True)


def _named_sources(texts: list[str]) -> dict[str, str]:
    """Return sources by their names: those that are given, or those of their files, folders or packages."""
    sources: dict[str, str] = {}
    for text in texts:
        named = re.fullmatch(r"([\w-]+)=(.+)", text)
        path = PurePosixPath(text.removeprefix("package:"))
        stem = (path.parent if "*" in path.name else path).name.partition(".")[0]
        name, source = named.groups() if named else (stem, text)
        if not name or name in sources:
            raise SettingsError(f"{text!r} needs a name that no other text has: pass NAME={source}")
        sources[name] = source
    return sources


def _print_topics(found: "FoundTopics") -> None:
    """Print the largest topics, and their agreement with the names of the texts."""
    quality = found.quality
    table = Table(title="Topics", title_justify="left")
    table.add_column("topic", no_wrap=True)
    table.add_column("documents", justify="right")
    table.add_column("words", justify="right")
    if quality.metrics:
        table.add_column("main text")
    table.add_column("terms")
    for index, topic in enumerate(found.topics.topics[:TOPICS_SHOWN]):
        name, share = quality.main_domain(index)
        main = [f"{name} ({share:.0%})"] if quality.metrics else []
        terms = ", ".join(topic.terms[:TERMS_SHOWN])
        table.add_row(topic.name, f"{topic.documents:,}", f"{topic.tokens:,}", *main, terms)
    console.print(table)
    if len(found.topics) > TOPICS_SHOWN:
        console.print(f"{len(found.topics) - TOPICS_SHOWN} smaller topics are in topics.json")
    if quality.metrics:
        console.print(
            f"purity {quality.purity:.1%}, held-out accuracy {quality.held_out_accuracy:.1%}, adjusted mutual "
            f"information {quality.mutual_information:.2f}",
            soft_wrap=True,
        )

"""Shared options are one option per field of a dataclass."""

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from bam_ray.cli.options import with_shared_options


@dataclass(frozen=True)
class Base:
    count: Annotated[int, typer.Option(help="The count.")] = 3


@dataclass(frozen=True)
class Derived(Base):
    names: Annotated[list[str] | None, typer.Option()] = None
    strict: Annotated[bool, typer.Option("--strict")] = False


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()

    @app.command()
    @with_shared_options
    def command(
        target: Annotated[str, typer.Argument()], group: Derived, out: Annotated[str, typer.Option()] = "x"
    ) -> None:
        """Do something."""
        typer.echo(f"{target} {out} {group}")

    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_fields_of_a_dataclass_become_options_with_their_defaults() -> None:
    assert run("a") == (0, "a x Derived(count=3, names=None, strict=False)\n")
    assert run("a", "--count=4", "--names=b", "--names=c", "--strict", "--out=y") == (
        0,
        "a y Derived(count=4, names=['b', 'c'], strict=True)\n",
    )


def test_the_help_shows_the_command_and_the_options_of_the_dataclass() -> None:
    code, text = run("--help")
    assert code == 0
    for shown in ("Do something.", "--count", "The count.", "--strict", "--out"):
        assert shown in text


def test_a_required_argument_stays_required() -> None:
    assert run()[0] == 2

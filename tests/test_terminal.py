"""Text of users, files and servers is printed as it is, without markup and control codes."""

import ast
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bam_ray.errors import DataError, one_line, printable
from bam_ray.terminal import terminal_console

HOSTILE = [
    "[/usr/bin] is no markup",
    "[bold]kept[/bold]",
    ":smile: [link=http://x]y[/link]",
    "red \x1b[31mtext\x1b]8;;http://x\x1b\\link\x07",
    "\x9b2J\x08\x08",
    "right \u202eto left",
    "half \udcff pair",
]


def table(text: str) -> RenderableType:
    grid = Table(text, title=text, caption=text)
    grid.add_row(text)
    return grid


def printed(show: Callable[[Console], None]) -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    show(terminal_console(file=out, width=300))
    out.flush()
    out.seek(0)
    return out.read()


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("make", [str, Text, table], ids=["string", "text", "table"])
def test_text_is_printed_without_markup_and_control_codes(text: str, make: Callable[[str], RenderableType]) -> None:
    out = printed(lambda console: console.print(make(text)))
    assert printable(text) in out
    assert not set(out) & set("\x1b\x07\x08\x9b\u202e")


def test_styles_and_cursor_codes_of_rich_are_kept() -> None:
    out = io.StringIO()
    console = terminal_console(file=out, force_terminal=True, color_system="standard", width=80)
    console.print(Text("a\x1b[5mb", "bold"))
    assert out.getvalue() == "\x1b[1ma[5mb\x1b[0m\n"
    with Live("one", console=console, auto_refresh=False) as live:
        live.update("two", refresh=True)
    assert "\x1b[?25l" in out.getvalue()  # the cursor is hidden


@given(st.text(st.characters()) | st.sampled_from(HOSTILE))
def test_any_error_becomes_one_printable_line(text: str) -> None:
    for line in (one_line(DataError(text)), one_line(ValueError(text), all_lines=True)):
        assert line == printable(line)
        assert len(line.splitlines()) <= 1
        line.encode()


def test_consoles_are_made_in_one_place() -> None:
    root = Path(__file__).parents[1]
    found = [
        str(path.relative_to(root))
        for folder in ("bam_ray", "jobs")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Console", "print")
        if path.name != "terminal.py" and "file=sys.stderr" not in ast.unparse(node)
    ]
    assert found == ["bam_ray/cli/recipes.py"]  # the JSON schema

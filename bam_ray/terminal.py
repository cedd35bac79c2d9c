"""Output for people: text of files, users, servers and exceptions is shown as it is and cannot control the terminal.

Problem: rich reads `[bold]` and `[/usr/bin]` in a string as markup. The first changes the text and the second is an
error. Terminals obey escape sequences, so a name in a shared store could rewrite the screen of whoever looks at it.

Design choice: all output goes through `terminal_console`. It treats no string as markup (styles are set by
`rich.text.Text`), and it removes control characters at the last moment, whatever the string went through before.
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from bam_ray.errors import printable


def terminal_console(**options: Any) -> Console:
    """Return a console for standard output, or with the `options` of `rich.console.Console`."""
    return _TerminalConsole(markup=False, emoji=False, highlight=False, **options)


def warn(text: str) -> None:
    """Print a warning, on one line of any length."""
    terminal_console().print(text, style="yellow", soft_wrap=True)


class _TerminalConsole(Console):
    """A console that removes control characters from all text. Its own control codes are kept."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object to segments."""
        for segment in super().render(renderable, options):
            text = printable(segment.text)
            yield segment if segment.control or text == segment.text else Segment(text, segment.style)

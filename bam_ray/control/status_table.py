"""A status as one table, for a terminal and for the log of a job."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.status import Row, Status

COLORS = {
    "running": "cyan",
    "draining": "yellow",
    "retrying": "yellow",
    "committed": "green",
    "failed": "bold red",
    "blocked": "red",
}
LOG_LINES = 8  # of a failed task, below the table; `status.json` has more
SILENCE = timedelta(seconds=30)  # a running coordinator writes every few seconds


def render(status: Status, now: datetime | None = None) -> RenderableType:
    """The table, with the errors of failed and retried tasks below it."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title_justify="left")
    for column, right in (
        ("stage", False),
        ("task", False),
        ("state", False),
        ("node", False),
        ("step", True),
        ("loss", True),
        ("tokens/s", True),
        ("ETA", True),
        ("checkpoint", True),
    ):
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for row in status.rows:
        table.add_row(
            row.kind,
            row.name,
            Text(row.state, style=COLORS.get(row.state, "dim")),
            row.node or "",
            f"{row.step}/{row.total_steps}" if row.total_steps else (str(row.step) if row.step else ""),
            "" if row.loss is None else f"{row.loss:.3f}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            duration(row.eta_seconds),
            "" if row.checkpoint_step is None else str(row.checkpoint_step),
        )
    said = [text for row in status.rows if (text := _said(row))]
    return Group(Text(headline(status, now), style="bold"), table, *said)


def headline(status: Status, now: datetime | None = None) -> str:
    """One line: the run, how it stands, and whether its coordinator has fallen silent."""
    committed = sum(row.state == "committed" for row in status.rows)
    line = f"{status.run}: {status.state}, {committed} of {len(status.rows)} committed"
    if status.state == "running" and status.eta_seconds is not None:
        line += f", {status.eta_kind} done in {duration(status.eta_seconds)}"
    silent = (now or datetime.now(UTC)) - status.updated
    if status.state == "running" and silent > SILENCE:
        line += f"; nothing heard for {duration(silent.total_seconds())}: submit it again to go on"
    return line


def render_history(status: Status) -> RenderableType:
    """Every attempt that is over, oldest first; of tasks that went well at once there is nothing to tell."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title="attempts", title_justify="left")
    for column in ("task", "node", "began", "lasted", "step", "ended by"):
        right = column in ("lasted", "step")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "ended by")
    told = [(past.began, row, past) for row in status.rows for past in row.past if len(row.past) > 1 or row.error]
    for began, row, past in sorted(told, key=lambda each: each[0]):
        when = began.astimezone().strftime("%d %b %H:%M:%S")
        task = f"{row.kind}/{row.name}"
        table.add_row(task, past.node or "", when, duration(past.seconds), str(past.step or ""), Text(past.cause))
    return table if told else Group()


def render_storage(stored: Mapping[ArtifactKind, int]) -> RenderableType:
    """Bytes by kind, in one line."""
    parts = [f"{kind} {amount(size)}B" for kind, size in stored.items()]
    return Text(f"stored: {', '.join(parts)}; {amount(sum(stored.values()))}B in all" if parts else "nothing is stored")


def duration(seconds: float | None) -> str:
    """`42s`, `3m 10s`, `2h 05m`, `4d 3h`."""
    if seconds is None:
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def amount(number: float) -> str:
    """`950`, `1.2k`, `34M`, `5.6G`: in thousands, three digits at most."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or unit == "P":
            break
        number /= 1000.0
    shown = f"{number:.3g}" if unit else f"{number:.0f}"
    return f"{shown}{unit}"


def _said(row: Row) -> Text | None:
    """What a task has to say for itself, below the table."""
    where = f"{row.kind}/{row.name}"
    if row.error:
        tail = "".join(f"\n    {line}" for line in row.log[-LOG_LINES:])
        return Text(f"{where}{f' on {row.node}' if row.node else ''}: {row.error}{tail}", "red")
    return Text(f"{where}: {row.note}", "dim") if row.note else None

"""A status as a table, for a terminal and for the log of a job."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.endpoint_record import EndpointRecord
from bam_ray.control.status import Status, TaskRow
from bam_ray.units import format_bytes, format_duration

COLORS = {
    "running": "cyan",
    "draining": "yellow",
    "retrying": "yellow",
    "committed": "green",
    "failed": "bold red",
    "blocked": "red",
}
LOG_LINES = 8  # log lines of a failed task that are shown below the table; `status.json` has more
MOST_ROWS = 200  # of the table; a larger run is summarized
TERMS_SHOWN = 5
SILENCE = timedelta(seconds=30)  # a running coordinator writes its status every few seconds


def render(status: Status, now: datetime | None = None) -> RenderableType:
    """Return the table, with the notes and errors of the tasks below it.

    In a run of more than `MOST_ROWS` tasks, those that have failed or that have an attempt come first, and the table
    ends with the numbers of the others.
    """
    rows, hidden = _rows_to_show(status)
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
    for row in rows:
        table.add_row(
            row.kind,
            row.name,
            Text(row.state, style=COLORS.get(row.state, "dim")),
            row.node or "",
            f"{row.step}/{row.total_steps}" if row.total_steps else (str(row.step) if row.step else ""),
            "" if row.loss is None else f"{row.loss:.3f}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            format_duration(row.eta_seconds),
            "" if row.checkpoint_step is None else str(row.checkpoint_step),
        )
    messages = [text for row in rows if (text := _message(row))]
    if hidden:
        counts = ", ".join(f"{count} {state}" for state, count in Counter(row.state for row in hidden).items())
        messages.insert(0, Text(f"and {counts}", "dim"))
    return Group(Text(headline(status, now), style="bold"), table, *messages)


def _rows_to_show(status: Status) -> tuple[Sequence[TaskRow], Sequence[TaskRow]]:
    """Return the rows of the table in the order of the tasks, and the rows that it leaves out."""
    by_interest = sorted(status.rows, key=lambda row: row.state in ("waiting", "committed", "blocked", "elsewhere"))
    shown = {row.id for row in by_interest[:MOST_ROWS]}
    return [row for row in status.rows if row.id in shown], by_interest[MOST_ROWS:]


def headline(status: Status, now: datetime | None = None) -> str:
    """Return one line with the state of the run, its ETA, and a warning if its coordinator has stopped writing."""
    committed = sum(row.state == "committed" for row in status.rows)
    line = f"{status.run}: {status.state}, {committed} of {len(status.rows)} committed"
    if status.state == "running" and status.eta_seconds is not None:
        line += f", {status.eta_kind} done in {format_duration(status.eta_seconds)}"
    silence = (now or datetime.now(UTC)) - status.updated
    if status.state == "running" and silence > SILENCE:
        line += (
            f"; no update for {format_duration(silence.total_seconds())} from its driver: if it was killed, for "
            "example because memory ran out, submit the run again to continue it"
        )
    return line


def render_history(status: Status) -> RenderableType:
    """Return a table of the finished attempts, oldest first, without tasks that succeeded in their first attempt."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title="attempts", title_justify="left")
    for column in ("task", "node", "started", "duration", "step", "cause of end"):
        right = column in ("duration", "step")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "cause of end")
    shown = [(past.began, row, past) for row in status.rows for past in row.past if len(row.past) > 1 or row.error]
    for began, row, past in sorted(shown, key=lambda each: each[0]):
        started = began.astimezone().strftime("%d %b %H:%M:%S") if began.year > 1 else ""  # the first year has no zone
        task, duration = f"{row.kind}/{row.name}", format_duration(past.seconds)
        table.add_row(task, past.node or "", started, duration, str(past.step or ""), Text(past.cause))
    return table if shown else Group()


def render_endpoints(endpoints: Sequence[EndpointRecord]) -> RenderableType:
    """Return one line for each endpoint: what it serves, since when, and why newer models are not served."""
    lines = []
    for each in endpoints:
        since = each.since.astimezone().strftime("%d %b %H:%M:%S")
        lines.append(Text(f"endpoint {each.name}: {' + '.join(each.served)} since {since} at {each.url}"))
        if each.note:
            lines.append(Text(f"endpoint {each.name}: {each.note}", "yellow"))
    return Group(*lines)


def render_domains(corpus_facts: Mapping[str, Any]) -> RenderableType:
    """Return one line for each domain of a corpus that was discovered: its terms, and the sources of its text.

    If there are several sources, one more line says how well the domains agree with them.
    """
    lines = []
    for name, facts in corpus_facts.get("domains", {}).items():
        if terms := facts.get("terms"):
            sources = ", ".join(f"{source} {share:.0%}" for source, share in facts["source"].items())
            lines.append(Text(f"{name}: {', '.join(terms[:TERMS_SHOWN])} ({sources})", "dim"))
    found = corpus_facts.get("discovered", {})
    if "purity" in found:
        information = found["adjusted_mutual_information"]
        line = (
            f"agreement with the sources: purity {found['purity']:.1%}, adjusted mutual information {information:.2f}"
        )
        lines.append(Text(line, "dim"))
    return Group(*lines)


def render_storage(stored: Mapping[ArtifactKind, int]) -> RenderableType:
    """Return one line with the stored bytes by kind."""
    parts = [f"{kind} {format_bytes(size)}" for kind, size in stored.items()]
    total = format_bytes(sum(stored.values()))
    return Text(f"stored: {', '.join(parts)}; {total} in total" if parts else "nothing is stored")


def _message(row: TaskRow) -> Text | None:
    """Return the error or the note of a task, for below the table."""
    task = f"{row.kind}/{row.name}"
    if row.error:
        log = "".join(f"\n    {line}" for line in row.log[-LOG_LINES:])
        return Text(f"{task}{f' on {row.node}' if row.node else ''}: {row.error}{log}", "red")
    return Text(f"{task}: {row.note}", "dim") if row.note else None

"""A plan as tables, for a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bam_ray.planning.planner import Plan, PlannedTask
from bam_ray.scheduling.nodes import GIB, describe_request
from bam_ray.units import format_amount, format_duration

NODES_SHOWN = 4  # of a task that moved often
WRAPPED = ("each needs", "where")  # between words
LEFT_OUT = ("each needs", "steps", "workers", "id", "stored", "tokens", "memory")  # one by one, where it is too narrow


def render_plan(plan: Plan, width: int) -> RenderableType:
    """What would be made, `width` characters wide; with a cluster, where and when too."""
    recipe = plan.recipe
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=f"{recipe.name} in {recipe.store.uri}")
    table.title_justify = "left"
    columns = ["stage", "task", "id", "steps", "tokens", "workers", "each needs", "memory", "stored"]
    if plan.cluster:
        columns = [*(column for column in columns if column != "id"), "where", "begins", "ends"]
    rows = [_cells(row) for row in plan.rows]
    for column in LEFT_OUT:
        if column in columns and sum(_least(name, rows) + 1 for name in columns) > width:
            columns.remove(column)
    for column in columns:
        right = column in ("steps", "tokens", "workers", "memory", "stored", "begins", "ends")
        table.add_column(
            column,
            justify="right" if right else "left",
            no_wrap=column not in WRAPPED,
            min_width=_least(column, rows) if column == "where" else None,
        )
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return Group(table, *(Text(line) for line in _words(plan)), *(Text(line, "red") for line in _warnings(plan)))


def _cells(row: PlannedTask) -> dict[str, str]:
    task = row.task
    needs = " or ".join(describe_request(demand) for demand in (task.needs, *task.needs.fallback))
    left_out = ", …" if len(row.nodes) > NODES_SHOWN else ""
    return {
        "stage": task.kind,
        "task": task.name,
        "id": task.id,
        "steps": str(task.total_steps or ""),
        "tokens": format_amount(row.tokens) if row.tokens else "",
        "workers": str(task.workers),
        "each needs": needs,
        "memory": f"{format_amount(row.memory)}B" if row.memory else "",
        "stored": f"{format_amount(row.kept)}B" if row.kept else "",
        "where": ", ".join(row.nodes[:NODES_SHOWN]) + left_out,
        "begins": format_duration(row.begins),
        "ends": format_duration(row.ends),
    }


def _least(column: str, rows: Sequence[Mapping[str, str]]) -> int:
    """The characters that a column needs, for no word of it to be cut."""
    cells = [column, *(row[column] for row in rows)]
    words = [word for cell in cells for word in cell.split()] if column in WRAPPED else cells
    return max(map(len, words))


def _words(plan: Plan) -> list[str]:
    """The sums."""
    lines = []
    when = plan.recipe.upcycle.when
    if when != "all":
        hours = f", {when.deadline_hours:g} hours after they can begin" if when.deadline_hours else ""
        branches = len(plan.recipe.branch.domains)
        lines.append(f"mixing starts with at least {when.at_least} of {branches} branches{hours}, and absorbs the rest")
    tokens = sum(row.tokens for row in plan.rows)
    if plan.size:
        written, kept, most = (
            sum(value or 0 for value in values)
            for values in zip(*((row.written, row.kept, row.most) for row in plan.rows), strict=True)
        )
        lines.append(
            f"{format_amount(plan.size.parameters)} parameters a branch, {format_amount(tokens)} tokens in all; "
            f"{format_amount(written)}B written to the blob store, {format_amount(most)}B there at most, "
            f"{format_amount(kept)}B in the end (corpora left out)"
        )
        lines.append("memory is an estimate of weights, gradients, AdamW and activations in fp32 or as the recipe says")
    else:
        lines.append(f"{format_amount(tokens)} tokens in all; the seed's size is not known before the run")
    if plan.cluster and plan.simulated:
        run = plan.simulated
        outcome = "not finished" if run.outcome == "running" else run.outcome
        nodes = sum(group.count for group in plan.cluster.nodes.values())
        lines.append(
            f"simulated on {plan.cluster.name} ({nodes} node{'' if nodes == 1 else 's'}): "
            f"{outcome} after {format_duration(run.seconds)}, {run.preemptions} preemptions, {run.moves} moves"
        )
        lines += [
            f"{stage.kind}: {format_duration(stage.seconds)}, at best {format_duration(stage.at_best)} "
            f"({stage.seconds / stage.at_best:.2f} ×)"
            for stage in plan.stages
        ]
    return lines


def _warnings(plan: Plan) -> list[str]:
    """What went wrong, and what looks too large for the nodes it ran on."""
    if not plan.cluster or not plan.simulated:
        return []
    lines = [f"{row.task.full_name}: {error}" for row in plan.rows if (error := plan.simulated.errors.get(row.task.id))]
    for kind, group in plan.cluster.nodes.items():
        there = group.device_memory_gib if group.gpus else group.memory_gib
        here = [row for row in plan.rows if any(node.startswith(f"{kind}-") for node in row.nodes)]
        large = [row.task.full_name for row in here if there and (row.memory or 0) > there * GIB]
        if large:
            what = "a GPU" if group.gpus else "a node"
            lines.append(f"{what} of {kind} has {there:g} GiB, too little for {', '.join(large)}: mend their needs")
    return lines

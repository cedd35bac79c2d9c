"""A plan as a table, followed by its totals and warnings, for a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bam_ray.planning.expert_groups import straddling_warnings
from bam_ray.planning.maturity import maturity_warning
from bam_ray.planning.planner import Plan, PlannedTask
from bam_ray.scheduling.nodes import describe_request
from bam_ray.units import GIB, format_amount, format_bytes, format_duration

NODES_SHOWN = 4  # of a task that moved often
WRAPPED = ("resources", "nodes")  # columns whose cells may be broken between words
RIGHT_ALIGNED = ("steps", "tokens", "workers", "memory", "stored", "start", "end")
DROPPED_FIRST = ("resources", "steps", "workers", "id", "stored", "tokens", "memory")
"""The columns that are left out one after another if the terminal is too narrow."""


def render_plan(plan: Plan, width: int) -> RenderableType:
    """Return the plan for a terminal of `width` characters; with a cluster it includes nodes and times."""
    recipe = plan.recipe
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=f"{recipe.name} in {recipe.store.uri}")
    table.title_justify = "left"
    columns = ["stage", "task", "id", "steps", "tokens", "workers", "resources", "memory", "stored"]
    if plan.cluster:
        columns = [*(column for column in columns if column != "id"), "nodes", "start", "end"]
    rows = [_cells(row) for row in plan.rows]
    for column in DROPPED_FIRST:
        if column in columns and sum(_least_width(name, rows) + 1 for name in columns) > width:
            columns.remove(column)
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in RIGHT_ALIGNED else "left",
            no_wrap=column not in WRAPPED,
            min_width=_least_width(column, rows) if column == "nodes" else None,
        )
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    warning = maturity_warning(recipe, plan.size)
    return Group(
        table,
        *(Text(line) for line in _totals(plan)),
        *([Text(warning, "yellow")] if warning else []),
        *(Text(line, "red") for line in _warnings(plan)),
    )


def _cells(row: PlannedTask) -> dict[str, str]:
    """Return the cells of a row by column."""
    task = row.task
    more = ", …" if len(row.nodes) > NODES_SHOWN else ""
    return {
        "stage": task.kind,
        "task": task.name,
        "id": task.id,
        "steps": str(task.total_steps or ""),
        "tokens": format_amount(row.tokens) if row.tokens else "",
        "workers": str(task.workers),
        "resources": " or ".join(describe_request(demand) for demand in (task.needs, *task.needs.fallback)),
        "memory": _memory_cell(row),
        "stored": format_bytes(row.final_bytes) if row.final_bytes else "",
        "nodes": ", ".join(row.nodes[:NODES_SHOWN]) + more,
        "start": format_duration(row.starts),
        "end": format_duration(row.ends),
    }


def _memory_cell(row: PlannedTask) -> str:
    """Return the memory of a worker: its node's, and with a GPU first that of the GPU."""
    if row.memory is None:
        return ""
    host = format_bytes(row.memory.host_bytes)
    return f"{format_bytes(row.memory.device_bytes)} + {host}" if row.memory.device_bytes else host


def _least_width(column: str, rows: Sequence[Mapping[str, str]]) -> int:
    """Return the number of characters that a column needs so that no word is cut."""
    cells = [column, *(row[column] for row in rows)]
    words = [word for cell in cells for word in cell.split()] if column in WRAPPED else cells
    return max(map(len, words))


def _totals(plan: Plan) -> list[str]:
    """Return the lines below the table: the quorum, the sums, and the outcome of the simulation."""
    lines = [*_quorum_line(plan)]
    tokens = format_amount(sum(row.tokens for row in plan.rows))
    if plan.size:
        written, final, peak = _stored_bytes(plan.rows)
        lines.append(
            f"{format_amount(plan.size.parameters)} parameters per branch, {tokens} tokens in total; without corpora, "
            f"{written} are written to the blob store, which holds at most {peak}, and {final} at the end"
        )
        lines.append(
            "resources and memory are per worker; memory is an estimate of the node's memory, after that of the GPU if "
            "there is one: weights, gradients, AdamW states, activations, and a copy of the state for checkpoints. The "
            "alternative of a request is for nodes that have no room for that copy"
        )
    else:
        lines.append(f"{tokens} tokens in total; the size of the seed is not known before the run")
    return lines + _comparison_line(plan) + _simulation_lines(plan)


def _stored_bytes(rows: Sequence[PlannedTask]) -> tuple[str, str, str]:
    """Return the sums of the bytes that are written, that are in the store at the end, and that it holds at most."""
    written, final, peak = (
        format_bytes(sum(value or 0 for value in values))
        for values in zip(*((row.written_bytes, row.final_bytes, row.peak_bytes) for row in rows), strict=True)
    )
    return written, final, peak


def _comparison_line(plan: Plan) -> list[str]:
    """Return a line about the cost of `bam compare`; empty without `compare` in the recipe."""
    if plan.recipe.compare is None:
        return []
    seeds = ", ".join(map(str, plan.recipe.compare.seeds))
    line = (
        f"the table is the run of one training seed; bam compare makes these models with the training seeds {seeds}: "
        f"{format_amount(sum(row.tokens for row in plan.compared))} tokens"
    )
    if not plan.size:
        return [line]
    written, final, _ = _stored_bytes(plan.compared)
    return [f"{line}, {written} are written to the blob store, which holds {final} at the end"]


def _quorum_line(plan: Plan) -> list[str]:
    """Return a line about the branches that mixing waits for; empty if it waits for all."""
    when, branches = plan.recipe.upcycle.when, len(plan.recipe.branch.domains)
    if when == "all":
        return []
    if not when.deadline_hours:
        return [f"mixing starts with at least {when.at_least} of {branches} branches, and absorbs the others later"]
    return [
        f"mixing starts with all {branches} branches, or {when.deadline_hours:g} hours after they can start with at "
        f"least {when.at_least} of them, and absorbs the others later"
    ]


def _simulation_lines(plan: Plan) -> list[str]:
    """Return the outcome of the simulation, and the duration of each stage next to its lower bound."""
    if not plan.cluster or not plan.simulated:
        return []
    run = plan.simulated
    outcome = "not finished" if run.outcome == "running" else run.outcome
    nodes = sum(group.count for group in plan.cluster.nodes.values())
    return [
        f"simulated on {plan.cluster.name} ({nodes} node{'' if nodes == 1 else 's'}): "
        f"{outcome} after {format_duration(run.seconds)}, {run.preemptions} preemptions, {run.moves} moves",
        *(
            f"{stage.kind}: {format_duration(stage.seconds)}, {stage.seconds / stage.least_seconds:.2f} × the lower "
            f"bound of {format_duration(stage.least_seconds)}"
            for stage in plan.stages
        ),
    ]


def _warnings(plan: Plan) -> list[str]:
    """Return the errors of the simulation, and the tasks for which the nodes look too small or badly connected."""
    if not plan.cluster or not plan.simulated:
        return []
    lines = [f"{row.task.full_name}: {error}" for row in plan.rows if (error := plan.simulated.errors.get(row.task.id))]
    lines += straddling_warnings([row.task for row in plan.rows], plan.recipe, plan.size, plan.cluster.nodes)
    for kind, group in plan.cluster.nodes.items():
        if group.device_memory_gib is None:  # the memory of nodes is requested, so a task never runs on too small a one
            continue
        available = group.device_memory_gib * GIB
        placed = [row for row in plan.rows if any(node.startswith(f"{kind}-") for node in row.nodes)]
        too_large = [row.task.full_name for row in placed if row.memory and (row.memory.device_bytes or 0) > available]
        if too_large:
            lines.append(
                f"a GPU of {kind} has {group.device_memory_gib:g} GiB, too little for {', '.join(too_large)}: "
                "change their resource requests"
            )
    return lines

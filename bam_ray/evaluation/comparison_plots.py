"""The figures of a comparison."""

from collections.abc import Sequence
from typing import Any

from bam_ray.evaluation.comparison import ComparedModel, Comparison, GapEstimate
from bam_ray.evaluation.decomposition import PARTS
from bam_ray.evaluation.plots import (
    CURVE_COLORS,
    LINE,
    LOG_SCALE_RATIO,
    MUTED,
    PANELS_PER_ROW,
    TEXT,
    Picture,
    panels,
    picture,
)
from bam_ray.evaluation.results import MEAN, ModelKind
from bam_ray.evaluation.wall_clock import WallClock
from bam_ray.settings import dense_multiple

MARKERS: dict[ModelKind, str] = {"seeds": "X", "branches": "v", "controls": "s", "mixtures": "o", "ensembles": "D"}


def cost_scatter(comparison: Comparison) -> Picture:
    """Draw mean perplexity against training FLOPs and against tokens, one point per model and training seed.

    The line is the Pareto front: the best mean over the training seeds at the cost or less.
    """
    quantities = {"lineage_flops": "training FLOPs", "lineage_tokens": "training tokens"}
    figure, axes = panels(len(quantities), len(quantities), width=11.0, height=4.2)
    values = [each.perplexity[MEAN] for model in comparison.models for each in model.trained]
    for ax, (quantity, name) in zip(axes, quantities.items(), strict=True):
        for index, model in enumerate(comparison.models):
            costs = [getattr(each, quantity) for each in model.trained]
            ax.plot(costs, [each.perplexity[MEAN] for each in model.trained], **_style(model, index))
        front = pareto_front(
            [(getattr(model.trained[0], quantity), model.perplexity[MEAN].value) for model in comparison.models]
        )
        ax.step(*zip(*front, strict=True), where="post", color=MUTED, linewidth=0.9, linestyle="--", zorder=0)
        if all(getattr(each, quantity) for model in comparison.models for each in model.trained):
            ax.set_xscale("log")  # an imported seed has cost nothing here, which this scale cannot show
        if max(values) > LOG_SCALE_RATIO * min(values):
            ax.set_yscale("log")
        _label(ax, name)
    return _with_legend(
        figure, axes, "Mean perplexity against training FLOPs and training tokens, one point per model and seed"
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, perplexity) of the models that are better than every model of the same or a smaller cost."""
    front: list[tuple[float, float]] = []
    for cost, perplexity in sorted(points):
        if not front or perplexity < front[-1][1]:
            front.append((cost, perplexity))
    return front


def time_scatter(comparison: Comparison, clock: WallClock) -> Picture:
    """Draw mean perplexity against the time after the seed; dense controls are curves, one for each way to train."""
    figure, (ax,) = panels(1, 1, width=8.5, height=4.2)
    models = {model.label: (index, model) for index, model in enumerate(comparison.models)}
    seed_tokens = next((model.trained[0].lineage_tokens for model in comparison.models if model.kind == "seeds"), 0)
    dense = sorted(
        (model.trained[0].lineage_tokens - seed_tokens, model.perplexity[MEAN].value)
        for model in comparison.models
        if model.kind == "controls" and dense_multiple(model.label) is not None
    )
    for number, (way, seconds) in enumerate(clock.dense.step_seconds.items()):
        ax.plot(
            [tokens / clock.dense.batch_tokens * seconds for tokens, _ in dense],
            [perplexity for _, perplexity in dense],
            color=MUTED,
            linestyle=("-", "--", ":")[number % 3],
            linewidth=1.2,
            marker="s",
            markersize=4,
            label=f"dense, {way}",
        )
    for time in clock.models:
        index, model = models[time.model]
        ax.plot([time.seconds], [model.perplexity[MEAN].value], **_style(model, index))
    ax.set_xscale("log")
    _label(ax, f"seconds after the seed on {clock.cluster.nodes} nodes, computed from measured speeds")
    return _with_legend(figure, [ax], "Mean perplexity against the time of training, one point per model")


def gap_bars(gaps: Sequence[GapEstimate]) -> Picture:
    """Draw the parts of the gap of each mixture with their intervals: one panel per mixture, one group per domain."""
    labels = list(dict.fromkeys(gap.model for gap in gaps))
    per_row = min(len(labels), PANELS_PER_ROW // 2)
    figure, axes = panels(len(labels), per_row, width=3.6 * per_row + 1.4, height=2.8)
    for ax, label in zip(axes, labels, strict=True):
        own = [gap for gap in gaps if gap.model == label]
        for number, part in enumerate(PARTS):
            estimates = [getattr(gap, part) for gap in own]
            places = [group + (number - 1.5) * 0.2 for group in range(len(own))]
            color = TEXT if part == "total" else CURVE_COLORS[number]
            ax.bar(places, [each.value for each in estimates], width=0.18, color=color, label=part)
            ax.vlines(places, *zip(*(each.interval for each in estimates), strict=True), color=MUTED, linewidth=1.0)
        ax.axhline(0.0, color=MUTED, linewidth=0.8)
        ax.set_title(label, fontsize=10, color=TEXT, loc="left")
        ax.set_xticks(range(len(own)), [gap.domain for gap in own])
        ax.tick_params(labelsize=8, colors=MUTED)
        ax.grid(axis="y", color=LINE, linewidth=0.6)
    axes[0].set_ylabel("nats per token", fontsize=8, color=MUTED)
    axes[per_row - 1].legend(fontsize=8, frameon=False, labelcolor=TEXT, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture(figure, "Bar charts of the parts of the gap of each mixture to the specialists; see the table above")


def _style(model: ComparedModel, index: int) -> dict[str, Any]:
    return {
        "linestyle": "",
        "marker": MARKERS[model.kind],
        "markersize": 5.5,
        "color": CURVE_COLORS[index % len(CURVE_COLORS)],
        "label": model.label,
    }


def _label(ax: Any, name: str) -> None:
    ax.set_xlabel(name, fontsize=8, color=MUTED)
    ax.tick_params(which="both", labelsize=8, colors=MUTED)
    ax.grid(color=LINE, linewidth=0.6)


def _with_legend(figure: Any, axes: Sequence[Any], alt: str) -> Picture:
    axes[0].set_ylabel("mean perplexity", fontsize=8, color=MUTED)
    axes[-1].legend(fontsize=8, frameon=False, labelcolor=TEXT, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture(figure, alt)

"""The figures of the report, as PNG with a transparent background.

The pages invert them on dark screens. They are drawn on matplotlib `Figure` objects, without pyplot, so there is no
global state and nothing to close.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from bam_ray.evaluation.results import MixtureRouting, Results
from bam_ray.evaluation.table import format_perplexity

Curve = Sequence[tuple[int, float]]

PANELS_PER_ROW = 6
LOG_SCALE_RATIO = 12.0  # a panel has a logarithmic axis if its largest perplexity exceeds its smallest by this factor

BACKGROUND, TEXT, MUTED, LINE = "#ffffff", "#1f2328", "#59636e", "#d8dee4"
HEATMAP_MAXIMUM = "#0b4f9e"
BAR_COLORS = {
    "seeds": "#8c959f",
    "branches": "#6aa3e0",
    "controls": "#b679d8",
    "mixtures": "#e0823d",
    "ensembles": "#3fa66b",
}
CURVE_COLORS = ("#4f8fd6", "#e0823d", "#3fa66b", "#b679d8", "#d35f72", "#2fa8b5", "#b08a2e", "#8b949e")


@dataclass(frozen=True)
class Picture:
    """A figure as base64 PNG, with a description in words."""

    png: str
    alt: str


def perplexity_bars(results: Results) -> Picture:
    """Draw one panel per domain and one for the mean, with one bar per model and its 95 % interval."""
    columns, models = results.columns, results.models
    per_row = min(len(columns), PANELS_PER_ROW)
    figure, axes = panels(len(columns), per_row, width=1.5 + 1.75 * per_row, height=0.75 + 0.3 * len(models))
    for index, (ax, column) in enumerate(zip(axes, columns, strict=True)):
        is_log = _draw_bars(ax, results, column)
        ax.set_title(f"{column} (log)" if is_log else column, fontsize=10, color=TEXT, loc="left")
        labels = [model.label for model in models] if index % per_row == 0 else [""] * len(models)
        ax.set_yticks(range(len(models)), labels)
        ax.tick_params(axis="y", length=0, labelsize=9, labelcolor=TEXT)
        ax.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
        ax.spines["bottom"].set_visible(False)
    return picture(figure, "Bar charts of the held-out perplexity of every model on every domain; see the table above")


def _draw_bars(ax: Any, results: Results, column: str) -> bool:
    """Draw the bars of one column. Return True if the axis is logarithmic."""
    models = results.models
    values = [model.perplexity(column) for model in models]
    low, high = zip(*(model.interval(column) for model in models), strict=True)
    is_log = max(values) > LOG_SCALE_RATIO * min(values)
    if is_log:
        ax.set_xscale("log")
    ax.set_xlim(1 if is_log else 0, max(high) ** 1.3 if is_log else max(high) * 1.38)
    rows = range(len(models))
    ax.barh(rows, values, height=0.72, color=[BAR_COLORS[model.kind] for model in models], linewidth=0)
    ax.hlines(rows, low, high, color=TEXT, linewidth=1.1)
    for row, model in enumerate(models):
        is_best = results.best[column] == model.id
        ax.annotate(
            format_perplexity(values[row]),
            (high[row], row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=TEXT,
            fontweight="bold" if is_best else "normal",
        )
    ax.set_ylim(len(models) - 0.4, -0.6)
    return is_log


def training_curves(results: Results, curves: dict[str, Curve]) -> Picture:
    """Draw NLL against step, one panel per kind of model. `curves` is keyed by model id."""
    models = [model for model in results.models if curves.get(model.id)]
    kinds = list(dict.fromkeys(model.kind for model in models))
    figure, axes = panels(len(kinds), len(kinds), width=max(5.0, 3.7 * len(kinds)), height=3.0)
    for ax, kind in zip(axes, kinds, strict=True):
        for index, model in enumerate(model for model in models if model.kind == kind):
            steps, losses = np.array(curves[model.id], dtype=float).T
            color = CURVE_COLORS[index % len(CURVE_COLORS)]
            ax.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            ax.plot(steps, smoothed(losses), color=color, linewidth=1.6, label=model.name)
        ax.set_title(kind, fontsize=10, color=TEXT, loc="left")
        ax.set_xlabel("step", fontsize=8, color=MUTED)
        ax.tick_params(labelsize=8, colors=MUTED)
        ax.grid(axis="y", color=LINE, linewidth=0.6)
        ax.legend(fontsize=8, frameon=False, labelcolor=TEXT)
    axes[0].set_ylabel("training NLL (nats per token)", fontsize=8, color=MUTED)
    return picture(figure, "Training loss against step, with one panel for each kind of model")


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Return a centered moving average over 5 % of the curve, with a narrower window at the ends."""
    radius = len(losses) // 40
    sums = np.cumsum(np.concatenate(([0.0], losses)))
    index = np.arange(len(losses))
    radii = np.minimum(np.minimum(index, index[::-1]), radius)  # symmetric, so the average does not lag
    starts, ends = index - radii, index + radii + 1
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def routing_heatmaps(routing: MixtureRouting, router: str) -> Picture:
    """Draw domains × experts, one panel per layer. `router`: "ffn" (share of choices) or "attention" (mean gate)."""
    domains = list(routing.domains)
    layers = range(len(routing.overall.layers))
    field = "ffn_share" if router == "ffn" else "attention_gate"
    values = np.array([[getattr(routing.domains[d].layers[i], field) for d in domains] for i in layers])
    experts = routing.expert_names
    per_row = min(len(layers), PANELS_PER_ROW)
    figure, axes = panels(
        len(layers), per_row, width=1.2 + per_row * (0.35 + 0.44 * len(experts)), height=0.85 + 0.34 * len(domains)
    )
    maximum = float(values.max())
    for layer, ax in zip(layers, axes, strict=True):
        _draw_heatmap(ax, values[layer], maximum)
        ax.set_title(f"layer {layer}", fontsize=9, color=TEXT, loc="left")
        ax.set_xticks(range(len(experts)), experts, rotation=40, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(domains)), domains if layer % per_row == 0 else [""] * len(domains))
        ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    quantity = "Share of choices of each FFN expert" if router == "ffn" else "Mean gate of each attention expert"
    return picture(figure, f"{quantity} in percent: one panel per layer, one row per domain, one column per expert")


def _draw_heatmap(ax: Any, values: np.ndarray, maximum: float) -> None:
    """Draw fractions [rows, columns] as percentages on a color scale from 0 to `maximum`."""
    colors = LinearSegmentedColormap.from_list("share", [BACKGROUND, HEATMAP_MAXIMUM])
    ax.imshow(values, cmap=colors, vmin=0.0, vmax=maximum, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = BACKGROUND if value > 0.55 * maximum else TEXT
        ax.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color(LINE)


def panels(count: int, per_row: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """Return a figure with `count` empty axes, `per_row` in a row. `height` is that of one row, in inches."""
    rows = ceil(count / per_row)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, per_row, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        for name, spine in ax.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(LINE)
    return figure, axes[:count]


def picture(figure: Figure, alt: str) -> Picture:
    """Return a figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, transparent=True)
    return Picture(png=base64.b64encode(buffer.getvalue()).decode(), alt=alt)

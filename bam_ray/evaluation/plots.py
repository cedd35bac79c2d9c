"""The report's figures, as PNG without background; the page inverts them on dark screens.

Drawn on `Figure` objects (Agg), without pyplot: nothing global, nothing to close.
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

from bam_ray.evaluation.results import Results, Routing
from bam_ray.evaluation.table import number

Curve = Sequence[tuple[int, float]]

PANELS_A_ROW = 6
LOG_FROM = 12.0  # a column whose largest perplexity is this many times its smallest is drawn on a log axis


PAPER, INK, MUTED, LINE = "#ffffff", "#1f2328", "#59636e", "#d8dee4"
FULL = "#0b4f9e"  # of heat maps
BARS = {"seeds": "#8c959f", "branches": "#6aa3e0", "mixtures": "#e0823d"}
LINES = ("#4f8fd6", "#e0823d", "#3fa66b", "#b679d8", "#d35f72", "#2fa8b5", "#b08a2e", "#8b949e")


@dataclass(frozen=True)
class Picture:
    """One figure as base64 PNG, and what it shows in words."""

    png: str
    alt: str


def perplexity_bars(results: Results) -> Picture:
    """One panel a domain and one for the mean, one bar a model, with 95 % intervals."""
    columns, models = results.columns, results.models
    wide = min(len(columns), PANELS_A_ROW)
    figure, axes = _panels(len(columns), wide, width=1.5 + 1.75 * wide, height=0.75 + 0.3 * len(models))
    for index, (ax, column) in enumerate(zip(axes, columns, strict=True)):
        values = [model.perplexity(column) for model in models]
        low, high = zip(*(model.interval(column) for model in models), strict=True)
        is_log = max(values) > LOG_FROM * min(values)
        if is_log:
            ax.set_xscale("log")
        ax.set_xlim(1 if is_log else 0, max(high) ** 1.3 if is_log else max(high) * 1.38)
        rows = range(len(models))
        ax.barh(rows, values, height=0.72, color=[BARS[model.kind] for model in models], linewidth=0)
        ax.hlines(rows, low, high, color=INK, linewidth=1.1)
        for row, model in enumerate(models):
            is_best = results.best[column] == model.id
            ax.annotate(
                number(values[row]),
                (high[row], row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
                fontweight="bold" if is_best else "normal",
            )
        ax.set_ylim(len(models) - 0.4, -0.6)
        ax.set_title(f"{column} (log)" if is_log else column, fontsize=10, color=INK, loc="left")
        ax.set_yticks(rows, [model.label for model in models] if index % wide == 0 else [""] * len(models))
        ax.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
        ax.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
        ax.spines["bottom"].set_visible(False)
    return _picture(figure, "Held-out perplexity of every model on every domain, as bars; the table has the numbers")


def training_curves(results: Results, curves: dict[str, Curve]) -> Picture:
    """NLL against step, one panel a kind of model. `curves` by model id."""
    models = [model for model in results.models if curves.get(model.id)]
    kinds = list(dict.fromkeys(model.kind for model in models))
    figure, axes = _panels(len(kinds), len(kinds), width=max(5.0, 3.7 * len(kinds)), height=3.0)
    for ax, kind in zip(axes, kinds, strict=True):
        for index, model in enumerate(model for model in models if model.kind == kind):
            steps, losses = np.array(curves[model.id], dtype=float).T
            colour = LINES[index % len(LINES)]
            ax.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(steps, smoothed(losses), color=colour, linewidth=1.6, label=model.name)
        ax.set_title(kind, fontsize=10, color=INK, loc="left")
        ax.set_xlabel("step", fontsize=8, color=MUTED)
        ax.tick_params(labelsize=8, colors=MUTED)
        ax.grid(axis="y", color=LINE, linewidth=0.6)
        ax.legend(fontsize=8, frameon=False, labelcolor=INK)
    axes[0].set_ylabel("training NLL, nats a token", fontsize=8, color=MUTED)
    return _picture(figure, "Training loss against step, one panel for seed, branches and mixtures each")


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Mean over the 5 % of points around each, fewer at the ends; as long as the curve."""
    reach = len(losses) // 40
    sums = np.cumsum(np.concatenate(([0.0], losses)))
    at = np.arange(len(losses))
    reach_here = np.minimum(np.minimum(at, at[::-1]), reach)  # as far to the left as to the right: no lag
    starts, ends = at - reach_here, at + reach_here + 1
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def routing_heatmaps(routing: Routing, router: str) -> Picture:
    """Domain × expert, one panel a layer. `router`: "ffn" (share of choices) or "attention" (mean gate)."""
    domains = list(routing.domains)
    layers = range(len(routing.overall.layers))
    field = "ffn_share" if router == "ffn" else "attention_gate"
    values = np.array([[getattr(routing.domains[d].layers[i], field) for d in domains] for i in layers])
    experts = routing.expert_names
    wide = min(len(layers), PANELS_A_ROW)
    figure, axes = _panels(
        len(layers), wide, width=1.2 + wide * (0.35 + 0.44 * len(experts)), height=0.85 + 0.34 * len(domains)
    )
    colours = LinearSegmentedColormap.from_list("share", [PAPER, FULL])
    most = float(values.max())
    for layer, ax in zip(layers, axes, strict=True):
        ax.imshow(values[layer], cmap=colours, vmin=0.0, vmax=most, aspect="auto")
        for (row, column), value in np.ndenumerate(values[layer]):
            ink = PAPER if value > 0.55 * most else INK
            ax.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
        ax.set_title(f"layer {layer}", fontsize=9, color=INK, loc="left")
        ax.set_xticks(range(len(experts)), experts, rotation=40, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(domains)), domains if layer % wide == 0 else [""] * len(domains))
        ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)
        for spine in ax.spines.values():
            spine.set_visible(True)
            spine.set_color(LINE)
    what = (
        "Share of the choices that fell on each FFN expert" if router == "ffn" else "Mean gate of each attention expert"
    )
    return _picture(figure, f"{what} in percent: domains down, experts across, one panel a layer")


def _panels(count: int, wide: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """`count` bare axes, `wide` of them a row; sizes in inches, height of one row."""
    rows = ceil(count / wide)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, wide, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        for name, spine in ax.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(LINE)
    return figure, axes[:count]


def _picture(figure: Figure, alt: str) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, transparent=True)
    return Picture(png=base64.b64encode(buffer.getvalue()).decode(), alt=alt)

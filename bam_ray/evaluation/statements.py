"""The results of a comparison in words, for the terminal and the page."""

from collections.abc import Iterator, Sequence

from bam_ray.evaluation.comparison import CLOSE_PERCENT, DENSE_LABEL, Difference, SpecialistGap
from bam_ray.evaluation.dense_curve import DenseEquivalent, DenseMatch
from bam_ray.evaluation.samples import IntervalEstimate
from bam_ray.evaluation.wall_clock import STEP_SECONDS, Cluster


def statement(
    label: str, differences: Sequence[Difference], gaps: Sequence[SpecialistGap], equivalents: Sequence[DenseEquivalent]
) -> str:
    """Return what the comparison shows about one model, as one line."""
    own = [each for each in differences if each.model == label]
    parts = [
        f"{each.verdict}{' of' if each.verdict == 'ahead' else ''} {each.other} ({format_difference(each)})"
        for each in own
        if each.verdict != "no difference shown"
    ]
    unclear = [each.other for each in own if each.verdict == "no difference shown"]
    if unclear:
        parts.append(f"no difference shown to {', '.join(unclear)}")
    parts += _gap_parts([gap for gap in gaps if gap.model == label])
    parts += [f"worth {format_equivalent(each)}" for each in equivalents if each.model == label]
    return f"{label}: {'; '.join(parts)}"


def _gap_parts(gaps: Sequence[SpecialistGap]) -> Iterator[str]:
    """Yield the domains on which a model is close to the specialist, behind it, and neither of them for sure."""
    behind = [gap for gap in gaps if not gap.close and gap.percent.interval[0] > 0]
    unclear = [gap for gap in gaps if not gap.close and gap not in behind]
    within = f"within {CLOSE_PERCENT:g} % of the specialist on"
    if close := [gap.domain for gap in gaps if gap.close]:
        yield f"{within} {', '.join(close)}"
    for words, group in (("behind the specialist on", behind), (f"not shown to be {within}", unclear)):
        if group:
            yield f"{words} {', '.join(f'{gap.domain} ({gap.percent.value:+.1f} %)' for gap in group)}"


def format_difference(difference: Difference) -> str:
    """Format a difference: `-12.1 %, 95 % -13.0 to -11.2, 3 of 3 seeds`."""
    seeds = len(difference.by_seed)
    return (
        f"{format_percent(difference.percent)}, {difference.same_sign} of {seeds} {'seed' if seeds == 1 else 'seeds'}"
    )


def format_percent(percent: IntervalEstimate) -> str:
    """Format a difference in percent: `-12.1 %, 95 % -13.0 to -11.2`."""
    low, high = percent.interval
    return f"{percent.value:+.1f} %, 95 % {low:+.1f} to {high:+.1f}"


def format_equivalent(equivalent: DenseEquivalent) -> str:
    """Format dense-equivalent tokens: `634,000 dense tokens (95 % 600,000 to 700,000), 0.38 of the tokens used`."""
    lowest, highest = equivalent.measured
    low, high = equivalent.interval
    ends = (
        f"at most {lowest:,}" if low <= lowest else f"{low:,.0f}",
        f"at least {highest:,}" if high >= highest else f"{high:,.0f}",
    )
    interval = f"95 % {' to '.join(ends)}"
    if equivalent.tokens is not None and equivalent.share is not None:
        return f"{equivalent.tokens:,.0f} dense tokens ({interval}), {equivalent.share:.2f} of the tokens used"
    bound = f"less than {lowest:,}" if equivalent.place == "below" else f"more than {highest:,}"
    reach = f"; {interval}" if low < high else ""
    return f"{bound} dense tokens ({equivalent.place} the measured range{reach})"


def cost_statement(label: str, matches: Sequence[DenseMatch], cluster: Cluster) -> str:
    """Return what the comparison with dense controls at equal cost shows about one model, as one line."""
    parts = [format_match(each) for each in matches if each.cost not in STEP_SECONDS]
    timed = [format_match(each) for each in matches if each.cost in STEP_SECONDS]
    if timed:
        nodes = (
            f"{cluster.nodes} {'node' if cluster.nodes == 1 else 'nodes'} with {cluster.network_gbit_per_s:g} Gbit/s"
        )
        parts.append(f"in the time that it takes on {nodes}, computed from measured speeds: {'; '.join(timed)}")
    return f"{label} at equal cost: {'; '.join(parts)}"


def format_match(match: DenseMatch) -> str:
    """Format a match: `equal FLOPs: behind dense with 5,850,000 tokens (+2.1 %, 95 % +1.0 to +3.2)`."""
    name = match.cost if match.cost in STEP_SECONDS else f"equal {match.cost}"
    dense = f"{DENSE_LABEL} with {match.tokens:,.0f} tokens"
    if match.percent is None or match.verdict is None:
        advice = f"add {match.add_multiple:g} to compare.dense"
        return f"{name}: {dense} is {match.place} the measured range: {advice}"
    words = {"ahead": "ahead of", "behind": "behind", "no difference shown": "no difference shown to"}[match.verdict]
    return f"{name}: {words} {dense} ({format_percent(match.percent)})"

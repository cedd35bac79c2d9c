"""The comparison with dense controls at equal tokens, FLOPs and time, and the parts of the gap to the specialists."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_ray.evaluation.bootstrap import Resamples, interval_95
from bam_ray.evaluation.comparison import Comparison
from bam_ray.evaluation.comparison_page import render_comparison
from bam_ray.evaluation.comparison_plots import pareto_front
from bam_ray.evaluation.decomposition import PARTS
from bam_ray.evaluation.dense_curve import DenseCurve, DenseMatch, crossing, two_digits
from bam_ray.evaluation.results import DomainScore, OracleScore, Results
from bam_ray.evaluation.samples import Samples, SeedSamples
from bam_ray.evaluation.serving_cost import ServingCost
from bam_ray.evaluation.wall_clock import Cluster, dense_speed, longest_path
from bam_ray.settings import control_name, dense_multiple
from tests.support.compared import LEVEL, compare, results, score, shifted
from tests.support.html_page import Page

SPEED = 10.0  # tokens per second of a worker in dense training


def match(comparison: Comparison, model: str, cost: str) -> DenseMatch:
    (found,) = [each for each in comparison.matches if (each.model, each.cost) == (model, cost)]
    return found


def changed(result: Results, **changes: dict[str, Any]) -> Results:
    """Return the results with changed fields of some models, by name."""
    models = tuple(model.model_copy(update=changes.get(model.name, {})) for model in result.models)
    return result.model_copy(update={"models": models})


def timed(result: Results) -> Results:
    """Return results with times: two branches of 400 tokens, a mixing phase of 600 tokens, dense batches of 10."""
    dense = {"parameters": 10**9}
    return changed(
        result,
        **{
            "code": {"tokens": 400, "worker_seconds": 40.0, "steps": 40},
            "bam": {"tokens": 600, "worker_seconds": 120.0, "processes": 2, "branches": ("code",)},
            "btx": {"tokens": 600, "worker_seconds": 120.0, "processes": 8, "branches": ("code",)},
            "posterior": {"branches": ("code",)},
            "dense": dense | {"tokens": 1000, "worker_seconds": 1000 / SPEED, "steps": 100},
            "dense-2x": dense | {"tokens": 2000, "worker_seconds": 2000 / SPEED, "steps": 200},
        },
    )


def curve(levels: dict[int, float], multiple: float = 1.0) -> DenseCurve:
    one = {tokens: SeedSamples(np.array([nll]), np.array([[nll]])) for tokens, nll in levels.items()}
    return DenseCurve(list(one.items()), multiple)


def one_model() -> Samples:
    model = score("dense", {"code": np.array([2.0, 3.0])})
    return Samples({"dense": [model]}, Resamples(1, [2]))


@given(st.dictionaries(st.integers(1, 10**12), st.floats(0.1, 20.0), min_size=1, max_size=5), st.floats(1e-2, 1e14))
def test_the_curve_is_never_extrapolated(levels: dict[int, float], tokens: float) -> None:
    """Inside the measured range the NLL is between those of the neighbors; outside there is none, but an advice."""
    dense = curve(levels)
    place = dense.place(tokens)
    found = dense.match("x", dense.nll(min(levels)), "tokens", tokens, one_model())
    if not min(levels) <= tokens <= max(levels):
        if place == "between":  # a rounding error away from an end
            assert min(abs(tokens / end - 1) for end in (min(levels), max(levels))) < 1e-8
        else:
            assert found.nll is None and found.percent is None and found.verdict is None and found.by_seed == ()
            assert found.add_multiple is not None
            needed = tokens / max(levels)
            assert 0.9 * needed <= found.add_multiple <= 1.11 * needed
            assert (found.add_multiple >= needed * (1 - 1e-6)) == (place == "above") or math.isclose(
                found.add_multiple, needed, rel_tol=1e-6
            )
        return
    assert place == "between" and found.add_multiple is None
    below, above = max(x for x in levels if x <= tokens), min(x for x in levels if x >= tokens)
    nll = dense.nll(tokens).measured[0]
    low, high = sorted((levels[below], levels[above]))
    assert low - 1e-9 <= nll <= high + 1e-9


def test_the_curve_is_linear_in_the_logarithm_of_the_tokens() -> None:
    dense = curve({100: 4.0, 400: 3.0, 6400: 2.0})
    assert [dense.nll(tokens).measured[0] for tokens in (100, 200, 400, 1600, 6400)] == pytest.approx(
        [4.0, 3.5, 3.0, 2.5, 2.0]
    )
    assert crossing([(100, 4.0), (400, 3.0), (6400, 2.0)], 2.5) == ("between", pytest.approx(1600))


@pytest.mark.parametrize(
    ("number", "up", "expected"),
    [(2.31, True, 2.4), (2.31, False, 2.3), (2.4, True, 2.4), (12.01, True, 13.0), (0.0349, False, 0.034)],
)
def test_multiples_are_rounded_away_from_the_measured_range(number: float, up: bool, expected: float) -> None:
    assert two_digits(number, up) == expected


def test_names_of_controls_give_their_multiples() -> None:
    for multiple in (1.0, 0.25, 2.0, 1e-05, 1000.0):
        assert dense_multiple(control_name(multiple)) == multiple
    assert dense_multiple("dense-prior") is None and dense_multiple("diloco") is None


def test_a_control_at_its_own_flops_differs_by_zero() -> None:
    """A "mixture" with the scores and the FLOPs of a control has no difference to the curve, in any resample."""
    runs = {}
    for k in range(3):
        result = results(shifted(0.3 * k), text=0.5)
        by_name = {model.name: model for model in result.models}
        twin = {field: getattr(by_name["dense-2x"], field) for field in ("domains", "lineage_flops")}
        runs[k] = changed(result, bam=twin)
    found = match(compare(runs), "mixture bam", "FLOPs")
    assert found.tokens == pytest.approx(2000)
    assert found.nll is not None
    assert (found.nll.value, *found.nll.interval) == pytest.approx((0, 0, 0), abs=1e-12)
    assert found.by_seed == pytest.approx((0, 0, 0), abs=1e-12)


def test_equal_flops_interpolate_between_controls() -> None:
    """A mixture with 1.41 times the FLOPs of a dense token meets a control with that many more tokens."""
    flops = 1e9 * (1000 + math.sqrt(2) * 1000)
    runs = {k: changed(results(shifted(0.3 * k, bam=0.02 * k), text=0.5), bam={"lineage_flops": flops}) for k in (0, 1)}
    compared = compare(runs)
    found = match(compared, "mixture bam", "FLOPs")
    assert (found.tokens, found.place) == (pytest.approx(1414.2, abs=0.1), "between")
    assert found.nll is not None and found.percent is not None
    assert found.by_seed == pytest.approx((0.0, 0.02), abs=1e-9), "the dense level there is 2.5"
    assert found.nll.interval == pytest.approx((0.0, 0.02), abs=1e-9), "the text cancels, and the seeds do not"
    assert found.verdict == "no difference shown"
    assert match(compared, "mixture btx", "tokens").verdict == "behind"
    (line,) = [line for line in compared.statements if line.startswith("mixture bam at equal cost: ")]
    assert "equal tokens: no difference shown to dense with 1,000 tokens (" in line or "equal tokens: ahead of" in line
    assert "equal FLOPs: no difference shown to dense with 1,414 tokens (+1.0 %, 95 %" in line


def test_outside_the_measured_range_the_multiple_to_add_is_named() -> None:
    runs = {0: changed(results(shifted(0.0)), bam={"lineage_flops": 1e9 * 4100})}
    compared = compare(runs)
    found = match(compared, "mixture bam", "FLOPs")
    assert (found.place, found.add_multiple, found.verdict) == ("above", 3.1, None)
    line = next(line for line in compared.statements if line.startswith("mixture bam at equal cost"))
    assert "equal FLOPs: dense with 3,100 tokens is above the measured range: add 3.1 to compare.dense" in line


def test_dense_equivalent_tokens_have_an_interval() -> None:
    """With two training seeds, each resample is one of them or their mean."""
    runs = {k: results(shifted(0.0, bam=change)) for k, change in enumerate((-0.05, 0.05))}
    (found,) = [each for each in compare(runs).equivalents if each.model == "mixture bam"]
    ends = [1000 * 2 ** ((2.6 - nll) / 0.2) for nll in (2.55, 2.45)]
    assert found.tokens == pytest.approx(math.sqrt(2) * 1000)
    assert found.interval == pytest.approx(tuple(ends))
    runs = {k: results(shifted(0.0, bam=change)) for k, change in enumerate((-0.15, 0.05))}
    (found,) = [each for each in compare(runs).equivalents if each.model == "mixture bam"]
    assert found.interval[1] == 2000, "limited to the measured range"


def test_time_is_that_of_the_longest_branch_and_of_mixing() -> None:
    """Four nodes at 10 Gbit/s: 4 GB of gradients take 4.8 s, and a batch of 10 tokens takes 0.25 s."""
    compared = compare({0: timed(results(shifted(0.0)))})
    clock = compared.clock
    assert clock is not None
    dense = clock.dense
    assert (dense.tokens_per_second, dense.batch_tokens) == pytest.approx((SPEED, 10.0))
    assert dense.all_reduce_seconds == pytest.approx(2 * 3 / 4 * 4e9 * 8 / 10e9)
    assert dense.step_seconds == pytest.approx(
        {"data parallel": 5.05, "data parallel, overlapped": 4.8, "DiLoCo, 100 steps": 0.298}
    )
    times = {time.model: time for time in clock.models}
    bam, btx, posterior = (times[label] for label in ("mixture bam", "mixture btx", "ensemble posterior"))
    assert (bam.branch_seconds, bam.mixing_seconds, bam.seconds) == (40.0, 60.0, 100.0)
    assert btx.mixing_seconds == 30.0, "the eight workers are at most four nodes"
    assert (posterior.branch_seconds, posterior.mixing_seconds) == (40.0, 0.0)
    assert bam.dense_tokens == pytest.approx(100 * 4 * SPEED)
    assert bam.break_even == pytest.approx(math.sqrt(2) * 1000 / 4000)
    (equivalent,) = [each for each in compared.equivalents if each.model == "mixture bam"]
    assert bam.break_even_interval == pytest.approx([end / 4000 for end in equivalent.interval])
    found = match(compared, "mixture bam", "DiLoCo, 100 steps")
    assert found.tokens == pytest.approx(4000 * 0.25 / 0.298)
    assert match(compared, "mixture bam", "data parallel").tokens == pytest.approx(10 * 100 / 5.05)
    assert match(compared, "mixture bam", "data parallel").place == "below"


def test_one_node_needs_no_network() -> None:
    controls = [model for model in timed(results(shifted(0.0))).models if model.kind == "controls"]
    dense = dense_speed(controls, Cluster(nodes=1, network_gbit_per_s=1e-3))
    assert dense is not None
    assert set(dense.efficiency.values()) == {1.0} and dense.all_reduce_seconds == 0.0
    compared = compare({0: timed(results(shifted(0.0)))}, nodes=1)
    found = match(compared, "mixture bam", "data parallel")
    assert found.tokens == pytest.approx((40 + 120) * SPEED)
    assert found.by_seed == pytest.approx([2.5 - (2.6 - 0.2 * math.log2(1.6))])
    assert found.verdict == "behind" and "dense at equal data parallel" not in str(compared.losses)
    assert "dense in equal time, data parallel" in compared.losses["mixture bam"]
    assert "in the time that it takes on 1 node with 10 Gbit/s, computed from measured speeds" in "".join(
        compared.statements
    )


def test_without_times_there_is_no_comparison_in_equal_time() -> None:
    compared = compare({0: results(shifted(0.0))})
    assert compared.clock is None
    assert {each.cost for each in compared.matches} == {"tokens", "FLOPs"}
    partly = compare({0: changed(timed(results(shifted(0.0))), code={"worker_seconds": 0.0})})
    assert partly.clock is not None and partly.clock.models == (), "the time of the branch is not known"


def test_without_a_dense_control_there_is_no_equal_cost() -> None:
    compared = compare({0: results({k: v for k, v in LEVEL.items() if not k.startswith("dense")})})
    assert compared.matches == () and compared.equivalents == () and compared.clock is None
    assert len(compared.statements) == 3


@pytest.mark.parametrize(
    ("seconds", "nodes", "expected"),
    [([5, 4, 3], 3, 5), ([5, 4, 3], 2, 7), ([5, 4, 3], 1, 12), ([2, 2, 2, 2], 3, 4), ([], 3, 0)],
)
def test_branches_on_fewer_nodes_follow_each_other(seconds: list[float], nodes: int, expected: float) -> None:
    assert longest_path(seconds, nodes) == expected


def with_oracle(result: Results, unmixed: float, mixed: float) -> Results:
    """Return results whose mixture bam has oracle scores on code that differ from those of its branch."""
    branch = next(model for model in result.models if model.name == "code").domains["code"]

    def moved(by: float) -> DomainScore:
        noise = np.random.default_rng(int(1000 * abs(by))).normal(scale=0.1, size=len(branch.sequence_nll))
        return DomainScore.from_sequence_nll((np.array(branch.sequence_nll) + by + noise).tolist(), branch.tokens)

    oracle = {"code": OracleScore(expert="code", unmixed=moved(unmixed), mixed=moved(mixed))}
    return changed(result, bam={"oracle": oracle})


def test_the_parts_of_the_gap_have_intervals_and_sum_to_it() -> None:
    runs = {k: with_oracle(results(shifted(0.3 * k), text=0.5), 0.3 + 0.05 * k, 0.1) for k in range(3)}
    compared = compare(runs)
    (gap,) = compared.gap_parts
    assert (gap.model, gap.domain, gap.specialist) == ("mixture bam", "code", "branch code")
    assert gap.averaging.value + gap.drift.value + gap.routing.value == pytest.approx(gap.total.value, abs=1e-12)
    assert gap.total.value == pytest.approx(LEVEL["bam"] - LEVEL["code"])
    nll = [
        [each.nll for each in (run.models[4].oracle["code"].unmixed, run.models[1].domains["code"])]
        for run in runs.values()
    ]
    assert gap.averaging.value == pytest.approx(np.mean([unmixed - branch for unmixed, branch in nll]))
    low, high = gap.averaging.interval
    assert low < gap.averaging.value < high and high - low < 0.4, "the text that both share cancels"
    assert compared.undecomposed == ("mixture btx",)
    lacking = {**runs, 1: changed(runs[1], bam={"oracle": {}})}
    assert compare(lacking).gap_parts == (), "a domain needs an expert in all training seeds"


def test_intervals_of_interpolated_levels_are_those_of_the_resamples() -> None:
    """The interval of a difference to the curve comes from the resamples of both controls, weighted."""
    rng = np.random.default_rng(1)
    nll = {name: rng.normal(3.0, 1.0, (2, 6)) for name in ("a", "b", "model")}
    scores = {name: [score("dense", {"code": row}) for row in rows] for name, rows in nll.items()}
    samples = Samples(scores, Resamples(2, [6]))
    dense = DenseCurve([(100, samples.nll("a")), (10000, samples.nll("b"))], 1.0)
    found = dense.match("model", samples.nll("model"), "tokens", 1000.0, samples)
    combined = nll["model"] - 0.5 * nll["a"] - 0.5 * nll["b"]
    draws = Resamples(2, [6])
    assert found.nll is not None
    assert found.nll.interval == pytest.approx(interval_95(draws.seed_means(draws.text_means(0, combined))))
    assert found.nll.value == pytest.approx(combined.mean())


def test_the_page_shows_costs_parts_and_losses() -> None:
    serving = ServingCost(parameters=1234, flops=5.6e3, cache_bytes=789)
    runs = {
        k: changed(timed(with_oracle(results(shifted(0.3 * k)), 0.3, 0.1)), bam={"serving": serving}) for k in (0, 1)
    }
    compared = compare(runs, ["report-0", "report-1"])
    html = render_comparison(compared)
    shown = Page(html)
    texts = " ".join(" ".join(shown.texts).split())
    (gap,) = compared.gap_parts
    assert all(f"{getattr(gap, part).value:+.4f}" in texts for part in PARTS)
    for each in compared.matches:
        assert each.condition in texts and f"{each.tokens:,.0f}" in texts
    assert "below the measured range: add" in texts and "mixture btx has no such parts" in texts
    assert "Time on 4 nodes with 10 Gbit/s" in texts and "These times were not measured." in texts
    assert "789 B" in texts and "5.6e03" in texts
    assert "mixture btx is behind dense; " in texts and "; dense at equal tokens" in texts
    assert len(shown.values("src")) == 3
    assert html == render_comparison(Comparison.model_validate_json(compared.model_dump_json()))


def test_the_pareto_front_has_the_best_of_each_cost() -> None:
    points = [(3.0, 5.0), (1.0, 9.0), (2.0, 7.0), (2.0, 8.0), (2.5, 7.0), (4.0, 6.0)]
    assert pareto_front(points) == [(1.0, 9.0), (2.0, 7.0), (3.0, 5.0)]

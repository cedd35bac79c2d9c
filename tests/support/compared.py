"""Results of made-up models, whose NLL is known, for the tests of comparisons."""

from collections.abc import Sequence

import numpy as np

from bam_ray.evaluation import compare as comparing
from bam_ray.evaluation.comparison import Comparison
from bam_ray.evaluation.findings import make_results
from bam_ray.evaluation.results import DomainScore, ModelKind, ModelScore, Results
from bam_ray.evaluation.wall_clock import Cluster

DOMAINS = ("general", "code")
KINDS: dict[str, ModelKind] = {
    "seed": "seeds",
    "code": "branches",
    "dense": "controls",
    "dense-2x": "controls",
    "dense-prior-tables": "controls",
    "dense-diloco": "controls",
    "bam": "mixtures",
    "btx": "mixtures",
    "posterior": "ensembles",
}
TOKENS = {
    "seed": 1000,
    "code": 1400,
    "dense": 2000,
    "dense-2x": 3000,
    "dense-prior-tables": 2000,
    "dense-diloco": 2000,
    "bam": 2000,
    "btx": 2000,
    "posterior": 1400,
}
LEVEL = {"seed": 3.0, "code": 2.9, "dense": 2.6, "dense-2x": 2.4, "bam": 2.5, "btx": 2.7, "posterior": 2.5}


def score(name: str, nll: dict[str, np.ndarray]) -> ModelScore:
    """Return the score of a model with the given NLL of each sequence by domain."""
    return ModelScore(
        id=f"{name}-0123456789ab",
        name=name,
        kind=KINDS[name],
        parameters=100,
        active_parameters=100,
        lineage_tokens=TOKENS[name],
        lineage_flops=1e9 * TOKENS[name],
        domains={d: DomainScore.from_sequence_nll(each.tolist(), 15 * len(each)) for d, each in nll.items()},
    )


def results(offsets: dict[str, float], text: float = 0.0, sequences: int = 8) -> Results:
    """Return the results of one training seed: models whose NLL is the text's difficulty plus an offset."""
    hard = text * np.random.default_rng(0).normal(size=(len(DOMAINS), sequences))
    return make_results(
        "tiny", [score(name, dict(zip(DOMAINS, hard + level, strict=True))) for name, level in offsets.items()]
    )


def compare(results: dict[int, Results], reports: Sequence[str] = (), nodes: int = 4) -> Comparison:
    """Return the comparison, with equal time on nodes of 10 Gbit/s."""
    return comparing.compare(results, Cluster(nodes=nodes, network_gbit_per_s=10.0), reports)


def shifted(shift: float, **changes: float) -> dict[str, float]:
    """Return the usual level of every model, shifted for all of them and changed for some."""
    return {name: level + shift + changes.get(name, 0.0) for name, level in LEVEL.items()}

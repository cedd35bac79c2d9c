"""The parts of the gap between a mixture and the specialists.

With oracle routing, all routers of a mixture send every token of a domain to the domain's expert (`routed_to`). The
gap in NLL between a mixture and the model that the expert was made from, on that domain, is then the sum of three
parts:

| part | difference |
| --- | --- |
| averaging | oracle routing before the mixing phase - specialist: what the parts cost that the experts share |
| drift | oracle routing after the mixing phase - before it: how mixing has changed the expert's own path |
| routing | the mixture with its own routers - oracle routing after the mixing phase |

A negative part is a gain.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bam_ray.evaluation.results import GapParts, ModelScore, model_label

SEED = "seed"  # the name of the expert that is the seed
PARTS = ("averaging", "drift", "routing", "total")


def specialist_label(expert: str) -> str:
    """Return the label of the model that an expert was made from."""
    return model_label("seeds", SEED) if expert == SEED else model_label("branches", expert)


def expert_of_domain(experts: Sequence[str], domain: str, general: str) -> str | None:
    """Return the name of the expert of a domain, or None if the mixture has none.

    Args:
        experts: The names of the mixture's experts.
        domain: The domain.
        general: The domain of general text, whose expert is the seed unless there is a branch for it.
    """
    if domain in experts:
        return domain
    return SEED if domain == general and SEED in experts else None


def part_sequences(model: ModelScore, domain: str, specialist: ModelScore) -> dict[str, np.ndarray]:
    """Return the parts of the gap on each held-out sequence of a domain and their total, in nats per token, each [S].

    Args:
        model: A mixture with oracle scores on the domain.
        domain: The domain.
        specialist: The model that the domain's expert was made from.
    """
    oracle = model.oracle[domain]
    levels = [specialist.domains[domain], oracle.unmixed, oracle.mixed, model.domains[domain]]
    nll = np.array([level.sequence_nll for level in levels])
    return dict(zip(PARTS, (*np.diff(nll, axis=0), nll[-1] - nll[0]), strict=True))


def gap_parts(models: Sequence[ModelScore]) -> Iterator[GapParts]:
    """Yield the parts of the gap of each mixture on each domain whose expert and specialist are among `models`."""
    by_label: Mapping[str, ModelScore] = {model.label: model for model in models}
    for model in models:
        for domain, oracle in model.oracle.items():
            specialist = by_label.get(specialist_label(oracle.expert))
            if specialist is not None:
                parts = part_sequences(model, domain, specialist)
                means = {part: float(nll.mean()) for part, nll in parts.items()}
                yield GapParts(model=model.label, domain=domain, specialist=specialist.label, **means)


def undecomposed(models: Sequence[ModelScore]) -> list[str]:
    """Return the labels of the mixtures without an expert of any domain, whose gaps have no such parts."""
    return [model.label for model in models if model.kind == "mixtures" and not model.oracle]

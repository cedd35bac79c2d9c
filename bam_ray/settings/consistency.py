"""Checks across the sections of a recipe. Each raises `ValueError` with the settings' names and values that work."""

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from bam_ray.settings.data import DataSettings
from bam_ray.settings.upcycle import QuorumSettings

if TYPE_CHECKING:
    from bam_ray.settings.dense import BranchSettings
    from bam_ray.settings.methods import MixtureSettings
    from bam_ray.settings.recipe import Recipe

MAX_DIVISOR = 4096  # no process group is larger
RESERVED_NAMES = ("seed", "posterior")  # of what an endpoint serves with `serve.mode` adapters and posterior


def divisors(number: int) -> list[int]:
    """Return the divisors of `number` up to `MAX_DIVISOR`, ascending."""
    return [size for size in range(1, min(number, MAX_DIVISOR) + 1) if number % size == 0]


def with_branch_lr(plain: Any) -> Any:
    """Return the plain recipe with `branch.training.peak_lr` set to half of the seed's if it is missing (BAM paper)."""
    branch = plain.get("branch") if isinstance(plain, dict) else None
    training = branch.get("training") if isinstance(branch, dict) else None
    if not isinstance(branch, dict) or not isinstance(training, dict) or "peak_lr" in training:
        return plain
    seed = plain.get("seed")
    trained = seed.get("training") if isinstance(seed, dict) else None
    rate = trained.get("peak_lr") if isinstance(trained, dict) else None
    if not isinstance(rate, int | float):
        raise ValueError(
            "branch.training.peak_lr is missing, and there is no seed.training.peak_lr to take half of: set it"
        )
    return {**plain, "branch": {**branch, "training": {**training, "peak_lr": rate / 2}}}


def with_branch_domains(plain: Any) -> Any:
    """Return the plain recipe with a branch for each domain but the general one, if `branch.domains` is missing."""
    branch, data = (plain.get(section) for section in ("branch", "data")) if isinstance(plain, dict) else (None, None)
    if not isinstance(branch, dict) or "domains" in branch:
        return plain
    try:
        settings = DataSettings.model_validate(data)
    except ValidationError:  # which is reported with the other settings
        return plain
    domains = [name for name in settings.names if name != settings.general]
    return {**plain, "branch": {**branch, "domains": domains}}


def min_workers_are_fewer(recipe: "Recipe") -> None:
    """Check that `min_workers` never exceeds the number of workers."""
    mix, branch, compare = recipe.mix, recipe.branch, recipe.compare
    for section, least, most in (
        ("seed", recipe.seed.min_workers, recipe.seed.workers),
        ("branch", branch.min_workers, max(map(branch.workers_of, branch.domains), default=branch.workers)),
        ("mix", mix.min_workers, mix.processes),
        *([("compare", compare.min_workers, compare.workers)] if compare else []),
    ):
        if least is not None and least > most:
            raise ValueError(f"{section}.min_workers is {least}, more than {section}.workers, which is {most}")


def gpus_are_used(recipe: "Recipe") -> None:
    """Check that the workers of a process group do not share GPUs, and that stages on the CPU request none."""
    for setting, needs in (
        ("upcycle.needs", recipe.upcycle.needs),
        *([("seed.needs", recipe.seed.needs)] if recipe.seed.folder is not None else []),
    ):
        if any(demand.gpus for demand in (needs, *needs.fallback)):
            work = "an imported seed is only copied" if setting.startswith("seed") else "upcycling computes on the CPU"
            raise ValueError(f"{setting}.gpus has no effect, because {work}: leave it out")
    branch = recipe.branch
    jobs = [
        (_needs_setting(branch, domain), branch.needs_of(domain), branch.workers_of(domain))
        for domain in branch.domains
    ]
    jobs += [
        ("seed.needs", recipe.seed.needs, recipe.seed.workers),
        ("mix.needs", recipe.mix.needs, recipe.mix.processes),
    ]
    if recipe.compare is not None:
        diloco = recipe.compare.diloco
        workers = max(recipe.compare.workers, diloco.workers if diloco else 1)
        jobs.append(("compare.needs", recipe.compare.needs, workers))
    for setting, needs, workers in jobs:
        for demand in (needs, *needs.fallback):
            if workers > 1 and 0 < demand.gpus < 1:
                raise ValueError(
                    f"{setting}.gpus is {demand.gpus:g}, but the {workers} workers of a process group cannot share a "
                    "GPU: use 1 (or 0 to compute on CPUs)"
                )


def _needs_setting(branch: "BranchSettings", domain: str) -> str:
    override = branch.overrides.get(domain)
    return "branch.needs" if override is None or override.needs is None else f"branch.overrides.{domain}.needs"


def domains_exist(recipe: "Recipe") -> None:
    """Check that every domain that a setting names is a domain of the data, and that no branch has the seed's name."""
    known = set(recipe.data.names)
    if "seed" in recipe.branch.domains:
        raise ValueError("branch.domains names 'seed', which is the name of the seed itself: rename this domain")
    for setting, names in (
        ("branch.domains", recipe.branch.domains),
        ("seed.blend", recipe.seed.blend or {}),
        ("mix.blend", recipe.mix.blend or {}),
    ):
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"{setting} names {unknown}, which are not in data.domains {sorted(known)}")
    blended = {domain for domain in known if recipe.mix.blend is None or recipe.mix.blend.get(domain)}
    dynamic = recipe.mix.dynamic_blend
    if dynamic is not None and dynamic.reference is not None and set(dynamic.reference) != blended:
        raise ValueError(
            f"mix.dynamic_blend.reference names {sorted(dynamic.reference)}, but the domains of the blend are "
            f"{sorted(blended)}"
        )


def mixtures_exist(recipe: "Recipe") -> None:
    """Check that the mixture to serve exists, and that each mixture has an expert for every model."""
    mixtures, branches = recipe.upcycle.mixtures, len(recipe.branch.domains)
    for name in RESERVED_NAMES:
        if name in mixtures:
            raise ValueError(f"upcycle.mixtures names {name!r}, which another model has at the endpoint: rename it")
    if recipe.serve.mixture is not None and recipe.serve.mixture not in mixtures:
        raise ValueError(
            f"serve.mixture is {recipe.serve.mixture!r}, which is not in upcycle.mixtures {sorted(mixtures)}"
        )
    for name, mixture in mixtures.items():
        experts = recipe.experts_of(mixture)
        if not mixture.includes_seed:
            _branches_are_enough(name, mixture, experts, branches)
        elif mixture.has_branch_experts and experts < 1 + branches:
            raise ValueError(
                f"upcycle.mixtures.{name}.num_experts is {experts}, fewer than the seed and its {branches} branches: "
                f"leave it out or make it at least {1 + branches}"
            )


def _branches_are_enough(name: str, mixture: "MixtureSettings", experts: int, branches: int) -> None:
    """Check that a mixture without the seed has at least two branches, and exactly one expert for each."""
    if branches < 2:
        raise ValueError(
            f"upcycle.mixtures.{name} has seed_expert: false, so it needs two branches or more: name another domain in "
            "branch.domains, or leave out seed_expert"
        )
    if not mixture.is_dense and experts != branches:
        raise ValueError(
            f"upcycle.mixtures.{name}.num_experts is {experts}, but with seed_expert: false each of the {branches} "
            "branches is one expert: leave out num_experts"
        )


def posterior_has_members(recipe: "Recipe") -> None:
    """Check that a posterior ensemble has a branch, and that no mixture is to be served beside it."""
    if recipe.serve.mode != "posterior":
        return
    if recipe.serve.mixture is not None:
        raise ValueError(
            f"serve.mixture is {recipe.serve.mixture!r}, but serve.mode posterior serves the seed and the branches: "
            "set serve.mixture to null, or serve.mode to mixture"
        )
    if not recipe.branch.domains:
        raise ValueError(
            "serve.mode posterior serves the seed and the branches, but branch.domains is empty: add a domain, or set "
            "serve.mode to mixture"
        )


def processes_share_experts(recipe: "Recipe") -> None:
    """Check that experts and workers are multiples of `mix.expert_parallel`."""
    size, workers = recipe.mix.expert_parallel, recipe.mix.workers or 0  # 0: as many as `size`, whatever it is
    mixtures = recipe.upcycle.mixtures.items()
    experts = {name: recipe.experts_of(mixture) for name, mixture in mixtures if not mixture.is_dense}
    choices = divisors(gcd(workers, *experts.values()))
    for name, count in experts.items():
        if count % size:
            raise ValueError(
                f"mix.expert_parallel is {size}, which does not divide the {count} experts of mixture {name}: "
                f"use one of {choices}"
            )
    if workers % size:
        raise ValueError(
            f"mix.workers is {workers}, not a multiple of mix.expert_parallel {size}: change it, or use one of "
            f"{choices} for mix.expert_parallel"
        )


def workers_share_batches(recipe: "Recipe") -> None:
    """Check that each batch is a whole number of sequences, and that workers can share it equally."""
    branch, mix = recipe.branch, recipe.mix
    jobs = [("branch", branch.training, branch.workers_of(domain)) for domain in branch.domains]
    jobs.append(("mix", mix.training, mix.processes))
    if recipe.seed.training is not None:
        jobs.append(("seed", recipe.seed.training, recipe.seed.workers))
    if recipe.compare is not None:
        jobs.append(("compare", mix.training, recipe.compare.workers))
        if recipe.compare.diloco is not None:
            jobs.append(("compare.diloco", mix.training, recipe.compare.diloco.workers))
    if recipe.adapters is not None:
        jobs.append(("adapters", recipe.adapters.training, 1))
    for section, training, workers in jobs:
        trained = "mix" if section.startswith("compare") else section  # controls have the batches of mixtures
        sequences = _sequences(trained, training.batch_tokens, recipe.data.sequence_length)
        if sequences % workers:
            shared = mix.expert_parallel if section == "mix" else 1
            choices = [number for number in divisors(sequences) if number % shared == 0]
            choice = f"use one of {choices} or" if choices else "use"
            raise ValueError(
                f"{section}.workers is {workers}, which does not divide a batch of {sequences} sequences: "
                f"{choice} another {trained}.training.batch_tokens"
            )


def _sequences(section: str, batch_tokens: int, length: int) -> int:
    """Return the number of sequences in a batch of `section`."""
    sequences, rest = divmod(batch_tokens, length)
    if rest:
        nearest = [str(tokens) for tokens in (sequences * length, (sequences + 1) * length) if tokens]
        raise ValueError(
            f"{section}.training.batch_tokens is {batch_tokens}, not a multiple of data.sequence_length {length}: "
            f"use {' or '.join(nearest)}"
        )
    return sequences


def quorum_is_enough(recipe: "Recipe") -> None:
    """Check that every mixture can start with the branches of the quorum."""
    when, branches = recipe.upcycle.when, len(recipe.branch.domains)
    if not isinstance(when, QuorumSettings):
        return
    if when.at_least > branches:
        raise ValueError(f"upcycle.when.at_least is {when.at_least}, more than the number of branches, {branches}")
    for name, mixture in recipe.upcycle.mixtures.items():
        if mixture.is_dense or not mixture.has_branches:  # it cannot start without a branch
            continue
        if not mixture.includes_seed and when.at_least < 2:
            raise ValueError(
                f"upcycle.when.at_least is {when.at_least}, but mixture {name} has seed_expert: false, so it needs two "
                "branches to start: set at_least to 2 or more, or leave out seed_expert"
            )
        experts = recipe.experts_of(mixture) - branches + when.at_least
        for key in ("num_experts_per_tok", "num_attention_experts_per_tok"):
            if getattr(mixture, key, 0) > experts:
                raise ValueError(
                    f"upcycle.mixtures.{name}.{key} is {getattr(mixture, key)}, but with upcycle.when.at_least "
                    f"{when.at_least} mixing may start with {experts} experts: raise at_least or lower {key}"
                )


def dense_mixtures_are_trained(recipe: "Recipe") -> None:
    """Check that `mix.train` leaves something to train in mixtures without experts and routers."""
    dense = [name for name, mixture in recipe.upcycle.mixtures.items() if mixture.is_dense]
    if dense and recipe.mix.train == "routers":
        raise ValueError(
            f"mix.train: routers trains nothing of mixture {dense[0]}, which is dense: leave it out or use train: all"
        )


def controls_can_be_trained(recipe: "Recipe") -> None:
    """Check that the settings of `mix.training` are valid with the tokens of each control."""
    try:
        _ = recipe.controls
    except ValidationError as error:
        raise ValueError(f"compare.dense: a control is trained as mix.training says, but {_reason(error)}") from None


def prior_has_domains(recipe: "Recipe") -> None:
    """Check that there are two domains or more, which the prior of a control can tell apart."""
    if recipe.compare is not None and recipe.compare.prior and len(recipe.data.names) < 2:
        raise ValueError("compare.prior needs two domains or more in data.domains: add one, or leave it out")


def adapters_have_topics(recipe: "Recipe") -> None:
    """Check that there are topics to train adapters for, at least one for each task, and adapters to serve."""
    if recipe.adapters is None:
        if recipe.serve.adapters is not None and recipe.serve.adapters.source is None:
            raise ValueError(
                "serve.adapters needs adapters: add the sections `topics` and `adapters`, or set serve.adapters.source "
                "to a folder with adapters"
            )
        return
    if recipe.topics is None:
        raise ValueError("adapters need topics: add a section `topics`, or leave out `adapters`")
    if recipe.topics.count != "auto" and recipe.adapters.tasks > recipe.topics.count:
        raise ValueError(
            f"adapters.tasks is {recipe.adapters.tasks}, more than topics.count {recipe.topics.count}: use at most one "
            "task for each topic"
        )
    served = recipe.serve.adapters
    if served is not None and served.source is None and recipe.adapters.rank > served.max_rank:
        raise ValueError(
            f"adapters.rank is {recipe.adapters.rank}, above serve.adapters.max_rank {served.max_rank}: raise it"
        )


def _reason(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


CHECKS: tuple[Callable[["Recipe"], None], ...] = (
    min_workers_are_fewer,
    gpus_are_used,
    domains_exist,
    mixtures_exist,
    posterior_has_members,
    processes_share_experts,
    workers_share_batches,
    quorum_is_enough,
    dense_mixtures_are_trained,
    controls_can_be_trained,
    prior_has_domains,
    adapters_have_topics,
)

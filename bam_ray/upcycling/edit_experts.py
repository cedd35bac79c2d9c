"""Experts come and go: a branch added to a mixture, one taken out, one put in another's place.

The mixture may have been trained. Experts that stay are copied bit by bit, with their router rows; nothing is trained.
What all experts share is moved towards a new branch by a weight (Nexus: 1/(n + 1)), which may be 0.

    change(mixture, absorbed(config, "math"), reader_of_math, writer, manifest, average_weight=0.0)
"""

import json
from dataclasses import dataclass
from typing import Any

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader, TensorSpec
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.families import DenseParameter, expert_name, family_of, plain_name
from bam_ray.model import BamConfig
from bam_ray.upcycling.dense import is_split, mixture_config_of, seed_config
from bam_ray.upcycling.expressions import Concat, Draw, Expression, Mean, Take
from bam_ray.upcycling.plan import Output, is_plain
from bam_ray.upcycling.preflight import check_config, check_shape, check_tensors, check_tokenizer
from bam_ray.upcycling.write import LINEAGE, Planned, Progress, Upcycled, write_mixture

MIXTURE = "mixture"


@dataclass(frozen=True)
class Change:
    """The experts there will be: each an old one's number, or None, the branch's. `row` is the old expert whose router
    rows the branch takes over; without it they are drawn anew."""

    verb: str
    slots: tuple[int | None, ...]
    names: tuple[str, ...]
    row: int | None = None


def absorbed(config: BamConfig, name: str) -> Change:
    """The branch `name` comes last; raises `UpcycleError` where there is one of that name."""
    names = names_of(config)
    if name in names:
        raise UpcycleError(f"the mixture has an expert {name!r} already: give the branch another name, or replace it")
    return Change("absorb", (*range(len(names)), None), (*names, name))


def removed(config: BamConfig, name: str) -> Change:
    """Without the expert `name`; raises `UpcycleError` where there is none, or too few would be left."""
    names = names_of(config)
    number = number_of(config, name)
    left = len(names) - 1
    if left < max(1, config.num_experts_per_tok, config.num_attention_experts_per_tok):
        raise UpcycleError(f"without {name!r} {left} experts are left, but a token meets {config.num_experts_per_tok}")
    slots = tuple(slot for slot in range(len(names)) if slot != number)
    return Change("remove", slots, tuple(names[slot] for slot in slots))


def replaced(config: BamConfig, name: str, new_name: str) -> Change:
    """The branch `new_name` in the place and with the router rows of the expert `name`."""
    names = names_of(config)
    number = number_of(config, name)
    if new_name != name and new_name in names:
        raise UpcycleError(f"the mixture has an expert {new_name!r} already: give the branch another name")
    slots = tuple(None if slot == number else slot for slot in range(len(names)))
    return Change("replace", slots, tuple(new_name if slot is None else names[slot] for slot in slots), number)


def names_of(config: BamConfig) -> list[str]:
    """The names of a mixture's experts; numbers where it has none."""
    return config.expert_names or [str(number) for number in range(config.num_experts)]


def number_of(config: BamConfig, name: str) -> int:
    """The number of the expert `name`; raises `UpcycleError`."""
    names = names_of(config)
    if name not in names:
        raise UpcycleError(f"the mixture has no expert {name!r}: it has {', '.join(names)}")
    return names.index(name)


def change(
    mixture: TensorReader,
    change: Change,
    branch: TensorReader | None,
    writer: ModelWriter,
    manifest: Manifest,
    average_weight: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    step: int | None = None,
) -> Upcycled:
    """Write the changed mixture and commit it with `manifest`. `step`, to be recorded: up to which it was trained.

    `average_weight` of the branch in what experts share; None: 1/(n + 1) where it is one more, 0 where it replaces
    another. Router rows of a new expert are drawn with the model's `initializer_range`. Raises `UpcycleError` where
    branch and mixture do not fit.
    """
    config = mixture_config_of(mixture)
    if is_split(config):
        raise UpcycleError(f"{mixture.uri} is a split of one model: its experts are slices, which no branch can join")
    sources = {MIXTURE: mixture}
    if branch is not None:
        name = next(name for name, slot in zip(change.names, change.slots, strict=True) if slot is None)
        check_branch(config, mixture, branch, name)
        sources[name] = branch
        if average_weight is None:
            average_weight = 1.0 / len(change.slots) if change.row is None else 0.0
        outputs = _Changed(config, sources, change, name, average_weight, seed).outputs()
    else:
        outputs = _Changed(config, sources, change, "", 0.0, seed).outputs()
    changed = BamConfig.from_dict(
        {**mixture.config, "num_experts": len(change.slots), "expert_names": list(change.names)}
    )
    how = {"experts": change.names, "average_weight": average_weight, "seed": seed}
    if step is not None:
        how["step"] = step
    history = [*_history(mixture), {change.verb: how, "of": {name: each.uri for name, each in sources.items()}}]
    return write_mixture(Planned(changed, outputs, [], history), sources, writer, manifest, progress=progress)


def check_branch(config: BamConfig, mixture: TensorReader, branch: TensorReader, name: str) -> None:
    """Raise `UpcycleError` where `branch` does not come from the seed that `mixture` came from."""
    dense = seed_config(config)
    family = family_of(branch.config, branch.uri)
    check_config(branch, name, dense, "the mixture's seed")
    check_tensors(branch, family)
    check_tokenizer(branch, name, mixture, "the mixture")
    for place in family.parameters(dense):
        if place.layer is None:
            plain = plain_name(place.role, None)
            check_shape(branch, place.name, mixture.specs[plain].shape, "the mixture")


def _history(mixture: TensorReader) -> list[dict[str, Any]]:
    lineage = mixture.read_file(LINEAGE)
    return list(json.loads(lineage)["history"]) if lineage else []


class _Changed:
    """The tensors of a changed mixture."""

    def __init__(
        self,
        config: BamConfig,
        sources: dict[str, TensorReader],
        change: Change,
        branch: str,
        average_weight: float,
        seed: int,
    ) -> None:
        self.config, self.sources, self.change = config, sources, change
        self.branch, self.average_weight, self.seed = branch, average_weight, seed
        self.parts: dict[str, list[DenseParameter]] = {}  # the dense places that a tensor of the mixture is made of
        dense = seed_config(config)
        for place in family_of(dense, "the seed").parameters(dense):
            if is_plain(config, place.role, place.layer):
                name = plain_name(place.role, place.layer)
            else:
                assert place.layer is not None
                name = expert_name(place.role, place.layer, config.mlp_gated)
            self.parts.setdefault(name, []).append(place)

    def outputs(self) -> list[Output]:
        """All of them, in the order of the mixture's files."""
        made = {spec.name: self._made(spec) for spec in self.sources[MIXTURE].specs.values()}
        specs = self.sources[MIXTURE].specs
        return [
            Output(TensorSpec(name, specs[name].dtype, each.shape(self.sources)), each) for name, each in made.items()
        ]

    def _made(self, spec: TensorSpec) -> Expression:
        if ".gate." in spec.name:
            return self._slots(spec, self._router_row(spec))
        if ".experts." in spec.name and spec.shape[0] == self.config.num_experts:
            return self._slots(spec, self._branch(spec, stacked=True) if self.branch else None)
        mine = Take(MIXTURE, spec.name)
        if not self.branch or not self.average_weight:
            return mine
        theirs = self._branch(spec, stacked=".experts." in spec.name)
        return Mean((mine, theirs), (1.0 - self.average_weight, self.average_weight))

    def _router_row(self, spec: TensorSpec) -> Expression:
        if self.change.row is not None:
            return Take(MIXTURE, spec.name, ((self.change.row, self.change.row + 1),))
        std = self.config.initializer_range if spec.name.endswith(".weight") else 0.0  # noise and bias begin at zero
        return Draw((1, *spec.shape[1:]), std, self.seed, f"{spec.name}/{self.branch}")

    def _branch(self, spec: TensorSpec, stacked: bool) -> Expression:
        """The branch's part of a tensor, [1, ...] where that is stacked. Raises `UpcycleError` if it does not fit."""
        takes = tuple(
            Take(self.branch, place.name, None if place.rows is None else tuple(place.rows))
            for place in self.parts[spec.name]
        )
        want, shapes = spec.shape[1:] if stacked else spec.shape, [take.shape(self.sources) for take in takes]
        if any(shape[1:] != want[1:] for shape in shapes) or sum(shape[0] for shape in shapes) != want[0]:
            raise UpcycleError(
                f"{self.sources[self.branch].uri}: {' and '.join(take.tensor for take in takes)} of {self.branch!r} "
                f"should make shape {list(want)}, but has {' and '.join(str(list(shape)) for shape in shapes)}"
            )
        part: Expression = takes[0] if len(takes) == 1 else Concat(takes)
        return Concat((part,), stacked=True) if stacked else part

    def _slots(self, spec: TensorSpec, new: Expression | None) -> Expression:
        """The experts' rows that stay, in runs, and the branch's where it comes."""
        parts: list[Expression] = []
        run: list[int] = []
        for slot in (*self.change.slots, -1):  # -1 ends the last run
            if run and slot != run[-1] + 1:
                parts.append(Take(MIXTURE, spec.name, ((run[0], run[-1] + 1),)))
                run = []
            if slot is None:
                assert new is not None
                parts.append(new)
            elif slot >= 0:
                run.append(slot)
        return parts[0] if len(parts) == 1 else Concat(tuple(parts))

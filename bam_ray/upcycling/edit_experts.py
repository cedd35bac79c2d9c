"""Edits of a mixture's experts: a branch is added, an expert is removed, or a branch replaces an expert.

The mixture may have been trained since it was upcycled. Experts that stay are copied bit by bit with their router rows,
and nothing is trained. The parameters that all experts share are moved towards a new branch by a weight (1/(n + 1) in
Nexus, arXiv 2408.15901), which may be 0. With embedding experts, the embedding and the head of the branch become tables
of the new expert. If the mixture has a router prior, the counts of the branch's text are needed too.

    edit = add_expert(config, "math")
    write_edited_mixture(mixture, edit, branch, writer, manifest, EditOptions(average_weight=0.0))
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader, TensorSpec
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.families import PRIOR_PAIRS, PRIOR_TOKENS, DenseParameter, expert_name, family_of, is_stacked, plain_name
from bam_ray.model import BamConfig
from bam_ray.upcycling.dense import check_mixture, is_split, seed_config
from bam_ray.upcycling.expressions import Concat, Counted, Draw, Expression, Mean, Take
from bam_ray.upcycling.methods import is_plain
from bam_ray.upcycling.plan import PlannedTensor
from bam_ray.upcycling.preflight import check_source
from bam_ray.upcycling.routers.counts import TokenCounts
from bam_ray.upcycling.tokenizers import check_same_tokenizer
from bam_ray.upcycling.write import ModelPlan, ProgressCallback, Upcycled, read_history, write_model

MIXTURE = "mixture"
"""The name of the edited mixture among the sources."""


@dataclass(frozen=True)
class ExpertEdit:
    """The experts of an edited mixture.

    Attributes:
        verb: The name of the edit in lineages: absorb, remove or replace.
        slots: For each expert of the result, its number in the mixture; None for the branch.
        names: The names of the experts of the result.
        router_row: The number of the expert whose router rows the branch takes over. With None they are drawn.
    """

    verb: str
    slots: tuple[int | None, ...]
    names: tuple[str, ...]
    router_row: int | None = None

    @property
    def branch(self) -> str | None:
        """The name of the branch; None if no expert is added."""
        return next((name for name, slot in zip(self.names, self.slots, strict=True) if slot is None), None)


@dataclass(frozen=True)
class EditOptions:
    """The options of an edit.

    Attributes:
        average_weight: The weight of the branch in the parameters that experts share. None means 1/n of a mixture that
            then has n experts, or 0 if the branch replaces an expert.
        seed: The random seed of new router rows.
        step: The step up to which the mixture was trained, for the lineage.
        counts: The counts of the branch's text, which only a router prior needs.
    """

    average_weight: float | None = None
    seed: int = 0
    step: int | None = None
    counts: TokenCounts | None = None

    def record(self) -> dict[str, Any]:
        """Return the entry of the lineage."""
        record = {"average_weight": self.average_weight, "seed": self.seed}
        return record if self.step is None else {**record, "step": self.step}


def add_expert(config: BamConfig, name: str) -> ExpertEdit:
    """Return the edit that adds the branch `name` as the last expert.

    Raises:
        UpcycleError: The mixture has an expert of this name.
    """
    names = names_of(config)
    if name in names:
        raise UpcycleError(f"the mixture has an expert {name!r} already: give the branch another name, or replace it")
    return ExpertEdit("absorb", (*range(len(names)), None), (*names, name))


def remove_expert(config: BamConfig, name: str) -> ExpertEdit:
    """Return the edit that removes the expert `name`.

    Raises:
        UpcycleError: The mixture has no such expert, or too few experts would be left.
    """
    names = names_of(config)
    number = number_of(config, name)
    left = len(names) - 1
    needed = max(1, config.num_experts_per_tok, config.num_attention_experts_per_tok)
    if left < needed:
        raise UpcycleError(
            f"{left} experts are left without {name!r}, but each token uses {needed}: keep {name!r} or add an expert "
            "first"
        )
    slots = tuple(slot for slot in range(len(names)) if slot != number)
    return ExpertEdit("remove", slots, tuple(names[slot] for slot in slots))


def replace_expert(config: BamConfig, name: str, new_name: str) -> ExpertEdit:
    """Return the edit that puts the branch `new_name` in the slot of the expert `name`, with its router rows.

    Raises:
        UpcycleError: The mixture has no expert `name`, or has another expert `new_name`.
    """
    names = names_of(config)
    number = number_of(config, name)
    if new_name != name and new_name in names:
        raise UpcycleError(f"the mixture has an expert {new_name!r} already: give the branch another name")
    slots = tuple(None if slot == number else slot for slot in range(len(names)))
    return ExpertEdit("replace", slots, tuple(new_name if slot is None else names[slot] for slot in slots), number)


def names_of(config: BamConfig) -> list[str]:
    """Return the names of a mixture's experts, or their numbers if the configuration has no names."""
    return config.expert_names or [str(number) for number in range(config.num_experts)]


def number_of(config: BamConfig, name: str) -> int:
    """Return the number of the expert `name`; raise `UpcycleError` if there is none."""
    names = names_of(config)
    if name not in names:
        raise UpcycleError(f"the mixture has no expert {name!r}: it has {', '.join(names)}")
    return names.index(name)


def write_edited_mixture(
    mixture: TensorReader,
    edit: ExpertEdit,
    branch: TensorReader | None,
    writer: ModelWriter,
    manifest: Manifest,
    options: EditOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Upcycled:
    """Write an edited mixture and commit it.

    New router rows are drawn with the model's `initializer_range`. If the mixture has a router prior, they are zeros:
    the prior tells the new expert from the others already, and random rows would be noise on it.

    Args:
        mixture: The mixture to edit, which is not changed itself.
        edit: The edit.
        branch: The branch that becomes an expert; None if the edit only removes one.
        writer: The writer of the edited mixture's folder.
        manifest: The manifest to commit. The digests of the files are added.
        options: The options of the edit.
        progress: Called after each chunk.

    Raises:
        UpcycleError: The branch does not fit the mixture, the mixture is a split, or its router prior needs counts of
            the branch's text that are missing or do not fit.
    """
    config = check_mixture(mixture)
    options = options or EditOptions()
    if is_split(config):
        raise UpcycleError(
            f"{mixture.uri} is a split of one model: its experts are slices, so they cannot be added, removed or "
            "replaced; upcycle branches with method bam or btx"
        )
    sources = {MIXTURE: mixture}
    if branch is not None:
        assert edit.branch is not None
        check_branch(config, mixture, branch, edit.branch)
        sources[edit.branch] = branch
        if config.router_prior != "none":
            _check_counts(config, edit.branch, options.counts)
        if options.average_weight is None:
            weight = 1.0 / len(edit.slots) if edit.router_row is None else 0.0
            options = replace(options, average_weight=weight)
    outputs = _EditPlanner(config, sources, edit, options).outputs()
    edited = BamConfig.from_dict({**mixture.config, "num_experts": len(edit.slots), "expert_names": list(edit.names)})
    record = {"experts": edit.names, **options.record()}
    history = [*read_history(mixture), {edit.verb: record, "of": {name: each.uri for name, each in sources.items()}}]
    return write_model(ModelPlan(edited, outputs, [], history), sources, writer, manifest, progress=progress)


def check_branch(config: BamConfig, mixture: TensorReader, branch: TensorReader, name: str) -> None:
    """Raise `UpcycleError` if `branch` does not come from the seed that `mixture` came from."""
    check_source(branch, name, seed_config(config), "the mixture's seed")
    check_same_tokenizer(branch, name, mixture, "the mixture")


def _check_counts(config: BamConfig, name: str, counts: TokenCounts | None) -> None:
    """Raise `UpcycleError` if `counts` are not those of a text of the branch `name` in the shapes of the mixture."""
    if counts is None or not counts.total:
        raise UpcycleError(
            f"the mixture has a router prior ({config.router_prior}), which needs text of the new expert {name!r}: "
            f"give it (--text {name}=SOURCE)"
        )
    want = (config.router_prior_vocab_size or config.vocab_size, config.router_prior_buckets)
    found = (len(counts.tokens), len(counts.pairs))
    if found != want:
        raise UpcycleError(
            f"the text of {name!r} was counted with {found[0]} tokens and {found[1]} buckets of pairs, but the counts "
            f"of the mixture have {want[0]} and {want[1]}: count it with the tokenizer of the mixture"
        )


class _EditPlanner:
    """The planner of an edited mixture's tensors."""

    def __init__(
        self, config: BamConfig, sources: Mapping[str, TensorReader], edit: ExpertEdit, options: EditOptions
    ) -> None:
        self.config, self.sources, self.edit, self.options = config, sources, edit, options
        self.branch = edit.branch
        self.dense_parameters: dict[str, list[DenseParameter]] = {}  # those that each tensor of the mixture consists of
        dense = seed_config(config)
        for parameter in family_of(dense, "the seed").parameters(dense):
            role, layer = parameter.role, parameter.layer
            if is_plain(config, role, layer):
                name = plain_name(role, layer)
            else:
                name = expert_name(role, layer, config.mlp_gated)
            self.dense_parameters.setdefault(name, []).append(parameter)

    def outputs(self) -> list[PlannedTensor]:
        """Return all tensors, in the order of the mixture's files."""
        outputs = []
        for spec in self.sources[MIXTURE].specs.values():
            expression = self._expression(spec)
            outputs.append(PlannedTensor(TensorSpec(spec.name, spec.dtype, expression.shape(self.sources)), expression))
        return outputs

    def _expression(self, spec: TensorSpec) -> Expression:
        if ".gate." in spec.name:
            return self._slots(spec, self._router_row(spec))
        if spec.name in (PRIOR_TOKENS, PRIOR_PAIRS):
            return self._slots(spec, self._counts(spec.name) if self.branch else None)
        if is_stacked(spec.name) and spec.shape[0] == self.config.num_experts:
            return self._slots(spec, self._branch_part(self.branch, spec, stacked=True) if self.branch else None)
        kept = Take(MIXTURE, spec.name)
        weight = self.options.average_weight
        if not self.branch or not weight:
            return kept
        added = self._branch_part(self.branch, spec, stacked=is_stacked(spec.name))
        return Mean((kept, added), (1.0 - weight, weight))

    def _router_row(self, spec: TensorSpec) -> Expression:
        row = self.edit.router_row
        if row is not None:
            return Take(MIXTURE, spec.name, ((row, row + 1),))
        drawn = spec.name.endswith(".weight") and self.config.router_prior == "none"  # noise and bias begin at zero
        std = self.config.initializer_range if drawn else 0.0
        return Draw((1, *spec.shape[1:]), std, self.options.seed, f"{spec.name}/{self.branch or ''}")

    def _counts(self, name: str) -> Expression:
        """Return the counts of the branch's text for one tensor of the prior, [1, ...]."""
        counts, branch = self.options.counts, self.branch
        assert counts is not None and branch is not None
        return Counted((counts.tokens if name == PRIOR_TOKENS else counts.pairs).unsqueeze(0), (branch,))

    def _branch_part(self, branch: str, spec: TensorSpec, stacked: bool) -> Expression:
        """Return the branch's part of a tensor, [1, ...] if the tensor is stacked.

        Raises:
            UpcycleError: Its shape does not fit.
        """
        takes = tuple(
            Take(branch, parameter.name, None if parameter.rows is None else tuple(parameter.rows))
            for parameter in self.dense_parameters[spec.name]
        )
        want, shapes = spec.shape[1:] if stacked else spec.shape, [take.shape(self.sources) for take in takes]
        if any(shape[1:] != want[1:] for shape in shapes) or sum(shape[0] for shape in shapes) != want[0]:
            raise UpcycleError(
                f"{self.sources[branch].uri}: {' and '.join(take.tensor for take in takes)} of {branch!r} should have "
                f"shape {list(want)}, but has {' and '.join(str(list(shape)) for shape in shapes)}: use a branch of "
                "the mixture's seed"
            )
        part: Expression = takes[0] if len(takes) == 1 else Concat(takes)
        return Concat((part,), stacked=True) if stacked else part

    def _slots(self, spec: TensorSpec, new: Expression | None) -> Expression:
        """Return the rows of the experts that stay, in runs of consecutive numbers, and the branch's in its slot."""
        parts: list[Expression] = []
        run: list[int] = []
        for slot in (*self.edit.slots, -1):  # -1 ends the last run
            if run and slot != run[-1] + 1:
                parts.append(Take(MIXTURE, spec.name, ((run[0], run[-1] + 1),)))
                run = []
            if slot is None:
                assert new is not None
                parts.append(new)
            elif slot >= 0:
                run.append(slot)
        return parts[0] if len(parts) == 1 else Concat(tuple(parts))

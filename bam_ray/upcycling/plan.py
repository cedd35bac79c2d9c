"""The plan of a model: an expression for each of its tensors. Nothing is read while planning."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bam_ray.checkpoint.tensors import TensorReader, TensorSpec
from bam_ray.families import (
    EMBEDDING_ROUTERS,
    FFN_ROLES,
    PRIOR_PAIRS,
    PRIOR_TOKENS,
    DenseParameter,
    Family,
    Role,
    expert_name,
    plain_name,
    router_names,
    shared_name,
)
from bam_ray.model import BamConfig
from bam_ray.settings import MixtureSettings, Operation, RoutedMixture, StackedMixture
from bam_ray.upcycling.expressions import (
    Concat,
    Counted,
    Draw,
    Expression,
    Fitted,
    Mean,
    Pick,
    Redrawn,
    RowMean,
    RowSpans,
    Scaled,
    Take,
    Ties,
)
from bam_ray.upcycling.methods import (
    EMBEDDING_ROLES,
    Expert,
    average_of,
    is_plain,
    models_of,
    operation_on,
    weights_embedding_rows,
)
from bam_ray.upcycling.plan_config import checkpoint_dtype
from bam_ray.upcycling.routers.counts import TokenCounts, row_weights
from bam_ray.upcycling.routers.rows import generator
from bam_ray.upcycling.split.partition import Partition

COLUMNS = (Role.DOWN, Role.OUTPUT)
"""Roles whose columns (inputs), not rows (outputs), belong to neurons or heads."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result, and the expression that computes it."""

    spec: TensorSpec
    expression: Expression


def averaged(takes: Mapping[str, Take], settings: MixtureSettings) -> Expression:
    """Return one tensor for all models, from the same tensor of each source (by name, the seed first)."""
    average = average_of(settings)
    seed, *branches = takes.values()
    if not branches:
        return seed
    if average.how == "ties":  # the seed is what the branches' changes are added to, also if it is no expert
        return Ties(seed, tuple(branches), average.density, average.scale)
    models = models_of(list(takes), settings)
    weights = tuple(average.weights.get(name, 1.0) for name in models) if average.weights else None
    return Mean(tuple(takes[name] for name in models), weights)


def row_averaged(takes: Mapping[str, Take], counts: Mapping[str, TokenCounts], rows: int) -> Expression:
    """Return one embedding of `rows` rows for all models, weighted by the counts of each model's text."""
    ordered = list(counts.values())
    return RowMean(
        tuple(takes[name] for name in counts), row_weights(ordered, rows), tuple(each.total for each in ordered)
    )


def averaged_model(
    family: Family,
    sources: Mapping[str, TensorReader],
    settings: MixtureSettings,
    embedding_counts: Mapping[str, TokenCounts],
) -> list[PlannedTensor]:
    """Return the tensors of the dense model that is the average of all models, in the seed's dtypes.

    Args:
        family: The family of all models.
        sources: The models by name, the seed first.
        settings: The method, which states how the parameters are merged.
        embedding_counts: The counts of each model's text, which weight the rows of embedding and output head. Without
            them, `average` applies to these too.
    """
    seed = next(iter(sources.values()))
    embeddings = {family.name_of(role) for role in EMBEDDING_ROLES} if embedding_counts else set()
    outputs = []
    for name in family.tensor_names(seed.config):
        spec = seed.specs[name]
        takes = {source: Take(source, name) for source in sources}
        merged = (
            row_averaged(takes, embedding_counts, spec.shape[0]) if name in embeddings else averaged(takes, settings)
        )
        outputs.append(PlannedTensor(spec, merged))
    return outputs


class Planner:
    """The planner of one mixture's tensors. `outputs()` and `routers()` together return all of them."""

    def __init__(
        self,
        family: Family,
        sources: Mapping[str, TensorReader],
        experts: Sequence[Expert],
        config: BamConfig,
        settings: RoutedMixture,
        partitions: Sequence[Partition] = (),
        counts: Mapping[str, TokenCounts] | None = None,
    ) -> None:
        self.sources = sources
        self.experts = experts
        self.config = config
        self.settings = settings
        self.partitions = partitions
        self.counts = counts or {}
        self.embedding_counts = self.counts if weights_embedding_rows(settings) else {}
        self.seed, *self.branches = sources
        self._parameters: dict[int | None, dict[Role, DenseParameter]] = defaultdict(dict)
        for parameter in family.parameters(sources[self.seed].config):
            self._parameters[parameter.layer][parameter.role] = parameter

    def outputs(self) -> list[PlannedTensor]:
        """Return all tensors except the routers, in the order of the dense model."""
        outputs: list[PlannedTensor] = []
        for layer, parameters in self._parameters.items():
            stacked: dict[str, list[DenseParameter]] = defaultdict(list)
            for role, parameter in parameters.items():
                if is_plain(self.config, role, layer):
                    outputs.append(self._output(plain_name(role, layer), parameter, self._average(parameter)))
                else:
                    stacked[expert_name(role, layer, self.config.mlp_gated)].append(parameter)
            order = list(Role)
            for name, parts in stacked.items():
                parts.sort(key=lambda parameter: order.index(parameter.role))  # gate before up
                outputs.append(self._output(name, parts[0], self._experts(parts)))
            if layer in self.config.mixture_layers and self.settings.ffn is Operation.PARTITION:
                outputs += self._shared_expert(parameters, layer)
        return outputs + self.prior()

    def prior(self) -> list[PlannedTensor]:
        """Return the counts of a router prior; an empty list if it has none."""
        if self.config.router_prior == "none":
            return []
        counts = [self.counts[expert.source] for expert in self.experts]
        stacked = {
            PRIOR_TOKENS: torch.stack([each.tokens for each in counts]),
            PRIOR_PAIRS: torch.stack([each.pairs for each in counts]).int(),
        }
        models = tuple(expert.source for expert in self.experts)
        return [
            PlannedTensor(TensorSpec(name, tensor.dtype, tuple(tensor.shape)), Counted(tensor, models))
            for name, tensor in stacked.items()
        ]

    def routers(self) -> list[PlannedTensor]:
        """Return the routers of all layers."""
        shape = (len(self.experts), self.config.hidden_size)
        dtype = checkpoint_dtype(self.sources[self.seed])
        names = [
            name
            for layer in self.config.mixture_layers
            for name in router_names(layer)[: 1 if self.settings.attention == "averaged" else 2]
        ]
        if self.config.embeddings == "experts":
            names += EMBEDDING_ROUTERS
        return [PlannedTensor(TensorSpec(name, dtype, shape), self._router(name, shape)) for name in names]

    def _router(self, name: str, shape: tuple[int, ...]) -> Expression:
        init = self.settings.router.init
        if init in ("means", "ridge"):
            return Fitted(shape, init)
        std = self.config.initializer_range if init == "random" else 0.0
        return Draw(shape, std, self.settings.seed, name)

    def _output(self, name: str, parameter: DenseParameter, expression: Expression) -> PlannedTensor:
        dtype = self.sources[self.seed].specs[parameter.name].dtype
        return PlannedTensor(TensorSpec(name, dtype, expression.shape(self.sources)), expression)

    def _take(self, parameter: DenseParameter, source: str) -> Take:
        return Take(source, parameter.name, None if parameter.rows is None else tuple(parameter.rows))

    def _average(self, parameter: DenseParameter) -> Expression:
        """Return one tensor for all experts."""
        takes = {source: self._take(parameter, source) for source in self.sources}
        if self.embedding_counts and parameter.role in EMBEDDING_ROLES:
            return row_averaged(takes, self.embedding_counts, takes[self.seed].shape(self.sources)[0])
        return averaged(takes, self.settings)

    def _experts(self, parts: Sequence[DenseParameter]) -> Expression:
        """Return one slice per expert. A slice is one parameter, or gate and up joined along the rows."""
        operation = operation_on(parts[0].role, self.settings)
        if operation is Operation.AVERAGE:
            return Concat((self._average(parts[0]),), stacked=True)
        slices = []
        for number, expert in enumerate(self.experts):
            joined = [
                self._slice(parameter, number)
                if operation is Operation.PARTITION
                else self._redrawn(self._take(parameter, expert.source), parameter, expert)
                for parameter in parts
            ]
            slices.append(joined[0] if len(joined) == 1 else Concat(tuple(joined)))
        return Concat(tuple(slices), stacked=True)

    def _redrawn(self, take: Take, parameter: DenseParameter, expert: Expert) -> Expression:
        """Return `take`, with a fraction of its neurons redrawn if the expert is a copy of the seed.

        The seed's own expert is redrawn only if all experts are copies of the seed.
        """
        fraction = self.settings.redraw_fraction if isinstance(self.settings, StackedMixture) else 0.0
        copy = expert.name != expert.source or not self.branches
        if not fraction or not copy or parameter.role not in FFN_ROLES or parameter.role is Role.DOWN_BIAS:
            return take
        neurons = self.config.intermediate_size
        seed, label = self.settings.seed, f"{expert.name}/{parameter.layer}"
        index = torch.randperm(neurons, generator=generator(seed, label))[: round(neurons * fraction)].sort().values
        dim = 1 if parameter.role in COLUMNS else 0
        return Redrawn(take, tuple(index.tolist()), dim, seed, f"{label}/{parameter.role}")

    def _slice(self, parameter: DenseParameter, number: int) -> Expression:
        """Return the part of the seed's tensor that belongs to expert `number` of a split."""
        take = self._take(parameter, self.seed)
        if parameter.role in FFN_ROLES:
            return self._ffn_slice(take, parameter, number)
        return self._attention_slice(take, parameter.role, number)

    def _ffn_slice(self, take: Take, parameter: DenseParameter, number: int) -> Expression:
        assert parameter.layer is not None
        partition = self.partitions[parameter.layer]
        if parameter.role is Role.DOWN_BIAS:  # the shared expert adds it, if there is one
            return Scaled(take, 0.0 if partition.shared else 1.0 / len(self.experts))
        dim = 1 if parameter.role in COLUMNS else 0
        return Pick(take, partition.experts[number], dim, f"neurons of slice {number + 1}")

    def _attention_slice(self, take: Take, role: Role, number: int) -> Expression:
        count = len(self.experts)
        if role is Role.OUTPUT_BIAS:
            return Scaled(take, 1.0 / count)
        shape = take.shape(self.sources)
        if role in COLUMNS:
            columns = shape[1] // count
            return Pick(take, tuple(range(number * columns, (number + 1) * columns)), 1, f"heads of slice {number + 1}")
        if role in (Role.QUERY_NORM, Role.KEY_NORM) and len(shape) == 1:  # one vector for all heads
            return take
        height = shape[0] // count
        return Take(take.source, take.tensor, _subrange(take.rows or ((0, shape[0]),), number * height, height))

    def _shared_expert(self, parameters: Mapping[Role, DenseParameter], layer: int) -> list[PlannedTensor]:
        """Return the tensors of the shared expert of a split; an empty list if it has none."""
        neurons = self.partitions[layer].shared
        outputs = []
        for role, parameter in parameters.items():
            if role not in FFN_ROLES or not neurons:
                continue
            take = self._take(parameter, self.seed)
            picked = Pick(take, neurons, 1 if role in COLUMNS else 0, "neurons of the shared expert")
            outputs.append(
                self._output(shared_name(role, layer), parameter, take if role is Role.DOWN_BIAS else picked)
            )
        return outputs


def _subrange(rows: RowSpans, start: int, length: int) -> RowSpans:
    """Return rows [start, start + length) of the concatenation of the ranges in `rows`."""
    ranges, position = [], 0
    for first, last in rows:
        begin, end = max(position, start), min(position + last - first, start + length)
        if begin < end:
            ranges.append((first + begin - position, first + end - position))
        position += last - first
    return tuple(ranges)

"""The plan of a mixture: its configuration, and for every tensor the expression that makes it, before any is read."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bam_ray.checkpoint.tensors import TensorReader, TensorSpec
from bam_ray.errors import UpcycleError
from bam_ray.families import FFN_ROLES, DenseParameter, Family, Role, expert_name, plain_name, router_names, shared_name
from bam_ray.model import BamConfig
from bam_ray.settings import Losses, MixtureSettings, divisors
from bam_ray.upcycling.expressions import (
    Concat,
    Draw,
    Expression,
    Fitted,
    Mean,
    Pick,
    Redrawn,
    Rows,
    Scaled,
    Take,
    Ties,
)
from bam_ray.upcycling.methods import KEY_SIDE, QUERY_SIDE, Operation, method_of
from bam_ray.upcycling.routers.rows import generator

COLUMNS = (Role.DOWN, Role.OUTPUT)  # whose inputs, not outputs, belong to neurons or heads


@dataclass(frozen=True)
class Expert:
    """An expert's name, and the source that it comes from."""

    name: str
    source: str


@dataclass(frozen=True)
class Partition:
    """Which neurons of one layer's FFN go to which expert, ascending, and which to the always-on shared one."""

    experts: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...] = ()


@dataclass(frozen=True)
class Output:
    """One tensor of the mixture."""

    spec: TensorSpec
    made: Expression


def experts_of(sources: Sequence[str], settings: MixtureSettings) -> list[Expert]:
    """The experts of a mixture: one a source, then copies of the first source (the seed); slices of it for a split."""
    seed, *_ = sources
    count = settings.num_experts or len(sources)
    if count < len(sources):
        raise UpcycleError(f"num_experts is {count}, fewer than the {len(sources)} models: leave out some, or raise it")
    if settings.method == "split":
        return [Expert(f"slice-{number}", seed) for number in range(1, count + 1)]
    copies = [Expert(f"{seed}-{number}", seed) for number in range(2, count - len(sources) + 2)]
    return [*(Expert(name, name) for name in sources), *copies]


def mixture_config(
    family: Family,
    seed: TensorReader,
    experts: Sequence[Expert],
    settings: MixtureSettings,
    losses: Losses,
    partitions: Sequence[Partition] = (),
) -> BamConfig:
    """The mixture's configuration, from the seed's `config.json` and the settings; raises `UpcycleError`."""
    dense = family.convert_config(seed.config)
    method = method_of(settings)
    count = len(experts)
    scale = settings.ffn_output_scale
    final = losses.at(1.0)
    sliced: dict[str, Any] = {}
    if settings.method == "split":
        scale = scale or count / settings.num_experts_per_tok
        sliced = {
            "intermediate_size": len(partitions[0].experts[0]),
            "dense_intermediate_size": dense["intermediate_size"],
            "shared_expert_intermediate_size": len(partitions[0].shared) or None,
        }
        if method.has_attention_experts:
            sliced |= _sliced_attention(dense, count)
    beyond = [layer for layer in settings.dense_layers if layer >= dense["num_hidden_layers"]]
    if beyond:
        raise UpcycleError(
            f"dense_layers names layer {beyond[0]}: the model has layers 0 to {dense['num_hidden_layers'] - 1}"
        )
    for key in ("num_experts_per_tok", "num_attention_experts_per_tok"):
        if getattr(settings, key) > count:
            raise UpcycleError(f"{key} is {getattr(settings, key)}: there are {count} experts")
    return BamConfig(
        **dense
        | sliced
        | {
            "dtype": str(_dtype(seed)).removeprefix("torch."),
            "architectures": ["BamForCausalLM"],
            "num_experts": count,
            "num_experts_per_tok": settings.num_experts_per_tok,
            "norm_topk_prob": settings.norm_topk_prob,
            "ffn_output_scale": scale or 1.0,
            "attention_experts": method.attention_experts,
            "num_attention_experts_per_tok": settings.num_attention_experts_per_tok,
            "dense_layers": sorted(set(settings.dense_layers)) or None,
            "router_aux_loss_coef": final.load_balance,
            "router_z_loss_coef": final.router_z,
            "expert_names": [expert.name for expert in experts],
            "seed_config": seed.config,
        }
    )


def _sliced_attention(dense: dict[str, Any], count: int) -> dict[str, Any]:
    """The attention of one expert where experts are slices: whole groups of key/value heads and their query heads."""
    heads = dense["num_attention_heads"]
    groups = dense.get("num_key_value_heads") or heads
    if groups % count:
        raise UpcycleError(
            f"attention has {groups} groups of key/value heads, which {count} experts cannot share alike: "
            f"use num_experts of {divisors(groups)}, or split.attention=kept"
        )
    if dense.get("qk_norm") == "full":
        raise UpcycleError(
            "query and key norms go over all heads together, so heads cannot part: use split.attention=kept"
        )
    return {
        "num_attention_heads": heads // count,
        "num_key_value_heads": groups // count,
        "head_dim": dense.get("head_dim") or dense["hidden_size"] // heads,
        "dense_num_attention_heads": heads,
        "dense_num_key_value_heads": groups,
        "attention_output_scale": float(count),
    }


def _dtype(reader: TensorReader) -> torch.dtype:
    """The dtype of a checkpoint: that of its largest tensor."""
    return max(reader.specs.values(), key=lambda spec: spec.elements).dtype


def is_plain(config: BamConfig, role: Role, layer: int | None) -> bool:
    """Whether a mixture holds a role under its plain name: one tensor, not a slice an expert.

    Keys and values that query experts share lie among the stacked, with a first dimension of 1.
    """
    if layer is None or layer not in config.mixture_layers:
        return True
    if role in FFN_ROLES:
        return False
    return role not in QUERY_SIDE | KEY_SIDE or config.attention_experts == "averaged"


class Planner:
    """Plans the tensors of one mixture. `outputs()` and `routers()` together are all of them."""

    def __init__(
        self,
        family: Family,
        sources: Mapping[str, TensorReader],
        experts: Sequence[Expert],
        config: BamConfig,
        settings: MixtureSettings,
        partitions: Sequence[Partition] = (),
    ) -> None:
        self.sources = sources
        self.experts = experts
        self.config = config
        self.settings = settings
        self.method = method_of(settings)
        self.partitions = partitions
        self.seed, *self.branches = sources
        self._places: dict[int | None, dict[Role, DenseParameter]] = defaultdict(dict)
        for place in family.parameters(sources[self.seed].config):
            self._places[place.layer][place.role] = place

    def outputs(self) -> list[Output]:
        """All tensors but the routers, in the order of the dense model."""
        made: list[Output] = []
        for layer, places in self._places.items():
            stacked: dict[str, list[DenseParameter]] = defaultdict(list)
            for role, place in places.items():
                if is_plain(self.config, role, layer):
                    made.append(self._output(plain_name(role, layer), place, self._average(place)))
                else:
                    assert layer is not None
                    stacked[expert_name(role, layer, self.config.mlp_gated)].append(place)
            order = list(Role)
            for name, parts in stacked.items():
                parts.sort(key=lambda place: order.index(place.role))  # gate before up
                made.append(self._output(name, parts[0], self._experts(parts)))
            if layer in self.config.mixture_layers and self.settings.method == "split":
                made += self._shared(places, layer)
        return made

    def routers(self) -> list[Output]:
        """The routers of all layers."""
        shape = (len(self.experts), self.config.hidden_size)
        dtype = _dtype(self.sources[self.seed])
        names = [
            name
            for layer in self.config.mixture_layers
            for name in router_names(layer)[: 1 + self.method.has_attention_experts]
        ]
        return [Output(TensorSpec(name, dtype, shape), self._router(name, shape)) for name in names]

    def _router(self, name: str, shape: tuple[int, ...]) -> Expression:
        init = self.settings.router.init
        if init in ("means", "ridge"):
            return Fitted(shape, init)
        std = self.config.initializer_range if init == "random" else 0.0
        return Draw(shape, std, self.settings.seed, name)

    def _output(self, name: str, place: DenseParameter, made: Expression) -> Output:
        dtype = self.sources[self.seed].specs[place.name].dtype
        return Output(TensorSpec(name, dtype, made.shape(self.sources)), made)

    def _take(self, place: DenseParameter, source: str) -> Take:
        return Take(source, place.name, None if place.rows is None else tuple(place.rows))

    def _average(self, place: DenseParameter) -> Expression:
        """One tensor for all experts."""
        takes = tuple(self._take(place, source) for source in self.sources)
        average = self.settings.average
        if len(takes) == 1:
            return takes[0]
        if average.how == "ties":
            return Ties(takes[0], takes[1:], average.density, average.scale)
        if not average.weights:
            return Mean(takes)
        weights = tuple(average.weights.get(source, 1.0) for source in self.sources)
        return Mean(takes, weights)

    def _experts(self, parts: Sequence[DenseParameter]) -> Expression:
        """One slice an expert: each of one place, or of gate and up one after the other."""
        operation = self.method.operation(parts[0].role)
        if operation is Operation.AVERAGE:
            return Concat((self._average(parts[0]),), stacked=True)
        slices = []
        for number, expert in enumerate(self.experts):
            one = [
                self._slice(place, number)
                if operation is Operation.PARTITION
                else self._redrawn(self._take(place, expert.source), place, expert)
                for place in parts
            ]
            slices.append(one[0] if len(one) == 1 else Concat(tuple(one)))
        return Concat(tuple(slices), stacked=True)

    def _redrawn(self, take: Take, place: DenseParameter, expert: Expert) -> Expression:
        """A copy of the seed, with a part of its neurons drawn anew where the settings say so (not the seed's own
        expert, unless all are copies of it)."""
        fraction = self.settings.redraw_fraction
        copy = expert.name != expert.source or not self.branches
        if not fraction or not copy or place.role not in FFN_ROLES or place.role is Role.DOWN_BIAS:
            return take
        neurons = self.config.intermediate_size
        seed, label = self.settings.seed, f"{expert.name}/{place.layer}"
        index = torch.randperm(neurons, generator=generator(seed, label))[: round(neurons * fraction)].sort().values
        dim = 1 if place.role in COLUMNS else 0
        return Redrawn(take, tuple(index.tolist()), dim, seed, f"{label}/{place.role}")

    def _slice(self, place: DenseParameter, number: int) -> Expression:
        """Expert `number`'s part of the seed's tensor."""
        take = self._take(place, self.seed)
        role, count = place.role, len(self.experts)
        if role in FFN_ROLES:
            assert place.layer is not None
            partition = self.partitions[place.layer]
            if role is Role.DOWN_BIAS:  # the shared expert adds it where there is one
                return Scaled(take, 0.0 if partition.shared else 1.0 / count)
            return Pick(take, partition.experts[number], 1 if role in COLUMNS else 0, f"neurons of slice {number + 1}")
        if role is Role.OUTPUT_BIAS:
            return Scaled(take, 1.0 / count)
        shape = take.shape(self.sources)
        if role in COLUMNS:
            columns = shape[1] // count
            return Pick(take, tuple(range(number * columns, (number + 1) * columns)), 1, f"heads of slice {number + 1}")
        if role in (Role.QUERY_NORM, Role.KEY_NORM) and len(shape) == 1:  # one for all heads
            return take
        height = shape[0] // count
        return Take(take.source, take.tensor, _below(take.rows or ((0, shape[0]),), number * height, height))

    def _shared(self, places: Mapping[Role, DenseParameter], layer: int) -> list[Output]:
        """The always-on expert of a split."""
        neurons = self.partitions[layer].shared
        made = []
        for role, place in places.items():
            if role not in FFN_ROLES or not neurons:
                continue
            take = self._take(place, self.seed)
            picked = Pick(take, neurons, 1 if role in COLUMNS else 0, "neurons of the shared expert")
            made.append(self._output(shared_name(role, layer), place, take if role is Role.DOWN_BIAS else picked))
        return made


def _below(rows: Rows, start: int, length: int) -> Rows:
    """Rows [start, start + length) of those in `rows`."""
    found, passed = [], 0
    for first, last in rows:
        begin, end = max(passed, start), min(passed + last - first, start + length)
        if begin < end:
            found.append((first + begin - passed, first + end - passed))
        passed += last - first
    return tuple(found)

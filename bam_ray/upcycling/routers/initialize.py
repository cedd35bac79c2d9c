"""Routers of a mixture set from a little text of each domain, without training.

A router drawn at random sends tokens anywhere, and the first part of a mixture's training goes into telling the
domains apart. Their texts say as much at once: run them through the mixture and set each router so that it knows the
domains' tokens by its inputs (`router_rows`). The layers are done in order, for what a router sees depends on all the
routers before it.

    tensors, separation = fit_routers(config, reader.read, {"code": rows, "law": rows}, "ridge", seed=0)
    rich.print(separation_table(separation))

One layer's weights are in memory at a time, and the hidden states of all text twice (as a layer's and as a router's
inputs): 4 GiB at 4096 hidden and 262144 tokens in bfloat16. The layers run in the dtype of their tensors.
"""

import copy
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from bam_ray.errors import UpcycleError
from bam_ray.model import BamConfig
from bam_ray.model.attention_bam import BamRotaryEmbedding
from bam_ray.model.modeling_bam import BamModel
from bam_ray.model.routing_bam import BamRouter
from bam_ray.upcycling.routers.rows import Assignment, fit_router, generator, router_logits
from bam_ray.upcycling.routers.separation import RouterKind, RouterSeparation, Separation

BATCH_TOKENS = 8192  # through a layer at a time

Read = Callable[[str], Tensor]


@torch.no_grad()
def fit_routers(
    config: BamConfig,
    read: Read,
    texts: dict[str, Tensor],
    how: Literal["means", "ridge"],
    seed: int,
    held_out_fraction: float = 0.25,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], Separation]:
    """Every router of a mixture [N, d] by its tensor's name, in the mixture's dtype, and how well each tells domains.

    `read(name)` gives a tensor of the mixture, all of which exist but the routers. `texts` maps names of experts to
    token rows [S, L], int64. A copy of an expert with text ("code-2" of "code") shares its text; other experts
    without text get a zero row. Of each text `held_out_fraction` of the rows serves only to score; all three
    initialisations are scored, on the inputs that the routers by `how` lead to. All domains count alike, whatever they
    have of text. `progress` is told layers done and layers in all.
    Raises `UpcycleError` where fewer than two experts have text, a text has a single row, or no expert has its name.
    """
    assignment = _assignment(config.expert_names or [], texts)
    splits = {name: split_rows(name, len(rows), held_out_fraction, seed) for name, rows in texts.items()}
    ordered = {name: rows[torch.cat(splits[name])] for name, rows in texts.items()}  # those to score last
    fit_rows = {name: len(fit) for name, (fit, _) in splits.items()}
    stream = _Stream(config, read, ordered)
    tensors: dict[str, Tensor] = {}
    separations: list[RouterSeparation] = []
    for index in range(config.num_hidden_layers):
        for name, router in stream.load(index):
            inputs = stream.inputs_of(router)
            fit = [inputs[domain][: fit_rows[domain]].flatten(0, 1) for domain in texts]
            held_out = [inputs[domain][fit_rows[domain] :].flatten(0, 1) for domain in texts]
            full_name = f"model.layers.{index}.{name}.weight"
            noise = partial(generator, seed, "copies", full_name)
            weights = {"random": draw_router(full_name, config, seed), **fit_router(assignment, fit, noise)}
            weights = {kind: weight.to(stream.dtype) for kind, weight in weights.items()}
            scores = {
                kind: assignment.score([router_logits(part, weight) for part in held_out])
                for kind, weight in weights.items()
            }
            router.weight = nn.Parameter(weights[how], requires_grad=False)
            tensors[full_name] = weights[how]
            separations.append(RouterSeparation(layer=index, kind=_kind(name), scores=scores))
            del inputs, fit, held_out  # before the next router's
        if index + 1 < config.num_hidden_layers:
            stream.advance()
        if progress is not None:
            progress(index + 1, config.num_hidden_layers)
    return tensors, Separation(
        how=how,
        domains=assignment.domains,
        fit_tokens=sum(ordered[name][: fit_rows[name]].numel() for name in texts),
        held_out_tokens=sum(ordered[name][fit_rows[name] :].numel() for name in texts),
        chance=assignment.chance(),
        routers=tuple(separations),
    )


def draw_router(name: str, config: BamConfig, seed: int) -> Tensor:
    """A router at random [N, d], in fp32: normal with the configuration's `initializer_range`, by its name and seed."""
    shape = (config.num_experts, config.hidden_size)
    return torch.randn(shape, generator=generator(seed, name)) * config.initializer_range


def split_rows(name: str, count: int, held_out_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """The rows of a text to fit with and those to score with, by a seeded shuffle: at least one of each."""
    if count < 2:
        raise UpcycleError(f"the text of {name!r} has {count} rows: give at least 2, one of them to score with")
    held_out = min(max(round(count * held_out_fraction), 1), count - 1)
    order = torch.randperm(count, generator=generator(seed, "rows", name))
    return order[held_out:], order[:held_out]


def _assignment(names: list[str], texts: dict[str, Tensor]) -> Assignment:
    unknown = sorted(texts.keys() - set(names))
    if unknown:
        raise UpcycleError(f"there is text for {unknown[0]!r}, but no such expert: the mixture has {names}")
    if len(texts) < 2:
        raise UpcycleError(
            f"routers learn from text to tell experts apart, and there is text for {sorted(texts)} alone: "
            f"give text of two or more of {names}, or draw the routers at random"
        )
    originals = [
        match[1] if (match := re.fullmatch(r"(.+)-\d+", name)) and name not in texts else name for name in names
    ]
    return Assignment(
        domains=tuple(texts),
        originals=torch.tensor([names.index(domain) for domain in texts]),
        right=torch.tensor([[original == domain for original in originals] for domain in texts]),
    )


def _kind(router: str) -> RouterKind:
    return "attention" if router.startswith("self_attn.") else "ffn"


class _Reached(Exception):
    """A router's input is known: the rest of the layer need not run."""


class _Skipped(nn.Module):
    """In a layer's place."""

    def forward(self, x: Tensor, **kwargs: object) -> tuple[Tensor, None, None]:
        return x, None, None


class _Stream:
    """The hidden states of all rows on their way through the mixture.

    It is `BamModel` that runs, so that masks, positions and blocks are its own: made without memory, with one layer
    filled at a time and passing by the others.
    """

    def __init__(self, config: BamConfig, read: Read, rows: dict[str, Tensor]) -> None:
        self._read = read
        config = copy.deepcopy(config)  # a model writes into its own
        with torch.device("meta"):
            self._model = BamModel(config).eval().requires_grad_(False)
        self._layers = list(self._model.layers)
        self._model.layers = nn.ModuleList(_Skipped() for _ in self._layers)
        self._model.rotary_emb = BamRotaryEmbedding(config)
        self._model.norm = nn.Identity()  # of the last layer's output, which no router sees
        embedding = self._model.embed_tokens
        self._fill(embedding, "model.embed_tokens.")
        self.dtype = embedding.weight.dtype
        self._states = {name: embedding(part) for name, part in rows.items()}  # [S, L, d] each
        embedding.to("meta")

    def load(self, index: int) -> list[tuple[str, BamRouter]]:
        """Hold this layer alone. Returns its routers, not set yet, by name in the order they run; a dense layer has
        none.
        """
        self._index, layer = index, self._layers[index]
        self._fill(layer, f"model.layers.{index}.")
        self._model.layers[index] = layer
        routers = [(name, module) for name, module in layer.named_modules() if isinstance(module, BamRouter)]
        return sorted(routers, key=lambda router: _kind(router[0]))  # attention first

    def inputs_of(self, router: BamRouter) -> dict[str, Tensor]:
        """What reaches a router of the layer, those before it being set: [S, L, d] each."""
        seen = {name: torch.empty_like(states) for name, states in self._states.items()}
        for name, states in self._states.items():
            for part, into in zip(_batches(states), _batches(seen[name]), strict=True):
                handle = router.register_forward_pre_hook(partial(_keep_input, into))
                with handle, suppress(_Reached):
                    self._run(part)
        return seen

    def advance(self) -> None:
        """Run all rows through the layer, and drop it."""
        for states in self._states.values():
            for part in _batches(states):
                part.copy_(self._run(part))
        self._model.layers[self._index] = _Skipped()
        self._layers[self._index].to("meta")

    def _run(self, states: Tensor) -> Tensor:
        out: Tensor = self._model(inputs_embeds=states, use_cache=False).last_hidden_state
        return out

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Read everything of `module` but its routers' weights."""
        routers = {f"{name}.weight" for name, child in module.named_modules() if isinstance(child, BamRouter)}
        names = [name for name in module.state_dict() if name not in routers]
        module.load_state_dict({name: self._read(prefix + name) for name in names}, strict=False, assign=True)


def _batches(states: Tensor) -> tuple[Tensor, ...]:
    """Views of rows [S, L, d] that make about `BATCH_TOKENS` each."""
    views: tuple[Tensor, ...] = states.split(max(1, BATCH_TOKENS // states.shape[1]))
    return views


def _keep_input(into: Tensor, _: nn.Module, args: tuple[Tensor]) -> None:
    into.copy_(args[0].view_as(into))
    raise _Reached

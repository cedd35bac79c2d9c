"""Fitting of a mixture's routers to a little text of each domain, without training.

Problem: a randomly drawn router sends tokens to arbitrary experts, so a mixture's training first has to learn to
separate the domains. A little text of each domain already contains this information.

Design choice: the text runs through the mixture, and each router is set in closed form so that it recognizes the tokens
of a domain by the router's inputs (see `rows`). Layers are processed in order, because the inputs of a router depend on
all routers before it.

    tensors, separation = fit_routers(config, reader.read, {"code": rows, "law": rows}, "ridge", seed=0)
    rich.print(separation_table(separation))

Routers that read the prefix are fitted to the running means of their inputs over each row of text. Embedding experts
have routers before the first layer and after the last, which are fitted in the same way.

Limits: the weights of one layer are in memory at a time, and the hidden states of all text twice (as the inputs of a
layer and of a router): 4 GiB for a hidden size of 4096 and 262144 tokens in bfloat16. The layers run in the dtype of
their tensors.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bam_ray.errors import UpcycleError
from bam_ray.model import BamConfig
from bam_ray.model.attention_bam import BamRotaryEmbedding
from bam_ray.model.modeling_bam import BamModel, following_positions
from bam_ray.model.prefix_bam import Documents, RoutingContext
from bam_ray.model.routing_bam import BamRouter
from bam_ray.upcycling.routers.rows import Assignment, fit_router, generator, router_logits
from bam_ray.upcycling.routers.separation import RouterKind, RouterSeparation, Separation

BATCH_TOKENS = 8192
"""Number of tokens that run through a layer at the same time."""

KINDS: dict[str, RouterKind] = {
    "self_attn.": "attention",
    "embed_tokens.": "embedding",
    "head.": "head",
}
"""The kind of a router by a part of its name; all others are those of FFN experts."""

ReadTensor = Callable[[str], Tensor]


@torch.no_grad()
def fit_routers(
    config: BamConfig,
    read: ReadTensor,
    texts: dict[str, Tensor],
    how: Literal["means", "ridge"],
    seed: int,
    held_out_fraction: float = 0.25,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], Separation]:
    """Fit all routers of a mixture.

    All domains have the same weight, no matter how much text they have. All three initializations are scored, on the
    inputs that the routers of the method `how` produce.

    Args:
        config: The configuration of the mixture.
        read: Returns a tensor of the mixture by name. All tensors except the routers exist.
        texts: Rows of tokens, int64 [S, L], by the name of an expert. A copy of an expert with text ("code-2" of
            "code") shares its text. Other experts without text get a row of zeros.
        how: The method of the fit.
        seed: The random seed.
        held_out_fraction: The fraction of the rows of each text that is used only for scores.
        progress: Called with the number of layers that are done and the number of all layers. The input and the output
            of embedding experts count as layers.

    Returns:
        The routers [N, d] in the mixture's dtype by the names of their tensors, and how well they separate the domains.

    Raises:
        UpcycleError: Fewer than two experts have text, a text has only one row, or text has the name of no expert.
    """
    assignment = _assignment(config.expert_names or [], texts)
    splits = {name: split_rows(name, len(rows), held_out_fraction, seed) for name, rows in texts.items()}
    ordered = {name: rows[torch.cat(splits[name])] for name, rows in texts.items()}  # held-out rows last
    fit_rows = {name: len(fit) for name, (fit, _) in splits.items()}
    stream = _Stream(config, read, ordered)
    tensors: dict[str, Tensor] = {}
    separations: list[RouterSeparation] = []
    for number, (prefix, routers) in enumerate(stream.parts()):
        if progress is not None:
            progress(number, stream.count)
        for name, router in routers:
            inputs = stream.inputs_of(router)
            fit = [inputs[domain][: fit_rows[domain]].flatten(0, 1) for domain in texts]
            held_out = [inputs[domain][fit_rows[domain] :].flatten(0, 1) for domain in texts]
            full_name = f"{prefix}{name}.weight"
            noise = partial(generator, seed, "copies", full_name)
            weights = {"random": draw_router(full_name, config, seed), **fit_router(assignment, fit, noise)}
            weights = {kind: weight.to(stream.dtype) for kind, weight in weights.items()}
            scores = {
                kind: assignment.score([router_logits(part, weight) for part in held_out])
                for kind, weight in weights.items()
            }
            router.weight = nn.Parameter(weights[how], requires_grad=False)
            tensors[full_name] = weights[how]
            separations.append(RouterSeparation(layer=_layer(prefix), kind=_kind(full_name), scores=scores))
            del inputs, fit, held_out  # free them before the inputs of the next router are collected
    if progress is not None:
        progress(stream.count, stream.count)
    return tensors, Separation(
        how=how,
        domains=assignment.domains,
        fit_tokens=sum(ordered[name][: fit_rows[name]].numel() for name in texts),
        held_out_tokens=sum(ordered[name][fit_rows[name] :].numel() for name in texts),
        chance=assignment.chance(),
        routers=tuple(separations),
    )


def draw_router(name: str, config: BamConfig, seed: int) -> Tensor:
    """Draw a router [N, d] in fp32, normal with the configuration's `initializer_range`, from its name and the seed."""
    shape = (config.num_experts, config.hidden_size)
    return torch.randn(shape, generator=generator(seed, name)) * config.initializer_range


def split_rows(name: str, count: int, held_out_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the rows to fit on and of the held-out rows, by a seeded shuffle: at least one of each."""
    if count < 2:
        raise UpcycleError(f"the text of {name!r} has {count} rows: give at least 2, one of which is held out")
    held_out = min(max(round(count * held_out_fraction), 1), count - 1)
    order = torch.randperm(count, generator=generator(seed, "rows", name))
    return order[held_out:], order[:held_out]


def _assignment(names: list[str], texts: dict[str, Tensor]) -> Assignment:
    unknown = sorted(texts.keys() - set(names))
    if unknown:
        raise UpcycleError(f"there is text for {unknown[0]!r}, but no such expert: use names of {names}")
    if len(texts) < 2:
        raise UpcycleError(
            f"fitted routers need text of at least two domains, but there is only text for {sorted(texts)}: "
            f"give text of two or more of {names}, or use router.init=random"
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
    return next((kind for part, kind in KINDS.items() if part in router), "ffn")


def _layer(prefix: str) -> int | None:
    return int(prefix.split(".")[2]) if prefix.startswith("model.layers.") else None


class _InputReached(Exception):
    """The input of a router is known, so the rest of the layer need not run."""


class _IdentityLayer(nn.Module):
    """A layer that returns its input, in the place of the layers that are not processed."""

    def forward(self, x: Tensor, **kwargs: object) -> tuple[Tensor, None, None]:
        return x, None, None


class _Stream:
    """The text of all domains, which is advanced through the mixture: embedding, layer by layer, head.

    `BamModel` itself runs, so masks, positions and blocks are exactly its own. It is created on the meta device and
    has the weights of one layer at a time; all other layers are replaced by the identity.
    """

    def __init__(self, config: BamConfig, read: ReadTensor, rows: dict[str, Tensor]) -> None:
        self._read = read
        config = copy.deepcopy(config)  # a model changes its configuration
        with torch.device("meta"):
            self._model = BamModel(config).eval().requires_grad_(False)
        self._layers = list(self._model.layers)
        self._norm, self._model.norm = self._model.norm, nn.Identity()
        self._model.layers = nn.ModuleList(_IdentityLayer() for _ in self._layers)
        self._model.rotary_emb = BamRotaryEmbedding(config)
        self._reads_prefix = config.router_input == "prefix"
        self._states = rows  # token ids [S, L], then hidden states [S, L, d]
        self._run: Callable[[Tensor], Any] = self._run_layers
        self.dtype = torch.float32
        self.count = len(self._layers) + (2 if config.embeddings == "experts" else 0)  # the number of `parts`

    def parts(self) -> Iterator[tuple[str, list[tuple[str, BamRouter]]]]:
        """Yield the prefix of the names of each part, and its routers by name in the order in which they run.

        The routers are not set yet, and must be before the next part. A dense layer has none.
        """
        embedding, head = self._model.embed_tokens, self._model.head
        routers = self._load(embedding, "model.embed_tokens.")
        self.dtype = next(embedding.parameters()).dtype
        self._run = lambda ids: self._model.embed(ids, self._context(ids))
        if routers:
            yield "model.embed_tokens.", routers
        self._states = {
            name: torch.cat([self._run(part) for part in _batches(rows)]) for name, rows in self._states.items()
        }
        embedding.to("meta")
        self._run = self._run_layers
        for index, layer in enumerate(self._layers):
            prefix = f"model.layers.{index}."
            routers = self._load(layer, prefix)
            self._model.layers[index] = layer
            yield prefix, routers
            if index + 1 < len(self._layers) or head is not None:
                self._advance()
            self._model.layers[index] = _IdentityLayer()
            layer.to("meta")
        if head is not None:
            self._load(self._norm, "model.norm.")
            self._run = lambda states: head(self._norm(states), self._context(states))
            yield "model.head.", self._load(head, "model.head.")

    def inputs_of(self, router: BamRouter) -> dict[str, Tensor]:
        """Return the inputs of a router of the part by domain, [S, L, d] each. Routers before it must be set."""
        inputs = {}
        for name, states in self._states.items():
            found: list[Tensor] = []
            for part in _batches(states):
                handle = router.register_forward_pre_hook(partial(_keep_input, found))
                with handle, suppress(_InputReached):
                    self._run(part)
                found[-1] = found[-1].to(self.dtype).view(*part.shape[:2], -1)
            inputs[name] = torch.cat(found)
        if not self._reads_prefix:
            return inputs
        return {name: _running_mean(part, self._model.config.router_forgetting) for name, part in inputs.items()}

    def _advance(self) -> None:
        """Run all rows through the layer."""
        for states in self._states.values():
            for part in _batches(states):
                part.copy_(self._run(part))

    def _context(self, given: Tensor) -> RoutingContext | None:
        model: BamModel = self._model
        return model.routing_context(None, given, following_positions(given, None), None, None)

    def _run_layers(self, states: Tensor) -> Tensor:
        out: Tensor = self._model(inputs_embeds=states, use_cache=False).last_hidden_state
        return out

    def _load(self, module: nn.Module, prefix: str) -> list[tuple[str, BamRouter]]:
        """Read all tensors of `module` except the weights of its routers, and return these in their order."""
        routers = [(name, child) for name, child in module.named_modules() if isinstance(child, BamRouter)]
        left_out = {f"{name}.weight" for name, _ in routers}
        names = [name for name in module.state_dict() if name not in left_out]
        module.load_state_dict({name: self._read(prefix + name) for name in names}, strict=False, assign=True)
        return sorted(routers, key=lambda router: _kind(router[0]))  # attention first


def _batches(states: Tensor) -> tuple[Tensor, ...]:
    """Return views of rows [S, L, d] with about `BATCH_TOKENS` tokens each."""
    views: tuple[Tensor, ...] = states.split(max(1, BATCH_TOKENS // states.shape[1]))
    return views


def _running_mean(inputs: Tensor, forgetting: float) -> Tensor:
    """Return the weighted mean over the tokens of each row up to each token: [S, L, d] -> [S, L, d]."""
    rows = Documents(torch.arange(inputs.shape[1])[None], None, False, forgetting)
    count = rows.running_sum(torch.ones(1, inputs.shape[1], 1), None)
    return torch.stack([(rows.running_sum(row[None], None) / count)[0].to(inputs.dtype) for row in inputs])


def _keep_input(found: list[Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    found.append(args[0])
    raise _InputReached

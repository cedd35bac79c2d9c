"""A planned mixture into a store: tensors first, then what tells where they came from, the manifest last."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from torch import Tensor

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader, TensorSpec
from bam_ray.checkpoint.writing import ChunkProducer, ModelWriter
from bam_ray.model import BamConfig
from bam_ray.upcycling.card import model_card
from bam_ray.upcycling.expressions import Fitted
from bam_ray.upcycling.plan import Output
from bam_ray.upcycling.routers.initialize import fit_routers
from bam_ray.upcycling.routers.separation import Separation

LINEAGE = "lineage.json"
SEPARATION = "separation.json"
PARTITION = "partition.json"
CARD = "README.md"
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
# For `trust_remote_code` where this package is not installed
MODEL_CODE = (
    "attention_bam.py",
    "attention_exchange_bam.py",
    "configuration_bam.py",
    "experts_bam.py",
    "layers_bam.py",
    "modeling_bam.py",
    "routing_bam.py",
    "token_dispatch_bam.py",
)
AUTO_MAP = {"AutoConfig": "configuration_bam.BamConfig", "AutoModelForCausalLM": "modeling_bam.BamForCausalLM"}

Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""


@dataclass(frozen=True)
class Planned:
    """A mixture to be written. `history` is what was done to get it, oldest first, as plain JSON."""

    config: BamConfig
    outputs: list[Output]
    routers: list[Output]
    history: list[dict[str, Any]]
    seed: int = 0  # of what is drawn while routers are fitted
    more: Mapping[str, bytes] = field(default_factory=dict)  # further files


@dataclass(frozen=True)
class Upcycled:
    """What was made: its configuration, its committed manifest, and how well fitted routers tell domains apart."""

    config: BamConfig
    manifest: Manifest
    separation: Separation | None


def write_mixture(
    planned: Planned,
    sources: Mapping[str, TensorReader],
    writer: ModelWriter,
    manifest: Manifest,
    texts: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Upcycled:
    """Write a mixture and commit it with `manifest`; where anything fails before that, there is none.

    `texts` are rows of tokens, int64 [S, L], by expert name: for routers that are fitted.
    """
    separation = _write_tensors(planned, sources, writer, texts or {}, progress)
    lineage = {
        "sources": {name: source.uri for name, source in sources.items()},
        "history": planned.history,
        "tensors": {output.spec.name: output.made.origin() for output in (*planned.outputs, *planned.routers)},
    }
    writer.write_file(LINEAGE, json.dumps(lineage, indent=1).encode())
    if separation is not None:
        writer.write_file(SEPARATION, separation.to_json().encode())
    for name in CARRIED:
        data = next(iter(sources.values())).read_file(name)
        if data is not None:
            writer.write_file(name, data)
    for name, data in planned.more.items():
        writer.write_file(name, data)
    writer.write_file(CARD, model_card(planned.config, lineage).encode())
    for name in MODEL_CODE:
        writer.write_file(name, (files("bam_ray.model") / name).read_bytes())
    planned.config.auto_map = AUTO_MAP
    return Upcycled(planned.config, writer.commit(planned.config.to_json_string(), manifest), separation)


def _write_tensors(
    planned: Planned,
    sources: Mapping[str, TensorReader],
    writer: ModelWriter,
    texts: Mapping[str, Tensor],
    progress: Progress | None,
) -> Separation | None:
    """Write all tensors; routers that are to be fitted come last, from the others that are in the store by then."""
    made = {output.spec.name: output.made for output in (*planned.outputs, *planned.routers)}
    fitted = {name: how.how for name, how in made.items() if isinstance(how, Fitted)}
    routers: dict[str, Tensor] = {}
    separation: Separation | None = None

    def produce(spec: TensorSpec) -> Iterator[Tensor]:
        nonlocal separation
        if spec.name not in fitted:
            return made[spec.name].pieces(sources)
        if not routers:
            reader = TensorReader(writer.store, writer.prefix, writer.shards)
            how = fitted[spec.name]
            weights, separation = fit_routers(planned.config, reader.read, dict(texts), how, planned.seed)
            routers.update(weights)
        return iter([routers[spec.name]])

    outputs = [output.spec for output in planned.outputs]
    last = [output.spec for output in planned.routers]
    counted = progressing(produce, [*planned.outputs, *planned.routers], progress)
    if fitted:
        writer.write_tensors(outputs, counted, last)
    else:
        writer.write_tensors([*outputs, *last], counted)
    return separation


def progressing(produce: ChunkProducer, outputs: Sequence[Output], progress: Progress | None) -> ChunkProducer:
    """`produce`, with `progress` told of the bytes made."""
    total = sum(output.spec.bytes for output in outputs)
    done = 0

    def counted(spec: TensorSpec) -> Iterator[Tensor]:
        nonlocal done
        for piece in produce(spec):
            yield piece
            done += piece.numel() * spec.dtype.itemsize
            if progress is not None:
                progress(done, total)

    return counted

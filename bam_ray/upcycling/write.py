"""Writing of a planned model to a store: first the tensors, then lineage and model card, and the manifest last."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

from torch import Tensor

from bam_ray.checkpoint.malloc import large_buffers_returned
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.model_folder import parse_object
from bam_ray.checkpoint.tensors import TensorReader, TensorSpec
from bam_ray.checkpoint.writing import ChunkProducer, ModelWriter
from bam_ray.errors import CheckpointError
from bam_ray.model import BamConfig
from bam_ray.upcycling.card import dense_card, model_card
from bam_ray.upcycling.expressions import Fitted
from bam_ray.upcycling.plan import PlannedTensor
from bam_ray.upcycling.routers.initialize import fit_routers
from bam_ray.upcycling.routers.separation import Separation
from bam_ray.upcycling.tokenizers import carried_files

LINEAGE = "lineage.json"
SEPARATION = "separation.json"
PARTITION = "partition.json"
CARD = "README.md"
# Copied into the folder for `trust_remote_code`, for readers that have not installed this package
MODEL_CODE = (
    "attention_bam.py",
    "attention_exchange_bam.py",
    "bigrams_bam.py",
    "configuration_bam.py",
    "embeddings_bam.py",
    "experts_bam.py",
    "layers_bam.py",
    "modeling_bam.py",
    "prefix_bam.py",
    "routing_bam.py",
    "table_exchange_bam.py",
    "token_dispatch_bam.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_bam.BamConfig",
    "AutoModel": "modeling_bam.BamModel",
    "AutoModelForCausalLM": "modeling_bam.BamForCausalLM",
}

UpcyclingPhase = Literal["writing", "fitting routers"]
ProgressCallback = Callable[[int, int, UpcyclingPhase], None]
"""Called with what is done and the total: bytes while tensors are written, layers while routers are fitted."""
"""A function that is called with the number of bytes written so far and the total number of bytes."""


@dataclass(frozen=True)
class ModelPlan:
    """A model that is planned and not written yet.

    Attributes:
        config: The configuration of a mixture, or the content of the config.json of a dense model.
        outputs: All tensors except routers.
        routers: The routers. A dense model has none.
        history: The operations that lead to the model, oldest first, as plain JSON.
        seed: The random seed of the noise and of the order of text while routers are fitted.
        extra_files: The contents of further files by name.
    """

    config: BamConfig | dict[str, Any]
    outputs: list[PlannedTensor]
    routers: list[PlannedTensor]
    history: list[dict[str, Any]]
    seed: int = 0
    extra_files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def tensors(self) -> list[PlannedTensor]:
        """All tensors in the order in which they are written."""
        return [*self.outputs, *self.routers]


@dataclass(frozen=True)
class Upcycled:
    """A committed model.

    Attributes:
        experts: The names of its experts; empty if the model is dense.
        manifest: The manifest, with the digests of its files.
        separation: How well fitted routers separate the domains; None if no routers were fitted.
    """

    experts: tuple[str, ...]
    manifest: Manifest
    separation: Separation | None


def write_model(
    planned: ModelPlan,
    sources: Mapping[str, TensorReader],
    writer: ModelWriter,
    manifest: Manifest,
    texts: Mapping[str, Tensor] | None = None,
    progress: ProgressCallback | None = None,
) -> Upcycled:
    """Write a planned model and commit it. If anything fails before the commit, there is no model.

    Args:
        planned: The model.
        sources: The models that its expressions read, by name. The tokenizer is copied from the first.
        writer: The writer of the model's folder.
        manifest: The manifest to commit. The digests of the files are added.
        texts: Rows of tokens, int64 [S, L], by expert name, for routers that are fitted.
        progress: Called after each chunk and each layer of routers.
    """
    with large_buffers_returned():
        separation = _write_tensors(planned, sources, writer, texts or {}, progress)
    lineage = {
        "sources": {name: source.uri for name, source in sources.items()},
        "history": planned.history,
        "tensors": {tensor.spec.name: tensor.expression.origin() for tensor in planned.tensors},
    }
    writer.write_file(LINEAGE, json.dumps(lineage, indent=1).encode())
    if separation is not None:
        writer.write_file(SEPARATION, separation.to_json().encode())
    carried = carried_files(next(iter(sources.values())))
    for name, data in (carried | dict(planned.extra_files)).items():
        writer.write_file(name, data)
    config = planned.config
    if not isinstance(config, BamConfig):
        writer.write_file(CARD, dense_card(config, lineage).encode())
        return Upcycled((), writer.commit(json.dumps(config, indent=2), manifest), None)
    writer.write_file(CARD, model_card(config, lineage).encode())
    for name in MODEL_CODE:
        writer.write_file(name, (files("bam_ray.model") / name).read_bytes())
    config.auto_map = AUTO_MAP
    return Upcycled(tuple(config.expert_names or ()), writer.commit(config.to_json_string(), manifest), separation)


def read_history(reader: TensorReader) -> list[dict[str, Any]]:
    """Return the operations that made the model at `reader`, oldest first; an empty list if it has no lineage.

    Raises:
        CheckpointError: The lineage is damaged.
    """
    data = reader.read_file(LINEAGE)
    if data is None:
        return []
    history = parse_object(data, f"{reader.uri}/{LINEAGE}").get("history")
    if not isinstance(history, list) or not all(isinstance(step, dict) for step in history):
        raise CheckpointError(f"{reader.uri}/{LINEAGE} has no history: the file is damaged")
    return history


def _write_tensors(
    planned: ModelPlan,
    sources: Mapping[str, TensorReader],
    writer: ModelWriter,
    texts: Mapping[str, Tensor],
    progress: ProgressCallback | None,
) -> Separation | None:
    """Write all tensors. Routers that are fitted come last, because all other tensors must be in the store by then."""
    expressions = {tensor.spec.name: tensor.expression for tensor in planned.tensors}
    fitted = {name: each.method for name, each in expressions.items() if isinstance(each, Fitted)}
    routers: dict[str, Tensor] = {}
    separation: Separation | None = None

    def fitting(layers: int, total: int) -> None:
        if progress is not None:
            progress(layers, total, "fitting routers")

    def produce(spec: TensorSpec) -> Iterator[Tensor]:
        nonlocal separation
        if spec.name not in fitted:
            return expressions[spec.name].pieces(sources)
        if not routers:
            reader = TensorReader(writer.store, writer.prefix, writer.shards)
            method = fitted[spec.name]
            assert isinstance(planned.config, BamConfig)
            weights, separation = fit_routers(
                planned.config, reader.read, dict(texts), method, planned.seed, progress=fitting
            )
            routers.update(weights)
        return iter([routers[spec.name]])

    outputs = [tensor.spec for tensor in planned.outputs]
    last = [tensor.spec for tensor in planned.routers]
    counted = with_progress(produce, planned.tensors, progress)
    if fitted:
        writer.write_tensors(outputs, counted, last)
    else:
        writer.write_tensors([*outputs, *last], counted)
    return separation


def with_progress(
    produce: ChunkProducer, tensors: Sequence[PlannedTensor], progress: ProgressCallback | None
) -> ChunkProducer:
    """Return `produce` with a call of `progress` after each chunk."""
    total = sum(tensor.spec.bytes for tensor in tensors)
    done = 0

    def counted(spec: TensorSpec) -> Iterator[Tensor]:
        nonlocal done
        for piece in produce(spec):
            yield piece
            done += piece.numel() * spec.dtype.itemsize
            if progress is not None:
                progress(done, total, "writing")

    return counted

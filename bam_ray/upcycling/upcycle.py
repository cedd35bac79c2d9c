"""Seed and branches to a mixture: every output tensor has one operation and its inputs, all known before any is read.

sources = {"seed": TensorReader(store, "seeds/..."), "code": ..., "law": ...}
upcycle(sources, MixtureSettings(method="bam"), folder)
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorReader, TensorSpec, write_tensors
from bam_ray.errors import UpcycleError
from bam_ray.families import FFN_ROLES, Family, Place, Role, expert_name, plain_name, router_names
from bam_ray.model import BamConfig
from bam_ray.settings import Losses, MixtureSettings
from bam_ray.upcycling.methods import Method, Operation, method_of
from bam_ray.upcycling.preflight import check_sources

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
UPS = {Role.GATE: Role.UP, Role.GATE_BIAS: Role.UP_BIAS}
GATES = {up: gate for gate, up in UPS.items()}


@dataclass(frozen=True)
class Output:
    """One tensor of the mixture: `parts` of the dense models are concatenated along the rows in each first."""

    spec: TensorSpec
    operation: Operation
    parts: tuple[Place, ...] = ()


def upcycle(
    sources: dict[str, TensorReader],
    settings: MixtureSettings,
    folder: Path,
    losses: Losses | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BamConfig:
    """Write the mixture of `sources` (the seed first) as a Hugging Face folder, with `lineage.json` beside it.

    The lineage says of every tensor which operation made it from which inputs. `progress` is told bytes done and
    bytes in all. Raises `UpcycleError` where the sources do not fit each other or hold values that are not finite.
    """
    family = check_sources(sources)
    method = method_of(settings)
    config = mixture_config(family, next(iter(sources.values())).config, list(sources), settings, losses or Losses())
    outputs = {output.spec.name: output for output in plan(family, next(iter(sources.values())), method, config)}
    total = sum(output.spec.bytes for output in outputs.values())
    done = 0

    def produce(spec: TensorSpec) -> Tensor:
        nonlocal done
        tensor = _produce(outputs[spec.name], sources, config, settings.seed)
        done += spec.bytes
        if progress is not None:
            progress(done, total)
        return tensor

    config.architectures = ["BamForCausalLM"]
    config.save_pretrained(folder)
    write_tensors(folder, [output.spec for output in outputs.values()], produce)
    for name in CARRIED:
        data = next(iter(sources.values())).file(name)
        if data is not None:
            (folder / name).write_bytes(data)
    lineage = {
        "sources": {name: source.uri for name, source in sources.items()},
        "settings": settings.model_dump(mode="json"),
        "tensors": {
            name: {"operation": output.operation, "inputs": [part.name for part in output.parts]}
            for name, output in outputs.items()
        },
    }
    (folder / "lineage.json").write_text(json.dumps(lineage, indent=1))
    return config


def mixture_config(
    family: Family, dense: dict[str, Any], names: list[str], settings: MixtureSettings, losses: Losses
) -> BamConfig:
    """The mixture's configuration, from the seed's `config.json` and the settings."""
    return BamConfig(
        **family.configure(dense),
        dtype=dense.get("dtype") or dense.get("torch_dtype") or "float32",
        num_experts=len(names),
        num_experts_per_tok=settings.num_experts_per_tok,
        norm_topk_prob=settings.norm_topk_prob,
        ffn_output_scale=settings.ffn_output_scale,
        attention_experts=method_of(settings).attention_experts,
        num_attention_experts_per_tok=settings.num_attention_experts_per_tok,
        router_aux_loss_coef=losses.load_balance,
        router_z_loss_coef=losses.router_z,
        expert_names=names,
    )


def plan(family: Family, seed: TensorReader, method: Method, config: BamConfig) -> list[Output]:
    """Every tensor of the mixture, in the order of the dense model."""
    experts = config.num_experts
    outputs: list[Output] = []
    places = family.places(seed.config)
    at = {(place.layer, place.role): place for place in places}
    for place in places:
        spec = seed.specs[place.name]
        rows = spec.shape[0] if place.rows is None else sum(end - start for start, end in place.rows)
        if place.role in FFN_ROLES and place.layer is not None:
            gate = at.get((place.layer, GATES[place.role])) if place.role in GATES else None
            if gate is not None:  # lies before the up rows, in one tensor
                continue
            parts: tuple[Place, ...] = (place,)
            if place.role in UPS:
                parts, rows = (place, at[place.layer, UPS[place.role]]), 2 * rows
            if place.role in (Role.GATE, Role.UP):
                outputs.append(_router(router_names(place.layer)[0], spec, config))
            name = expert_name(place.role, place.layer, config.mlp_gated)
            outputs.append(
                Output(TensorSpec(name, spec.dtype, (experts, rows, *spec.shape[1:])), Operation.STACK, parts)
            )
        elif place.role in method.attention and place.layer is not None and method.has_attention_experts:
            operation = method.attention[place.role]
            if place.role is Role.QUERY:
                outputs.append(_router(router_names(place.layer)[1], spec, config))
            shape = (experts if operation is Operation.STACK else 1, rows, *spec.shape[1:])
            name = expert_name(place.role, place.layer)
            outputs.append(Output(TensorSpec(name, spec.dtype, shape), operation, (place,)))
        else:
            name = plain_name(place.role, place.layer)
            outputs.append(Output(TensorSpec(name, spec.dtype, (rows, *spec.shape[1:])), Operation.AVERAGE, (place,)))
    return outputs


def _router(name: str, like: TensorSpec, config: BamConfig) -> Output:
    return Output(TensorSpec(name, like.dtype, (config.num_experts, config.hidden_size)), Operation.NEW)


def _produce(output: Output, sources: dict[str, TensorReader], config: BamConfig, seed: int) -> Tensor:
    spec = output.spec
    if output.operation is Operation.NEW:
        # Seeded by the tensor's name: the draw depends on no order
        digest = hashlib.sha256(spec.name.encode()).digest()
        generator = torch.Generator().manual_seed(seed + int.from_bytes(digest[:6], "big"))
        return (torch.randn(spec.shape, generator=generator) * config.initializer_range).to(spec.dtype)
    if output.operation is Operation.STACK:
        result = torch.empty(spec.shape, dtype=spec.dtype)
        for index, (name, source) in enumerate(sources.items()):
            torch.cat([_read(source, name, part) for part in output.parts], out=result[index])
        return result
    (part,) = output.parts
    mean = torch.zeros(spec.shape, dtype=torch.float32)
    for name, source in sources.items():
        mean += _read(source, name, part).float()
    return (mean / len(sources)).to(spec.dtype)


def _read(source: TensorReader, name: str, place: Place) -> Tensor:
    tensor = place.name
    value = source.read(tensor)
    if place.rows is not None:
        value = torch.cat([value[start:end] for start, end in place.rows])
    if not value.isfinite().all():
        raise UpcycleError(f"{source.uri}: {tensor} of {name!r} holds values that are not finite")
    return value

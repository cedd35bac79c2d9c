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
from bam_ray.families import Family, Role
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
STACKED = {
    Role.QUERY: "self_attn.experts.q_proj",
    Role.KEY: "self_attn.experts.k_proj",
    Role.VALUE: "self_attn.experts.v_proj",
    Role.OUTPUT: "self_attn.experts.o_proj",
}


@dataclass(frozen=True)
class Output:
    """One tensor of the mixture: `parts` are dense names, concatenated along the rows in each model first."""

    spec: TensorSpec
    operation: Operation
    parts: tuple[str, ...] = ()


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
            name: {"operation": output.operation, "inputs": list(output.parts)} for name, output in outputs.items()
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
    for name, weight in family.expected(seed.config).items():
        spec = seed.specs[name]
        layer = name.partition(".self_attn.")[0].partition(".mlp.")[0]
        operation = method.attention.get(weight.role, Operation.AVERAGE)
        shape: tuple[int, ...]
        if weight.role is Role.GATE:  # gate and up lie in one tensor, gate first
            up = name.replace("gate_proj", "up_proj")
            shape = (experts, 2 * spec.shape[0], spec.shape[1])
            outputs.append(
                Output(TensorSpec(f"{layer}.mlp.experts.gate_up_proj", spec.dtype, shape), Operation.STACK, (name, up))
            )
            outputs.append(_router(f"{layer}.mlp.gate.weight", spec, config))
        elif weight.role is Role.UP:
            continue
        elif weight.role is Role.DOWN:
            shape = (experts, *spec.shape)
            outputs.append(
                Output(TensorSpec(f"{layer}.mlp.experts.down_proj", spec.dtype, shape), Operation.STACK, (name,))
            )
        elif weight.role in STACKED and method.has_attention_experts:
            shape = (experts if operation is Operation.STACK else 1, *spec.shape)
            outputs.append(Output(TensorSpec(f"{layer}.{STACKED[weight.role]}", spec.dtype, shape), operation, (name,)))
            if weight.role is Role.QUERY:
                outputs.append(_router(f"{layer}.self_attn.gate.weight", spec, config))
        else:
            outputs.append(Output(spec, Operation.AVERAGE, (name,)))
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


def _read(source: TensorReader, name: str, tensor: str) -> Tensor:
    value = source.read(tensor)
    if not value.isfinite().all():
        raise UpcycleError(f"{source.uri}: {tensor} of {name!r} holds values that are not finite")
    return value

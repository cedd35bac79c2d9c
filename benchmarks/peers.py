"""Layers of FFN experts for comparison: transformers' Mixtral, DeepSpeed's MoE and DeepSpeed's AutoEP.

Each routes every token to the one expert that `expert` [T] names, and drops no token.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from bam_ray.model import BamConfig
from bam_ray.model.layers_bam import BamFFN

SHARES = {"balanced": (0.25, 0.25, 0.25, 0.25), "skewed": (0.71, 0.10, 0.10, 0.09)}
"""The share of the tokens of each of four experts."""


def chosen(routing: str, tokens: int) -> Tensor:
    """Return the expert of each token in random order, int64 [tokens]."""
    counts = [round(share * tokens) for share in SHARES[routing]]
    expert = torch.repeat_interleave(torch.tensor(counts))[:tokens]
    return torch.cat((expert, expert.new_zeros(tokens - len(expert))))[torch.randperm(tokens)]


def filled(module: Any, dtype: torch.dtype) -> Any:
    """Fill `module` with random weights and return it."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module.to(dtype).train()


def marked(x: Tensor, expert: Tensor, experts: int) -> Tensor:
    """Return `x` [T, d] with the wanted expert in its first features, for gates that `reading` has set."""
    x = x.detach().clone()
    x[:, :experts] = 20.0 * nn.functional.one_hot(expert, experts)
    return x


def reading(gate: nn.Linear) -> None:
    """Set the weights of a router so that it chooses the expert that `marked` wrote."""
    gate.weight.data = torch.eye(*gate.weight.shape, dtype=gate.weight.dtype)


def mixtral(config: BamConfig, implementation: str) -> MixtralExperts:
    """Return transformers' experts, which are called like `BamExperts`."""
    peer = mixtral_config(config)
    peer._experts_implementation = implementation
    return MixtralExperts(peer)


def mixtral_config(config: BamConfig, **more: Any) -> MixtralConfig:
    """Return the configuration of a Mixtral with the sizes of `config`."""
    return MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        **more,
    )


class MoE(nn.Module):
    """DeepSpeed's MoE layer without dropped tokens, from `marked` inputs [T, d] to [T, d]."""

    def __init__(self, config: BamConfig, dtype: torch.dtype, size: int = 1) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE as Layer

        class Expert(BamFFN):
            def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
                return super().forward(x)[0]

        layer = Layer(
            config.hidden_size,
            Expert(config, config.intermediate_size),
            num_experts=config.num_experts,
            ep_size=size,
            k=1,
            drop_tokens=False,
            use_rts=False,
            min_capacity=0,
        )
        layer.set_deepspeed_parallelism()
        self.layer = filled(layer, dtype)
        reading(self.layer.deepspeed_moe.gate.wg.float())

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer."""
        out: Tensor = self.layer(x)[0]
        return out


class AutoEP(nn.Module):
    """The layer that DeepSpeed's AutoEP makes from Mixtral's, from `marked` inputs [T, d] to [T, d]."""

    def __init__(self, config: BamConfig, dtype: torch.dtype, size: int = 1, rank: int = 0) -> None:
        super().__init__()
        from deepspeed.module_inject.auto_ep import AutoEP as Injection
        from deepspeed.module_inject.auto_ep_config import AutoEPConfig
        from deepspeed.utils import groups

        model = filled(MixtralForCausalLM(mixtral_config(config)), dtype)
        injection = Injection(model, AutoEPConfig(enabled=True, autoep_size=size, preset_model="mixtral"))
        (found,) = injection.ep_parser()
        # The public call also records router logits, which fails with DeepSpeed 0.19.8 and transformers 5.24
        self.layer = injection._replace_moe_layer_without_retarget(found, size, rank)[0].train()
        reading(self.layer.router.gate)
        if size > 1:
            groups._create_expert_and_data_parallel(size)
            self.layer.ep_group = groups._get_expert_parallel_group(f"ep_size_{size}")

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer."""
        out: Tensor = self.layer(x[None])
        return out[0]


def start_deepspeed(rank: int = 0, world_size: int = 1, store: Any = None, device: str = "cpu") -> None:
    """Start the process group that DeepSpeed's layers need, unless there is one.

    Without a `store`, the group has this process alone. `device` is cpu or cuda, for all layers of this process.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": device}
    import deepspeed

    if device == "cpu":
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # otherwise it compiles a C++ extension
    backend = "nccl" if device == "cuda" else "gloo"
    if not torch.distributed.is_initialized():
        store = store or torch.distributed.HashStore()  # type: ignore[attr-defined]  # torch marks no re-exports
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)

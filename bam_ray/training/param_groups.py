"""The parameter groups of a model: which parameters are trained, and at which rates.

A frozen parameter has no gradient and no optimizer state. A parameter that waits for the end of the router warm-up has
both: its learning rate is 0 until then.
"""

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from bam_ray.families import is_stacked
from bam_ray.settings import Mixing

ParameterKind = Literal["expert", "router", "shared"]
GENTLE = 0.1
"""The factor for experts that are whole. Measured: at the full rate they lose what they learned on their domains."""
TRAINED_KINDS: dict[str, tuple[ParameterKind, ...]] = {
    "all": ("expert", "router", "shared"),
    "routers_and_shared": ("router", "shared"),
    "routers": ("router",),
}


def parameter_kinds(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, ParameterKind]]:
    """Yield every parameter and its kind.

    It belongs to the experts (stacked, which includes the tables of embedding experts), to a router, or to all experts.
    """
    # Keys and values that all experts share are stored beside the stacked parameters
    shared = ("k_", "v_") if getattr(model.config, "attention_experts", None) == "kv_shared" else ()
    for name, parameter in model.named_parameters():  # yields tied weights once
        if ".gate." in name:
            yield name, parameter, "router"
        elif is_stacked(name) and not name.rpartition(".")[2].startswith(shared):
            yield name, parameter, "expert"
        else:
            yield name, parameter, "shared"


def has_weight_decay(name: str, parameter: Tensor) -> bool:
    """Return True if weight decay applies: to matrices, but not to norms and biases, even if they are stacked."""
    return parameter.ndim > 1 and "norm" not in name and not name.endswith("bias")


def freeze(model: PreTrainedModel, mixing: Mixing) -> None:
    """Disable the gradients of all parameters that are not trained; what is frozen already stays so."""
    for _, parameter, kind in parameter_kinds(model):
        parameter.requires_grad_(parameter.requires_grad and kind in TRAINED_KINDS[mixing.train])


def param_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups of all trained parameters, in a fixed order.

    Each has its `kind`, and the `expert_lr_factor` of the model if the settings state none.
    """
    found: dict[tuple[ParameterKind, bool], list[nn.Parameter]] = {}
    factor = default_expert_lr_factor(model.config)
    for name, parameter, kind in parameter_kinds(model):
        if parameter.requires_grad:
            found.setdefault((kind, has_weight_decay(name, parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "kind": kind,
            "expert_lr_factor": factor,
        }
        for (kind, decays), parameters in sorted(found.items(), key=lambda item: item[0])
    ]


def set_learning_rates(groups: list[dict[str, Any]], lr: float, mixing: Mixing, fraction_done: float) -> None:
    """Set the learning rate of every parameter group for the step after `fraction_done` of all steps."""
    waiting = fraction_done < mixing.router_warmup_fraction
    for group in groups:
        kind = group["kind"]
        if kind == "router":
            factor = 1.0
        elif waiting:
            factor = 0.0
        elif kind == "shared":
            factor = 1.0
        else:
            factor = group["expert_lr_factor"] if mixing.expert_lr_factor is None else mixing.expert_lr_factor
        group["lr"] = lr * factor


def default_expert_lr_factor(config: Any) -> float:
    """Return the factor on the learning rate of the experts' own parameters that suits a model."""
    with_tables = getattr(config, "embeddings", "averaged") == "experts"
    return GENTLE if with_tables and config.attention_experts == "kv_experts" else 1.0

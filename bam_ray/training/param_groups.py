"""Which parameters are trained, and which of them are updated alike.

Parameters that are not trained have no gradient and no state of an optimizer. Those that only wait (all but the routers
in a routers' warm-up) have both: their learning rate is 0 until then.
"""

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from bam_ray.settings import Mixing

Kind = Literal["expert", "router", "shared"]
TRAINED: dict[str, tuple[Kind, ...]] = {
    "all": ("expert", "router", "shared"),
    "routers_and_shared": ("router", "shared"),
    "routers": ("router",),
}


def kinds(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, Kind]]:
    """Every parameter, and whether it is the experts' own (stacked), a router's, or shared by all experts."""
    # Keys and values that all experts share lie among the stacked too
    shared = ("k_", "v_") if getattr(model.config, "attention_experts", None) == "kv_shared" else ()
    for name, parameter in model.named_parameters():  # tied weights once
        if ".gate." in name:
            yield name, parameter, "router"
        elif ".experts." in name and not name.rpartition(".")[2].startswith(shared):
            yield name, parameter, "expert"
        else:
            yield name, parameter, "shared"


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases, stacked ones included."""
    return parameter.ndim > 1 and "norm" not in name and not name.endswith("bias")


def freeze(model: PreTrainedModel, mixing: Mixing) -> None:
    """Leave gradients only to what is trained."""
    for _, parameter, kind in kinds(model):
        parameter.requires_grad_(kind in TRAINED[mixing.train])


def groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """An optimizer's groups of the parameters that are trained, with their `kind`, in an order that is always the
    same."""
    found: dict[tuple[Kind, bool], list[nn.Parameter]] = {}
    for name, parameter, kind in kinds(model):
        if parameter.requires_grad:
            found.setdefault((kind, decayed(name, parameter)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "kind": kind}
        for (kind, decays), parameters in sorted(found.items(), key=lambda item: item[0])
    ]


def set_rates(groups: list[dict[str, Any]], lr: float, mixing: Mixing, done: float) -> None:
    """Set the learning rate of every group for a step at which the fraction `done` of all steps is done."""
    waiting = done < mixing.router_warmup_fraction
    factors = {"router": 1.0, "shared": 0.0 if waiting else 1.0, "expert": 0.0 if waiting else mixing.expert_lr_factor}
    for group in groups:
        group["lr"] = lr * factors[group["kind"]]

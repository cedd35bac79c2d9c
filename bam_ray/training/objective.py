"""What is minimised: next-token NLL, and for mixtures the routers' losses beside it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bam_ray.model import routing_losses
from bam_ray.settings import Losses


@dataclass
class Objective:
    """NLL plus the weighted auxiliary losses of one micro batch; tensors, NLL and auxiliaries detached."""

    total: Tensor
    parts: Tensor  # [3]: nll, load balance, router z


def objective(
    model: torch.nn.Module,
    input_ids: Tensor,
    losses: Losses,
    top_k: int | None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Objective:
    """The training loss of `input_ids` [B, L]: next-token NLL, and for mixtures (`top_k` given) the routers' losses.

    `reduce` averages routing statistics over data-parallel ranks (`model.routing_losses`).
    """
    out = model(input_ids=input_ids, use_cache=False, **({} if top_k is None else {"output_router_logits": True}))
    nll = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
    if top_k is None or not out.router_logits:
        zero = torch.zeros((), device=nll.device)
        return Objective(nll, torch.stack((nll.detach(), zero, zero)))
    routing = routing_losses(out.router_logits, top_k, reduce)
    total = nll + losses.load_balance * routing.load_balance + losses.router_z * routing.router_z
    return Objective(total, torch.stack((nll, routing.load_balance, routing.router_z)).detach())

"""A step of DeepSpeed's ZeRO optimizer that updates nothing if the gradient norm is above a limit.

DeepSpeed has no setting for this. ZeRO 0.19.8 computes the norm inside of `step` and skips the update only if the norm
is not finite. Computing the norm before the step would need a second pass over all gradients and a second collective.
Therefore the method that computes the norm is wrapped during the step, and returns infinity if the norm is too large.
"""

import math
from typing import Any

import torch


def step_within_norm_limit(engine: Any, limit: float, zero_stage: int) -> float:
    """Do `engine.step()` unless the gradient norm is above `limit` or not finite; returns the norm before clipping.

    Args:
        engine: A `deepspeed.DeepSpeedEngine` with a ZeRO optimizer.
        limit: The largest norm that is allowed; infinity: every finite norm.
        zero_stage: The stage of the ZeRO optimizer.
    """
    if limit == math.inf:
        engine.step()
        return float(engine.get_global_grad_norm())
    zero = engine.optimizer
    method = "_get_norm_groups" if zero_stage == 3 else "scaled_global_norm"
    original = getattr(zero, method)
    norm = math.inf

    def limited() -> Any:
        nonlocal norm
        norms = original()  # the norm of all gradients, or with stage 3 a list of the norms of each parameter group
        norm = math.hypot(*map(float, norms)) if isinstance(norms, list) else float(norms)
        if norm <= limit:
            return norms
        infinite = torch.tensor(math.inf, device=engine.device)
        return [infinite] if isinstance(norms, list) else infinite

    setattr(zero, method, limited)
    try:
        engine.step()
    finally:
        delattr(zero, method)  # the attribute of the instance, which hides the method of the class
    return norm

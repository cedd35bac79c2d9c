"""Adam's states before the first update.

torch's Adam makes them in its first update, and so does ZeRO's. Memory that is measured before that is too small by two
fp32 values for each parameter of a rank's part.
"""

from typing import Any

import torch

from bam_ray.on_deepspeed.canonical import master_weights
from bam_ray.training.state import ADAM_STATES


def create_adam_states(zero: Any) -> None:
    """Give the inner optimizer of a ZeRO optimizer the states of step 0, unless it has states."""
    if zero.optimizer.state:
        return
    for partition in master_weights(zero):
        zero.optimizer.state[partition] = {
            "step": torch.zeros((), device=partition.device),
            **{kind: torch.zeros_like(partition) for kind in ADAM_STATES},
        }

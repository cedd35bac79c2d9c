"""Training over many processes with DeepSpeed's ZeRO; the experts of a mixture are distributed over ranks.

    collectives      asynchronous collectives with gradients, and the time that is spent waiting for them
    dispatch         the seams to FFN and attention experts over collectives: tokens to remote experts and back
    table_exchange   the seam to embedding experts over collectives
    expert_parallel  reduces a whole mixture to this rank's experts, from outside
    engine           `training.engine.Engine` with DeepSpeed
    process_group    DeepSpeed's process groups, with one timeout
    adam_states      Adam's states before the first update
    norm_limit       a DeepSpeed step that updates nothing if the gradient norm is above a limit
    canonical        converts its state to and from the form that is independent of ranks

Importing this package is cheap: deepspeed is imported only when a worker calls `deepspeed_engine`.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bam_ray.training.engine import Engine, EngineSpec

__all__ = ["deepspeed_engine"]


def deepspeed_engine(spec: "EngineSpec") -> "Engine":
    """Return an engine over all processes; each process calls this with an equal spec.

    It needs an initialized process group, or the variables of torch.distributed (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT).
    """
    # Must be set before deepspeed is imported, because deepspeed would take the GPUs that it finds
    os.environ["DS_ACCELERATOR"] = spec.device
    from bam_ray.on_deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(spec)

"""Training over many processes: DeepSpeed's ZeRO, with the mixture's experts spread over ranks.

    collectives      asynchronous collectives with gradients, and the time that is spent waiting for them
    dispatch         the two seams of the model over collectives: tokens to experts on other ranks and back
    expert_parallel  cuts a whole mixture down to this rank's experts, from outside
    engine           `training.engine.Engine` over DeepSpeed
    canonical        its state to and from the form that says nothing of ranks

Importing this package is cheap: only `deepspeed_engine`, called on the workers, imports deepspeed.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from bam_ray.settings import Mixing, TrainingSettings
    from bam_ray.training.engine import Engine

__all__ = ["deepspeed_engine"]


def deepspeed_engine(
    model: "PreTrainedModel",
    settings: "TrainingSettings",
    mixing: "Mixing | None" = None,
    expert_parallel: int = 1,
    folder: "Path | None" = None,
) -> "Engine":
    """An engine over all processes, called on each with the whole model, equal on all.

    Or with its outline (`training.outline`) and the `folder` of its weights, of which each process reads its own part.

    Needs torch.distributed's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) or an initialised
    process group. `mixing` and `expert_parallel`, how many processes share the experts, are of mixtures.
    """
    import torch

    # Before deepspeed is first imported: its own guess is the same, with a warning on stdout.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from bam_ray.on_deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(model, settings, mixing, expert_parallel, folder)

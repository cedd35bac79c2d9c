"""The engine over many processes: each trains on its share of the global batch, and all hold the same numbers.

With ZeRO stages 1 and 2 the weights are whole on every rank (except for the experts), and the fp32 master weights and
Adam's states are partitioned. Their gradient clipping uses the true global norm when experts are on different ranks,
which stage 0 does not. Stage 3 also partitions the weights of models whose experts are not distributed already. bf16 is
autocast over fp32 parameters, as in `TorchEngine`, so checkpoints are the same in both precisions.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorSpec
from bam_ray.errors import LossNotFinite, SettingsError, TrainingError
from bam_ray.on_deepspeed import canonical
from bam_ray.on_deepspeed.adam_states import create_adam_states
from bam_ray.on_deepspeed.expert_parallel import apply_expert_parallelism, expert_marker
from bam_ray.on_deepspeed.norm_limit import step_within_norm_limit
from bam_ray.on_deepspeed.process_group import join_process_group
from bam_ray.training.devices import device_name, resolve_precision
from bam_ray.training.engine import NO_LIMITS, EngineSpec, LossLimits, StepResult
from bam_ray.training.gradient_accumulation import GradientAccumulator
from bam_ray.training.memory import HostMemory, memory_of
from bam_ray.training.meta_init import materialize
from bam_ray.training.micro_batch import updating_weights
from bam_ray.training.next_token import NextTokenLoss
from bam_ray.training.objective import BatchStatistics, Objective, as_mixture, objective, update_selection_biases
from bam_ray.training.param_groups import freeze, param_groups, set_learning_rates
from bam_ray.training.state import StatePart

deepspeed.utils.logger.setLevel(logging.ERROR)  # its warnings repeat our errors, or need no action
# torch 2.13 renames two collectives; torch 2.11 and DeepSpeed know only the old names
warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated", FutureWarning)


class DeepSpeedEngine:
    """One of the processes; see `bam_ray.on_deepspeed.deepspeed_engine`."""

    def __init__(self, spec: EngineSpec) -> None:
        if get_accelerator().device_name() == "cpu":
            # Otherwise the first collective compiles a C++ extension for a minute, or fails without a compiler
            deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        join_process_group(get_accelerator().communication_backend_name())
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.settings, self.mixing = spec.training, spec.mixing
        self.precision = resolve_precision(get_accelerator().device_name(), self.settings.precision)
        self.model = spec.model.train()
        self._mixture = as_mixture(spec.model)
        micro_batch = self.settings.micro_batch_sequences
        assert self._mixture is None or micro_batch != "auto", "the router losses depend on the micro batch: set one"
        if self.settings.recompute:
            spec.model.activation_checkpointing_enable()
        self.deepspeed = self._wrap(spec)
        self.updates = 0
        self.device = torch.device(self.deepspeed.device)
        self.memory = memory_of(str(self.device), spec.memory_limit)
        self._host = HostMemory(spec.memory_limit)
        # With other stages, and in mixtures, ranks wait for one another within a micro batch
        independent = self.settings.zero_stage == 1 and self._mixture is None
        self._accumulator = GradientAccumulator(self, str(self.device), micro_batch, independent)
        # Communicators and Adam's states would be made later, but memory is measured from here on
        self._connect()
        create_adam_states(self.deepspeed.optimizer)

    def _wrap(self, spec: EngineSpec) -> Any:
        """Distribute the model over the ranks and return DeepSpeed's engine."""
        model = spec.model
        self.shards = apply_expert_parallelism(model, spec.expert_parallel)
        if spec.weights_folder is not None:
            materialize(model)
        freeze(model, self.mixing)
        optimizer = self._optimizer()  # needs the shapes of whole parameters
        if self.settings.zero_stage == 3:
            self._partition_weights()
        if spec.weights_folder is not None:
            canonical.load_weights(spec.weights_folder, model, self.shards)
        with expert_marker(model, self.shards):
            wrapped, *_ = deepspeed.initialize(model=NextTokenLoss(model), optimizer=optimizer, config=self._config())
        return wrapped

    @property
    def device_name(self) -> str:
        """See `Engine`."""
        return device_name(str(self.device))

    @property
    def micro_batch(self) -> int | None:
        """See `Engine`."""
        return self._accumulator.micro_batch

    def _connect(self) -> None:
        """Make the communicators of the groups that DeepSpeed has not used yet; NCCL makes each in its first use."""
        if self.shards.ep_group is not None:
            self.shards.ep_group.connect(self.device)
        self.mean(0.0)

    def _partition_weights(self) -> None:
        """Keep only this rank's part of every parameter, on its device, which may be too small for the whole model."""
        if self.shards.ep_group is not None:
            raise SettingsError(
                "zero_stage 3 partitions all weights, but expert_parallel already distributes those of the experts: "
                "use zero_stage 1 or 2, or expert_parallel 1"
            )
        deepspeed.zero.Init(module=self.model, config_dict_or_path=self._config())
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(get_accelerator().current_device_name())

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of `TorchEngine`, with ZeRO's marks on the parameter groups of experts.

        ZeRO reduces and partitions these over the ranks that hold the same experts.
        """
        found = param_groups(self.model, self.settings.weight_decay)
        for group in found:
            if is_moe_param(group["params"][0]):
                group |= {"moe": True, "name": self.shards.group_name}
        return torch.optim.AdamW(
            found,
            lr=self.settings.peak_lr,
            betas=self.settings.betas,
            eps=1e-8,
            fused=True,
        )

    def _config(self) -> dict[str, object]:
        sizes = {name: canonical.shape_of(parameter).numel() for name, parameter in self.model.named_parameters()}
        size = sum(sizes.values())
        routers = max((sizes[name] for name in sizes if name.endswith(".gate.weight")), default=0)
        micro_batch = self.settings.micro_batch_sequences
        return {
            # Only for DeepSpeed's own statistics
            "train_micro_batch_size_per_gpu": 1 if micro_batch == "auto" else micro_batch,
            "gradient_accumulation_steps": 1,  # `step` weights the micro batches itself: the last may be smaller
            "managed_gradient_accumulation": False,  # gradients accumulate until `step` reduces them
            "zero_optimization": {
                "stage": self.settings.zero_stage,
                # The bucket is allocated whole, so it must not be larger than what can fill it
                "reduce_bucket_size": min(500_000_000, size),
                # A gradient goes only to the rank that updates the weight. DeepSpeed's default, to all ranks, is faster
                # for two ranks of gloo
                "use_multi_rank_bucket_allreduce": self.world_size <= 2,
                # Parameters up to this size stay whole. Routers always do, because only rank 0 reads them for metrics
                "stage3_param_persistence_threshold": max(min(100_000, size // 1000), routers),
            },
            "gradient_clipping": self.settings.clip_norm,
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # the modules whose gradients would be reduced in bf16
            },
            "steps_per_print": None,
            # Its timer would wait for the GPU before every micro batch
            "timers": {"throughput": {"enabled": False}},
        }

    def step(
        self, input_ids: Tensor, lr: float, limits: LossLimits = NO_LIMITS, domains: Tensor | None = None
    ) -> StepResult:
        """See `Engine`. All shares have the same shape, so that the mean of ranks is the batch's."""
        self._check_shares(input_ids)
        self._exchange_seconds()  # discards what was measured between steps
        packed = self._mean(self._accumulator.accumulate(input_ids, domains))
        statistics = BatchStatistics.unpack(packed, self._mixture)
        nll, load_balance, router_z = statistics.losses()
        try:
            if not math.isfinite(nll):
                raise LossNotFinite(f"the loss ({nll:.4g}) is not finite")
            limits.check(nll)
        except TrainingError:
            self.drop_gradients()
            raise
        set_learning_rates(self.deepspeed.optimizer.param_groups, lr, self.mixing, self._fraction_done)
        with updating_weights(self.memory):
            norm = step_within_norm_limit(self.deepspeed, limits.grad_norm, self.settings.zero_stage)
        if not math.isfinite(norm):
            raise LossNotFinite(f"the gradient ({norm:.4g}) of the loss ({nll:.4g}) is not finite")
        limits.check(nll, norm)
        self.updates += 1
        exchange_seconds = self._exchange_seconds()
        update_selection_biases(self._mixture, statistics.load, self.mixing.losses.bias_rate)
        return StepResult(nll, load_balance, router_z, norm, statistics.load, exchange_seconds)

    def forward(self, input_ids: Tensor, domains: Tensor | None = None) -> Objective:
        """See `GradientBackend`."""
        losses = self.mixing.losses.at(self._fraction_done)
        return objective(self.deepspeed, input_ids, losses, self._mixture, self._mean, domains)

    def backward(self, loss: Tensor) -> None:
        """See `GradientBackend`."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def drop_gradients(self) -> None:
        """See `GradientBackend`. Includes the gradients that ZeRO-2 has already reduced and stored elsewhere."""
        zero = self.deepspeed.optimizer
        zero.zero_grad()
        for parts in (zero.averaged_gradients, getattr(zero, "all_grad_tensors", {})):
            parts.update(dict.fromkeys(parts))

    @property
    def _fraction_done(self) -> float:
        """The fraction of all steps that is done."""
        return self.updates / self.settings.steps

    def _exchange_seconds(self) -> float | None:
        """Return the seconds since the last call that tokens were waited for; None if all experts are on this rank."""
        return self.shards.ep_group.timer.pop_seconds() if self.shards.ep_group else None

    def evaluate(self, input_ids: Tensor) -> float:
        """See `Engine`. A collective."""
        return self.mean(self._accumulator.evaluate(input_ids))

    def mean(self, value: float) -> float:
        """See `Engine`. A collective."""
        return self._mean(torch.tensor(value, dtype=torch.double, device=self.device)).item()

    def _mean(self, x: Tensor) -> Tensor:
        """Average `x` over all ranks, in place."""
        dist.all_reduce(x)
        return x.div_(self.world_size)

    def any_rank(self, flag: bool) -> bool:
        """See `Engine`. A collective."""
        seen = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen)

    def gather(self, mine: Any) -> list[Any]:
        """See `Engine`. A collective."""
        found = [None] * self.world_size
        dist.all_gather_object(found, mine)
        return found

    def _check_shares(self, input_ids: Tensor) -> None:
        """Raise `TrainingError` if the shares have different shapes: the collectives would then wait forever."""
        mine = torch.tensor(input_ids.shape, device=self.device)
        shapes = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(shapes, mine)
        shares = [tuple(shape.tolist()) for shape in shapes]
        if len(set(shares)) > 1 or 0 in shares[0]:
            raise TrainingError(
                f"the {self.world_size} processes got {shares} sequences and tokens: "
                "use a batch_tokens that is a multiple of processes times sequence_length"
            )

    def state(self) -> StatePart:
        """See `Engine`. This rank's part of the state."""
        part = canonical.state(self.model, self.deepspeed.optimizer, self.shards)
        return part.snapshot(self._host.available_bytes())

    def whole_weights(self) -> tuple[list[TensorSpec], Iterator[Tensor]]:
        """See `Engine`."""
        return canonical.whole_weights(self.model, self.shards)

    def load(self, folder: Path) -> None:
        """See `Engine`. Every rank reads its own part."""
        canonical.load(folder, self.model, self.deepspeed.optimizer, self.shards)
        self.updates = canonical.steps(self.deepspeed.optimizer)
        create_adam_states(self.deepspeed.optimizer)

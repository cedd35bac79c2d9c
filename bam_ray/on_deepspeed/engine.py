"""The engine over many processes: each trains on its share of the global batch, and all hold the same numbers.

ZeRO stages 1 and 2: weights are whole on every rank (but for the experts), fp32 masters and Adam's states are
partitioned. Their clipping knows the true global norm with experts on different ranks, which stage 0's doesn't. Stage 3
partitions the weights too, of models whose experts are not spread already. bf16 is autocast over fp32 parameters, as in
`TorchEngine`: the checkpoint is the same in both precisions.
"""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import LossNotFinite, SettingsError, TrainingError
from bam_ray.on_deepspeed import canonical
from bam_ray.on_deepspeed.expert_parallel import apply_expert_parallelism, expert_marker
from bam_ray.settings import Mixing, TrainingSettings
from bam_ray.training.engine import NO_LIMITS, Limits, StepResult, name_of, precision_on
from bam_ray.training.memory import memory_of
from bam_ray.training.meta_init import materialise
from bam_ray.training.micro_batch import halved_to_fit, largest_that_fits, ran_out
from bam_ray.training.next_token import NextTokenLoss
from bam_ray.training.objective import (
    Load,
    Objective,
    all_of_one,
    as_mixture,
    balance,
    held_out_nll,
    load_of,
    objective,
    parts_of,
)
from bam_ray.training.param_groups import freeze, groups, set_rates
from bam_ray.training.state import State

deepspeed.utils.logger.setLevel(logging.ERROR)  # its warnings say what our errors say, or nothing to act on
# torch 2.13 renames two collectives; torch 2.11 and DeepSpeed know the old names only.
warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated", FutureWarning)


class DeepSpeedEngine:
    """One of the processes; see `bam_ray.on_deepspeed.deepspeed_engine`."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: TrainingSettings,
        mixing: Mixing | None,
        expert_parallel: int,
        folder: Path | None,
    ) -> None:
        if get_accelerator().device_name() == "cpu":
            # Else the first collective compiles a C++ extension for a minute, or fails without a compiler.
            deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(), auto_mpi_discovery=False, verbose=False
        )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.settings, self.mixing = settings, mixing or Mixing()
        self.precision = precision_on(get_accelerator().device_name(), settings.precision)
        self.mixture = as_mixture(model)
        self.last_load: Load | None = None
        self.last_exchange: float | None = None
        self.micro_batch = None if settings.micro_batch_sequences == "auto" else settings.micro_batch_sequences
        assert self.mixture is None or self.micro_batch, "routers' losses are those of a micro batch: it must be said"
        # Else ranks wait for one another within a micro batch, and one that ran out of memory would be waited for
        self._apart = settings.zero_stage == 1 and self.mixture is None
        self.model = model.train()
        if settings.recompute:
            model.activation_checkpointing_enable()
        self.shards = apply_expert_parallelism(model, expert_parallel)
        if folder is not None:
            materialise(model)
        freeze(model, self.mixing)
        self._updates = 0
        optimizer = self._optimizer()  # by the shapes of whole parameters
        if settings.zero_stage == 3:
            self._partition_weights()
        if folder is not None:
            canonical.fill(folder, model, self.shards)
        with expert_marker(model, self.shards):
            self.deepspeed, *_ = deepspeed.initialize(
                model=NextTokenLoss(model),
                optimizer=optimizer,
                config=self._config(),
            )
        self.device = torch.device(self.deepspeed.device)
        self.memory = memory_of(str(self.device))

    @property
    def device_name(self) -> str:
        """See `training.engine.Engine`."""
        return name_of(str(self.device))

    def _partition_weights(self) -> None:
        """Keep this rank's part of every parameter, on its device: the whole model may be larger than that."""
        if self.shards.ep_group is not None:
            raise SettingsError(
                "zero_stage 3 partitions all weights, but those of experts are spread by expert_parallel already: "
                "use zero_stage 1 or 2, or expert_parallel 1"
            )
        deepspeed.zero.Init(module=self.model, config_dict_or_path=self._config())
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(get_accelerator().current_device_name())

    def _optimizer(self) -> torch.optim.Optimizer:
        """TorchEngine's, its groups split where ZeRO must reduce and partition experts over ranks of their own."""
        found = groups(self.model, self.settings.weight_decay)
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
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch or 1,  # only for its own statistics
            "gradient_accumulation_steps": 1,  # `step` weighs micro batches itself: the last may be smaller
            "managed_gradient_accumulation": False,  # gradients add up until `step` reduces them
            "zero_optimization": {
                "stage": self.settings.zero_stage,
                # The bucket is allocated whole, so no larger than what can fill it.
                "reduce_bucket_size": min(500_000_000, size),
                # Those up to this size stay whole; routers, at which rank 0 looks alone, in any case.
                "stage3_param_persistence_threshold": max(min(100_000, size // 1000), routers),
            },
            "gradient_clipping": self.settings.clip_norm,
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # those whose gradients would be reduced in bf16
            },
            "steps_per_print": None,
        }

    def _mean(self, x: Tensor) -> Tensor:
        """Average over all ranks, in place."""
        dist.all_reduce(x)
        return x.div_(self.world_size)

    def step(
        self, input_ids: Tensor, lr: float, limits: Limits = NO_LIMITS, domains: Tensor | None = None
    ) -> StepResult:
        """See `training.engine.Engine`. Every rank brings the same shape, so that the mean of ranks is the batch's."""
        self._check_shares(input_ids)
        if self.shards.ep_group:
            self.shards.ep_group.timer.pop_seconds()  # of what came between steps
        domains = all_of_one(input_ids) if domains is None else domains
        sums = self._accumulate(input_ids.to(self.device), domains.to(self.device))
        nll, load_balance, router_z = self._mean(sums)[:3].tolist()
        try:
            if not math.isfinite(nll):
                raise LossNotFinite(f"the loss ({nll:.4g}) is not finite")
            limits.check(nll)
        except TrainingError:
            self._drop_gradients()
            raise
        set_rates(self.deepspeed.optimizer.param_groups, lr, self.mixing, self._done)
        norm = self._update(limits)
        if not math.isfinite(norm):
            raise LossNotFinite(f"the gradient ({norm:.4g}) of the loss ({nll:.4g}) is not finite")
        limits.check(nll, norm)
        self._updates += 1
        self.last_load = load_of(sums, self.mixture)
        self.last_exchange = self.shards.ep_group.timer.pop_seconds() if self.shards.ep_group else None
        balance(self.mixture, self.last_load, self.mixing.losses.bias_rate)
        return StepResult(nll, load_balance, router_z, norm)

    def _update(self, limits: Limits) -> float:
        """DeepSpeed's step; the norm. Leaves everything as it was where that is not finite, or above its limit."""
        zero = self.deepspeed.optimizer
        if limits.grad_norm == math.inf:
            self.deepspeed.step()
            return float(self.deepspeed.get_global_grad_norm())
        method = "_get_norm_groups" if self.settings.zero_stage == 3 else "scaled_global_norm"
        own, found = getattr(zero, method), [math.inf]

        def limited() -> Any:
            norms = own()  # of all gradients, or (stage 3) of each group of them
            found.append(math.hypot(*map(float, norms)) if isinstance(norms, list) else float(norms))
            if found[-1] <= limits.grad_norm:
                return norms
            # To ZeRO 0.19.8 a norm that is not finite means that there is nothing to update with: there is no setting
            infinite = torch.tensor(math.inf, device=self.device)
            return [infinite] if isinstance(norms, list) else infinite

        setattr(zero, method, limited)
        try:
            self.deepspeed.step()
        finally:
            delattr(zero, method)
        return found[-1]

    @property
    def _done(self) -> float:
        """The fraction of all steps that is done."""
        return self._updates / self.settings.steps

    def evaluate(self, input_ids: Tensor) -> float:
        """See `training.engine.Engine`. A collective."""
        mine = held_out_nll(self.model, self._forward, input_ids.to(self.device), self.micro_batch)
        return self.mean(mine)

    def mean(self, value: float) -> float:
        """See `training.engine.Engine`. A collective."""
        return self._mean(torch.tensor(value, dtype=torch.double, device=self.device)).item()

    def _forward(self, micro: Tensor, domains: Tensor | None = None) -> Objective:
        losses = self.mixing.losses.at(self._done)
        return objective(self.deepspeed, micro, losses, self.mixture, self._mean, domains)

    def _accumulate(self, input_ids: Tensor, domains: Tensor) -> Tensor:
        """Gradients of the mean over this rank's share, and its `Objective.parts`, in micro batches that fit memory."""
        if self.micro_batch is None:
            self.micro_batch = self._fit(input_ids)
        sums = torch.zeros(parts_of(self.mixture, domains.shape[1]), device=self.device)

        def work(micro_batch: int) -> None:
            self._drop_gradients()
            sums.zero_()
            for micro, of in zip(input_ids.split(micro_batch), domains.split(micro_batch), strict=True):
                share = micro.shape[0] / input_ids.shape[0]
                sums.add_(self._backward(micro, share, of) * share)

        if self._apart:
            self.micro_batch = halved_to_fit(work, self.micro_batch, self.memory, self.any_rank)
        elif ran_out(work, self.micro_batch):
            raise SettingsError(
                f"out of memory with {self.micro_batch} sequences at once on each of {self.world_size} processes: "
                "set a smaller micro_batch_sequences or recompute: true, or use devices with more memory"
            )
        return sums

    def _fit(self, input_ids: Tensor) -> int:
        """The micro batch for shares like `input_ids`, by passes over some of it; gradients are dropped after them."""

        def trial(size: int) -> None:
            self._backward(input_ids[:size], 1.0)

        return largest_that_fits(trial, len(input_ids), self.memory, self.any_rank)

    def _backward(self, micro: Tensor, share: float, domains: Tensor | None = None) -> Tensor:
        """Add the gradients of a micro batch's mean, times `share`; its `Objective.parts`."""
        loss = self._forward(micro, domains)
        self.deepspeed.backward(loss.total * share, scale_wrt_gas=False)
        return loss.parts

    def _drop_gradients(self) -> None:
        """Forget what micro batches have added up to, those parts too that ZeRO-2 has reduced and put away."""
        zero = self.deepspeed.optimizer
        zero.zero_grad()
        for parts in (zero.averaged_gradients, getattr(zero, "all_grad_tensors", {})):
            parts.update(dict.fromkeys(parts))

    def any_rank(self, flag: bool) -> bool:
        """See `training.engine.Engine`. A collective."""
        seen = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen)

    def gather(self, mine: Any) -> list[Any]:
        """See `training.engine.Engine`. A collective."""
        found = [None] * self.world_size
        dist.all_gather_object(found, mine)
        return found

    def _check_shares(self, input_ids: Tensor) -> None:
        """Ranks with other shapes would wait for each other's collectives for ever."""
        mine = torch.tensor(input_ids.shape, device=self.device)
        shapes = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(shapes, mine)
        shares = [tuple(shape.tolist()) for shape in shapes]
        if len(set(shares)) > 1 or 0 in shares[0]:
            raise TrainingError(
                f"the {self.world_size} processes got {shares} sequences and tokens: "
                "use a batch_tokens that is a multiple of processes times sequence_length"
            )

    def state(self) -> State | None:
        """See `training.engine.Engine`."""
        return canonical.state(self.model, self.deepspeed.optimizer, self.shards)

    def load(self, folder: Path) -> None:
        """See `training.engine.Engine`. Every rank reads the whole folder."""
        canonical.load(folder, self.model, self.deepspeed.optimizer, self.shards)
        self._updates = canonical.steps(self.deepspeed.optimizer)

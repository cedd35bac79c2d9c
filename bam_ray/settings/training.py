"""One training job's settings, the same for seeds, branches and mixtures."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bam_ray.settings.strict import Count, Fraction, Strict


class Spike(Strict):
    """A loss or gradient norm so many times the median of the last steps; the numbers are ours, papers judge by eye."""

    loss: Annotated[float, Field(gt=1.0)] = 1.5
    grad_norm: Annotated[float, Field(gt=1.0)] = 10.0
    window: Count = 50  # steps; before so many are done nothing is a spike


class TrainingSettings(Strict):
    """One training job: AdamW, warm-up, then cosine down to a fraction of the peak (the paper's recipe)."""

    tokens: Count
    batch_tokens: Count = 8192  # the global batch
    peak_lr: Annotated[float, Field(gt=0.0)]
    final_lr_fraction: Fraction = 0.1
    warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0
    # skip: the batch is left out. roll_back: to the last checkpoint, and on with the data after the spike (PaLM's)
    on_spike: Literal["ignore", "skip", "roll_back", "stop"] = "ignore"
    spike: Spike = Spike()
    # Where the loss or its gradient is NaN or infinite. retry: to the last checkpoint once, and the same data again
    on_not_finite: Literal["retry", "skip", "roll_back", "stop"] = "retry"
    # On each device; never changes what a dense model learns. auto: the largest power of two that fits its memory. Of
    # mixtures see MixSettings.balance_sequences
    micro_batch_sequences: Count | Literal["auto"] = "auto"
    recompute: bool = False  # activations in the backward pass: less memory for a third more operations
    checkpoint_every: Count = 50  # steps
    keep_last: Count = 2  # checkpoints kept: the last, and the one before should the last be damaged
    keep_every: Count | None = None  # steps; checkpoints at its multiples stay for good
    precision: Literal["fp32", "bf16", "auto"] = "auto"  # auto: bf16 on GPUs that compute in it, else fp32
    # Of several workers, each keeps a part of the optimizer's states (1), of gradients too (2), of weights too (3)
    zero_stage: Literal[1, 2, 3] = 1
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps: enough to see `tokens`, the last one whole."""
        return -(-self.tokens // self.batch_tokens)

    @model_validator(mode="after")
    def _spikes_can_be_told(self) -> Self:
        if self.on_spike != "ignore" and self.spike.window >= self.steps:
            raise ValueError(
                f"on_spike {self.on_spike} never acts: nothing is a spike before spike.window {self.spike.window} "
                f"steps are done, and there are {self.steps}: make the window smaller, or use on_spike: ignore"
            )
        return self

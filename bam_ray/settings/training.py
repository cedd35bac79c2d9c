"""Settings of one training job. Seeds, branches, controls and mixtures use the same ones."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bam_ray.settings.strict import Count, Fraction, Identity, NotNegative, Positive, Strict

MAX_STEPS = 10_000_000  # more than any model was trained for, and few enough to plan each checkpoint

Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class Spike(Strict):
    """The thresholds of a spike, as multiples of the median over the last steps.

    The defaults are our own, because papers judge spikes by eye.
    """

    loss: Annotated[float, Field(gt=1.0)] = 1.5
    """A loss above this multiple of the median is a spike."""
    grad_norm: Annotated[float, Field(gt=1.0)] = 10.0
    """A gradient norm above this multiple of the median is a spike."""
    window: Count = 50
    """Number of steps of the median. Spikes are detected only after this many steps."""


class TrainingSettings(Strict):
    """One training job: AdamW, linear warm-up, then cosine decay to a fraction of the peak (the BAM paper's recipe)."""

    tokens: Count
    """Number of tokens to train on. The last step is a whole batch."""
    batch_tokens: Count = 8192
    """Size of the global batch, in tokens. It must be a multiple of `data.sequence_length`."""
    peak_lr: Positive
    """Learning rate after warm-up."""
    final_lr_fraction: Fraction = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    warmup_fraction: Fraction = 0.05
    """Fraction of the steps with linear warm-up."""
    weight_decay: NotNegative = 0.1
    """AdamW weight decay of matrices. Norms and biases are not decayed."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """AdamW betas."""
    clip_norm: Positive = 1.0
    """Maximum norm of the gradient over all parameters."""
    on_spike: Literal["ignore", "skip", "roll_back", "stop"] = "ignore"
    """Reaction to a spike. `skip` leaves the batch out. `roll_back` returns to the last checkpoint and continues with
    the data after the spike (as in PaLM). `stop` ends training with an error."""
    spike: Spike = Spike()
    """Thresholds of a spike."""
    on_not_finite: Literal["retry", "skip", "roll_back", "stop"] = "retry"
    """Reaction to a loss or gradient that is NaN or infinite. `retry` returns to the last checkpoint once and repeats
    the same data. The other values work as in `on_spike`."""
    micro_batch_sequences: Annotated[Count | Literal["auto"], Identity.EXCLUDED] = "auto"
    """Number of sequences per forward pass on each device. `auto` uses the largest power of two that fits in memory.
    The result of a dense model is the same for every value. For mixtures see [balance](mixing.md#balance)."""
    recompute: Annotated[bool, Identity.EXCLUDED] = False
    """Recompute activations in the backward pass. This saves memory and costs about a third more operations."""
    checkpoint_every: Annotated[Count, Identity.EXCLUDED] = 50
    """Number of steps between checkpoints."""
    keep_last: Annotated[Count, Identity.EXCLUDED] = 2
    """Number of newest checkpoints to keep. The second one is used if the newest is damaged."""
    keep_every: Annotated[Count | None, Identity.EXCLUDED] = None
    """Checkpoints whose step is a multiple of this number are never deleted. `null` means that none are kept."""
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    """Precision of the forward and backward pass. Weights are always fp32. `auto` means bf16 on GPUs that support it,
    and fp32 elsewhere."""
    zero_stage: Annotated[Literal[1, 2, 3], Identity.EXCLUDED] = 1
    """ZeRO stage with several workers: 1 shards the optimizer states, 2 also the gradients, 3 also the weights."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of initialization, data order and dropout."""

    @property
    def steps(self) -> int:
        """Number of optimizer steps: enough to see `tokens`, with a whole last batch."""
        return -(-self.tokens // self.batch_tokens)

    @model_validator(mode="after")
    def _steps_are_few(self) -> Self:
        if self.steps > MAX_STEPS:
            raise ValueError(
                f"tokens / batch_tokens gives {self.steps:,} steps, more than {MAX_STEPS:,}: lower tokens or use a "
                "larger batch"
            )
        return self

    @model_validator(mode="after")
    def _spike_window_fills(self) -> Self:
        if self.on_spike != "ignore" and self.spike.window >= self.steps:
            raise ValueError(
                f"on_spike {self.on_spike} has no effect: spikes are detected only after spike.window "
                f"{self.spike.window} steps, and training has {self.steps}: use a smaller window or on_spike: ignore"
            )
        return self

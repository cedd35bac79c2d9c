"""Settings of a mixture's training objective: the losses of its routers, and which parameters are trained."""

from typing import Literal, Self

from pydantic import model_validator

from bam_ray.settings.strict import Fraction, NotNegative, Positive, Strict


class Ramp(Strict):
    """A coefficient that changes linearly from `start` to `end` and then stays constant."""

    start: NotNegative
    """Value at the first step."""
    end: NotNegative
    """Value after the ramp."""
    steps_fraction: Fraction = 1.0
    """Fraction of all steps over which the value changes."""

    def at(self, done: float) -> float:
        """Return the value after the fraction `done` of all steps."""
        if done >= self.steps_fraction:
            return self.end
        return self.start + (self.end - self.start) * done / self.steps_fraction


class Losses(Strict):
    """Coefficients of the auxiliary losses of FFN routers.

    The BAM paper does not state them. The defaults are those of BTX (load balance) and ST-MoE (z-loss). LLaMA-MoE's
    coefficient for noisy gates is 0.01 as well.
    """

    load_balance: NotNegative | Ramp = 0.01
    """Coefficient of the load-balance loss."""
    router_z: NotNegative | Ramp = 0.001
    """Coefficient of the router z-loss."""
    bias_rate: NotNegative = 0.0
    """Balance without a loss (arXiv 2408.15664, which uses 0.001): each expert has a bias on its probability for the
    selection alone, and this is the change of the bias per step. 0 means no biases."""

    def at(self, done: float) -> Self:
        """Return the coefficients after the fraction `done` of all steps."""
        return self.model_copy(update={name: ramp.at(done) for name, ramp in self if isinstance(ramp, Ramp)})


class Mixing(Strict):
    """The settings of mixture training that an engine needs."""

    losses: Losses = Losses()
    """Coefficients of the routers' losses."""
    gate: Literal["plain", "noisy"] = "plain"
    """`noisy` adds LLaMA-MoE's trained noise to the router logits during training. It has a balance loss of its
    own."""
    capacity_factor: Positive | None = None
    """In training, limit each expert to this multiple of an equal share of a sequence's choices. `null` means no
    limit."""
    train: Literal["all", "routers_and_shared", "routers"] = "all"
    """Parameters that are trained. `routers_and_shared` freezes the experts; `routers` freezes everything else."""
    router_warmup_fraction: Fraction = 0.0
    """Fraction of the steps in which only the routers are trained."""
    expert_lr_factor: Positive | None = None
    """Factor on the learning rate of the experts' own parameters. `null` means 0.1 for a mixture in which only norms
    are averaged (attention experts with keys and values of their own, and embedding experts), and 1 for all others:
    their training has to repair what was averaged."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.train != "all" and self.expert_lr_factor is not None:
            raise ValueError(
                f"expert_lr_factor has no effect with train: {self.train}, which freezes the experts: leave it out"
            )
        if self.train == "routers" and self.router_warmup_fraction:
            raise ValueError(
                "router_warmup_fraction has no effect with train: routers, which trains nothing else: leave it out"
            )
        if self.gate == "noisy" and self.losses.bias_rate:
            raise ValueError(
                "losses.bias_rate and gate: noisy exclude each other, because the balance loss of noisy gates ignores "
                "biases: use one of them"
            )
        return self

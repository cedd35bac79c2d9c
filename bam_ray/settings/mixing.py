"""What a mixture learns by, beside the next token: its routers' losses, and which of its parameters are trained."""

from typing import Any, Literal, Self

from pydantic import model_validator

from bam_ray.settings.strict import Blend, Count, Fraction, Name, NotNegative, Positive, Strict


class Ramp(Strict):
    """A coefficient that goes in a line from `start` to `end` over the first part of the steps, and stays there."""

    start: NotNegative
    end: NotNegative
    steps_fraction: Fraction = 1.0

    def at(self, done: float) -> float:
        """Its value when the fraction `done` of all steps is done."""
        if done >= self.steps_fraction:
            return self.end
        return self.start + (self.end - self.start) * done / self.steps_fraction


class Losses(Strict):
    """Coefficients of the auxiliary losses of FFN routers; the paper gives none, these are BTX's and ST-MoE's.

    LLaMA-MoE's coefficient for its noisy gates is 0.01 too.
    """

    load_balance: NotNegative | Ramp = 0.01
    router_z: NotNegative | Ramp = 0.001
    # Balancing without a loss (arXiv 2408.15664, there 0.001): a bias an expert, added to its probability when experts
    # are chosen, goes up or down by this each step. 0: there is none
    bias_rate: NotNegative = 0.0

    def at(self, done: float) -> Self:
        """Those that hold when the fraction `done` of all steps is done."""
        return self.model_copy(update={name: ramp.at(done) for name, ramp in self if isinstance(ramp, Ramp)})


class Mixing(Strict):
    """What an engine must know of a mixture's training."""

    losses: Losses = Losses()
    # noisy: LLaMA-MoE's, with noise on the logits in training and a balance loss of its own (`model.routing_losses`)
    gate: Literal["plain", "noisy"] = "plain"
    # In training, an expert takes at most so many times an even share of a sequence's choices; None: all that come
    capacity_factor: Positive | None = None
    train: Literal["all", "routers_and_shared", "routers"] = "all"  # shared: what is no expert's own
    router_warmup_fraction: Fraction = 0.0  # of the steps, in which all but the routers stand still
    expert_lr_factor: Positive = 1.0  # on the learning rate of what is an expert's own

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.train != "all" and self.expert_lr_factor != 1.0:
            raise ValueError(f"expert_lr_factor is of experts, which train: {self.train} leaves as they are")
        if self.train == "routers" and self.router_warmup_fraction:
            raise ValueError("router_warmup_fraction comes before the rest is trained, which train: routers never does")
        if self.gate == "noisy" and self.losses.bias_rate:
            raise ValueError(
                "losses.bias_rate balances by what plain gates choose, gate: noisy by a loss that knows of no biases: "
                "leave out one of them"
            )
        return self


class DynamicBlend(Strict):
    """Data goes where the mixture is furthest behind: Sheared-LLaMA's rule (arXiv 2310.06694), which LLaMA-MoE took.

    Every weight is multiplied by e to the power of how far the domain's held-out loss is above its reference (not below
    0), and all are made to sum to 1 again. The blend they begin with is `mix.blend`.
    """

    every: Count = 170  # steps (LLaMA-MoE: 2.5 billion tokens, of 14.7 million a step)
    sequences: Count = 64  # of held-out text of each domain
    reference: dict[Name, NotNegative] | None = None  # nats a token; None: of each domain's branch, else of the seed


PILES = ("common-crawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange")  # of RedPajama and SlimPajama
LLAMA: Blend = dict(zip(PILES, (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02), strict=True))  # arXiv 2302.13971
SHEARED: Blend = dict(zip(PILES, (0.361, 0.492, 0.008, 0.031, 0.091, 0.007, 0.01), strict=True))  # arXiv 2310.06694
PRESETS: dict[str, tuple[Blend | None, bool]] = {
    "static_llama": (LLAMA, False),
    "static_sheared": (SHEARED, False),
    "dynamic_llama": (LLAMA, True),
    "dynamic_uniform": (None, True),
}
"""LLaMA-MoE's four (arXiv 2406.16554): what a blend begins with, and whether it follows losses from there."""


def with_preset(plain: Any) -> Any:
    """`plain` settings of mixing, `blend: <a preset's name>` being what that stands for."""
    if not isinstance(plain, dict) or not isinstance(plain.get("blend"), str):
        return plain
    if plain["blend"] not in PRESETS:
        raise ValueError(f"blend is {plain['blend']!r}: give weights of domains, or one of {', '.join(PRESETS)}")
    blend, dynamic = PRESETS[plain["blend"]]
    following = plain.get("dynamic_blend")
    if following is not None and not dynamic:
        raise ValueError(f"blend {plain['blend']} stays as it is: leave out dynamic_blend, or give weights of domains")
    return {**plain, "blend": blend, "dynamic_blend": (following or {}) if dynamic else None}

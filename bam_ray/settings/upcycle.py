"""Settings of upcycling: how the seed and its branches become mixtures."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bam_ray.settings.quorum import When
from bam_ray.settings.resources import Needs
from bam_ray.settings.strict import Blend, Count, Identity, Name, Positive, Strict


class AverageSettings(Strict):
    """How the parameters that all experts share are merged."""

    how: Literal["mean", "ties"] = "mean"
    """`mean`: weighted mean of seed and branches. `ties`: TIES-merging of the branches' changes to the seed
    (arXiv 2306.01708)."""
    weights: Blend = Field(default={})
    """Weights of single models in the mean, by name. All others have weight 1."""
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Fraction of each branch's changes that TIES-merging keeps."""
    scale: Positive = 1.0
    """Factor on the changes that TIES-merging adds to the seed."""

    @model_validator(mode="after")
    def _weights_apply_to_a_mean(self) -> Self:
        if self.how == "ties" and self.weights:
            raise ValueError("average.weights apply only to how: mean: leave them out with how: ties")
        return self


class RouterSettings(Strict):
    """Initial weights of the routers."""

    init: Literal["random", "zero", "means", "ridge"] = "random"
    """`random`: normal with the model's initializer range. `zero`: zeros. `means` and `ridge`: fitted to text of the
    domains without training, by class means or by ridge regression on hidden states."""
    sequences: Count = 32
    """Sequences of text per domain for `means` and `ridge`. A quarter of them is held out for the report."""

    @property
    def needs_text(self) -> bool:
        """True if text of the domains is needed."""
        return self.init in ("means", "ridge")


class SplitSettings(Strict):
    """How one dense FFN is split into experts (LLaMA-MoE, arXiv 2406.16554)."""

    construction: Literal["random", "clustering", "inner", "inter"] = "random"
    """Assignment of neurons to experts: `random`; `clustering` by balanced k-means on the up projection; `inner` by
    importance on clustered text, with overlaps; `inter`, which makes a shared expert of the neurons that most experts
    would select."""
    shared_neurons: Count | None = None
    """Size of the shared expert of `inter`. `null` means the size of one expert."""
    attention: Literal["kept", "groups"] = "kept"
    """`groups` makes one attention expert of each key/value group. `kept` leaves attention dense."""
    sequences: Count = 64
    """Sequences of text from which `inner` and `inter` measure the importance of neurons."""


class MixtureSettings(Strict):
    """One mixture: how seed and branches become experts, and how tokens are routed."""

    method: Literal["bam", "btx", "sparse", "split"]
    """Upcycling method."""
    attention_experts: Literal["kv_experts", "kv_shared"] = "kv_experts"
    """Attention experts of method bam: each with its own keys and values, or with shared ones."""
    num_experts: Count | None = None
    """Number of experts. `null` means one per model. Additional experts are copies of the seed."""
    num_experts_per_tok: Count = 1
    """Number of FFN experts per token (top-k)."""
    norm_topk_prob: bool = False
    """Normalize the router probabilities over the selected experts (as in BTX and Mixtral)."""
    ffn_output_scale: Positive | None = None
    """Factor on the output of the FFN experts. `null` means 1, and N/k for method split (LLaMA-MoE)."""
    num_attention_experts_per_tok: Annotated[int, Field(ge=0)] = 0
    """Number of attention experts per token. 0 means soft routing over all of them."""
    dense_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers that stay dense."""
    redraw_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of the FFN neurons of copied experts that is drawn again (Drop-Upcycling, arXiv 2502.19261, uses
    0.5)."""
    same_seed: bool = True
    """Refuse branches whose weights do not descend from the seed."""
    average: AverageSettings = AverageSettings()
    """Merging of the shared parameters."""
    router: RouterSettings = RouterSettings()
    """Initial weights of the routers."""
    split: SplitSettings = SplitSettings()
    """Settings of method split."""
    seed: int = 0
    """Random seed of everything that is drawn."""

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        seed_only = not self.has_branches
        if seed_only and self.num_experts is None:
            raise ValueError(f"method {self.method} makes all experts from the seed: set num_experts")
        if seed_only and self.router.needs_text:
            raise ValueError(
                f"router.init {self.router.init} separates domains, which method {self.method} does not have: "
                "use random or zero"
            )
        if seed_only and self.average != AverageSettings():
            raise ValueError(f"method {self.method} has one model and nothing to average: leave out average")
        if self.method != "split" and self.split != SplitSettings():
            raise ValueError("split settings apply only to method split: leave them out")
        if self.method == "split" and self.redraw_fraction:
            raise ValueError("redraw_fraction applies to copied experts; method split makes none: leave it out")
        if self.split.shared_neurons is not None and self.split.construction != "inter":
            raise ValueError("split.shared_neurons applies only to construction inter, which has a shared expert")
        return self

    @property
    def has_branches(self) -> bool:
        """True if the mixture is made of the seed and its branches, not of the seed alone."""
        return self.method in ("bam", "btx")

    @property
    def needs_text(self) -> bool:
        """True if upcycling needs text of the domains."""
        return self.router.needs_text or (self.method == "split" and self.split.construction in ("inner", "inter"))


class UpcycleSettings(Strict):
    """The mixtures to make."""

    mixtures: dict[Name, MixtureSettings]
    """The mixtures, by name."""
    when: When = "all"
    """When mixing starts: with all branches, or with a quorum `{at_least, deadline_hours}`."""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of the process that upcycles."""

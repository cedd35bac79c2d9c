"""The upcycling methods. Each is one class with its settings and its operations on attention and FFN.

| method | models | FFN | query, output | key, value | paper |
| --- | --- | --- | --- | --- | --- |
| bam, kv_experts | seed and branches | stacked | stacked | stacked | arXiv 2408.08274 |
| bam, kv_shared | seed and branches | stacked | stacked | averaged | arXiv 2408.08274 |
| btx | seed and branches | stacked | averaged | averaged | arXiv 2403.07816 |
| sparse | seed | stacked copies | kept | kept | arXiv 2212.05055, Drop-Upcycling 2502.19261 |
| split | seed | partitioned | kept | kept | LLaMA-MoE, arXiv 2406.16554 |
| split, groups | seed | partitioned | partitioned | partitioned | LLaMA-MoE v2, arXiv 2411.15708 |
| soup | seed and branches | averaged | averaged | averaged | model soups, arXiv 2203.05482 |

Norms are always averaged (the average of one model is the model itself). Embeddings and the output head are averaged
too, with the weights that the setting `embeddings` says, or stacked with `embeddings: experts`. To add a method, write
its class here and add it to `AnyMixture`.
"""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from bam_ray.settings.strict import Blend, Count, Positive, Strict


class Operation(StrEnum):
    """The way in which a mixture's tensors of one role are made."""

    STACK = "stack"
    """One slice per expert, each from its own model."""
    AVERAGE = "average"
    """One tensor for all experts: the average over the models."""
    PARTITION = "partition"
    """One slice per expert, all cut from the same model."""


class AverageSettings(Strict):
    """Merging of the parameters that all experts share."""

    how: Literal["mean", "ties"] = "mean"
    """`mean`: weighted mean of seed and branches; of the branches alone with `seed_expert: false`. `ties`: TIES-merging
    of the branches' changes to the seed (arXiv 2306.01708)."""
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
    sequences: Count = 64
    """Sequences of text per domain for `means` and `ridge`. A quarter of them is held out for the report."""
    input: Literal["token", "prefix"] = "token"
    """Routers read the hidden state of a `token`, or its running mean over the document so far (`prefix`)."""
    prior: Literal["none", "bigram"] = "none"
    """`bigram` adds to the logits of all routers how probable the counts of token pairs in each domain's text make the
    document so far. It needs text of all domains. The routers themselves should begin with `init: zero`."""
    prior_scale: Positive = 0.25
    """Factor on the log-probabilities of the prior."""
    forgetting: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the weight of all earlier tokens with each token, in the running mean of `input: prefix` and in the
    prior. 1 weights all tokens of the document equally. Below 1, routers follow a change of the domain within a
    document, after about 1 / (1 - forgetting) tokens."""

    @property
    def needs_text(self) -> bool:
        """True if sequences of text are needed to fit the routers."""
        return self.init in ("means", "ridge")

    @model_validator(mode="after")
    def _only_a_prefix_is_forgotten(self) -> Self:
        if self.forgetting != 1.0 and self.input == "token" and self.prior == "none":
            raise ValueError(
                "router.forgetting weights the tokens of a document, but these routers read single tokens: "
                "set input: prefix or a prior"
            )
        return self

    @model_validator(mode="after")
    def _prior_replaces_a_fit(self) -> Self:
        if self.prior != "none" and self.needs_text:
            raise ValueError(
                f"router.init {self.init} fits routers to text that router.prior {self.prior} tells apart already: "
                "use init: zero"
            )
        return self


class PartitionSettings(Strict):
    """Splitting of one dense FFN into experts (LLaMA-MoE, arXiv 2406.16554)."""

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

    @model_validator(mode="after")
    def _only_inter_has_a_shared_expert(self) -> Self:
        if self.shared_neurons is not None and self.construction != "inter":
            raise ValueError("shared_neurons applies only to construction inter, which has a shared expert")
        return self

    @property
    def needs_text(self) -> bool:
        """True if text is needed to measure the importance of neurons."""
        return self.construction in ("inner", "inter")


class MixtureSettings(Strict):
    """One mixture. This is the base class of all methods."""

    method: str
    """Upcycling method."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of all random numbers."""

    ffn: ClassVar[Operation] = Operation.AVERAGE
    """The operation on the FFN."""

    @property
    def query(self) -> Operation:
        """The operation on the query and output projections of attention."""
        return Operation.AVERAGE

    @property
    def key(self) -> Operation:
        """The operation on the key and value projections of attention."""
        return Operation.AVERAGE

    @property
    def embedding(self) -> Operation:
        """The operation on the input embedding and the output head."""
        return Operation.AVERAGE

    @property
    def attention(self) -> Literal["kv_experts", "kv_shared", "averaged"]:
        """The kind of attention, as the mixture's configuration names it."""
        if self.query is Operation.AVERAGE:
            return "averaged"
        return "kv_shared" if self.key is Operation.AVERAGE else "kv_experts"

    @property
    def has_branches(self) -> bool:
        """True if the mixture is made of the seed and its branches, not of the seed alone."""
        return isinstance(self, BranchedMixture)

    @property
    def includes_seed(self) -> bool:
        """True if the seed is one of the models that become experts or that are averaged."""
        return not isinstance(self, BranchedMixture) or self.seed_expert

    @property
    def is_dense(self) -> bool:
        """True if the result is a dense model without experts and routers."""
        return self.ffn is Operation.AVERAGE

    @property
    def has_branch_experts(self) -> bool:
        """True if branches become experts, which the average of a model soup has not."""
        return self.has_branches and not self.is_dense

    @property
    def text_sequences(self) -> int:
        """Number of sequences of each domain's text that upcycling needs; 0 if it needs none."""
        return 0

    @property
    def needs_token_counts(self) -> bool:
        """True if upcycling needs the counts of the tokens in each model's text."""
        return False

    def expert_count(self, models: int) -> int:
        """Return the number of experts of a mixture that is made with `models` models; 1 if it is dense.

        The seed counts as a model even if no expert is made of it.
        """
        return 1


class BranchedMixture(MixtureSettings):
    """A mixture of the seed and its branches."""

    seed_expert: bool = True
    """Make an expert of the seed too. With false, the branches alone are the experts, for example when one of them is
    trained on the general domain."""
    same_seed: bool = True
    """Refuse branches whose weights do not descend from the seed."""
    average: AverageSettings = AverageSettings()
    """Merging of the shared parameters."""
    embeddings: Literal["averaged", "counts", "experts"] = "averaged"
    """Input embedding and output head. `averaged`: merged as `average` says. `counts`: a mean in which each model's
    weight in the row of a token depends on how often the model's own text has the token; `average` then applies to all
    other shared parameters. `experts`: each expert keeps its own, with soft gates; the head then takes as many times
    the operations as there are experts."""

    @property
    def needs_token_counts(self) -> bool:
        """True if upcycling needs the counts of the tokens in each model's text."""
        return self.embeddings == "counts" or super().needs_token_counts

    @property
    def embedding(self) -> Operation:
        """The operation on the input embedding and the output head."""
        return Operation.STACK if self.embeddings == "experts" else Operation.AVERAGE

    def expert_count(self, models: int) -> int:
        """Return the number of experts of a mixture that is made with `models` models, one of which is the seed."""
        return super().expert_count(models if self.seed_expert else models - 1)

    @model_validator(mode="after")
    def _weights_apply_to_averaged_models(self) -> Self:
        if not self.seed_expert and "seed" in self.average.weights:
            raise ValueError(
                "average.weights gives the seed a weight, but with seed_expert: false it is not averaged: leave it out"
            )
        return self


class RoutedMixture(MixtureSettings):
    """A mixture with experts and routers."""

    num_experts: Count | None = None
    """Number of experts. `null` means one per model. Additional experts are copies of the seed, which a mixture with
    `seed_expert: false` cannot have."""
    num_experts_per_tok: Count = 1
    """Number of FFN experts per token (top-k)."""
    norm_topk_prob: bool = False
    """Normalize the router probabilities over the selected experts (as in BTX and Mixtral)."""
    ffn_output_scale: Positive | None = None
    """Factor on the output of the FFN experts. `null` means 1, and N/k for method split (LLaMA-MoE)."""
    dense_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers that stay dense."""
    router: RouterSettings = RouterSettings()
    """Initial weights of the routers."""

    @property
    def text_sequences(self) -> int:
        """Number of sequences of each domain's text that upcycling needs; 0 if it needs none."""
        return self.router.sequences if self.router.needs_text else 0

    @property
    def needs_token_counts(self) -> bool:
        """True if upcycling needs the counts of the tokens in each model's text."""
        return self.router.prior == "bigram"

    def expert_count(self, models: int) -> int:
        """Return the number of experts of a mixture that is made with `models` models."""
        return self.num_experts or models

    @model_validator(mode="after")
    def _seed_alone_has_no_domains(self) -> Self:
        if self.has_branches:
            return self
        if self.num_experts is None:
            raise ValueError(f"method {self.method} makes all experts from the seed: set num_experts")
        if self.router.needs_text:
            raise ValueError(
                f"router.init {self.router.init} separates domains, which method {self.method} does not have: "
                "use random or zero"
            )
        if self.router.prior != "none":
            raise ValueError(
                f"router.prior {self.router.prior} separates domains, which method {self.method} does not have: "
                "leave it out"
            )
        return self


class StackedMixture(RoutedMixture):
    """A mixture whose FFN experts are whole FFNs."""

    redraw_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of the FFN neurons of copied experts that is drawn again (Drop-Upcycling, arXiv 2502.19261, uses
    0.5)."""

    ffn: ClassVar[Operation] = Operation.STACK


class BamSettings(BranchedMixture, StackedMixture):
    """Branch-Attend-Mix: FFN experts and attention experts (arXiv 2408.08274)."""

    method: Literal["bam"]
    """Branch-Attend-Mix."""
    attention_experts: Literal["kv_experts", "kv_shared"] = "kv_experts"
    """Attention experts have keys and values of their own, or share one set."""
    num_attention_experts_per_tok: Annotated[int, Field(ge=0)] = 0
    """Number of attention experts per token. 0 means soft routing over all of them."""

    @property
    def query(self) -> Operation:
        """The operation on the query and output projections of attention."""
        return Operation.STACK

    @property
    def key(self) -> Operation:
        """The operation on the key and value projections of attention."""
        return Operation.STACK if self.attention_experts == "kv_experts" else Operation.AVERAGE


class BtxSettings(BranchedMixture, StackedMixture):
    """Branch-Train-MiX: FFN experts, and averaged attention (arXiv 2403.07816)."""

    method: Literal["btx"]
    """Branch-Train-MiX."""


class SparseSettings(StackedMixture):
    """Sparse upcycling: FFN experts that are copies of the seed's FFN (arXiv 2212.05055)."""

    method: Literal["sparse"]
    """Sparse upcycling."""


class SplitSettings(RoutedMixture):
    """LLaMA-MoE: the seed's FFN is split into experts (arXiv 2406.16554)."""

    method: Literal["split"]
    """LLaMA-MoE."""
    split: PartitionSettings = PartitionSettings()
    """Assignment of neurons and heads to experts."""
    num_attention_experts_per_tok: Annotated[int, Field(ge=0)] = 0
    """Number of attention experts per token, for `split.attention: groups`. 0 means soft routing over all of them."""

    ffn: ClassVar[Operation] = Operation.PARTITION

    @property
    def query(self) -> Operation:
        """The operation on the query and output projections of attention."""
        return Operation.PARTITION if self.split.attention == "groups" else Operation.AVERAGE

    @property
    def key(self) -> Operation:
        """The operation on the key and value projections of attention."""
        return self.query

    @property
    def text_sequences(self) -> int:
        """Number of sequences of text that upcycling needs; 0 if it needs none."""
        return self.split.sequences if self.split.needs_text else 0


class SoupSettings(BranchedMixture):
    """Model soup: the weight average of seed and branches, one dense model (arXiv 2203.05482).

    With `seed_expert: false`, it is the average of the branches alone.
    """

    method: Literal["soup"]
    """Model soup."""

    @model_validator(mode="after")
    def _has_no_experts(self) -> Self:
        if self.embeddings == "experts":
            raise ValueError("embeddings: experts needs experts, which a soup does not have: use averaged or counts")
        return self


AnyMixture = Annotated[
    BamSettings | BtxSettings | SparseSettings | SplitSettings | SoupSettings, Field(discriminator="method")
]
"""The settings of any method, chosen by `method`."""

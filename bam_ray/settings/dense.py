"""Settings of the dense models: the seed and its branches."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bam_ray.settings.resources import Needs
from bam_ray.settings.strict import Blend, Count, Fraction, Identity, Name, Strict
from bam_ray.settings.training import TrainingSettings


class Scratch(Strict):
    """The shape of a seed that is trained from scratch.

    The architecture is Cohere's of transformers, which has a parallel block as in the BAM paper.
    """

    architecture: Literal["cohere"] = "cohere"
    """Model architecture."""
    hidden_size: Count = 256
    """Width of the residual stream."""
    intermediate_size: Count = 512
    """Hidden size of the FFN."""
    layers: Count = 4
    """Number of layers."""
    heads: Count = 4
    """Number of query heads."""
    kv_heads: Count = 4
    """Number of key and value heads."""
    tie_embeddings: bool = True
    """Use one matrix for the input and output embeddings."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""


class SeedSettings(Strict):
    """The dense model that everything starts from: `scratch` with `training`, or `folder`."""

    scratch: Scratch | None = None
    """Shape of a seed that is trained from scratch."""
    folder: str | None = None
    """Path or URI of a Hugging Face folder to use as the seed."""
    training: TrainingSettings | None = None
    """Training of a seed from scratch."""
    blend: Blend | None = None
    """Sampling weights over domains. `null` means equal weights."""
    workers: Annotated[Count, Identity.EXCLUDED] = 1
    """Number of processes that train the seed together. Each takes an equal part of every batch."""
    min_workers: Annotated[Count | None, Identity.EXCLUDED] = None
    """If nodes are lost for good, continue with at least this many workers. `null` means to wait for all."""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of each worker."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.scratch is None) == (self.folder is None):
            raise ValueError("seed needs exactly one of `scratch` and `folder`")
        if self.scratch is not None and self.training is None:
            raise ValueError("seed.scratch needs seed.training")
        if self.folder is not None and self.workers > 1:
            raise ValueError("seed.workers has no effect with seed.folder, which is only copied: leave it out")
        return self


class BranchOverride(Strict):
    """Settings of one branch that differ from those of all branches. They never change what the branch learns."""

    needs: Needs | None = None
    """Resources of each worker. They replace `branch.needs`; they are not merged with it."""
    workers: Count | None = None
    """Number of workers. It replaces `branch.workers`."""


class BranchSettings(Strict):
    """One branch for each domain. All branches are trained with the same settings."""

    domains: Annotated[list[Name], Identity.EXCLUDED] = Field(default=[])
    """Domains that get a branch. If this is left out, all domains but the general one get a branch. The general domain
    may be one of them; its branch is trained on general text alone. (The identity of a branch contains its own domain
    only.)"""
    training: TrainingSettings
    """Training of each branch. `peak_lr` may be left out: it is then half of the seed's, as in the BAM paper."""
    general_fraction: Fraction = 0.1
    """Fraction of each branch's tokens that comes from the general domain (0.1 in the BAM paper)."""
    workers: Annotated[Count, Identity.EXCLUDED] = 1
    """Number of processes that train each branch together."""
    min_workers: Annotated[Count | None, Identity.EXCLUDED] = None
    """If nodes are lost for good, continue with at least this many workers. `null` means to wait for all."""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of each worker."""
    overrides: Annotated[dict[Name, BranchOverride], Identity.EXCLUDED] = Field(default={})
    """Different resources or workers for single branches, by domain."""
    max_attempts: Annotated[Count, Identity.EXCLUDED] = 4
    """Number of attempts in a row without a new checkpoint after which a branch fails."""

    def needs_of(self, domain: str) -> Needs:
        """Return the resources of each worker of the branch of `domain`."""
        return self.overrides.get(domain, BranchOverride()).needs or self.needs

    def workers_of(self, domain: str) -> int:
        """Return the number of workers of the branch of `domain`."""
        return self.overrides.get(domain, BranchOverride()).workers or self.workers

    @model_validator(mode="after")
    def _overrides_name_branches(self) -> Self:
        unknown = sorted(set(self.overrides) - set(self.domains))
        if unknown:
            raise ValueError(f"branch.overrides names {unknown}, which are not in branch.domains {self.domains}")
        return self

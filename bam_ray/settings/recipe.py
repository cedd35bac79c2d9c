"""The recipe: the settings of a whole run."""

from typing import Any, Literal, Self

from pydantic import model_validator

from bam_ray.settings import consistency
from bam_ray.settings.adapters import AdapterSettings
from bam_ray.settings.compare import DILOCO, CompareSettings, control_name
from bam_ray.settings.data import DataSettings
from bam_ray.settings.dense import BranchSettings, SeedSettings
from bam_ray.settings.methods import MixtureSettings
from bam_ray.settings.mix import MixSettings
from bam_ray.settings.outputs import EvaluateSettings, MetricsSettings, ServeSettings
from bam_ray.settings.strict import Name, Strict
from bam_ray.settings.topics import TopicsSettings
from bam_ray.settings.training import TrainingSettings
from bam_ray.settings.upcycle import UpcycleSettings


class StoreSettings(Strict):
    """The blob store of the run's artifacts. Credentials come only from the environment."""

    uri: str
    """`s3://bucket/prefix`, or a folder that all nodes can access."""
    endpoint: str | None = None
    """URL of an S3 server other than AWS. `null` means `AWS_ENDPOINT_URL`, and AWS if that is not set."""
    promise: Literal["strict", "weak"] = "strict"
    """`weak` accepts a server without conditional puts. Two writers of one artifact are then not detected."""


class Recipe(Strict):
    """A whole run."""

    name: Name
    """Name of the run."""
    store: StoreSettings
    """The blob store of the artifacts."""
    data: DataSettings
    """Text of the domains."""
    seed: SeedSettings
    """The dense model that everything starts from."""
    branch: BranchSettings
    """Training of one branch for each domain."""
    upcycle: UpcycleSettings
    """Mixtures to make from the seed and the branches."""
    mix: MixSettings
    """Training of the mixtures."""
    compare: CompareSettings | None = None
    """Dense models to compare the mixtures with. `null` means none."""
    topics: TopicsSettings | None = None
    """Topics of the corpus, for adapters. `null` means none."""
    adapters: AdapterSettings | None = None
    """Adapters of the seed, one for each topic of `topics` (MoIN). `null` means none."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Held-out evaluation."""
    serve: ServeSettings = ServeSettings()
    """The endpoint."""
    metrics: MetricsSettings = MetricsSettings()
    """Curves of training."""

    def experts_of(self, mixture: MixtureSettings) -> int:
        """Return the number of experts of `mixture` once all branches are part of it; 1 if it is dense."""
        return mixture.expert_count(1 + len(self.branch.domains))

    def mix_of(self, name: str) -> MixSettings:
        """Return the settings with which the mixture `name` is trained."""
        mix = self.mix
        if mix.without_branches == "mix_tokens" or self.upcycle.mixtures[name].has_branches:
            return mix
        return mix.model_copy(update={"training": mix.training.model_copy(update={"tokens": self.all_tokens})})

    @property
    def all_tokens(self) -> int:
        """Number of tokens that all branches and one mixture train on together, in whole batches."""
        mix, branch = self.mix.training, self.branch.training
        return len(self.branch.domains) * branch.steps * branch.batch_tokens + mix.steps * mix.batch_tokens

    @property
    def controls(self) -> dict[str, TrainingSettings]:
        """The training of each control, by name; empty without `compare`."""
        compare, mix = self.compare, self.mix.training
        if compare is None:
            return {}
        multiples = {control_name(multiple): multiple for multiple in compare.dense}
        multiples |= dict.fromkeys(compare.prior_controls, 1.0)
        if compare.diloco is not None:
            multiples[DILOCO] = 1.0
        common = mix.model_dump() | {"peak_lr": compare.peak_lr or mix.peak_lr}
        return {
            name: TrainingSettings.model_validate(common | {"tokens": max(1, round(multiple * self.all_tokens))})
            for name, multiple in multiples.items()
        }

    @model_validator(mode="before")
    @classmethod
    def _branch_defaults(cls, plain: Any) -> Any:
        return consistency.with_branch_domains(consistency.with_branch_lr(plain))

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for check in consistency.CHECKS:
            check(self)
        return self

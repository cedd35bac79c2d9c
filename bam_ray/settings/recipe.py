"""The recipe: the settings of a whole run."""

from typing import Any, Literal, Self

from pydantic import model_validator

from bam_ray.settings import consistency
from bam_ray.settings.compare import CompareSettings, control_name
from bam_ray.settings.data import DataSettings
from bam_ray.settings.dense import BranchSettings, SeedSettings
from bam_ray.settings.methods import MixtureSettings
from bam_ray.settings.mix import MixSettings
from bam_ray.settings.outputs import EvaluateSettings, MetricsSettings, ServeSettings
from bam_ray.settings.strict import Name, Strict
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
    evaluate: EvaluateSettings = EvaluateSettings()
    """Held-out evaluation."""
    serve: ServeSettings = ServeSettings()
    """The endpoint."""
    metrics: MetricsSettings = MetricsSettings()
    """Curves of training."""

    def experts_of(self, mixture: MixtureSettings) -> int:
        """Return the number of experts of `mixture` once all branches are part of it; 1 if it is dense."""
        return mixture.expert_count(1 + len(self.branch.domains))

    @property
    def controls(self) -> dict[str, TrainingSettings]:
        """The training of each control, by name; empty without `compare`.

        The tokens of branches and mixtures are counted in whole batches, as they are trained on.
        """
        if self.compare is None:
            return {}
        mix, branch = self.mix.training, self.branch.training
        total = len(self.branch.domains) * branch.steps * branch.batch_tokens + mix.steps * mix.batch_tokens
        common = mix.model_dump() | {"peak_lr": self.compare.peak_lr or mix.peak_lr}
        return {
            control_name(multiple): TrainingSettings.model_validate(
                common | {"tokens": max(1, round(multiple * total))}
            )
            for multiple in self.compare.dense
        }

    @model_validator(mode="before")
    @classmethod
    def _default_branch_lr(cls, plain: Any) -> Any:
        return consistency.with_branch_lr(plain)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for check in consistency.CHECKS:
            check(self)
        return self

"""Settings of adapters: one LoRA per topic on the frozen seed (MoIN, arXiv 2410.09687)."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bam_ray.settings.resources import Needs
from bam_ray.settings.strict import Count, Identity, Positive, Strict
from bam_ray.settings.training import TrainingSettings


class AdapterSettings(Strict):
    """One LoRA adapter for each topic. All adapters are trained with the same settings, each on the text of its topic.

    MoIN publishes neither the rank nor the learning rate, so the defaults are those of peft and of the LoRA paper.
    """

    rank: Count = 8
    """Rank r of the factors A [r, in] and B [out, r]."""
    alpha: Positive = 16.0
    """The change of a layer is multiplied by `alpha / rank`."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter: all except the output head (as in MoIN), or those whose names end with one of
    a list, such as `[q_proj, v_proj]`."""
    training: TrainingSettings
    """Training of each adapter. `tokens` are those of one topic. An adapter has no checkpoints: if its worker is lost,
    it is trained again."""
    tasks: Count = 1
    """Number of tasks that the topics are divided into: topic t belongs to task t mod `tasks`. Each task loads the seed
    once and trains its topics one after another, so use about as many tasks as there are workers."""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of each task."""
    max_attempts: Annotated[Count, Identity.EXCLUDED] = 4
    """Number of attempts in a row without a new adapter after which a task fails."""

    @model_validator(mode="after")
    def _training_has_no_rollback(self) -> Self:
        training = self.training
        if training.on_spike != "ignore" or training.on_not_finite not in ("retry", "stop"):
            raise ValueError(
                "adapters.training can neither skip batches nor roll back, because an adapter has no checkpoints: use "
                "on_spike: ignore, and on_not_finite: retry or stop"
            )
        return self

    def topics_of(self, task: int, topics: int) -> range:
        """Return the numbers of the topics of a task, of `topics` in total."""
        return range(task, topics, self.tasks)

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks."""
        return [f"part-{number:02d}" for number in range(self.tasks)]

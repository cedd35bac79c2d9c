"""Settings of adapters: one LoRA per topic on the frozen seed (MoIN, arXiv 2410.09687)."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bam_ray.settings.resources import Needs
from bam_ray.settings.strict import Count, Identity, Positive, Strict
from bam_ray.settings.training import TrainingSettings

RANDOM = "control-random"
ALL_TEXT = "control-all-text"


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
    controls: Annotated[tuple[Literal["random", "all_text"], ...], Identity.EXCLUDED] = ()
    """Adapters that those of the topics are compared with. `random` trains as many adapters on the same number of
    documents, which are drawn from all text at random. `all_text` trains one adapter of the same rank on all text, with
    as many tokens as all topics together. Each control costs as much compute as the adapters of the topics. Controls
    are never served."""
    held_out_tokens: Annotated[Count, Identity.EXCLUDED] = 16384
    """Number of held-out tokens of each topic that the adapters are evaluated on."""
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

    def all_text_training(self, topics: int) -> TrainingSettings:
        """Return the training of the control `all_text`, which has the tokens of all of `topics`."""
        training = self.training
        return training.model_copy(update={"tokens": training.steps * training.batch_tokens * topics})

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks that train the adapters of topics."""
        return [f"part-{number:02d}" for number in range(self.tasks)]

    @property
    def random_tasks(self) -> list[str]:
        """The names of the tasks of the control `random`, each with as many adapters as the task of topics."""
        return [f"{RANDOM}-{number:02d}" for number in range(self.tasks)] if "random" in self.controls else []

    @property
    def all_text_task(self) -> str | None:
        """The name of the task of the control `all_text`; None without this control."""
        return ALL_TEXT if "all_text" in self.controls else None

"""Corpus: the text of all domains, nearly duplicate-free, split, tokenized, packed and counted once."""

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.data import build_corpus
from bam_ray.errors import Interrupted
from bam_ray.pipeline.tasks import Progress
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.token_counts import write_token_counts


def make_corpus(run: TaskRun) -> Manifest:
    """Build the corpus of `recipe.data` and publish it."""
    settings, lease = run.recipe.data, run.take_lease()
    steps = 0

    def note(text: str) -> None:
        nonlocal steps
        if run.context.should_stop():
            raise Interrupted("the corpus is not finished: run the same command again to build it from the start")
        run.context.report(Progress(step=steps, total_steps=3 * len(settings.domains) + 1, note=text))
        steps += 1

    with scratch_folder("corpus") as folder:
        facts = build_corpus(settings, folder, note)
        write_token_counts(folder, note)
        note("uploading")
        manifest = Manifest(
            id=run.task.id,
            kind=run.task.kind,
            name=run.task.name,
            settings=settings.model_dump(mode="json"),
            tokens=sum(domain["train_tokens"] for domain in facts["domains"].values()),
            facts=facts,
            attempt=str(lease.number),
        )
        return run.artifact.publish(folder, manifest, lease)

"""Corpus: the text of all domains, nearly duplicate-free, split, tokenized, packed and counted once."""

from functools import partial

from bam_ray.adapters.discover_domains import discover_domains
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.data import build_corpus
from bam_ray.data.corpus import DISCOVERED
from bam_ray.errors import Interrupted
from bam_ray.pipeline.tasks import Progress
from bam_ray.settings import DataSettings
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.token_counts import write_token_counts


def make_corpus(run: TaskRun) -> Manifest:
    """Build the corpus of `recipe.data` and publish it."""
    settings, lease = run.recipe.data, run.take_lease()
    started, total = 0, _step_count(settings)

    def report(step: int, text: str) -> None:
        if run.context.should_stop():
            raise Interrupted("the corpus is not finished: run the same command again to build it from the start")
        run.context.report(Progress(step=step, total_steps=total, note=text))

    def note(text: str) -> None:
        nonlocal started
        report(started, text)
        started += 1

    def note_part(done: int, count: int, text: str) -> None:
        report(started - 1, f"{text} ({done} of {count})")

    with scratch_folder("corpus") as folder:
        discover = partial(discover_domains, folder=folder / DISCOVERED, report=note_part)
        facts = build_corpus(settings, folder, note, discover)
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


def _step_count(settings: DataSettings) -> int:
    """Return the number of steps: texts to read, the search for domains, the tokenizer, and to tokenize and count."""
    reads = len(settings.domains)
    if settings.discover is not None:
        reads += len(settings.discover.sources) + 1
    return reads + 1 + 2 * len(settings.names)

"""Topics: clusters of the corpus, and the topic of each of its documents."""

from bam_ray.adapters.find_topics import find_topics
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.data import Corpus
from bam_ray.data.corpus_documents import CorpusDocuments
from bam_ray.errors import Interrupted
from bam_ray.evaluation.topics_page import TOPICS_PAGE, write_topics_page
from bam_ray.pipeline.tasks import Progress
from bam_ray.stages.task_run import TaskRun
from bam_ray.training.devices import requested_device


def make_topics(run: TaskRun) -> Manifest:
    """Find the topics of the corpus of `recipe.topics` and publish them, with a page that shows them."""
    settings, lease = run.recipe.topics, run.take_lease()
    assert settings is not None, "the task exists only with `topics`"
    corpus = Corpus(run.parent(ArtifactKind.CORPORA, "corpus").fetch())
    seed = run.parent(ArtifactKind.SEEDS, "seed").fetch() if settings.embedder == "seed" else None

    def report(done: int, total: int, note: str) -> None:
        if run.context.should_stop():
            raise Interrupted("the topics are not finished: run the same command again to find them from the start")
        run.context.report(Progress(done, total, note=note))

    with scratch_folder("topics") as folder:
        found = find_topics(
            {domain: CorpusDocuments(corpus, domain) for domain in corpus.domains},
            {domain: CorpusDocuments(corpus, domain, held_out=True) for domain in corpus.domains},
            settings,
            report,
            seed,
            requested_device(run.task.needs.gpus),
        )
        found.save(folder)
        write_topics_page(found, run.recipe.name, folder / TOPICS_PAGE)
        manifest = Manifest(
            id=run.task.id,
            kind=run.task.kind,
            name=run.task.name,
            parents=run.task.parents,
            settings=settings.model_dump(mode="json"),
            metrics={"topics/count": len(found.topics), **found.quality.metrics},
            attempt=str(lease.number),
        )
        return run.artifact.publish(folder, manifest, lease)

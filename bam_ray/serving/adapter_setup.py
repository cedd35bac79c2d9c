"""The adapters of a server, as its settings describe them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bam_ray.adapters.embedders import embedder_of
from bam_ray.adapters.peft_source import PeftFolders
from bam_ray.adapters.pool import AdapterPool
from bam_ray.adapters.run_adapters import RunAdapters
from bam_ray.adapters.run_source import RunSource
from bam_ray.adapters.source import AdapterSource
from bam_ray.adapters.topics import TopicChoice, Topics
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.run import PipelineRun
from bam_ray.serving.lora import LoraSlots
from bam_ray.serving.served_adapters import AdapterOptions, ServedAdapters, TopicRouter
from bam_ray.settings import ServeAdapterSettings

LOADING_THREADS = 2


def open_adapters(
    base: str, folder: Path, lora: LoraSlots, settings: ServeAdapterSettings, run: PipelineRun | None = None
) -> ServedAdapters:
    """Return the adapters that a server offers.

    Args:
        base: The name of the base model.
        folder: The model folder of the base model.
        lora: The adapter slots of the base model.
        settings: The settings of the adapters.
        run: The run whose adapters and topics are served; needed if the settings name no folder.

    Raises:
        CheckpointError: Adapters or topics cannot be read, or the topics belong to another embedder.
        SettingsError: A package of the embedder is missing.
    """
    topics = None if settings.topics is None else Path(settings.topics)
    source: AdapterSource
    if settings.source is not None:
        source = PeftFolders(Path(settings.source), lora.shapes)
    else:
        assert run is not None
        source = RunSource(RunAdapters(run))
        topics = topics or run.artifact(ArtifactKind.TOPICS, "topics").fetch()
    executor = ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="adapters")
    pool = AdapterPool(
        source, lora, executor, host_bytes=settings.host_bytes, max_wait_seconds=settings.max_wait_seconds
    )
    router = None if topics is None else topic_router(topics, folder)
    return ServedAdapters(base, source, pool, executor, router=router, options=AdapterOptions(settings.on_unavailable))


def topic_router(folder: Path, base: Path) -> TopicRouter:
    """Return a function that finds the topic of a text.

    Args:
        folder: The folder of the topics.
        base: The model folder of the base model, of which an embedder may need a copy.

    Raises:
        CheckpointError: The topics are damaged or belong to another embedder.
        SettingsError: A package of the embedder is missing.
    """
    topics = Topics.load(folder)
    embedder = embedder_of(topics.embedder, folder, base)

    def route(text: str) -> TopicChoice:
        return topics.choose(embedder.embed([text]))[0]

    return route

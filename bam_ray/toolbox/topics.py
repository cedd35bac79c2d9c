"""Find the topics of bare text, without a run."""

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from bam_ray.adapters.find_topics import FoundTopics, Report, find_topics
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.data.documents import DocumentFile, FileDocuments
from bam_ray.data.sources import read_documents
from bam_ray.data.split import split_documents
from bam_ray.errors import CheckpointError
from bam_ray.evaluation.topics_page import TOPICS_PAGE, write_topics_page
from bam_ray.settings import DomainSettings, TopicsSettings

HELD_OUT_FRACTION = 0.1  # of the characters of each text


def topics_of_text(
    sources: Mapping[str, str],
    settings: TopicsSettings,
    out: Path,
    report: Report,
    seed: Path | None = None,
    most_documents: int | None = None,
) -> FoundTopics:
    """Find the topics of text, and write them to a new folder, with a page that shows them.

    Args:
        sources: Sources as in a recipe's domains, by name.
        settings: The settings of the topics.
        out: A folder that does not exist or is empty.
        report: Receives the progress.
        seed: The model folder of the seed, for the embedder `seed`.
        most_documents: The most documents to read of each source; None means all.

    Raises:
        CheckpointError: `out` is not empty.
        DataError: A source cannot be read, or there is too little text.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError(f"{out} is not empty: name a new folder or delete its contents")
    train, held_out = {}, {}
    with scratch_folder("text") as folder, ExitStack() as stack:
        for number, (name, source) in enumerate(sources.items()):
            report(number, len(sources), "texts are read")
            file = DocumentFile(folder / str(number))
            stack.callback(file.close)
            for text in islice(read_documents(name, DomainSettings(source=source)), most_documents):
                file.append(text)
            unshared = np.zeros(len(file))
            parts = split_documents(name, file.characters, unshared, HELD_OUT_FRACTION, settings.random_seed)
            train[name], held_out[name] = (FileDocuments(file, indices) for indices in parts)
        found = find_topics(train, held_out, settings, report, seed)
    out.mkdir(parents=True, exist_ok=True)
    found.save(out)
    write_topics_page(found, ", ".join(sources), out / TOPICS_PAGE)
    return found

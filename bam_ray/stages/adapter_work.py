"""The adapters that a task trains: those of topics, or those of a control.

A control shows that an adapter gains from the text of its topic, and not only from more training:

| control | adapters | documents of each |
| --- | --- | --- |
| `random` | as many as topics | those of a topic after all documents have exchanged their topics at random |
| `all_text` | one, trained on as many tokens as all others together | all |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from bam_ray.adapters.topic_rows import TopicRows
from bam_ray.adapters.topics import ASSIGNMENTS_FILE
from bam_ray.data import Corpus
from bam_ray.settings import ALL_TEXT, RANDOM, AdapterSettings, TrainingSettings

Assignments = Mapping[str, NDArray[np.int32]]
"""The number of the topic of each training document, [documents], by domain."""


@dataclass(frozen=True)
class AdapterWork:
    """The adapters of one task.

    Attributes:
        adapters: Their names by their numbers.
        training: The training of each.
        rows: The rows of each.
    """

    adapters: dict[int, str]
    training: TrainingSettings
    rows: TopicRows


def adapter_work(task: str, settings: AdapterSettings, corpus: Corpus, topics: list[str], folder: Path) -> AdapterWork:
    """Return the adapters of a task.

    Args:
        task: The name of the task.
        settings: The settings of the adapters.
        corpus: The corpus.
        topics: The names of the topics, in the order of their numbers.
        folder: The folder of the artifact of the topics.
    """
    stored = load_file(folder / ASSIGNMENTS_FILE)
    assigned: Assignments = {domain: stored[f"{domain}/train"] for domain in corpus.domains}
    training = settings.training
    if task == settings.all_text_task:
        everything = {domain: np.zeros_like(each) for domain, each in assigned.items()}
        return AdapterWork(
            {0: ALL_TEXT}, settings.all_text_training(len(topics)), TopicRows(corpus, [ALL_TEXT], everything)
        )
    names = topics
    if task in settings.random_tasks:
        names = [random_name(number) for number in range(len(topics))]
        assigned = exchanged(assigned, training.seed)
        number = settings.random_tasks.index(task)
    else:
        number = settings.task_names.index(task)
    mine = {topic: names[topic] for topic in settings.topics_of(number, len(topics))}
    return AdapterWork(mine, training, TopicRows(corpus, names, assigned))


def random_name(number: int) -> str:
    """Return the name of the adapter of the control `random` that has as many documents as topic `number`."""
    return f"{RANDOM}-{number:04d}"


def exchanged(assigned: Assignments, seed: int) -> Assignments:
    """Return the topics of all documents in a random order, so that each topic keeps its number of documents."""
    domains = sorted(assigned)
    shuffled = np.random.default_rng(seed).permutation(np.concatenate([assigned[domain] for domain in domains]))
    parts = np.split(shuffled, np.cumsum([len(assigned[domain]) for domain in domains])[:-1])
    return dict(zip(domains, parts, strict=True))

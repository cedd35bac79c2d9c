"""The agreement of topics with the names of the domains, which the search for topics does not use."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TopicQuality:
    """The domains of the documents of each topic.

    The main domain of a topic is that of most of its training documents.

    Attributes:
        domains: The names of the domains.
        counts: The training documents of each domain in each topic, [topics, domains], int64.
        purity: The fraction of training documents that are of the main domain of their topic.
        held_out_accuracy: The fraction of held-out documents whose nearest topic has their domain as its main domain.
        mutual_information: The adjusted mutual information of the topics and the domains of training documents: 1 if
            they are the same partition, 0 on average if they are independent.
    """

    domains: tuple[str, ...]
    counts: Tensor
    purity: float
    held_out_accuracy: float
    mutual_information: float

    @property
    def metrics(self) -> dict[str, float]:
        """The agreement as numbers by name; empty if there is only one domain."""
        if len(self.domains) < 2:
            return {}
        return {
            "topics/purity": self.purity,
            "topics/held_out_accuracy": self.held_out_accuracy,
            "topics/adjusted_mutual_information": self.mutual_information,
        }

    def main_domain(self, topic: int) -> tuple[str, float]:
        """Return the main domain of a topic, and its share of the topic's training documents."""
        row = self.counts[topic]
        main = int(row.argmax())
        return self.domains[main], float(row[main] / row.sum().clamp(min=1))


def topic_quality(assignments: Mapping[str, Tensor], count: int) -> TopicQuality:
    """Return the agreement of `count` topics with the domains of `assignments`, whose keys are `<domain>/<part>`."""
    from sklearn.metrics import adjusted_mutual_info_score

    domains = tuple(name.removesuffix("/train") for name in assignments if name.endswith("/train"))
    counts = torch.stack([torch.bincount(assignments[f"{domain}/train"], minlength=count) for domain in domains], 1)
    main = counts.argmax(1)  # [topics]
    right, total = 0, 0
    for index, domain in enumerate(domains):
        found = assignments[f"{domain}/held_out"].long()
        right, total = right + int((main[found] == index).sum()), total + len(found)
    purity = float(counts.amax(1).sum() / counts.sum().clamp(min=1))
    topics = np.concatenate([assignments[f"{domain}/train"].numpy() for domain in domains])
    owners = np.repeat(np.arange(len(domains)), counts.sum(0).numpy())
    return TopicQuality(
        domains, counts, purity, right / max(total, 1), float(adjusted_mutual_info_score(owners, topics))
    )

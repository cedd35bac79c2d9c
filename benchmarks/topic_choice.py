"""The choice of the topic of a request, over one pass over the prototypes in memory, on one CPU thread.

    python -m benchmarks.topic_choice [--rounds 200]

Every prototype must be read once, so the time of their sum is the floor. The vector of the request is given. The
results are medians of CPU time.
"""

from typing import Annotated

import torch
import typer
from torch.nn import functional as F

from bam_ray.adapters.embedders import EmbedderIdentity
from bam_ray.adapters.topics import Topic, Topics
from benchmarks.measure import report, seconds

DIMENSION = 384  # of all-MiniLM-L6-v2


def choice(rounds: int, count: int, prototypes: int) -> list[str | float]:
    """Measure one number of topics and return its row."""
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(count * prototypes, DIMENSION, generator=generator), dim=1)
    owners = torch.arange(count).repeat_interleave(prototypes)
    described = [Topic(f"topic-{index:04}", 10, 1000, (), 0.2) for index in range(count)]
    topics = Topics(EmbedderIdentity("minilm", "", DIMENSION, 64), described, vectors, owners)
    request = F.normalize(torch.randn(1, DIMENSION, generator=generator), dim=1)
    with torch.inference_mode():
        taken = seconds({"floor": vectors.sum, "choice": lambda: topics.choose(request)}, rounds)
    milliseconds = 1e3 * taken["choice"]
    shape = f"{count} topics of {prototypes} prototypes"
    return [shape, vectors.nbytes / 1e6, milliseconds, taken["choice"] / taken["floor"]]


def main(rounds: Annotated[int, typer.Option(help="Choices of each case.")] = 200) -> None:
    """Measure, print a table and write `benchmarks/results/topic_choice.json`."""
    rows = [choice(rounds, *shape) for shape in ((500, 4), (5000, 1), (5000, 4))]
    report("topic_choice", ("topics", "prototypes, MB", "choice, ms", "choice ÷ sum"), rows)


if __name__ == "__main__":
    typer.run(main)

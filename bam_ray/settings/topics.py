"""Settings of topics: clusters of the corpus, each of which gets an adapter (MoIN, arXiv 2410.09687)."""

from typing import Annotated, Literal

from pydantic import Field

from bam_ray.settings.resources import Needs
from bam_ray.settings.strict import Count, Identity, Strict

EmbedderName = Literal["minilm", "seed", "tfidf"]


class TopicsSettings(Strict):
    """Topics of the corpus. They are found in the text of all domains together, without the names of the domains."""

    count: Count | Literal["auto"]
    """Number of topics. Topics of fewer than `min_documents` documents are left out. `auto` means the number that
    HDBSCAN finds."""
    embedder: EmbedderName = "minilm"
    """The function from a text to the vector that it is clustered by. `minilm` means all-MiniLM-L6-v2, which a package
    contains. `seed` means the mean hidden state of the seed. `tfidf` means tf-idf of words and a singular value
    decomposition, which needs no model."""
    prefix_tokens: Count = 64
    """Number of tokens at the beginning of a text that the embedder reads. `minilm` counts its own tokens, `seed` those
    of the seed, and `tfidf` words."""
    prototypes: Count = 4
    """Number of vectors of each topic. The topic of a text is that of the most similar vector."""
    min_documents: Count = 10
    """The fewest training documents of a topic. The documents of a smaller topic join the other topics."""
    random_seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of the clustering."""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of the process that finds the topics."""

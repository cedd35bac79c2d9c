"""The tokenizer of a corpus: a byte-level BPE trained on its text, or the one of a Hugging Face folder.

Either way a folder that `AutoTokenizer` loads comes out, with a fast tokenizer (`tokenizer.json`) and an end-of-text
token.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bam_ray.data.sources import END_OF_TEXT, fetched
from bam_ray.errors import DataError

SAMPLE_CHARACTERS = 12_000_000  # BPE merges hardly change beyond; seconds to train on
PARALLELISM = "TOKENIZERS_PARALLELISM"  # the environment variable that the library reads at every call
SMALLEST_VOCABULARY = 257  # all bytes, and the end of text

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class TokenizerFacts:
    """What packing and models need to know."""

    vocab_size: int
    end_of_text_id: int


def train_tokenizer(texts: Iterator[str], vocab_size: int, folder: Path) -> TokenizerFacts:
    """Train a byte-level BPE and save it in `folder`. It has fewer than `vocab_size` tokens where the text gives none.

    Raises `DataError` for a `vocab_size` that cannot hold all bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"data.tokenizer.vocab_size is {vocab_size}: a byte-level vocabulary needs at least {SMALLEST_VOCABULARY}"
        )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return TokenizerFacts(tokenizer.get_vocab_size(), tokenizer.get_vocab()[END_OF_TEXT])


def copy_tokenizer(source: str, folder: Path) -> TokenizerFacts:
    """Save the tokenizer of the Hugging Face folder (or URI of one) at `source` in `folder`; raises `DataError`."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="bam-tokenizer-") as temporary:
        place = Path(source.removeprefix("file://")).expanduser()
        if "://" in source and not source.startswith("file://"):
            place = Path(temporary)
            for _ in fetched(source, place, _is_tokenizer_file):
                pass
        if not place.is_dir():
            raise DataError(f"data.tokenizer.folder {source} does not exist: mend it")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"data.tokenizer.folder {source} holds no tokenizer that loads: {reason}") from None
        if not tokenizer.is_fast:
            raise DataError(f"data.tokenizer.folder {source} holds no fast tokenizer (tokenizer.json): convert it")
        if tokenizer.eos_token_id is None:
            raise DataError(f"data.tokenizer.folder {source}: its tokenizer has no eos_token, which ends documents")
        tokenizer.save_pretrained(folder)
        return TokenizerFacts(len(tokenizer), tokenizer.eos_token_id)


def load_for_packing(folder: Path) -> Tokenizer:
    """The bare tokenizer of a folder, set so that no text is cut, padded or read as a special token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # text that spells <|endoftext|> must not end a document
    return tokenizer


@contextmanager
def in_threads() -> Iterator[None]:
    """Tokenise in threads within, but never after: a process that is forked later would wait for threads it lacks.

    The library prevents that by itself, with a warning at the fork, unless the environment says what is meant.
    """
    if PARALLELISM in os.environ:
        yield
        return
    os.environ[PARALLELISM] = "true"
    try:
        yield
    finally:
        os.environ[PARALLELISM] = "false"


def _is_tokenizer_file(key: str) -> bool:
    return key.endswith((".json", ".jinja", ".txt", ".model")) and not key.endswith(".safetensors.index.json")

"""The tokenizer of a corpus: a byte-level BPE trained on its text, or a copy from a Hugging Face folder.

Both give a folder that `AutoTokenizer` loads, with a fast tokenizer (`tokenizer.json`) and an end-of-text token.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bam_ray.checkpoint.model_folder import refuse_outside_link
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.data.download import remote_files
from bam_ray.data.formats import END_OF_TEXT
from bam_ray.errors import DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLE_CHARACTERS = 12_000_000  # more text hardly changes the BPE merges; this much takes seconds
PARALLELISM = "TOKENIZERS_PARALLELISM"  # environment variable that the library reads at every call
MIN_VOCAB_SIZE = 257  # all bytes and the end-of-text token
MAX_REASON_CHARACTERS = 200  # of an error message of transformers, which may be pages long

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class TokenizerInfo:
    """The properties of a tokenizer that packing and models need."""

    vocab_size: int
    end_of_text_id: int


def train_tokenizer(texts: Iterator[str], vocab_size: int, folder: Path) -> TokenizerInfo:
    """Train a byte-level BPE tokenizer and save it to `folder`.

    Args:
        texts: The text to train on.
        vocab_size: The maximum number of tokens; a small text gives fewer.
        folder: The folder to write.

    Raises:
        DataError: `vocab_size` is too small for all bytes and the end-of-text token.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"data.tokenizer.vocab_size is {vocab_size}, but a byte-level vocabulary needs at least {MIN_VOCAB_SIZE}: "
            "increase it"
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
    return TokenizerInfo(tokenizer.get_vocab_size(), tokenizer.get_vocab()[END_OF_TEXT])


def copy_tokenizer(source: str, folder: Path) -> TokenizerInfo:
    """Save the tokenizer of the Hugging Face folder at `source`, a path or a URI, to `folder`.

    Raises:
        DataError: `source` has no tokenizer that loads and can be saved, or it is not fast or has no end-of-text token.
        CheckpointError: A file is a link that leads out of the folder.
    """
    with scratch_folder("tokenizer") as temporary:
        local = Path(os.path.expanduser(source.removeprefix("file://")))
        if "://" in source and not source.startswith("file://"):
            local = temporary
            for file in remote_files(source):
                if _is_tokenizer_file(file.key):
                    file.download(local)
        if not local.is_dir():
            raise DataError(f"data.tokenizer.folder {source} does not exist: correct the path")
        for path in local.iterdir():
            if _is_tokenizer_file(path.name):
                refuse_outside_link(str(local), "", path.name)
        return _save(_load_fast(local, source), folder, source)


def load_for_packing(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder such that no text is truncated, padded or read as a special token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a text that contains "<|endoftext|>" must not end a document
    return tokenizer


@contextmanager
def threaded_tokenization() -> Iterator[None]:
    """Tokenize in several threads inside the block and in one thread afterwards.

    A process that is forked later would wait forever for threads that it does not have. The library prevents this
    itself, with a warning at each fork, unless the environment variable is set. A value set by the user is kept.
    """
    if PARALLELISM in os.environ:
        yield
        return
    os.environ[PARALLELISM] = "true"
    try:
        yield
    finally:
        os.environ[PARALLELISM] = "false"


def _load_fast(local: Path, source: str) -> "PreTrainedTokenizerFast":
    """Return the tokenizer in a local folder, which is a copy of `source`; raises `DataError`."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
            str(local), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of any type: the tokenizers library raises `Exception` for a file of a new version
        raise DataError(f"data.tokenizer.folder {source} has no tokenizer that loads: {_reason(error)}") from None
    if not tokenizer.is_fast:
        raise DataError(f"data.tokenizer.folder {source} has no fast tokenizer (tokenizer.json): convert it")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"data.tokenizer.folder {source}: the tokenizer has no eos_token to end documents with: set one"
        )
    return tokenizer


def _save(tokenizer: "PreTrainedTokenizerFast", folder: Path, source: str) -> TokenizerInfo:
    """Save a tokenizer that was loaded from `source`; raises `DataError` if its files are damaged."""
    try:
        tokenizer.save_pretrained(folder)
        vocabulary = tokenizer.get_vocab()
    except OSError:  # of the disk
        raise
    except Exception as error:  # of any type, as above
        raise DataError(
            f"data.tokenizer.folder {source} has a tokenizer that cannot be saved: {_reason(error)}: a file of it is "
            "damaged, so copy it again"
        ) from None
    vocab_size = max(len(tokenizer), *(number + 1 for number in vocabulary.values()))  # ids may have gaps
    return TokenizerInfo(vocab_size, tokenizer.eos_token_id)


def _reason(error: Exception) -> str:
    return one_line(error, all_lines=True)[:MAX_REASON_CHARACTERS]


def _is_tokenizer_file(key: str) -> bool:
    return key.endswith((".json", ".jinja", ".txt", ".model")) and not key.endswith(".safetensors.index.json")

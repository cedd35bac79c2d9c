"""Upcycle, edit, measure and export model folders, local or on S3, without a cluster, a run or a recipe.

Each function that writes makes one new folder. If it fails, it leaves nothing behind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest, identity
from bam_ray.checkpoint.output_folder import check_disk_space, new_model_folder
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import SettingsError
from bam_ray.evaluation.perplexity import perplexity
from bam_ray.families import family_of
from bam_ray.model import is_mixture
from bam_ray.settings import Losses, MixtureSettings, StoreSettings
from bam_ray.toolbox.token_rows import text_counts, token_rows
from bam_ray.upcycling import (
    DomainText,
    EditOptions,
    ExpertEdit,
    ProgressCallback,
    Upcycled,
    export_mixtral,
    load_model,
    mixture_config_of,
    plan,
    write_edited_mixture,
    write_model,
)
from bam_ray.upcycling.preflight import Drift, Estimate, drift, estimate
from bam_ray.upcycling.routers.counts import TokenCounts

BATCH_SEQUENCES = 8


def open_model(uri: str, endpoint: str | None = None) -> TensorReader:
    """Return a reader of the model folder at `uri`; it reads no weights yet."""
    return TensorReader(open_store(uri, endpoint))


@dataclass(frozen=True)
class PreflightReport:
    """The drift of each branch from the seed, and the estimated cost of upcycling them."""

    drifts: dict[str, Drift]
    estimate: Estimate


def preflight(sources: Mapping[str, TensorReader], settings: MixtureSettings, text: DomainText) -> PreflightReport:
    """Run all checks of an upcycle and read all weights once, without writing anything."""
    planned = plan(sources, settings, Losses(), text)
    seed, *branches = sources
    family = family_of(sources[seed].config, sources[seed].uri)
    for source in sources.values():
        source.check_digests()
    drifts = {name: drift(sources[seed], sources[name], family) for name in branches}
    return PreflightReport(drifts, estimate(planned, sources))


def make_mixture(
    sources: Mapping[str, TensorReader],
    settings: MixtureSettings,
    out: StoreSettings,
    text: DomainText | None = None,
    progress: ProgressCallback | None = None,
) -> Upcycled:
    """Upcycle `sources`, whose first is the seed, to a new folder at `out`."""
    text = text or DomainText()
    planned = plan(sources, settings, Losses(), text)
    check_disk_space(out.uri, estimate(planned, sources).written)
    uris = tuple(source.uri for source in sources.values())
    manifest = Manifest(
        id=identity(settings.method, settings, uris),
        kind=ArtifactKind.UPCYCLED,
        name=settings.method,
        parents=uris,
        settings=settings.model_dump(mode="json"),
    )
    with new_model_folder(out) as writer:
        for source in sources.values():
            source.check_digests()
        return write_model(planned, sources, writer, manifest, text.rows, progress)


@dataclass(frozen=True)
class EditedMixture:
    """An edited mixture, and its perplexity by text before and after; empty if no text was given."""

    upcycled: Upcycled
    before: dict[str, float]
    after: dict[str, float]


def change_mixture(
    mixture: TensorReader,
    edit: ExpertEdit,
    branch: TensorReader | None,
    out: StoreSettings,
    options: EditOptions | None = None,
    texts: Mapping[str, Tensor] | None = None,
    progress: ProgressCallback | None = None,
) -> EditedMixture:
    """Add, remove or replace an expert of `mixture`, and write the result to a new folder.

    Args:
        mixture: The mixture to edit, which is not changed itself.
        edit: The edit.
        branch: The branch that becomes an expert; None to remove one.
        out: Location of the new folder.
        options: The options of the edit.
        texts: Rows of tokens by name, int64 [S, L]; both mixtures are evaluated on them.
        progress: Called after each chunk.
    """
    sources = [mixture] if branch is None else [mixture, branch]
    check_disk_space(out.uri, sum(spec.bytes for source in sources for spec in source.specs.values()))
    uris = tuple(source.uri for source in sources)
    options = options or EditOptions()
    settings: dict[str, Any] = {
        "verb": edit.verb,
        "experts": edit.names,
        "average_weight": options.average_weight,
    }
    if options.counts is not None:
        settings["counted_tokens"] = options.counts.total
    manifest = Manifest(
        id=identity(edit.verb, settings, uris),
        kind=ArtifactKind.UPCYCLED,
        name=edit.verb,
        parents=uris,
        settings=settings,
    )
    with new_model_folder(out) as writer:
        for source in sources:
            source.check_digests()
        upcycled = write_edited_mixture(mixture, edit, branch, writer, manifest, options, progress)
    before = perplexities(mixture, texts or {})
    return EditedMixture(upcycled, before, perplexities(open_model(out.uri, out.endpoint), texts or {}))


def counts_of_branch(edit: ExpertEdit, mixture: TensorReader, texts: Mapping[str, str]) -> TokenCounts | None:
    """Return the counts of the text of the branch that `edit` adds, as the router prior of `mixture` needs them.

    `texts` are sources by name. Returns None if the mixture has no prior, or there is no text of the branch.
    """
    config, name = mixture_config_of(mixture), edit.branch
    if config.router_prior == "none" or name is None or name not in texts:
        return None
    vocab_size = config.router_prior_vocab_size or config.vocab_size
    return text_counts(name, texts[name], mixture, vocab_size, config.router_prior_buckets)


def perplexities(model: TensorReader, texts: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the perplexity of `model` by text, of rows int64 [S, L]."""
    if not texts:
        return {}
    loaded = load_model(model)
    return {name: perplexity(loaded, rows.numpy(), BATCH_SEQUENCES).perplexity for name, rows in texts.items()}


def export(mixture: TensorReader, out: StoreSettings, progress: ProgressCallback | None = None) -> None:
    """Write a mixture to a new folder in the format of Mixtral."""
    check_disk_space(out.uri, sum(spec.bytes for spec in mixture.specs.values()))
    manifest = Manifest(
        id=identity("mixtral", {}, (mixture.uri,)), kind=ArtifactKind.UPCYCLED, name="mixtral", parents=(mixture.uri,)
    )
    with new_model_folder(out) as writer:
        mixture.check_digests()
        export_mixtral(mixture, writer, manifest, progress)


def read_domain_text(
    texts: Mapping[str, str], model: TensorReader, settings: MixtureSettings, length: int
) -> DomainText:
    """Read what an upcycling with `settings` needs of each named text, with the tokenizer of `model`.

    Args:
        texts: The sources of text, by the name of the expert.
        model: The seed.
        settings: The settings of the mixture. They decide whether the first rows or the counts of all text are needed.
        length: Tokens per row.

    Raises:
        SettingsError: There is text, but the settings need none.
    """
    if texts and not settings.text_sequences and not settings.needs_token_counts:
        raise SettingsError(
            "these settings use no text: leave it out, or set router.init to means or ridge, router.prior to "
            "bigram, or embeddings to counts"
        )
    counted = texts if settings.needs_token_counts else {}
    return DomainText(
        rows=tokenize_texts(texts, model, settings.text_sequences, length),
        counts={name: text_counts(name, source, model) for name, source in counted.items()},
    )


def tokenize_texts(sources: Mapping[str, str], model: TensorReader, sequences: int, length: int) -> dict[str, Tensor]:
    """Return up to `sequences` rows of tokens of each named text, int64 [S, L], by the tokenizer of `model`.

    Rows are no longer than the model has positions.
    """
    if not sources or not sequences:
        return {}
    if is_mixture(model.config):
        positions = mixture_config_of(model).max_position_embeddings
    else:
        normalized = family_of(model.config, model.uri).normalize_config(model.config)
        positions = normalized.get("max_position_embeddings") or length
    return {
        name: token_rows(name, source, model, sequences, min(length, positions)) for name, source in sources.items()
    }

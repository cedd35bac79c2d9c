"""A commented recipe for a user's own seed and text, ready for `bam plan` and `bam run`."""

import json
from collections.abc import Mapping
from string import Template

from bam_ray.blobs import open_store
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.data.sources import read_documents
from bam_ray.errors import FamilyError, SettingsError
from bam_ray.families import check_weights, family_of
from bam_ray.settings import DomainSettings, parse_recipe
from bam_ray.upcycling.tokenizers import has_tokenizer

LONGEST_SEQUENCE = 2048

TEMPLATE = Template("""\
# Branches of $seed, one per domain, become a BAM mixture of $experts experts.
#   bam plan $path        shows what the run would make and need; it starts nothing
#   bam run $path         runs it on the Ray cluster of RAY_ADDRESS
# `bam schema` prints the schema of all settings, which editors can use to complete this file.
name: $name
store:
  uri: $store                # where all artifacts are stored: s3://bucket/prefix, or a folder that all nodes can access

data:
  domains:                   # text, JSONL or Parquet files: a path, glob or URI; text_field names the field or column
$domains
  # discover: {domains: 8, sources: {pile: {source: "pile/*.parquet"}}}   # finds further domains in text without labels
  general: $general          # text of this domain is added to the data of every branch
  sequence_length: $length
  tokenizer: {folder: $seed}

seed:
  folder: $seed
  needs: {cpus: 1}

branch:                      # one branch per domain, trained independently of each other
  domains: [$branches]
  general_fraction: 0.1      # fraction of each branch's tokens that comes from the general domain
  training:
    tokens: 20_000_000       # per branch; choose about one pass over a domain's text
    batch_tokens: $batch
    peak_lr: 1.0e-4          # the BAM paper uses half of the peak learning rate of the seed's own training
    checkpoint_every: 100
  needs: {gpus: 1, fallback: [{cpus: 1}]}   # one GPU per branch; one CPU if the cluster has no GPU

upcycle:
  mixtures:
    bam:                     # FFN experts and attention experts; `method: btx` has FFN experts only
      method: bam
      attention_experts: kv_experts
      num_experts_per_tok: 2
      norm_topk_prob: true

mix:
  expert_parallel: $expert_parallel         # processes over which the $experts experts are distributed
  training:
    tokens: 10_000_000
    batch_tokens: $batch
    peak_lr: 5.0e-5
    checkpoint_every: 100
  needs: {gpus: 1, fallback: [{cpus: 1}]}   # per process

evaluate:
  tokens_per_domain: 65536

serve:
  mixture: bam
  port: 8000
""")


def recipe_for(
    seed: str, texts: Mapping[str, str], path: str, store: str, general: str = "general", endpoint: str | None = None
) -> str:
    """Return a commented recipe that branches `seed` on every domain of `texts`.

    The seed and the text are checked first, so that the recipe is valid.

    Args:
        seed: Path or URI of a Hugging Face folder.
        texts: The source of each domain's text, by name, in the form of `data.domains.*.source`.
        path: Name of the file that the recipe is for, which its comments mention.
        store: The run's `store.uri`.
        general: The name of the general domain, which gets no branch.
        endpoint: URL of an S3 server other than AWS.

    Raises:
        SettingsError: There is no general domain, or no other one.
        FamilyError: The seed's architecture is not supported, or it has no tokenizer.
        CheckpointError: The seed is not a model folder that can be read.
        DataError: A domain has no text.
    """
    branches = [domain for domain in texts if domain != general]
    if general not in texts or not branches:
        raise SettingsError(
            f"the domains are {sorted(texts)}: give text for {general!r} (see --general) and for at least one more"
        )
    positions = _positions(seed, endpoint)
    for domain, source in texts.items():
        next(read_documents(domain, DomainSettings(source=source)), None)
    length = min(LONGEST_SEQUENCE, positions)
    text = TEMPLATE.substitute(
        seed=json.dumps(seed),
        experts=1 + len(branches),
        path=path,
        name="-".join(branches)[:40],
        store=json.dumps(store),
        domains="\n".join(f"    {domain}: {{source: {json.dumps(source)}}}" for domain, source in texts.items()),
        general=general,
        length=length,
        branches=", ".join(branches),
        batch=32 * length,
        expert_parallel=2 if len(branches) % 2 else 1,
    )
    parse_recipe(text, path)
    return text


def _positions(seed: str, endpoint: str | None) -> int:
    """Check that the folder can be a seed, and return the number of its positions."""
    reader = TensorReader(open_store(seed, endpoint))
    check_weights(reader, family_of(reader.config, seed))
    if not has_tokenizer(reader):
        raise FamilyError(f"{seed} has no tokenizer: save the model's tokenizer there")
    return int(reader.config.get("max_position_embeddings") or LONGEST_SEQUENCE)

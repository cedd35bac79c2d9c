"""The seed with a prior over domains: controls that have the prior of a mixture, but none of its experts.

    seed_with_tables    a table for each domain, weighted by soft gates as those of embedding experts
    seed_with_vectors   vectors for each domain, weighted by the prior (`bam_ray.model.domain_vectors`)

Everything else is that of the seed. All tables begin as the seed's, and routers and vectors with zeros, so at first the
model computes what the seed computes.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.domain_vectors import DomainVectorsConfig, DomainVectorsForCausalLM
from bam_ray.settings import Losses, domain_tables
from bam_ray.upcycling.expressions import whole
from bam_ray.upcycling.routers.counts import TokenCounts
from bam_ray.upcycling.upcycle import DomainText, plan


def seed_with_tables(seed: TensorReader, counts: Mapping[str, TokenCounts]) -> BamForCausalLM:
    """Return the seed with a table for each domain, in fp32.

    Args:
        seed: The seed.
        counts: The counts of each domain's text, of two domains or more.

    Raises:
        FamilyError: The architecture of the seed is not supported.
        UpcycleError: The counts do not fit the seed.
    """
    sources = {"seed": seed, **dict.fromkeys(counts, seed)}
    planned = plan(sources, domain_tables(seed.config["num_hidden_layers"]), Losses(), DomainText(counts=counts))
    weights = {tensor.spec.name: whole(tensor.expression, sources) for tensor in planned.tensors}
    assert isinstance(planned.config, BamConfig)  # the method makes a mixture
    model = BamForCausalLM(planned.config)
    model.load_state_dict(weights, strict=False)  # a tied head has no weights of its own
    return model


def seed_with_vectors(seed: Path, counts: Mapping[str, TokenCounts]) -> DomainVectorsForCausalLM:
    """Return the seed in the folder `seed` with vectors for each domain, in fp32.

    `counts` are the counts of each domain's text, of the seed's vocabulary.
    """
    dense = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    any_counts = next(iter(counts.values()))
    model = DomainVectorsForCausalLM(
        DomainVectorsConfig(
            dense.config,
            num_experts=len(counts),
            router_prior_buckets=len(any_counts.pairs),
            router_prior_vocab_size=len(any_counts.tokens),
        )
    )
    model.dense.load_state_dict(dense.state_dict())
    model.prior.experts.tokens.copy_(torch.stack([each.tokens for each in counts.values()]))
    model.prior.experts.pairs.copy_(torch.stack([each.pairs for each in counts.values()]))
    return model

"""Plans, which import no torch, know the parameters and operations of the mixtures that upcycling makes."""

from itertools import product
from typing import Any

import pytest
import torch

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.parameters import count_parameters
from bam_ray.planning.model_size import PAIR_BUCKETS, ModelSize
from bam_ray.settings import BamSettings, BtxSettings, Operation, SplitSettings, StackedMixture
from bam_ray.training.flops import training_flops
from bam_ray.training.param_groups import parameter_kinds
from bam_ray.upcycling.routers.counts import BUCKETS

SHAPE: dict[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
EXPERTS = 4
BOTH = (False, True)
METHODS: dict[str, tuple[type[BamSettings | BtxSettings], dict[str, Any]]] = {
    "bam": (BamSettings, {"method": "bam"}),
    "bam, kv_shared": (BamSettings, {"method": "bam", "attention_experts": "kv_shared", "num_experts_per_tok": 2}),
    "btx": (BtxSettings, {"method": "btx", "num_experts_per_tok": 2}),
}


def seed_of(tied: bool) -> ModelSize:
    return ModelSize(hidden=64, ffn=96, layers=3, query=64, key=32, vocabulary=512, tied=tied, vectors=1)


def model_of(settings: StackedMixture, tied: bool) -> BamForCausalLM:
    """Return the mixture that upcycling makes with these settings, without memory for its weights."""
    config = BamConfig(
        **SHAPE,
        num_experts=EXPERTS,
        num_experts_per_tok=settings.num_experts_per_tok,
        attention_experts=settings.attention,
        embeddings="experts" if settings.embedding is Operation.STACK else "averaged",
        router_input=settings.router.input,
        router_prior=settings.router.prior,
        dense_layers=list(settings.dense_layers),
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return BamForCausalLM(config)


@pytest.mark.parametrize("embeddings", ["averaged", "counts", "experts"])
@pytest.mark.parametrize("method", METHODS)
def test_a_mixture_has_the_planned_parameters_and_operations(method: str, embeddings: str) -> None:
    make, chosen = METHODS[method]
    for tied, dense_layers, router in product(
        BOTH, [(), (1,), (0, 1, 2)], [{}, {"input": "prefix", "prior": "bigram"}]
    ):
        settings = make.model_validate(
            {**chosen, "embeddings": embeddings, "dense_layers": dense_layers, "router": router}
        )
        size, model = seed_of(tied).mixed(settings, EXPERTS), model_of(settings, tied)
        total, active = count_parameters(model)
        assert size.parameters == total
        distributed = sum(each.numel() for _, each, kind in parameter_kinds(model) if kind == "expert")
        assert size.expert_parameters == distributed
        rejected = (EXPERTS - settings.num_experts_per_tok) * 3 * 64 * 96  # of one layer
        assert active == total - (3 - len(dense_layers)) * rejected, "all tables are used"
        assert size.training_flops(128) == training_flops(model.config, 128, 1)
        assert size.count_bytes == sum(each.nbytes for name, each in model.named_buffers() if ".prior." in name)


def test_dense_layers_of_a_split_keep_the_sizes_of_the_seed() -> None:
    settings = SplitSettings.model_validate(
        {"method": "split", "num_experts": 4, "dense_layers": [0, 2], "split": {"attention": "groups"}}
    )
    seed = seed_of(tied=True)
    split, whole = seed.mixed(settings, 1), seed.mixed(settings.model_copy(update={"dense_layers": ()}), 1)
    routers = 2 * 4 * 64
    assert whole.parameters == seed.parameters + 3 * routers
    assert split.parameters == seed.parameters + routers
    unused = 3 * 3 * 64 * 96 // 4  # one of four slices is used
    assert seed.training_flops(8) - split.training_flops(8) == 6 * (unused - routers)


def test_plans_assume_the_number_of_buckets_of_upcycling() -> None:
    assert PAIR_BUCKETS == BUCKETS

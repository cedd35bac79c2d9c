"""Commands that work on model folders. A user error is one line, and nothing is written."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralForCausalLM

from bam_ray.blobs import open_store
from bam_ray.blobs.memory import MemoryStore
from bam_ray.data.tokenizer import train_tokenizer
from tests.support import tiny
from tests.support.command_line import bam, refusal

NAMES = ["seed", "code", "law"]
CONFIG = LlamaConfig(**tiny.SIZES | {"vocab_size": 300, "num_key_value_heads": 4})
Run = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a seed, two branches, their tokenizer and two texts."""
    for number, name in enumerate(NAMES):
        model = tiny.dense(CONFIG, 0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * number * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        train_tokenizer(iter(["some text to learn bytes from"]), 300, tmp_path / name)
    (tmp_path / "prose.txt").write_text("It was a dark and stormy night. " * 60)
    (tmp_path / "code.txt").write_text("def f(x):\n    return x[0]\n" * 80)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Run:
    """Return a function that runs a command that must succeed, and returns its output."""
    monkeypatch.chdir(folder)

    def succeed(*arguments: str) -> str:
        assert bam(monkeypatch, *arguments) == 0
        return capsys.readouterr().out

    return succeed


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Run:
    """Return a function that runs a command that must fail without writing anything, and returns its error line."""
    monkeypatch.chdir(folder)

    def fail(*arguments: str) -> str:
        before = set(folder.iterdir())
        capsys.readouterr()  # transformers' progress bars
        line = refusal(monkeypatch, capsys, *arguments)
        assert set(folder.iterdir()) == before
        return line

    return fail


UPCYCLE = ("upcycle", "--seed=seed", "--branch=code=code", "--branch=law=law", "--out=mixture")


def test_dense_folders_become_a_mixture_and_a_mixtral(run: Run, folder: Path) -> None:
    out = run(*UPCYCLE, "--method=btx", "--set=num_experts_per_tok=2", "--set=norm_topk_prob=true")
    assert "3 experts: seed, code, law" in out
    assert "FAIL" not in run("verify", "mixture")
    model = AutoModelForCausalLM.from_pretrained(folder / "mixture")
    assert model(tiny.tokens()).logits.isfinite().all()
    shown = run("inspect", "mixture")
    assert "mixture of 3 × llama" in shown
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" in shown
    assert "upcycle of" in shown
    assert "llama" in run("inspect", "seed")
    run("export", "mixture", "--out=mixtral")
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder / "mixtral"), MixtralForCausalLM)
    assert (folder / "mixture" / "README.md").read_text().count("seed, code, law") == 1
    assert {path.name for path in folder.iterdir()} >= {"mixture", "mixtral"}
    assert not list(folder.glob(".*partial*"))


def test_dense_folders_become_a_soup(run: Run, refused: Run, folder: Path) -> None:
    assert "written: mixture" in run(*UPCYCLE, "--method=soup", "--set=average.how=ties")
    model = AutoModelForCausalLM.from_pretrained(folder / "mixture", trust_remote_code=False)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model(tiny.tokens()).logits.isfinite().all()
    assert "llama (dense)" in run("inspect", "mixture")
    for command in (("verify", "mixture"), ("absorb", "mixture", "--branch=law=law", "--out=more")):
        assert "mixture is a dense 'llama' model, not a mixture" in refused(*command)


def test_routers_are_fitted_to_text(run: Run, folder: Path) -> None:
    texts = ("--text=seed=prose.txt", "--text=code=code.txt", "--length=32")
    out = run(*UPCYCLE, "--set=router.init=ridge", "--set=router.sequences=8", *texts)
    assert "ridge *" in out
    separation = json.loads((folder / "mixture" / "separation.json").read_text())
    assert separation["domains"] == ["seed", "code"]


def test_embedding_rows_are_weighted_by_all_text(run: Run, folder: Path) -> None:
    texts = ("--text=seed=prose.txt", "--text=code=code.txt", "--text=law=law.txt")
    (folder / "law.txt").write_text("Whereas the party of the first part. " * 50)
    run(*UPCYCLE, "--method=btx", "--set=embeddings=counts", *texts)
    tokenizer = AutoTokenizer.from_pretrained(folder / "seed")
    counts = torch.ones(3, 300)
    for number, name in enumerate(("prose", "code", "law")):
        ids = tokenizer((folder / f"{name}.txt").read_text())["input_ids"]
        counts[number] += torch.bincount(torch.tensor([*ids, CONFIG.eos_token_id]), minlength=300)
    totals = counts.sum(1, keepdim=True) - 300
    counts = (counts - 1) * totals.mean() / totals + 1
    models = torch.stack([load_file(folder / name / "model.safetensors")["lm_head.weight"] for name in NAMES])
    expected = (models * (counts / counts.sum(0))[:, :, None]).sum(0)
    written = load_file(folder / "mixture" / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(written, expected)


def test_text_that_is_missing_or_unused_is_an_error(refused: Run) -> None:
    error = refused(*UPCYCLE, "--set=embeddings=counts", "--text=code=code.txt")
    assert "there is none of ['seed', 'law']: give it (--text NAME=SOURCE)" in error
    assert "or embeddings to counts" in refused(*UPCYCLE, "--text=code=code.txt")
    assert "embeddings" in refused(*UPCYCLE, "--set=embeddings=mean")
    assert "embeddings: unknown key" in refused(*UPCYCLE[:2], "--out=x", "--method=sparse", "--set=embeddings=counts")


def test_experts_are_added_to_a_mixture_with_a_prior(run: Run, refused: Run, folder: Path) -> None:
    settings = ("--set=embeddings=experts", "--set=router.init=zero", "--set=router.prior=bigram")
    texts = ("--text=seed=prose.txt", "--text=code=code.txt")
    run(*UPCYCLE[:3], "--out=mixture", *settings, "--set=router.input=prefix", "--set=router.forgetting=0.99", *texts)
    shown = run("inspect", "mixture")
    for key, value in (
        ("embeddings", "experts"),
        ("router_input", "prefix"),
        ("router_prior", "bigram"),
        ("router_forgetting", "0.99"),
    ):
        assert re.search(rf"{key} +{value}", shown)
    card = (folder / "mixture" / "README.md").read_text()
    assert "| embeddings | embedding experts, each with its own embedding and head |" in card
    assert "read the running mean of the document so far, with a bigram prior (scale 0.25); a token's weight" in card
    assert "is multiplied by 0.99 with each later token |" in card
    absorb = ("absorb", "mixture", "--branch=law=law", "--out=more", "--length=32")
    for text in ((), ("--text=code=code.txt",)):
        assert "needs text of the new expert 'law': give it (--text law=SOURCE)" in refused(*absorb, *text)
    out = run(*absorb, "--text=law=prose.txt")
    assert "Perplexity before and after" in out
    assert "FAIL" not in run("verify", "more")
    old, new = (load_file(folder / name / "model.safetensors") for name in ("mixture", "more"))
    for name in ("model.prior.experts.tokens", "model.prior.experts.pairs"):
        assert torch.equal(new[name][:2], old[name])
        assert torch.equal(new[name][2], old[name][0])  # prose.txt is the text of the seed too
    run("replace", "more", "--expert=code", "--branch=other=law", "--out=other", "--text=other=code.txt")
    replaced = load_file(folder / "other" / "model.safetensors")["model.prior.experts.tokens"]
    assert torch.equal(replaced, new["model.prior.experts.tokens"])  # code.txt is the text of the replaced expert
    run("remove", "other", "--expert=law", "--out=fewer")
    assert "FAIL" not in run("verify", "fewer")


def test_a_dry_run_measures_and_writes_nothing(run: Run, folder: Path) -> None:
    before = set(folder.iterdir())
    out = run(*UPCYCLE[:-1], "--dry-run")
    assert set(folder.iterdir()) == before
    assert "nothing was written" in out
    seed, code = (load_file(folder / name / "model.safetensors") for name in ("seed", "code"))
    layer = [name for name in seed if name.startswith("model.layers.1.")]
    change = sum(float((code[name] - seed[name]).square().sum()) for name in layer) ** 0.5
    size = sum(float(seed[name].square().sum()) for name in layer) ** 0.5
    assert f"{change / size:.4f}" in out


def test_experts_are_added_replaced_and_removed(run: Run, folder: Path) -> None:
    run(*UPCYCLE[:3], "--out=mixture", "--set=num_experts_per_tok=1")
    out = run("absorb", "mixture", "--branch=law=law", "--out=more", "--text=prose=prose.txt", "--length=32")
    assert "Perplexity before and after" in out
    assert "prose" in out
    out = run("replace", "more", "--expert=code", "--branch=other=law", "--out=other")
    assert "was not evaluated" in out
    run("remove", "other", "--expert=law", "--out=fewer")
    assert "seed, other" in run("inspect", "fewer")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    store = MemoryStore()
    monkeypatch.setattr(MemoryStore, "named", lambda name: store)
    return store


def test_models_are_read_from_and_written_to_a_store(run: Run, refused: Run, folder: Path, memory: MemoryStore) -> None:
    for path in (folder / "code").iterdir():
        memory.put_file(path.name, path)
    run("upcycle", "--seed=seed", "--branch=code=memory://x", "--out=mixture")
    for path in (folder / "code").iterdir():
        memory.delete(path.name)
    run(*UPCYCLE[:-1], "--out=memory://x")
    assert "FAIL" not in run("verify", "memory://x")
    for key in list(memory.list()):
        memory.delete(key)
    damage(folder / "law", {"model.norm.weight": torch.full((32,), float("nan"))})
    assert "not finite" in refused(*UPCYCLE[:-1], "--out=memory://x")
    assert list(memory.list()) == []


@pytest.mark.usefixtures("folder")
def test_a_store_without_conditional_puts_needs_weak_store(
    run: Run,
    refused: Run,
    weak_server: tuple[str, str],
) -> None:
    endpoint, _ = weak_server
    run(*UPCYCLE)
    out = "s3://bam/of-cli"
    for command in (
        UPCYCLE[:-1],
        ("absorb", "mixture", "--branch=more=law"),
        ("remove", "mixture", "--expert=law"),
        ("replace", "mixture", "--expert=law", "--branch=more=law"),
    ):
        error = refused(*command, f"--out={out}", f"--endpoint={endpoint}")
        assert "two attempts could both commit" in error
        assert "--weak-store" in error
        assert list(open_store(out, endpoint).list()) == []
        assert f"written: {out}" in run(*command, f"--out={out}", f"--endpoint={endpoint}", "--weak-store")
        assert "FAIL" not in run("verify", out, f"--endpoint={endpoint}")
        store = open_store(out, endpoint)
        for key in list(store.list()):
            store.delete(key)


def damage(folder: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a model. None removes a tensor."""
    changed = {**load_file(folder / "model.safetensors"), **tensors}
    remaining = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(remaining, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage_branch", "message"),
    [
        (lambda law: os.truncate(law / "model.safetensors", 5000), r"law/model.safetensors is truncated"),
        (lambda law: (law / "model.safetensors").write_bytes(b"no"), "is not a safetensors file"),
        (lambda law: damage(law, {"model.norm.weight": None}), "law lacks model.norm.weight"),
        (lambda law: damage(law, {"more": torch.ones(1)}), "law has more"),
        (
            lambda law: damage(law, {"model.norm.weight": torch.ones(31)}),
            "norm.weight has shape [31], but config.json describes [32]",
        ),
        (
            lambda law: damage(law, {"model.layers.1.mlp.up_proj.weight": torch.full((48, 32), float("nan"))}),
            "law: model.layers.1.mlp.up_proj.weight of 'law' has values that are not finite",
        ),
        (lambda law: reconfigure(law, model_type="gpt2"), "model_type is 'gpt2' in 'law' but 'llama' in 'seed'"),
        (lambda law: reconfigure(law, rms_norm_eps=0.5), "rms_norm_eps is 0.5 in 'law' but 1e-06 in 'seed'"),
        (lambda law: reconfigure(law, tie_word_embeddings=True), "tie_word_embeddings is True in 'law' but False"),
        (
            lambda law: (law / "tokenizer.json").write_text("{}"),
            "the tokenizer files of 'law' differ from those of 'seed'",
        ),
        (lambda law: (law / "config.json").unlink(), "it has no config.json"),
        (lambda law: (law / "config.json").write_text("{"), "config.json is not JSON"),
    ],
)
def test_a_damaged_branch_is_one_line(
    refused: Run, folder: Path, damage_branch: Callable[[Path], object], message: str
) -> None:
    damage_branch(folder / "law")
    assert message in refused(*UPCYCLE)


def test_a_wrong_digest_is_one_line(run: Run, refused: Run, folder: Path) -> None:
    run(*UPCYCLE[:3], "--out=mixture")
    damage(folder / "mixture", {"model.norm.weight": torch.ones(32)})
    error = refused("absorb", "mixture", "--branch=law=law", "--out=more")
    assert "mixture/model.safetensors does not match its manifest" in error
    assert "files failed" in refused("verify", "mixture")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*UPCYCLE[:-1],), "no output folder is given: pass --out"),
        ((*UPCYCLE[:-1], "--out=seed"), "seed is not empty"),
        ((*UPCYCLE[:-1], "--out=prose.txt"), "prose.txt is not empty"),
        (
            (*UPCYCLE, "--branch=law=law"),
            "--branch 'law=law' must have the form NAME=VALUE, with a name that is used only once",
        ),
        ((*UPCYCLE, "--set=k"), "must have the form KEY=VALUE"),
        ((*UPCYCLE, "--set=norm=1"), "mixture: norm: unknown key"),
        ((*UPCYCLE, "--method=average"), "method is 'average': use one of 'bam', 'btx', 'sparse', 'split', 'soup'"),
        ((*UPCYCLE, "--set=router.init=means"), "give some of each domain (--text NAME=URI)"),
        ((*UPCYCLE, "--set=router.init=means", "--text=code=nowhere.txt"), "names no file to read"),
        ((*UPCYCLE, "--set=router.init=means", "--text=code=code.txt"), "two"),
        (("upcycle", "--seed=nowhere", "--branch=a=law", "--out=x"), "it has no config.json"),
        (("verify", "seed"), "is a dense 'llama' model, not a mixture"),
        (("export", "seed", "--out=x"), "is a dense 'llama' model, not a mixture"),
        (("export", "seed", "--out=x", "--format=onnx"), "use mixtral"),
        (("remove", "seed", "--expert=law", "--out=x"), "is a dense 'llama' model, not a mixture"),
    ],
)
def test_a_user_error_is_one_line(refused: Run, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(*arguments)


def test_a_branch_of_another_seed_is_named(refused: Run, folder: Path) -> None:
    tiny.dense(CONFIG, 1).save_pretrained(folder / "law")
    assert "of 'law' does not descend from 'seed'" in refused(*UPCYCLE)


def test_an_unknown_architecture_is_named(refused: Run, folder: Path) -> None:
    for name in NAMES:
        reconfigure(folder / name, model_type="mamba")
    assert "has architecture 'mamba': supported are" in refused(*UPCYCLE)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line(refused: Run, run: Run, folder: Path) -> None:
    small = folder / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this system does not allow mounting a file system")
    try:
        assert "its disk has 0.00 GB free: free space" in refused(*UPCYCLE[:-1], "--out=small/mixture")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)

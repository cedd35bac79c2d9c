"""Tasks of lm-eval: models are scored on files of the user, in a report and alone."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bam_ray.blobs import open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import SettingsError
from bam_ray.evaluation.compare import compare
from bam_ray.evaluation.comparison_page import render_comparison
from bam_ray.evaluation.lm_eval_tasks import digest_of_tasks, score_tasks
from bam_ray.evaluation.results import LmEvalScore, Results
from bam_ray.evaluation.wall_clock import Cluster
from bam_ray.pipeline.graph import find_task, task_graph
from tests.support.compared import results
from tests.support.stage_run import make_artifacts, small_recipe
from tests.support.tiny import dense

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one task: the next letter, out of two, after each of 24 texts."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"text": a + b, "choices": ["x", "y"], "answer": (i + j) % 2}
        for i, a in enumerate("abcdef")
        for j, b in enumerate("uvwx")
    ]
    (folder / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "letters.yaml").write_text(TASK.format(data=folder / "letters.jsonl"))
    return folder


@pytest.fixture
def letters() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:96])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")


@pytest.mark.slow  # importing lm-eval takes seconds
def test_accuracy_is_that_of_the_logits(folder: Path, letters: PreTrainedTokenizerFast) -> None:
    model = dense("llama", 0)
    rows = [json.loads(line) for line in (folder / "letters.jsonl").read_text().splitlines()]
    x, y = (letters(choice).input_ids[0] for choice in "xy")
    right = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([letters(row["text"]).input_ids])).logits[0, -1]
        right.append(int(logits[y] > logits[x]) == row["answer"])
    assert 0 < sum(right) < len(right)
    (score,) = score_tasks(model, letters, folder, batch=5, max_length=16)
    assert (score.task, score.metric, score.value) == ("letters", "acc", sum(right) / len(right))
    assert score.stderr is not None and score.stderr > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [("", "it defines no task"), (TASK.format(data="/missing/letters.jsonl"), "/missing/letters.jsonl")],
)
def test_unusable_tasks_are_refused(
    tmp_path: Path, letters: PreTrainedTokenizerFast, content: str, message: str
) -> None:
    (tmp_path / "task.yaml").write_text(content)
    with pytest.raises(SettingsError, match=message):
        score_tasks(dense("llama", 0), letters, tmp_path, batch=5, max_length=16)


def test_the_digest_covers_names_and_content(folder: Path) -> None:
    first = digest_of_tasks(folder)
    assert digest_of_tasks(folder) == first
    (folder / "letters.jsonl").write_text("{}")
    second = digest_of_tasks(folder)
    (folder / "letters.yaml").rename(folder / "other.yaml")
    assert len({first, second, digest_of_tasks(folder)}) == 3
    with pytest.raises(SettingsError, match="missing on this node"):
        digest_of_tasks(folder / "missing")


@pytest.mark.slow
def test_a_report_scores_every_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    task = folder / "letters.yaml"  # with a space, the choices do not merge with the text to one token
    task.write_text(task.read_text().replace('target_delimiter: ""', 'target_delimiter: " "'))
    plain = small_recipe(tmp_path)
    recipe = small_recipe(tmp_path, evaluate={"tokens_per_domain": 256, "lm_eval_tasks": str(folder)})
    store = open_store(recipe.store.uri)
    make_artifacts(recipe, store, ("corpora", "seeds", "branches", "upcycled", "mixtures", "reports"))
    report = find_task(task_graph(recipe), ArtifactKind.REPORTS, "report")
    assert report.id != find_task(task_graph(plain), ArtifactKind.REPORTS, "report").id
    files = Artifact(store, ArtifactKind.REPORTS, report.id).fetch()
    found = Results.model_validate_json((files / "results.json").read_bytes())
    scored = [model.label for model in found.models if [score.metric for score in model.lm_eval] == ["acc"]]
    assert scored == ["seed", "branch code", "mixture bam", "mixture btx"]  # the ensembles are no models
    assert "Tasks of lm-eval" in (files / "report.html").read_text()


def test_a_comparison_has_the_mean_of_the_seeds() -> None:
    by_seed = {}
    for seed, value in ((0, 0.25), (1, 0.75)):
        found = results({"seed": 3.0, "bam": 2.5})
        scored = tuple(LmEvalScore(task=name, metric="acc", value=value) for name in ("letters", f"only {seed}"))
        models = [model.model_copy(update={"lm_eval": scored}) for model in found.models]
        by_seed[seed] = found.model_copy(update={"models": tuple(models)})
    comparison = compare(by_seed, Cluster(nodes=4, network_gbit_per_s=10.0), ("first", "second"))
    for model in comparison.models:
        (task,) = model.lm_eval
        assert (task.task, task.mean, task.by_seed) == ("letters", 0.5, (0.25, 0.75))
    assert "<td>0.25, 0.75</td>" in render_comparison(comparison)

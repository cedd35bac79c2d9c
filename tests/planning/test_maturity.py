"""The warning about a seed that is too immature to branch from, in plans and before runs."""

from pathlib import Path

import pytest
from rich.console import Console

from bam_ray.errors import PlacementError
from bam_ray.on_ray.run import run_tasks
from bam_ray.planning.maturity import MATURE_TOKENS_PER_PARAMETER, maturity_warning
from bam_ray.planning.model_size import seed_size
from bam_ray.planning.plan_table import render_plan
from bam_ray.planning.planner import make_plan
from bam_ray.settings import Recipe, parse_recipe
from tests.support import tiny

SCRATCH = "{scratch: {hidden_size: 16, intermediate_size: 24, layers: 1, heads: 2, kv_heads: 2}, training: {%s}}"
TRAINING = "tokens: 1024, batch_tokens: 1024, peak_lr: 0.001"
RECIPE = f"""
name: small
store: {{uri: runs/small}}
data:
  domains: {{general: {{source: x}}, code: {{source: x}}}}
  tokenizer: {{vocab_size: 100}}
seed: {SCRATCH % TRAINING}
branch: {{domains: [code], training: {{{TRAINING}}}}}
upcycle: {{mixtures: {{bam: {{method: bam}}}}}}
mix: {{training: {{{TRAINING}}}}}
"""
PARAMETERS = 100 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16  # embedding, attention, FFN, norms
LIMIT = PARAMETERS * MATURE_TOKENS_PER_PARAMETER


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, "test", list(overrides))


def of_tokens(tokens: int) -> Recipe:
    """Return a recipe whose seed is trained on exactly `tokens` tokens, in one batch."""
    settings = recipe()
    training = settings.seed.training
    assert training is not None
    exact = training.model_copy(update={"tokens": tokens, "batch_tokens": tokens})
    return settings.model_copy(update={"seed": settings.seed.model_copy(update={"training": exact})})


def warning(settings: Recipe) -> str:
    return maturity_warning(settings, seed_size(settings))


def plan_text(settings: Recipe) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_plan(make_plan(settings), 200))
    return " ".join(capture.get().split())


def test_an_immature_seed_is_reported() -> None:
    assert warning(of_tokens(round(0.7 * PARAMETERS))) == (
        "warning: the seed sees 0.7 tokens per parameter: below about 20, training one dense model on the same tokens "
        "will probably beat the mixture; train the seed for longer or make it smaller"
    )


def test_the_limit_itself_is_mature() -> None:
    assert warning(of_tokens(LIMIT)) == warning(of_tokens(100 * LIMIT)) == ""
    assert "sees 19 tokens per parameter" in warning(of_tokens(LIMIT - 1)), "never rounded up to the limit"


def test_tokens_are_those_of_whole_batches() -> None:
    assert warning(recipe("seed.training.tokens=1025")) == warning(of_tokens(2048)) != warning(of_tokens(1025))


def test_nothing_is_reported_if_tokens_or_size_are_unknown(tmp_path: Path) -> None:
    tiny.CONFIGS["llama"].save_pretrained(tmp_path)
    folder = recipe(f"seed={{folder: {tmp_path}}}")
    assert seed_size(folder) is not None and warning(folder) == ""
    assert "tokens per parameter" not in plan_text(folder)
    unknown = recipe(f"data.tokenizer.folder={tmp_path / 'missing'}")
    assert seed_size(unknown) is None and warning(unknown) == ""
    assert warning(recipe("branch.domains=[]", "mix.expert_parallel=1")) == "", "nothing is branched from it"


def test_a_plan_shows_the_warning() -> None:
    assert warning(recipe()) in plan_text(recipe()) and warning(recipe())
    assert "warning:" not in plan_text(recipe(f"seed.training.tokens={LIMIT}"))


def test_a_run_shows_the_warning_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_cluster() -> None:
        raise PlacementError("no cluster")

    monkeypatch.setattr("bam_ray.on_ray.run.connect", no_cluster)
    for tokens, shown in ((1024, warning(recipe()) + "\n"), (LIMIT, "")):
        settings = recipe(f"store.uri={tmp_path}", f"seed.training.tokens={tokens}")
        with pytest.raises(PlacementError, match="no cluster"):
            run_tasks(settings)
        assert capsys.readouterr().out == shown

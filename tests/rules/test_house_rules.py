"""Rules of the project that no other tool checks."""

import subprocess
import sys
from pathlib import Path

import pytest

from bam_ray.settings import load_recipe
from bam_ray.upcycling.write import MODEL_CODE

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MAX_FILE_LINES = 500  # a longer file does more than one thing
FAST_IMPORTS = ["bam_ray.settings", "bam_ray.control", "bam_ray.checkpoint.manifest"]


def test_import_contracts_hold() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(recipe: Path) -> None:
    assert load_recipe(recipe).upcycle.mixtures


def test_the_demo_recipe_is_shipped() -> None:
    assert "demo.yaml" in [recipe.name for recipe in RECIPES]


@pytest.mark.parametrize("folder", ["bam_ray", "cluster", "jobs"])
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert {str(path): length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_a_written_mixture_contains_all_model_files() -> None:
    assert set(MODEL_CODE) == {path.name for path in (ROOT / "bam_ray" / "model").glob("*_bam.py")}


@pytest.mark.parametrize("module", FAST_IMPORTS)
def test_modules_that_must_start_fast_import_no_large_library(module: str) -> None:
    heavy = {"torch", "ray", "transformers", "deepspeed", "datasets", "boto3"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

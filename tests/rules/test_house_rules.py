"""Rules of the project that no other tool checks."""

import ast
import functools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from bam_ray.settings import load_recipe
from bam_ray.upcycling.write import MODEL_CODE

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MAX_FILE_LINES = 500  # a longer file does more than one thing
MAX_TEST_NAME = 70  # characters after `test_`
QUESTION_WORDS = re.compile(r"(What|Whether|Of|Where|Which|How|So)\b")
TESTED_PRIVATE_NAMES = {"_MODULES"}  # the table of lazy imports, which must list exactly the names of `__all__`
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


@pytest.mark.parametrize("folder", ["bam_ray", "benchmarks", "cluster", "jobs", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert {str(path): length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_a_written_mixture_contains_all_model_files() -> None:
    assert set(MODEL_CODE) == {path.name for path in (ROOT / "bam_ray" / "model").glob("*_bam.py")}


@pytest.mark.parametrize("module", FAST_IMPORTS)
def test_modules_that_must_start_fast_import_no_large_library(module: str) -> None:
    heavy = {"torch", "ray", "transformers", "deepspeed", "pyarrow", "boto3"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@functools.cache
def modules(folder: str) -> dict[str, ast.Module]:
    """Return the syntax trees of all modules in a folder, by path."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield all strings that are statements: the docstrings of a module, its classes, functions and attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str()) as docstring):
                yield docstring


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Yield the full name of everything that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names of all classes, functions, variables and attributes that a module defines."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def accessed_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every attribute of another object that a module reads, sets or patches."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(attr=name):
                yield node.lineno, name
            case ast.Call(
                func=ast.Attribute(attr="setattr" | "delattr") | ast.Name(id="getattr" | "setattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


@pytest.mark.parametrize("folder", ["bam_ray", "benchmarks", "cluster", "jobs"])
def test_no_docstring_begins_with_a_question_word(folder: str) -> None:
    found = [
        f"{path}:{docstring.lineno}: {docstring.value.strip().splitlines()[0]}"
        for path, tree in modules(folder).items()
        for docstring in docstrings(tree)
        if QUESTION_WORDS.match(docstring.value.strip())
    ]
    assert found == []


def test_no_two_classes_have_the_same_name() -> None:
    places = defaultdict(list)
    for path, tree in modules("bam_ray").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_names_of_tests_are_short() -> None:
    names = {name for tree in modules("tests").values() for name in defined_names(tree) if name.startswith("test_")}
    assert [name for name in names if len(name.removeprefix("test_")) > MAX_TEST_NAME] == []


def test_no_test_module_imports_another_one() -> None:
    found = [
        f"{path}: {name}"
        for path, tree in modules("tests").items()
        for name in imported_names(tree)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
    ]
    assert found == []


def test_no_test_uses_a_private_name() -> None:
    trees = modules("bam_ray").values()
    private = {name for tree in trees for name in defined_names(tree) if is_private(name)} - TESTED_PRIVATE_NAMES
    accessed = [
        f"{path}:{line}: {name}"
        for path, tree in modules("tests").items()
        for line, name in accessed_names(tree)
        if name in private
    ]
    imported = [
        f"{path}: {name}"
        for path, tree in modules("tests").items()
        for name in imported_names(tree)
        if name.startswith("bam_ray.") and any(map(is_private, name.split(".")))
    ]
    assert accessed + imported == []

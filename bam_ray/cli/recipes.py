"""Commands that help to write a recipe."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bam_ray.cli.app import Endpoint, app, console
from bam_ray.errors import SettingsError


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, so that editors can check and complete them."""
    from bam_ray.settings import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(help="The recipe file to write.")],
    seed: Annotated[str, typer.Option(help="Path or URI of the seed, a Hugging Face folder.")],
    text: Annotated[
        list[str], typer.Option(metavar="DOMAIN=SOURCE", help="Text of a domain: a path, glob or URI. Repeatable.")
    ],
    general: Annotated[str, typer.Option(help="The general domain. It gets no branch of its own.")] = "general",
    store: Annotated[str, typer.Option(help="Where the run stores its artifacts.")] = "runs",
    endpoint: Endpoint = None,
) -> None:
    """Write a commented recipe for your own seed and text."""
    from bam_ray.toolbox.recipe_template import recipe_for

    if recipe.exists():
        raise SettingsError(f"{recipe} exists: choose another name, or remove it")
    sources = dict(item.partition("=")[::2] for item in text)
    wrong = [item for item in text if not all(item.partition("=")[::2])]
    if wrong:
        raise SettingsError(f"--text {wrong[0]!r} is malformed: use DOMAIN=SOURCE")
    recipe.write_text(recipe_for(seed, sources, str(recipe), store, general, endpoint), encoding="utf-8")
    console.print(f"wrote {recipe}; next: bam plan {recipe}", highlight=False, markup=False)

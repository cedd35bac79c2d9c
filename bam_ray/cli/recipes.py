"""Commands that help to write a recipe and the list of API keys of its endpoint."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bam_ray.cli.app import app
from bam_ray.cli.console import console
from bam_ray.cli.options import EndpointOption, named_values
from bam_ray.errors import SettingsError


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, which editors use to validate and complete them."""
    from bam_ray.settings import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(help="The recipe file to write.")],
    seed: Annotated[str, typer.Option(help="The Hugging Face folder of the seed: a path or an s3:// URI.")],
    text: Annotated[
        list[str],
        typer.Option(metavar="DOMAIN=SOURCE", help="The text of a domain: a path, a glob or a URI. May be repeated."),
    ],
    general: Annotated[str, typer.Option(help="The general domain, which has no branch.")] = "general",
    store: Annotated[str, typer.Option(help="The location of the artifacts of the run.")] = "runs",
    endpoint: EndpointOption = None,
) -> None:
    """Write a commented recipe for your own seed and text."""
    from bam_ray.toolbox.recipe_template import recipe_for

    if recipe.exists():
        raise SettingsError(f"{recipe} exists: choose another name, or remove it")
    sources = named_values(text, "--text")
    recipe.write_text(recipe_for(seed, sources, str(recipe), store, general, endpoint), encoding="utf-8")
    console.print(f"written: {recipe}; next: bam plan {recipe}", soft_wrap=True)


@app.command()
def serve_key(
    name: Annotated[str, typer.Argument(help="The name of the client: letters, digits and the characters . _ @ -")],
) -> None:
    """Make an API key for the endpoint, and print it with its line for the list in serve.api_keys.

    The key is shown only once. The list has its hash, from which the key cannot be found.
    """
    from pydantic import ValidationError

    from bam_ray.settings.api_keys import ApiKey, hash_api_key, new_api_key

    key = new_api_key()
    try:
        entry = ApiKey(sha256=hash_api_key(key.encode()), name=name)
    except ValidationError:
        raise SettingsError(f"{name!r} cannot be the name of a client: use 1 to 64 letters, digits, . _ @ -") from None
    console.print(f"key, for the client:      {key}", soft_wrap=True)
    console.print(f"line, for serve.api_keys: {entry.sha256} name={entry.name}", soft_wrap=True)

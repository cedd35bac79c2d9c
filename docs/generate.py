"""A hook of mkdocs: it generates the settings and command line references, and refuses resources of other hosts."""

import inspect
import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

from bam_ray.cli.app import app
from bam_ray.settings import MixtureSettings, Recipe
from bam_ray.settings.strict import Identity

SETTINGS_INTRO = """# Settings

Every key of a recipe, generated from the models in `bam_ray/settings/`. A recipe is a YAML file. All commands that read
one also take overrides with dots, such as `mix.training.tokens=200000`. Unknown keys and wrong types are errors.

A setting that is marked "Not part of the identity" can be changed between two submissions of a run. The run then
continues with the artifacts that exist. A change of any other setting makes new artifacts.
"""
CLI_INTRO = """# Command line

The command `bam`, generated from its source. Errors are printed as one line, and the exit code is 1.
"""

REMOTE = re.compile(r"""<(?:script|img|iframe|link)[^>]*\s(?:src|href)=["']?(?:https?:)?//[^>]*>""")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    for path, content in (("reference/settings.md", settings_page()), ("reference/cli.md", cli_page())):
        files.append(File.generated(config, path, content=content))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raise `PluginError` if a page loads anything from another host."""
    remote = REMOTE.search(output)
    if remote:
        raise PluginError(f"{page.file.src_uri} loads {remote[0]} from another host: put the file into docs/ instead")
    return output


def settings_page() -> str:
    """Return the settings reference as Markdown: one section for each model, in the order of the recipe."""
    sections: dict[type[BaseModel], list[str]] = {}
    _collect(Recipe, "", sections)
    page = "\n".join([SETTINGS_INTRO, *(_section(model, paths) for model, paths in sections.items())])
    return re.sub(r"\]\((?:docs/)?(?=[a-z_]+\.md)", "](../", page)  # descriptions link to pages of docs/


def cli_page() -> str:
    """Return the command line reference as Markdown."""
    command = typer.main.get_command(app)
    text: str = get_docs_for_click(obj=command, ctx=typer.Context(command), name="bam")
    return CLI_INTRO + text.partition("\n")[2]


def _collect(model: type[BaseModel], path: str, sections: dict[type[BaseModel], list[str]]) -> None:
    """Add `model` and the models of its fields to `sections`, each with the places in a recipe where it is used."""
    first = model not in sections
    sections.setdefault(model, []).append(path)
    for name, field in model.model_fields.items() if first else ():
        for inner in _models(field.annotation):
            _collect(inner, f"{path}.{name}".lstrip(".") + _key(field.annotation), sections)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the settings models that occur in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _key(annotation: Any) -> str:
    """Return the part of a path that stands for a key or a list index."""
    kinds = {get_origin(each) for each in (annotation, *get_args(annotation))}
    return ".NAME" if dict in kinds else "[]" if kinds & {list, tuple} else ""


def _section(model: type[BaseModel], paths: list[str]) -> str:
    """Return one model as a heading, its docstring, and a table of its fields."""
    title = f"`{paths[0]}`{_method(model)}" if paths[0] else "The recipe"
    others = ", ".join(f"`{path}`" for path in dict.fromkeys(paths) if path != paths[0])
    rows = [_row(name, field) for name, field in model.model_fields.items()]
    return "\n".join(
        [
            f"## {title} {{ #{model.__name__.lower()} }}",
            "",
            _unwrap(inspect.cleandoc(model.__doc__ or "")),
            *(["", f"The same settings are used at {others}."] if others else []),
            "",
            "| setting | type | default | description |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _method(model: type[BaseModel]) -> str:
    """Return the end of a heading for the settings of one upcycling method, which all have the same path."""
    if not issubclass(model, MixtureSettings):
        return ""
    (name,) = get_args(model.model_fields["method"].annotation)
    return f" with `method: {name}`"


def _unwrap(text: str) -> str:
    """Join the lines of each paragraph, so that a line break is never read as the start of a list."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(each if each.startswith(("- ", "|", "    ")) else each.replace("\n", " ") for each in paragraphs)


def _row(name: str, field: FieldInfo) -> str:
    """Return a field as a row of a table."""
    constraints = _constraints(field.metadata)
    excluded = " Not part of the identity." if Identity.EXCLUDED in field.metadata else ""
    description = (field.description or "") + excluded
    cells = (f"`{name}`", _type(field.annotation) + constraints, _default(field), description)
    return "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |"


def _type(annotation: Any) -> str:
    """Return a type as words; the names of settings models are links to their sections."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0]) + _constraints(inner[1:])
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(each) for each in inner)
    if origin is dict:
        return f"mapping of names to {_type(inner[1])}"
    if origin in (list, tuple):
        return "list of " + " and ".join(dict.fromkeys(_type(each) for each in inner if each is not Ellipsis))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    words = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "none", Any: "any value"}
    return words.get(annotation, str(getattr(annotation, "__name__", annotation)))


def _constraints(metadata: Any) -> str:
    """Return the bounds of a number as words, for example ` ≥ 1`."""
    flat = [each for item in metadata for each in (item.metadata if isinstance(item, FieldInfo) else [item])]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = ((sign, getattr(each, key, None)) for each in flat for key, sign in signs.items())
    text = ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
    return f" {text}" if text else ""


def _default(field: FieldInfo) -> str:
    """Return the default value of a field as YAML; nested settings have their defaults in their own section."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return ""
    if value is None or value in ((), [], {}):
        return "none"
    return f"`{json.dumps(value)}`"

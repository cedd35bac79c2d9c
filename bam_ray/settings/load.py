"""A recipe from YAML and dotted overrides (`mix.training.tokens=200000`), with errors of one line."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from bam_ray.errors import SettingsError
from bam_ray.settings.recipe import Recipe

Model = TypeVar("Model", bound=BaseModel)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read the recipe at `path`; raises `SettingsError`."""
    return parse_recipe(_read(path, "recipe"), str(path), overrides)


def parse_recipe(text: str, where: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe from YAML text; `where` names it in errors."""
    plain = _mapping(text, f"recipe {where}")
    for override in overrides or []:
        apply_override(plain, override)
    return validated(Recipe, plain, f"recipe {where}")


def load_as(model: type[Model], path: str | Path, what: str) -> Model:
    """Read the YAML file at `path` as a `model`; `what` it is stands in errors. Raises `SettingsError`."""
    where = f"{what} {path}"
    return validated(model, _mapping(_read(path, what), where), where)


def _read(path: str | Path, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{what} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{what} {path} cannot be read: it is not text (UTF-8)") from None


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise SettingsError(f"{where} is not a mapping of settings")
    return plain


def validated(model: type[Model], plain: dict[str, Any], where: str) -> Model:
    """`plain` as a `model`; raises `SettingsError` of one line that begins with `where`."""
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "unknown key"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise SettingsError(f"{where}: {place + ': ' if place else ''}{message}{more}") from None


def apply_override(plain: dict[str, Any], override: str) -> None:
    """Set one dotted key of a nested mapping to a YAML value."""
    dotted, separator, value = override.partition("=")
    if not separator or not all(dotted.split(".")):
        raise SettingsError(f"override {override!r} is not of the form key.subkey=value")
    *parents, last = dotted.split(".")
    inner = plain
    for part in parents:
        following = inner.setdefault(part, {})
        if not isinstance(following, dict):
            raise SettingsError(f"override {override!r}: {part!r} is a value, not a group of settings")
        inner = following
    try:
        inner[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SettingsError(f"override {override!r}: the value is not YAML") from None

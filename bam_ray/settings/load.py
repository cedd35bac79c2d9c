"""Loading of recipes: YAML files with dotted overrides (`mix.training.tokens=200000`).

Every error is a `SettingsError` with one line that names the file, the setting and the problem.
"""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from bam_ray.errors import SettingsError
from bam_ray.settings.methods import AnyMixture, MixtureSettings
from bam_ray.settings.recipe import Recipe

Model = TypeVar("Model", bound=BaseModel)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Load the recipe at `path`.

    Args:
        path: A YAML file.
        overrides: Settings to change, as `key.subkey=value` with a YAML value.

    Raises:
        SettingsError: The file cannot be read, or a setting is wrong.
    """
    return parse_recipe(_read(path, "recipe"), str(path), overrides)


def parse_recipe(text: str, source: str, overrides: list[str] | None = None) -> Recipe:
    """Parse a recipe from YAML text. `source` names it in errors."""
    plain = _mapping(text, f"recipe {source}")
    for override in overrides or []:
        apply_override(plain, override)
    return validated(Recipe, plain, f"recipe {source}")


def load_as(model: type[Model], path: str | Path, description: str) -> Model:
    """Load the YAML file at `path` as a `model`. `description` names the kind of file in errors."""
    source = f"{description} {path}"
    return validated(model, _mapping(_read(path, description), source), source)


def _read(path: str | Path, description: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{description} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{description} {path} cannot be read: it is not UTF-8 text") from None


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise SettingsError(f"{source} is not a mapping of settings")
    return plain


def validated(model: type[Model], plain: dict[str, Any], source: str) -> Model:
    """Validate `plain` as a `model`.

    Raises:
        SettingsError: A setting is wrong. The message is one line that begins with `source`.
    """
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        raise SettingsError(f"{source}: {_first_error(error, plain)}") from None


def mixture_settings(plain: dict[str, Any], source: str = "mixture") -> MixtureSettings:
    """Validate the settings of one mixture; its `method` selects the class of settings.

    Raises:
        SettingsError: A setting is wrong. The message is one line that begins with `source`.
    """
    try:
        return _MIXTURE.validate_python(plain)
    except ValidationError as error:
        raise SettingsError(f"{source}: {_first_error(error, plain)}") from None


_MIXTURE: TypeAdapter[MixtureSettings] = TypeAdapter(AnyMixture)


def _first_error(error: ValidationError, plain: Any) -> str:
    """Return the first of pydantic's errors in one line, and the number of the others."""
    first = error.errors()[0]
    setting = ".".join(_without_tags(first["loc"], plain))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    elif first["type"] == "union_tag_invalid":
        message = f"method is {first['ctx']['tag']!r}: use one of {first['ctx']['expected_tags']}"
    elif first["type"] == "union_tag_not_found":
        message = "method is missing"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{setting + ': ' if setting else ''}{message}{more}"


def _without_tags(place: tuple[int | str, ...], plain: Any) -> list[str]:
    """Return the path of a setting without the methods' names, which pydantic adds below a mixture."""
    path, inner, tagged = [], plain, False
    for part in place:
        if isinstance(inner, dict) and inner.get("method") == part and not tagged:
            tagged = True
            continue
        path.append(str(part))
        inner, tagged = inner.get(part) if isinstance(inner, dict) else None, False
    return path


def apply_override(plain: dict[str, Any], override: str) -> None:
    """Set one dotted key of a nested mapping to a YAML value.

    Args:
        plain: The mapping to change.
        override: `key.subkey=value`.

    Raises:
        SettingsError: The override is malformed, or a part of the key is not a group of settings.
    """
    dotted, separator, value = override.partition("=")
    if not separator or not all(dotted.split(".")):
        raise SettingsError(f"override {override!r} is malformed: use key.subkey=value")
    *groups, last = dotted.split(".")
    inner = plain
    for part in groups:
        following = inner.setdefault(part, {})
        if not isinstance(following, dict):
            raise SettingsError(f"override {override!r}: {part!r} is a value, not a group of settings")
        inner = following
    try:
        inner[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SettingsError(f"override {override!r}: the value is not YAML") from None

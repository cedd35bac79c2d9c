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

MAX_BYTES = 1 << 20  # of a file of settings
MAX_VALUES = 100_000  # keys and values, at all levels
MAX_DEPTH = 64
MAX_INTEGER = (1 << 63) - 1
MAX_REASON_CHARACTERS = 200  # of an error of the YAML library
MAX_MESSAGE_CHARACTERS = 320
MAX_SHOWN_CHARACTERS = 80  # of an override


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
    _check_extent(plain, f"recipe {source}")
    return validated(Recipe, plain, f"recipe {source}")


def load_as(model: type[Model], path: str | Path, description: str) -> Model:
    """Load the YAML file at `path` as a `model`. `description` names the kind of file in errors."""
    source = f"{description} {path}"
    return validated(model, _mapping(_read(path, description), source), source)


def _read(path: str | Path, description: str) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise SettingsError(f"{description} {path} has more than {MAX_BYTES:,} bytes: name a YAML file of settings")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{description} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{description} {path} cannot be read: it is not UTF-8 text") from None


def _mapping(text: str, source: str) -> dict[str, Any]:
    plain = _parsed(text, source)
    if not isinstance(plain, dict):
        raise SettingsError(f"{source} is not a mapping of settings")
    _check_extent(plain, source)
    return plain


def _parsed(text: str, source: str) -> Any:
    """Parse YAML text. The errors of the library, such as that of the date 2024-13-45, are of many types."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise SettingsError(f"{source} is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
        raise SettingsError(f"{source} is not YAML: {reason}") from None


def _check_extent(plain: Any, source: str) -> None:
    """Raise `SettingsError` if settings are larger than any real ones, so that no code below meets absurd values.

    A few lines of YAML can stand for billions of values, because a value may refer to others and even to itself.
    """
    left = [(plain, 0)]
    for _ in range(MAX_VALUES):
        if not left:
            return
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            break
        if isinstance(value, dict):
            left += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list | tuple | set):
            left += [(inner, depth + 1) for inner in value]
        elif isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise SettingsError(f"{source} contains an integer of more than 64 bits: make it smaller")
        elif isinstance(value, str) and "\0" in value:
            raise SettingsError(f"{source} contains a text with a NUL character: remove it")
    raise SettingsError(f"{source} is nested too deeply or has more than {MAX_VALUES:,} values")


def validated(model: type[Model], plain: dict[str, Any], source: str) -> Model:
    """Validate `plain` as a `model`.

    Raises:
        SettingsError: A setting is wrong. The message is one line that begins with `source`.
    """
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        raise _settings_error(source, error, plain) from None


def mixture_settings(plain: dict[str, Any], source: str = "mixture") -> MixtureSettings:
    """Validate the settings of one mixture; its `method` selects the class of settings.

    Raises:
        SettingsError: A setting is wrong. The message is one line that begins with `source`.
    """
    _check_extent(plain, source)
    try:
        return _MIXTURE.validate_python(plain)
    except ValidationError as error:
        raise _settings_error(source, error, plain) from None


_MIXTURE: TypeAdapter[MixtureSettings] = TypeAdapter(AnyMixture)


def _settings_error(source: str, error: ValidationError, plain: Any) -> SettingsError:
    message = _first_error(error, plain)
    if len(message) > MAX_MESSAGE_CHARACTERS:  # it quotes a long value
        half = MAX_MESSAGE_CHARACTERS // 2
        message = f"{message[:half]} … {message[-half:]}"
    return SettingsError(f"{source}: {message}")


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
        raise SettingsError(f"override {_shown(override)} is malformed: use key.subkey=value")
    *groups, last = dotted.split(".")
    inner = plain
    for part in groups:
        following = inner.setdefault(part, {})
        if not isinstance(following, dict):
            raise SettingsError(f"override {_shown(override)}: {part!r} is a value, not a group of settings")
        inner = following
    inner[last] = _parsed(value, f"override {_shown(override)}: the value")


def _shown(override: str) -> str:
    """Return an override in quotes, without the end if it is long."""
    return repr(override if len(override) <= MAX_SHOWN_CHARACTERS else f"{override[:MAX_SHOWN_CHARACTERS]}…")

"""The options that several commands share.

Typer creates one option per parameter of a command. Options that belong together are the fields of a dataclass here,
and `with_shared_options` adds them to a command that has a parameter of that type:

    @app.command()
    @with_shared_options
    def export(mixture: MixtureArgument, out: OutputOption, store: StoreOptions) -> None: ...
"""

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from bam_ray.errors import SettingsError
from bam_ray.settings import MixtureSettings, StoreSettings, apply_override, mixture_settings

if TYPE_CHECKING:
    from torch import Tensor

    from bam_ray.checkpoint.tensors import TensorReader
    from bam_ray.upcycling import DomainText, ExpertEdit
    from bam_ray.upcycling.routers.counts import TokenCounts

MixtureArgument = Annotated[str, typer.Argument(help="The folder of the mixture: a path or an s3:// URI.")]
RunArgument = Annotated[str, typer.Argument(help="The location of the run: the store.uri of its recipe.")]
OutputOption = Annotated[
    str, typer.Option(help="The folder to write to: a path or an s3:// URI. It must not exist, or must be empty.")
]
EndpointOption = Annotated[
    str | None, typer.Option(help="The URL of an S3 server other than AWS. Default: the value of AWS_ENDPOINT_URL.")
]


@dataclass(frozen=True)
class StoreOptions:
    """The options of the blob store that a command reads from and writes to."""

    endpoint: EndpointOption = None
    weak_store: Annotated[
        bool,
        typer.Option(
            "--weak-store", help="Accept an S3 server without conditional puts, like store.promise=weak in a recipe."
        ),
    ] = False

    def target(self, uri: str) -> StoreSettings:
        """Return the settings of the store at `uri`."""
        return StoreSettings(uri=uri, endpoint=self.endpoint, promise="weak" if self.weak_store else "strict")


@dataclass(frozen=True)
class TextOptions:
    """The options of a command that reads some text of each domain."""

    text: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SOURCE of the text of a domain, once per domain. SOURCE is a path, a glob, a URI or "
            "package:NAME. NAME is the name of the expert."
        ),
    ] = None
    length: Annotated[int, typer.Option(help="The number of tokens per sequence.", min=2)] = 256

    def token_rows(self, model: "TensorReader", sequences: int) -> dict[str, "Tensor"]:
        """Return up to `sequences` rows of tokens of each text, by the tokenizer of `model`."""
        from bam_ray.toolbox.folders import tokenize_texts  # loads torch

        return tokenize_texts(named_values(self.text or [], "--text"), model, sequences, self.length)

    def domain_text(self, seed: "TensorReader", settings: MixtureSettings) -> "DomainText":
        """Return what an upcycling with `settings` needs of each text. Raises `SettingsError` if it needs none."""
        from bam_ray.toolbox.folders import read_domain_text  # loads torch

        return read_domain_text(named_values(self.text or [], "--text"), seed, settings, self.length)


@dataclass(frozen=True)
class EvaluationOptions(TextOptions):
    """The options of a command that evaluates a mixture before and after a change."""

    sequences: Annotated[int, typer.Option(help="The number of sequences to evaluate per text.", min=2)] = 16

    def counts_of_branch(self, mixture: "TensorReader", edit: "ExpertEdit") -> "TokenCounts | None":
        """Return the counts of the text of a new expert; None if the mixture needs none or there is no such text."""
        from bam_ray.toolbox.folders import counts_of_branch  # loads torch

        return counts_of_branch(edit, mixture, named_values(self.text or [], "--text"))


@dataclass(frozen=True)
class UpcycleOptions:
    """The options that determine the settings of a mixture."""

    method: Annotated[str, typer.Option(help="The upcycling method: bam, btx, sparse, split or soup.")] = "bam"
    set: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of a setting of the mixture. May be repeated.")] = (
        None
    )

    def settings(self) -> MixtureSettings:
        """Return the settings of the mixture. Raises `SettingsError` if one is not valid."""
        plain: dict[str, object] = {"method": self.method}
        for override in self.set or []:
            if "=" not in override:
                raise SettingsError(f"--set {override!r} must have the form KEY=VALUE")
            apply_override(plain, override)
        return mixture_settings(plain)


def named_values(pairs: list[str], option: str, reserved: Collection[str] = ()) -> dict[str, str]:
    """Parse the NAME=VALUE pairs of an option.

    Raises `SettingsError` for a pair without a name or a value, and for a name that is repeated or in `reserved`.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name or not value or name in values or name in reserved:
            raise SettingsError(f"{option} {pair!r} must have the form NAME=VALUE, with a name that is used only once")
        values[name] = value
    return values


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each dataclass parameter of a command by one keyword parameter per field.

    The returned function has the flat signature that Typer reads, and calls `command` with instances of the
    dataclasses.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _field_parameters(groups[name])
        else:  # keyword-only, because an option with a default may precede one without
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(command)
    def flat_command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    flat_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by inspect
    flat_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat_command


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=hints[field.name]
        )
        for field in fields(group)
    ]


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default

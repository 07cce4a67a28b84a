"""Options that commands share, and options in groups.

A group is a frozen dataclass whose fields are `Annotated[type, typer.Option(...)]`. A command
takes groups, and `grouped` gives it one option on the command line for each of their fields. A
group's `HEADING` is where `--help` lists them.
"""

import functools
import inspect
import os
from collections.abc import Callable
from copy import copy
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import typer
import typer.core

from sana_cli.choices import Precision, Weights
from sana_cli.cli.process import console

if TYPE_CHECKING:
    from sana_cli.config.keys import Config

T = TypeVar("T", str, Path)


# --- groups -----------------------------------------------------------------------------------


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a command that is a group by the fields of the group."""
    signature, parameters = inspect.signature(command), list[inspect.Parameter]()
    groups: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        group = parameter.annotation
        if is_dataclass(group):
            groups[name] = group
            parameters += [_parameter(field, group) for field in fields(group)]
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return flat


def _parameter(field: Field[Any], group: Any) -> inspect.Parameter:
    """The parameter of a field, whose option is listed under the heading of its group."""
    annotation: Any = field.type
    option = copy(annotation.__metadata__[0])
    option.rich_help_panel = group.HEADING
    annotation = Annotated[annotation.__origin__, option]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
    )


def given(*groups: Any) -> dict[str, Any]:
    """The fields of groups that are not None, with lists as tuples."""
    found = {name: value for group in groups for name, value in vars(group).items() if value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


class Command(typer.core.TyperCommand):
    """A command whose help has headings. Typer itself has these only with rich."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each heading, in order of first appearance."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = getattr(parameter, "rich_help_panel", None) or "Options"
                heading = "Arguments" if parameter.param_type_name == "argument" else heading
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


# --- shared options ---------------------------------------------------------------------------


def home(path: T | None) -> T | None:
    """Replace `~` by the home folder, which a shell does not do behind `--option=`."""
    if path is None:
        return None
    return type(path)(os.path.expanduser(path))  # noqa: PTH111 (Path drops a slash at the end)


DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@dataclass(frozen=True)
class ConfigOptions:
    """The config of a command that works on a dataset or a run."""

    HEADING: ClassVar = None

    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE|NAME",
            callback=home,
            help="A YAML file, or the name of a shipped config.",
        ),
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, as in --set optim.lr=1e-3. Repeatable."
        ),
    ] = None

    def load(self) -> "Config":
        """Read the config.

        Raises:
            SanaError: there is no such config, or it has mistakes.
        """
        from sana_cli.config.file import DEFAULT_CONFIG, load_config

        if self.config is None:
            console.note(f"no --config given: using {DEFAULT_CONFIG}, the offline default")
        return load_config(self.config, self.set_ or ())


@dataclass(frozen=True)
class PrintOptions:
    """What a command prints."""

    HEADING: ClassVar = None

    json: JsonOption = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only errors to stderr; results still go to stdout.")
    ] = False


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of the solver, apart from those that `eval` takes several of."""

    HEADING: ClassVar = "Sampling"

    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LO HI", help="Guide only while sigma is between LO and HI."),
    ] = None
    flow_shift: Annotated[float | None, typer.Option(help="Moves the solver's steps towards noise.")] = None
    seed: Annotated[
        int | None, typer.Option(min=0, help="Image i has seed + i. The same seed gives the same images.")
    ] = None


@dataclass(frozen=True)
class ModelOptions:
    """Which weights of a checkpoint compute, on what and in what."""

    HEADING: ClassVar = "Model"

    weights: Annotated[
        Weights, typer.Option(help="Averaged (ema) or as optimized (raw), where there are both.")
    ] = "ema"
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of the transformer. Default: as it was trained, or as it is stored."),
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")] = "auto"

"""Options that commands share, and options in groups.

A group is a frozen dataclass whose fields are `option(...)`. A command takes groups, and `grouped` gives
it one option on the command line for each of their fields. A group's `HEADING` is where `--help` lists them.
"""

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
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


def home(path: T | None) -> T | None:
    """Replace `~` by the home folder, which a shell does not do behind `--option=`."""
    if path is None:
        return None
    return type(path)(os.path.expanduser(path))  # noqa: PTH111 (Path drops a slash at the end)


def option(
    help: str, default: Any = None, *, path: str | None = None, flag: str | None = None, **more: Any
) -> Any:
    """A field of a group that is an option, such as `--its-name`; a bool is a flag without a `--no-` form.

    Args:
        help: what `--help` says.
        default: the value without the option.
        path: how `--help` calls the path that the option takes; `~` in it is expanded.
        flag: another name than the field's.
        more: of `typer.Option`.
    """
    if path is not None:
        more |= {"metavar": path, "callback": home}
    info = typer.Option(*([flag] if flag else []), help=help, **more)
    return field(default=default, metadata={"typer": info})


def adapter_option(what: str) -> Any:
    """A field of a group that takes adapters; `what` begins its help."""
    forms = "a file (diffusers, peft, kohya, LyCORIS), a folder, or a run. Give it again for several."
    return option(f"{what}: {forms}", metavar="FILE[:SCALE]")


def argument(help: str, *, path: bool = False, **more: Any) -> Any:
    """A field of a group that is an optional argument; `path`: it may begin with `~`."""
    return field(
        default=None, metadata={"typer": typer.Argument(help=help, callback=home if path else None, **more)}
    )


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


def _parameter(of: Field[Any], group: Any) -> inspect.Parameter:
    """The parameter of a field, whose option is listed under the heading of its group."""
    info = of.metadata["typer"]
    if of.type is bool and not info.param_decls:
        info.param_decls = (f"--{of.name.replace('_', '-')}",)
    info.rich_help_panel = group.HEADING
    kind = Annotated[of.type, info]  # type: ignore[name-defined]
    return inspect.Parameter(of.name, inspect.Parameter.KEYWORD_ONLY, default=of.default, annotation=kind)


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


DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@dataclass(frozen=True)
class ConfigOptions:
    """The config of a command that works on a dataset or a run."""

    HEADING: ClassVar = None

    config: str | None = option("A YAML file, or the name of a shipped config.", path="FILE|NAME")
    set_: list[str] | None = option(
        "Override a key, as in --set optim.lr=1e-3. Repeatable.", flag="--set", metavar="KEY=VALUE"
    )

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

    json: bool = option("Print one JSON document.", default=False)
    quiet: bool = field(
        default=False,
        metadata={
            "typer": typer.Option(
                "--quiet", "-q", help="Print only errors to stderr; results still go to stdout."
            )
        },
    )


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of the solver, apart from those that `eval` takes several of."""

    HEADING: ClassVar = "Sampling"

    guidance_interval: tuple[float, float] | None = option(
        "Guide only while sigma is between LO and HI.", metavar="LO HI"
    )
    flow_shift: float | None = option("Moves the solver's steps towards noise.")
    seed: int | None = option("Image i has seed + i. The same seed gives the same images.", min=0)


@dataclass(frozen=True)
class ModelOptions:
    """Weights, device and precision."""

    HEADING: ClassVar = "Model"

    weights: Weights = option("Averaged (ema) or as optimized (raw), where there are both.", default="ema")
    precision: Precision | None = option(
        "Of the transformer. Default: as it was trained, or as it is stored."
    )
    device: str = option("auto, cpu, mps, cuda or cuda:N.", default="auto")


@dataclass(frozen=True)
class AroundOptions:
    """What stands around the transformer: adapters, caption encoder, autoencoder."""

    HEADING: ClassVar = ModelOptions.HEADING

    adapter: list[str] | None = adapter_option(
        "A LoRA or another adapter to put on the checkpoint, and how strongly"
    )
    encoder: str | None = option("The caption encoder: a folder, a Hugging Face id, or tiny.", path="PATH")
    instruction: str | None = option(
        "Text before each prompt, in place of the model family's; '' for none.", metavar="TEXT"
    )
    autoencoder: str | None = option(
        "The DC-AE that decodes latents: a folder or a Hugging Face id.", path="PATH"
    )

"""`sana inspect` on the command line."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import typer

from sana_cli.cli.options import JsonOption, argument, grouped, option
from sana_cli.cli.process import console, load_torch, user_errors
from sana_cli.errors import SanaError

if TYPE_CHECKING:
    from sana_cli.commands.inspect import Description


@dataclass(frozen=True)
class TargetOptions:
    """What to describe, and which part of it."""

    HEADING: ClassVar = None

    target: str | None = argument(
        "A config, run, checkpoint, dataset, image, diffusers folder or weights file, "
        "or `shipped:NAME` (quickstart, also `shipped`, or critters). "
        "Default: the shipped configs.",
        path=True,
    )
    verify: bool = option("Check every byte of a dataset or checkpoint.", default=False)
    yaml: bool = option(
        "Print the whole config with every key explained, to start your own from.", default=False
    )
    schema: bool = option("Print the JSON schema of configs, for editors to check them by.", default=False)
    env: bool = option("Print what sana runs on here, for a bug report.", default=False)


@grouped
def inspect(context: typer.Context, of: TargetOptions, *, json: JsonOption = False) -> None:
    """Describe a config, run, checkpoint, dataset, image or weights.

    \b
    Examples:
      sana inspect
      sana inspect sana
      sana inspect runs/quickstart
      sana inspect shipped:critters
      sana inspect quickstart --yaml > mine.yaml
    """
    with user_errors(context) as work:
        if of.target is not None and (of.schema or of.env):
            raise SanaError(
                f"`{'schema' if of.schema else 'env'}` takes no target: drop {of.target}", exit_code=2
            )
        if of.schema:
            from sana_cli.config.keys import json_schema

            return console.print_json(json_schema())
        load_torch(work)
        from sana_cli.commands.inspect import InspectOptions, environment
        from sana_cli.commands.inspect import inspect as run

        description = environment() if of.env else run(InspectOptions(of.target, of.verify))
        if of.yaml:
            return _print_yaml(description)
        return console.print_json(description.document) if json else _print_description(description)


def _print_yaml(description: "Description") -> None:
    if description.config is None:
        raise SanaError(
            f"`yaml`: {description.title or description.kind} has no config to print",
            "give a config, a run or a checkpoint",
            exit_code=2,
        )
    console.print_text(description.config.to_commented_yaml())


def _print_description(description: "Description") -> None:
    if description.kind != "configs":
        console.result(f"{description.kind} {description.title}".rstrip())
        console.facts(description.facts)
    console.shapes(description.shapes, description.fit)
    if description.rows:
        console.table(description.columns, description.rows)

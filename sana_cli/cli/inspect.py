"""`sana inspect` on the command line."""

from typing import TYPE_CHECKING, Annotated

import typer

from sana_cli.cli.options import JsonOption, home
from sana_cli.cli.process import console, load_torch, user_errors
from sana_cli.errors import SanaError

if TYPE_CHECKING:
    from sana_cli.commands.inspect import Description


def inspect(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            callback=home,
            help="A config, run, checkpoint, dataset, image, diffusers folder or weights file. "
            "Default: the shipped configs.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte of a dataset or checkpoint.")
    ] = False,
    yaml: Annotated[
        bool,
        typer.Option(
            "--yaml", help="Print the whole config with every key explained, to start your own from."
        ),
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of configs, for editors to check them by.")
    ] = False,
    env: Annotated[
        bool, typer.Option("--env", help="Print what sana runs on here, for a bug report.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Describe a config, run, checkpoint, dataset, image or weights.

    \b
    Examples:
      sana inspect
      sana inspect sana
      sana inspect runs/quickstart
      sana inspect quickstart --yaml > mine.yaml
    """
    with user_errors(context) as work:
        if target is not None and (schema or env):
            raise SanaError(f"`{'schema' if schema else 'env'}` takes no target: drop {target}", exit_code=2)
        if schema:
            from sana_cli.config.keys import json_schema

            return console.print_json(json_schema())
        load_torch(work)
        from sana_cli.commands.inspect import InspectOptions, environment
        from sana_cli.commands.inspect import inspect as run

        description = environment() if env else run(InspectOptions(target, verify))
        if yaml:
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
    if description.rows:
        console.table(description.columns, description.rows)

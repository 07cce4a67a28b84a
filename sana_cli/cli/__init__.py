"""The command line: the app and its commands.

A command is a module here, which parses, calls and prints, and one in `commands/`, which does
the work.

What `--help` needs is imported at once. The rest is imported when a command runs: torch and
transformers, and pydantic and rich too.
"""

from typing import Annotated

import typer

from sana_cli import __version__
from sana_cli.cli import distill, embed, eval, inspect, merge, play, sample, train
from sana_cli.cli.options import Command
from sana_cli.cli.process import console

app = typer.Typer(
    name="sana",
    no_args_is_help=True,
    rich_markup_mode=None,  # importing rich takes longer than the rest of --help
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: sana embed, sana train, sana sample '4 two 4 six', sana inspect",
)
app.command(cls=Command)(embed.embed)
app.command(cls=Command)(train.train)
app.command(cls=Command)(distill.distill)
app.command(cls=Command)(sample.sample)
app.command(cls=Command)(play.play)
app.command(cls=Command)(merge.merge)
app.command("eval", cls=Command)(eval.evaluate)
app.command(cls=Command)(inspect.inspect)


def _version(wanted: bool) -> None:
    if wanted:
        console.result(f"sana {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Train and run SANA, the linear-attention text-to-image diffusion transformer."""

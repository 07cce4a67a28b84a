"""`sana play` on the command line."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from sana_cli.choices import Solver
from sana_cli.cli.options import AroundOptions, ModelOptions, argument, given, grouped, option
from sana_cli.cli.process import console, load_torch, user_errors
from sana_cli.interrupts import Asked, Stop

if TYPE_CHECKING:
    from sana_cli.commands.play import PlayServing


@dataclass(frozen=True)
class PageOptions:
    """Where the page is served."""

    HEADING: ClassVar = "Page"

    checkpoint: Path | None = argument(
        "As for `sana sample`. Default: the newest checkpoint under runs/, else `shipped`.",
        path=True,
        metavar="CHECKPOINT",
    )
    host: str = option("The address to listen on; 0.0.0.0 is all of them.", default="127.0.0.1")
    port: int | None = option(
        "The port to listen on. Default: the first free one from 7262.", min=1, max=65535
    )
    open: bool = option("Open the page in the browser.", default=False)


@dataclass(frozen=True)
class ImageOptions:
    """What stays the same for all pictures."""

    HEADING: ClassVar = "Images"

    height: int | None = option("Pixels. Default: as trained.", min=1)
    width: int | None = option("Pixels. Default: as trained.", min=1)
    solver: Solver | None = option("In place of the checkpoint's own.")


@grouped
def play(
    context: typer.Context,
    page: PageOptions,
    image: ImageOptions,
    around: AroundOptions,
    model: ModelOptions,
) -> None:
    """Serve a local page that draws while you type (needs the play extra).

    It has sliders for seed, guidance and steps, other seeds of the same prompt, and the way from
    noise to the picture. A saved picture says how it was made. Ctrl-C ends it.

    \b
    Examples:
      sana play
      sana play shipped:critters --open
      sana play runs/photos --port 8000
    """
    with user_errors(context) as work:
        load_torch(work)
        from sana_cli.commands.play import PlayOptions
        from sana_cli.commands.play import play as run

        options = {name: value for name, value in given(page, image, around, model).items() if name != "open"}
        stop = Stop(lambda: console.note("stopping (Ctrl-C again quits at once)"))
        for serving in stop.during(run(PlayOptions(**options, stop=stop))):
            _print_serving(serving)
            if page.open:
                import webbrowser

                webbrowser.open(serving.url)
        number = stop()
        if number not in (None, signal.SIGINT):
            raise Asked(number)


def _print_serving(serving: "PlayServing") -> None:
    for text in serving.notes:
        console.note(f"note: {text}")
    name = f"shipped:{serving.checkpoint.name}" if serving.shipped else str(serving.checkpoint)
    console.note(f"{name} on {serving.device}: {serving.settings.in_words}")
    if not serving.is_local:
        console.note("note: everybody who reaches this machine can use the page")
    console.result(serving.url)
    console.note("Ctrl-C ends it")

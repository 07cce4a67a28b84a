"""`sana sample` on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from sana_cli.choices import Offload, Solver
from sana_cli.cli.options import (
    AroundOptions,
    ModelOptions,
    PrintOptions,
    SamplingOptions,
    argument,
    given,
    grouped,
    option,
)
from sana_cli.cli.process import console, load_torch, user_errors
from sana_cli.errors import SanaError
from sana_cli.interrupts import attentive

if TYPE_CHECKING:
    from sana_cli.commands.sample import SampleSummary


@dataclass(frozen=True)
class PromptOptions:
    """What to draw."""

    HEADING: ClassVar = "Images"

    prompts: list[str] | None = argument("What to draw, a row of the grid each.", metavar="PROMPT")
    images_per_prompt: int = option("Images for each prompt.", default=1, min=1)
    prompts_file: Path | None = option("Prompts, one a line; # begins a comment; - is stdin.", path="FILE")
    grid: str | None = option(
        "A table in place of prompts: 'a {red,blue} cat on {a chair,the moon}' has two rows and two columns.",
        metavar="TEMPLATE",
    )
    negative_prompt: str | None = option(
        "What to steer away from, in place of the null caption.", metavar="TEXT"
    )
    height: int | None = option("Pixels. Default: as trained.", min=1)
    width: int | None = option("Pixels. Default: as trained.", min=1)


@dataclass(frozen=True)
class FileOptions:
    """Where images go."""

    HEADING: ClassVar = "Files"

    out: str | None = option(
        "The grid: .png, .jpg or .webp, or DIR/. Default: in the run directory.", path="PATH"
    )
    separate: Path | None = option("A PNG for each image, in place of a grid or beside --out.", path="DIR")
    trajectory: str | None = option(
        "Also the grid from noise to images, animated: .gif, .webp or .png, or DIR/.", path="PATH"
    )


@dataclass(frozen=True)
class SolverOptions:
    """Solver settings that `eval` can sweep."""

    HEADING: ClassVar = SamplingOptions.HEADING

    steps: int | None = option("Solver steps.", min=1)
    guidance_scale: float | None = option("1 is none; above 1 follows the prompt more.")
    solver: Solver | None = option("scm is the one for Sprint models, and for no others.")


@dataclass(frozen=True)
class CheckpointOptions:
    """Which checkpoint, and where its parts are while it draws."""

    HEADING: ClassVar = ModelOptions.HEADING

    checkpoint: Path | None = option(
        "A run, a step folder, a diffusers folder, a file of weights (diffusers, official, mindiffusion's), or "
        "`shipped:NAME` for weights that come with sana: quickstart (also `shipped`), critters, and their students in one step, NAME-distilled. "
        "Default: the newest checkpoint under runs/, else `shipped`.",
        path="PATH",
    )
    offload: Offload = option(
        "model (and auto): encoder, transformer and decoder take turns on the device; none: all stay there.",
        default="auto",
    )


@grouped
def sample(
    context: typer.Context,
    prompt: PromptOptions,
    solver: SolverOptions,
    sampling: SamplingOptions,
    file: FileOptions,
    checkpoint: CheckpointOptions,
    around: AroundOptions,
    model: ModelOptions,
    printing: PrintOptions,
) -> None:
    """Draw images for prompts with a checkpoint.

    The checkpoint may be one of yours, or come from diffusers, NVlabs/Sana or mindiffusion. If it
    was trained on single words, each word of a prompt is an image: '4 two 4 six' is a row of
    four.

    \b
    Examples:
      sana sample '4 two 4 six'
      sana sample seven --images-per-prompt 8 --guidance-scale 3 --out seven.png
      sana sample --prompts-file prompts.txt --separate samples/
      sana sample --checkpoint shipped:critters --grid 'a {red,blue} monster'
    """
    with user_errors(context, printing.quiet) as work:
        load_torch(work)
        from sana_cli.commands.sample import SampleOptions
        from sana_cli.commands.sample import sample as run
        from sana_cli.runtime.outputs import is_stdout

        piped = is_stdout(file.out) or is_stdout(file.trajectory)
        if piped and printing.json:
            raise SanaError(
                "`json`: stdout has the picture already", "drop it, or give `out` a file", exit_code=2
            )
        options = SampleOptions(**given(prompt, solver, sampling, file, checkpoint, around, model))
        summary = console.watch(attentive(run(options)), _progress, quiet=printing.json)
        if printing.json:
            return console.print_json(summary)
        _print_notes(summary, chosen=checkpoint.checkpoint is not None)
        for path in summary.saved:
            (console.note if piped else console.result)(str(path))
        return None


def _progress(step: object) -> "console.Line | None":
    from sana_cli.commands.sample import SampleStep

    return console.Line(step.stage, step.done, step.total) if isinstance(step, SampleStep) else None


def _print_notes(summary: "SampleSummary", chosen: bool) -> None:
    """What was drawn with what. `chosen`: the user named the checkpoint."""
    for text in summary.notes:
        console.note(f"note: {text}")
    drawn_by = f"shipped:{summary.checkpoint.name}" if summary.shipped else str(summary.checkpoint)
    if summary.shipped and not chosen:
        console.note(
            "no run of your own yet (sana train makes one): drawing with the weights that come with sana"
        )
        drawn_by = "them"
    console.note(f"drew {len(summary.images)} images with {drawn_by} in {summary.seconds:.1f} s")
    console.note(f"{summary.settings.in_words}, seed {summary.settings.seed}")

"""`sana sample` on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from sana_cli.choices import Offload, Solver
from sana_cli.cli.options import ModelOptions, PrintOptions, SamplingOptions, given, grouped, home
from sana_cli.cli.process import console, load_torch, user_errors
from sana_cli.errors import SanaError
from sana_cli.interrupts import attentive

if TYPE_CHECKING:
    from sana_cli.commands.sample import SampleSummary


@dataclass(frozen=True)
class PromptOptions:
    """What to draw."""

    HEADING: ClassVar = "Images"

    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to draw, a row of the grid each.")
    ] = None
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 1
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=home, help="Prompts, one a line; # begins a comment; - is stdin."
        ),
    ] = None
    negative_prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What to steer away from, in place of the null caption."),
    ] = None
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: as trained.")] = None
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: as trained.")] = None


@dataclass(frozen=True)
class FileOptions:
    """Where images go."""

    HEADING: ClassVar = "Files"

    out: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            callback=home,
            help="The grid: .png, .jpg or .webp, or DIR/. Default: in the run directory.",
        ),
    ] = None
    separate: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", callback=home, help="A PNG for each image, in place of a grid or beside --out."
        ),
    ] = None
    trajectory: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            callback=home,
            help="Also the grid from noise to images, animated: .gif, .webp or .png, or DIR/.",
        ),
    ] = None


@dataclass(frozen=True)
class SolverOptions:
    """The settings of the solver that `sample` takes one of each."""

    HEADING: ClassVar = SamplingOptions.HEADING

    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.")] = None
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 is none; above 1 follows the prompt more.")
    ] = None
    solver: Annotated[
        Solver | None, typer.Option(help="scm is the one for Sprint models, and for no others.")
    ] = None


@dataclass(frozen=True)
class CheckpointOptions:
    """The models that take turns."""

    HEADING: ClassVar = ModelOptions.HEADING

    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            callback=home,
            help="A run, a step folder, a diffusers folder, a file of weights (diffusers, official, the "
            "lesson's), or `shipped`: the weights that come with sana. Default: the newest checkpoint "
            "under runs/, else `shipped`.",
        ),
    ] = None
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", callback=home, help="The caption encoder: a folder, a Hugging Face id, or tiny."
        ),
    ] = None
    instruction: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Text before each prompt, in place of the model family's; '' for none."
        ),
    ] = None
    autoencoder: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            callback=home,
            help="The DC-AE that decodes latents: a folder or a Hugging Face id.",
        ),
    ] = None
    offload: Annotated[
        Offload,
        typer.Option(
            help="model (and auto): encoder, transformer and decoder take turns on the device; "
            "none: all stay there."
        ),
    ] = "auto"


@grouped
def sample(
    context: typer.Context,
    prompt: PromptOptions,
    solver: SolverOptions,
    sampling: SamplingOptions,
    file: FileOptions,
    checkpoint: CheckpointOptions,
    model: ModelOptions,
    printing: PrintOptions,
) -> None:
    """Draw images for prompts with a checkpoint.

    The checkpoint may be one of yours, or come from diffusers, NVlabs/Sana or the lesson. If it
    was trained on single words, each word of a prompt is an image: '4 two 4 six' is a row of
    four.

    \b
    Examples:
      sana sample '4 two 4 six'
      sana sample seven --images-per-prompt 8 --guidance-scale 3 --out seven.png
      sana sample --prompts-file prompts.txt --separate samples/
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
        options = SampleOptions(**given(prompt, solver, sampling, file, checkpoint, model))
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
    drawn_by = "shipped" if summary.shipped else str(summary.checkpoint)
    if summary.shipped and not chosen:
        console.note(
            "no run of your own yet (sana train makes one): drawing with the weights that come with sana"
        )
        drawn_by = "them"
    console.note(f"drew {len(summary.images)} images with {drawn_by} in {summary.seconds:.1f} s")
    console.note(f"{summary.settings.in_words}, seed {summary.settings.seed}")

"""`sana merge` on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import typer

from sana_cli.choices import Weights
from sana_cli.cli.options import PrintOptions, adapter_option, argument, given, grouped, option
from sana_cli.cli.process import console, load_torch, user_errors
from sana_cli.errors import SanaError
from sana_cli.interrupts import attentive

if TYPE_CHECKING:
    from sana_cli.commands.merge import MergeSummary


@dataclass(frozen=True)
class MergedOptions:
    """What to merge, and where to."""

    HEADING: ClassVar = None

    checkpoint: Path | None = argument(
        "The model: a diffusers folder, a file or a run. A run of adapters alone knows its own.",
        path=True,
        metavar="PATH",
    )
    adapter: list[str] | None = adapter_option("A LoRA or another adapter, and how strongly")
    out: Path | None = option("The folder to write. It must not be there yet.", path="DIR")
    weights: Weights = option("Of a run: the average (ema), or raw.", default="ema")
    dtype: Literal["fp32", "bf16"] = option(
        "What the merged weights are kept in. bf16 is half the size and rounds small changes away; how much is said.",
        default="fp32",
    )


@grouped
def merge(
    context: typer.Context,
    of: MergedOptions,
    *,
    printing: PrintOptions,
) -> None:
    """Work adapters into their model, for programs that read whole models.

    A diffusers pipeline with --adapter is copied with all its parts, ready for diffusers. A run of
    adapters alone becomes a checkpoint of ours with all weights. A transformer alone becomes the
    folder that diffusers' SanaTransformer2DModel loads.

    \b
    Examples:
      sana merge models/sana-1.6b --adapter runs/photos --out models/photos
      sana merge runs/photos --out models/photos --dtype bf16
      sana merge models/sana-1.6b --adapter a.safetensors:0.8 --adapter b.safetensors --out models/both
    """
    with user_errors(context, printing.quiet) as work:
        if of.checkpoint is None:
            raise SanaError(
                "nothing to merge: give a model with `adapter` FILE, or a run of adapters", exit_code=2
            )
        if of.out is None:
            raise SanaError("`out`: give the folder to write", exit_code=2)
        load_torch(work)
        from sana_cli.commands.merge import MergeOptions
        from sana_cli.commands.merge import merge as run

        options = MergeOptions(**given(of))
        summary = console.watch(attentive(run(options)), _progress, quiet=printing.json)
        return console.print_json(summary) if printing.json else _print_summary(summary)


def _progress(step: object) -> "console.Line | None":
    from sana_cli.commands.merge import MergeStep

    return console.Line("merge", step.done, step.total) if isinstance(step, MergeStep) else None


def _print_summary(summary: "MergeSummary") -> None:
    for text in summary.notes:
        console.note(f"note: {text}")
    console.note(f"{summary.layers} layers moved by {summary.update:.2%} of their norm, as a {summary.kind}")
    if summary.dtype == "bf16":
        lost = f"{summary.lost:.0%} as much" if summary.lost < 1 else f"{summary.lost:.1f} times as much"
        console.note(f"rounding to bf16 moved them by {lost}; --dtype fp32 does not")
    console.result(str(summary.folder))

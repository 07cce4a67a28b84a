"""`sana embed` on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from sana_cli.cli.options import ConfigOptions, DryRunOption, PrintOptions, given, grouped, option
from sana_cli.cli.process import console, load_torch, user_errors
from sana_cli.interrupts import attentive
from sana_cli.units import human_bytes

if TYPE_CHECKING:
    from sana_cli.commands.embed import EmbedPlan, EmbedSummary
    from sana_cli.config.keys import Config


@dataclass(frozen=True)
class DatasetOptions:
    """The dataset to write."""

    HEADING: ClassVar = None

    out: Path | None = option("The dataset directory. Default: data.dir of the config.", path="DIR")
    limit: int | None = option("Embed the first N images only.", min=1)
    overwrite: bool = option("Replace a finished dataset, once the new one is whole.", default=False)
    strict: bool = option(
        "Stop at the first entry that cannot be used, instead of listing it.", default=False
    )


@grouped
def embed(
    context: typer.Context,
    config: ConfigOptions,
    dataset: DatasetOptions,
    *,
    dry_run: DryRunOption = False,
    printing: PrintOptions,
) -> None:
    """Turn images and captions into a pre-embedded dataset.

    Each distinct caption goes through the encoder once and is stored once, without padding.
    After an interruption, run the same command again: it continues.

    \b
    Examples:
      sana embed
      sana embed --config folder-rgb --set data.path=photos
      sana embed --config sana --set text.encoder=google/gemma-2-2b-it
    """
    with user_errors(context, printing.quiet, distributed=True) as work:
        loaded = config.load()
        load_torch(work)
        from sana_cli.commands.embed import EmbedOptions, plan
        from sana_cli.commands.embed import embed as run

        options = EmbedOptions(loaded, **given(dataset))
        if dry_run:
            found = plan(options)
            return console.print_json(found) if printing.json else _print_plan(found)
        summary = console.watch(
            attentive(run(options)), lambda step: _progress(step, loaded), quiet=printing.json
        )
        if summary is None:  # not rank 0, which alone has a summary
            return None
        return console.print_json(summary) if printing.json else _print_summary(summary)


def _progress(step: object, config: "Config") -> "console.Line | None":
    from sana_cli.commands.embed import EmbedStep

    if not isinstance(step, EmbedStep):
        return None
    what = "embed" if step.split == config.data.split else f"embed {step.split}"
    return console.Line(what, step.images, step.total, f"{step.captions} distinct captions")


def _print_plan(plan: "EmbedPlan") -> None:
    console.facts(
        {
            "images": "as many as there are" if plan.images is None else plan.images,
            "each": " x ".join(map(str, plan.image_shape))
            + (f", or another of {plan.shapes} shapes" if plan.shapes > 1 else ""),
            "image bytes": "unknown" if plan.image_bytes is None else human_bytes(plan.image_bytes),
            "source": str(plan.source["source"]),
            "encoder": plan.encoder["encoder"],
            "dataset": f"{plan.directory}" + (" (there already)" if plan.exists else ""),
        }
    )


def _print_summary(summary: "EmbedSummary") -> None:
    _print_notes(summary)
    console.facts(
        {
            "images": summary.images,
            "captions": f"{summary.captions} distinct (the null caption is one of them), "
            f"{summary.tokens} tokens",
            **_left_out(summary),
            "size": human_bytes(summary.bytes),
            "time": f"{summary.seconds:.1f} s, peak memory {human_bytes(summary.peak_memory)}",
            "dataset": str(summary.directory),
        }
    )
    console.shapes(summary.shapes, summary.fit)
    held_out = summary.held_out
    if held_out is not None:
        _print_notes(held_out)
        size = f"{held_out.images:,} images, {human_bytes(held_out.bytes)}, in {held_out.directory}"
        console.facts({**_left_out(held_out), "held out": size})
        console.shapes(held_out.shapes, held_out.fit)


def _print_notes(summary: "EmbedSummary") -> None:
    if summary.resumed:
        console.note(f"went on after {summary.resumed} windows that were there")
    if summary.was_there:
        console.note(
            f"{summary.directory} is finished and matches; nothing to do (--overwrite makes it anew)"
        )
    for text in summary.notes:
        console.note(f"note: {text}")
    if summary.cut:
        console.note(
            f"note: {summary.cut:,} captions are longer than text.max_length and were cut there; "
            "a larger one keeps more of them"
        )
    for line in summary.first_skipped:
        console.note(f"left out: {line}")
    enlarged = sum(shape.enlarged for shape in summary.shapes)
    if enlarged:
        console.note(
            f"note: {enlarged:,} of {summary.images:,} images are smaller than their shape and were enlarged, "
            f"the most: {', '.join(summary.most_enlarged)}"
        )


def _left_out(summary: "EmbedSummary") -> dict[str, str]:
    if not summary.skipped:
        return {}
    return {"left out": f"{summary.skipped:,}, listed with reasons in {summary.directory / 'skipped.jsonl'}"}

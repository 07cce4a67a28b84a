"""The command line: parse, call, print. It imports neither torch nor transformers until a command runs."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_cli import __version__, console
from sana_cli.config import DEFAULT_CONFIG, Config, load_config
from sana_cli.console import Line
from sana_cli.errors import Interrupted, SanaError
from sana_cli.units import human_bytes, human_time

if TYPE_CHECKING:
    from sana_cli.commands.inspect import Report
    from sana_cli.commands.train import TrainStep

app = typer.Typer(
    name="sana",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: sana embed, sana train, sana sample '4 two 4 six', sana inspect",
)

ConfigOption = Annotated[
    str | None, typer.Option("--config", metavar="FILE|NAME", help="A YAML file, or the name of a shipped config.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set train.lr=1e-3. Repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")]


# --- boundary ---------------------------------------------------------------------------------------------------------


@contextmanager
def user_errors() -> Iterator[None]:
    """Every user mistake becomes one message and an exit code; SIGTERM ends a command as cleanly as Ctrl-C."""

    def terminate(number: int, _frame: FrameType | None) -> None:
        raise Interrupted("terminated", exit_code=128 + number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except SanaError as problem:
        console.error(problem)
        raise typer.Exit(problem.exit_code) from None
    except KeyboardInterrupt:
        console.error(Interrupted("interrupted"))
        raise typer.Exit(130) from None
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], int | None]]:
    """A question "were we asked to stop?" for a command that wants to finish what it is at; a second signal is final."""
    asked: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if asked:
            os._exit(128 + number)
        asked.append(number)
        console.note("stopping after this micro-batch and saving; once more to leave at once")

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, handle) for number in numbers]
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _config(name: str | None, overrides: list[str] | None) -> Config:
    if name is None:
        console.note(f"no --config given: using {DEFAULT_CONFIG}, the offline default")
    return load_config(name, overrides or ())


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


# --- embed ------------------------------------------------------------------------------------------------------------


@app.command()
def embed(
    config: ConfigOption = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The dataset directory. Default: data.dir of the config.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Embed the first N images only.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished dataset, once the new one is whole.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first entry that cannot be used, instead of listing it.")
    ] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Turn images and captions into a pre-embedded dataset.

    Each distinct caption goes through the encoder once and is stored once, without padding. Interrupted, it goes on
    where it was when it is run again.

    Examples: sana embed; sana embed --config sana --set text.encoder=Efficient-Large-Model/gemma-2-2b-it
    """
    with user_errors():
        loaded = _config(config, set_)
        from sana_cli.commands.embed import EmbedOptions, EmbedStep
        from sana_cli.commands.embed import embed as run
        from sana_cli.commands.embed import plan as make_plan

        options = EmbedOptions(loaded, out, limit, overwrite, strict)
        if dry_run:
            plan = make_plan(options)
            if json:
                return console.print_json(plan)
            shape = " x ".join(map(str, plan.image_shape))
            console.facts(
                {
                    "images": "as many as there are" if plan.images is None else plan.images,
                    "each": shape,
                    "image bytes": "unknown" if plan.image_bytes is None else human_bytes(plan.image_bytes),
                    "source": str(plan.source["source"]),
                    "encoder": plan.encoder["encoder"],
                    "dataset": f"{plan.directory}" + (" (there already)" if plan.exists else ""),
                }
            )
            return None

        def describe(step: object) -> Line | None:
            if not isinstance(step, EmbedStep):
                return None
            return Line("embed", step.images, step.total, f"{step.captions} distinct captions")

        summary = console.watch(run(options), describe, quiet=json)
        if summary is None:  # one of several processes, of which the first alone speaks
            return None
        if json:
            return console.print_json(summary)
        if summary.resumed:
            console.note(f"went on after {summary.resumed} windows that were there")
        if summary.was_there:
            console.note(f"{summary.directory} is finished and matches; nothing to do (--overwrite makes it anew)")
        saved = summary.lesson_bytes / summary.bytes
        skipped = {}
        if summary.skipped:
            skipped["left out"] = f"{summary.skipped:,}, listed with reasons in {summary.directory / 'skipped.jsonl'}"
            for line in summary.first_skipped:
                console.note(f"left out: {line}")
        console.facts(
            {
                "images": summary.images,
                "captions": f"{summary.captions} distinct (the null caption is one of them), {summary.tokens} tokens",
                **skipped,
                "size": f"{human_bytes(summary.bytes)}, where the lesson's layout would take "
                f"{human_bytes(summary.lesson_bytes)} ({saved:,.0f} times as much)",
                "time": f"{summary.seconds:.1f} s, peak memory {human_bytes(summary.peak_memory)}",
                "dataset": str(summary.directory),
            }
        )
        return None


# --- train ------------------------------------------------------------------------------------------------------------


def _train_line(step: "TrainStep") -> Line:
    events = [f"step {step.step}: checkpoint {step.saved}"] if step.saved else []
    events += [f"step {step.step}: samples {step.sampled}"] if step.sampled else []
    events += [f"warning: {step.warning}"] if step.warning else []
    info = (
        f"loss {step.loss:.4f}  lr {step.lr:.1e}  grad {step.grad_norm:.2f}  {step.samples_per_second:.0f} img/s  "
        f"{human_bytes(step.memory)}"
        if step.step
        else ""
    )
    if not console.err.is_terminal and step.step:
        info += f"  {human_time(step.seconds_left)} left"
    return Line("train", step.step, step.steps, info, "\n".join(events))


@app.command()
def train(
    config: ConfigOption = None,
    set_: SetOption = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|PATH|none", help="Continue: from the newest whole checkpoint, or a given one.")
    ] = "none",
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Train on a pre-embedded dataset.

    Ctrl-C saves the last whole step; --resume auto goes on from it, to the bit.

    Examples: sana train; sana train --config sana --resume auto; sana train --set train.steps=500 --set run.dir=runs/short
    """
    with user_errors():
        loaded = _config(config, set_)
        from sana_cli.commands.train import TrainOptions, TrainStep
        from sana_cli.commands.train import plan as make_plan
        from sana_cli.commands.train import train as run

        plan = make_plan(TrainOptions(loaded, resume))
        facts = {
            "parameters": plan.parameters,
            "dataset": f"{plan.dataset}, {plan.images:,} images",
            "steps": f"{plan.steps:,} of {plan.batch} images, {plan.epochs:.2f} epochs",
            "precision": f"{plan.precision} ({plan.precision_reason}), on {plan.device}",
            "checkpoint": f"{human_bytes(plan.checkpoint_bytes)} each, {loaded.train.keep} kept, in {plan.run}",
        }
        if dry_run:
            return console.print_json(plan) if json else console.facts(facts)
        if not json:
            for name, fact in facts.items():
                console.note(f"{name:<10}  {fact:,}" if isinstance(fact, int) else f"{name:<10}  {fact}")

        def describe(step: object) -> Line | None:
            return _train_line(step) if isinstance(step, TrainStep) else None

        with stop_on_signals() as stop:
            summary = console.watch(run(TrainOptions(loaded, resume, stop)), describe, quiet=json)
        for reason in summary.skipped:
            console.note(f"passed over: {reason}")
        if json:
            return console.print_json(summary)
        if summary.first_step == summary.steps:
            console.note(f"{summary.run} is finished at step {summary.steps}; nothing to do (a larger train.steps goes on)")
        else:
            console.note(
                f"trained steps {summary.first_step + 1} to {summary.steps} in {human_time(summary.seconds)}, "
                f"peak memory {human_bytes(summary.peak_memory)}"
            )
        console.result(str(summary.checkpoint))
        return None


# --- sample -----------------------------------------------------------------------------------------------------------


@app.command()
def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to draw, a row of the grid each.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A run, a step folder, a diffusers pipeline or transformer, or a file of weights: diffusers', official or the "
            "lesson's. Default: the newest checkpoint under runs/.",
        ),
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts, one a line.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is none; above 1 follows the prompt more.")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LO HI", help="Guide only while sigma is between these.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="dpm++, euler, heun or scm.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Moves the solver's steps towards noise.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Image i has seed + i; the same seed gives the same images.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to steer away from, in place of the null caption.")
    ] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 1,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: as trained.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: as trained.")] = None,
    weights: Annotated[
        str, typer.Option(metavar="ema|raw", help="The averaged weights, or those that the optimizer moved.")
    ] = "ema",
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")] = "auto",
    offload: Annotated[
        str,
        typer.Option(
            metavar="auto|model|none", help="model (and auto): encoder, transformer and decoder take turns; none: hold all."
        ),
    ] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="auto|bf16|fp32", help="What the transformer computes in. Default: as it was trained, or is stored."
        ),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the caption encoder lies: a folder, a Hugging Face id, or tiny.")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Put before each prompt, in place of the family's; '' for none.")
    ] = None,
    autoencoder: Annotated[
        str | None, typer.Option(metavar="PATH", help="The DC-AE that decodes latents: a folder or a Hugging Face id.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="PNG", help="Where the grid goes. Default: the run directory.")] = None,
    separate: Annotated[Path | None, typer.Option(metavar="DIR", help="A PNG for each image instead of a grid.")] = None,
    trajectory: Annotated[Path | None, typer.Option(metavar="GIF", help="Also the grid from noise to images, animated.")] = None,
    json: JsonOption = False,
) -> None:
    """Draw images for prompts with a checkpoint: trained here, by diffusers, by NVlabs/Sana or by the lesson.

    Where it was trained on single words, each word of a prompt is an image: '4 two 4 six' is a row of four.

    Examples: sana sample '4 two 4 six'; sana sample seven --images-per-prompt 8 --guidance-scale 3 --out seven.png
    """
    with user_errors():
        from sana_cli.commands.sample import SampleOptions, SampleStep
        from sana_cli.commands.sample import sample as run

        options = SampleOptions(
            prompts=tuple(prompts or ()),
            checkpoint=checkpoint,
            prompts_file=prompts_file,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            solver=solver,
            flow_shift=flow_shift,
            seed=seed,
            negative_prompt=negative_prompt,
            images_per_prompt=images_per_prompt,
            height=height,
            width=width,
            weights=weights,
            device=device,
            offload=offload,
            precision=precision,
            encoder=encoder,
            instruction=instruction,
            autoencoder=autoencoder,
            out=out,
            separate=separate,
            trajectory=trajectory,
        )

        def describe(step: object) -> Line | None:
            return Line(step.stage, step.done, step.total) if isinstance(step, SampleStep) else None

        summary = console.watch(run(options), describe, quiet=json)
        if json:
            return console.print_json(summary)
        settings = summary.settings
        console.note(
            f"drew {len(summary.images)} images with {summary.checkpoint} in {summary.seconds:.1f} s "
            f"({settings.solver}, {settings.steps} steps, guidance {settings.guidance_scale:g}, seed {settings.seed})"
        )
        for path in summary.saved:
            console.result(str(path))
        return None


# --- inspect ----------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    target: Annotated[
        str | None,
        typer.Argument(
            help="A config, run, checkpoint, dataset, PNG, diffusers folder, or a file of weights. Default: the shipped configs."
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of a dataset or checkpoint.")] = False,
    yaml: Annotated[
        bool, typer.Option("--yaml", help="Print the whole config, every key explained, to start one's own from.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Say what anything is, parameter counts first.

    Examples: sana inspect; sana inspect sana; sana inspect runs/quickstart; sana inspect quickstart --yaml > mine.yaml
    """
    with user_errors():
        from sana_cli.commands.inspect import InspectOptions
        from sana_cli.commands.inspect import inspect as run

        _print_report(run(InspectOptions(target, verify)), yaml, json)


def _print_report(report: "Report", yaml: bool, json: bool) -> None:
    if yaml:
        if report.config is None:
            raise SanaError(f"--yaml: {report.title} has no config to print", "give a config, a run or a checkpoint", exit_code=2)
        sys.stdout.write(report.config.to_commented_yaml())
        return
    if json:
        document: dict[str, Any] = {"kind": report.kind, "target": report.title, **report.facts}
        if report.kind != "configs":
            document["table"] = [
                dict(zip(report.columns, (str(c).strip() if isinstance(c, str) else c for c in row), strict=True))
                for row in report.rows
            ]
        console.print_json(document)
        return
    if report.kind != "configs":
        console.result(f"{report.kind} {report.title}")
        console.facts(report.facts)
    if report.rows:
        console.table(report.columns, report.rows)

"""The command line: parse, call, print.

What it takes to answer `--help` is imported at once, and the rest when a command runs: not only torch and transformers, but
pydantic and rich too, since a person waits for each tenth of a second.
"""

import importlib.util
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args

import typer

from sana_cli import __version__
from sana_cli.choices import Offload, Precision, Solver, Weights
from sana_cli.errors import Interrupted, SanaError, one_line
from sana_cli.interrupts import Asked, Stop, attentive, end_at_once, handling, raise_asked, word_for
from sana_cli.runtime import openmp
from sana_cli.runtime.launch import launch
from sana_cli.units import human_bytes, human_time

if TYPE_CHECKING:
    from sana_cli import console
    from sana_cli.commands.embed import EmbedSummary
    from sana_cli.commands.eval import EvalSummary
    from sana_cli.commands.inspect import Report
    from sana_cli.commands.train import TrainPlan, TrainStep
    from sana_cli.config.keys import Config
else:

    def _when_used(name: str) -> Any:
        """A module that is executed when something of it is first asked for."""
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.find_spec(name)
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    console = _when_used("sana_cli.console")

app = typer.Typer(
    name="sana",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help and usage errors: importing rich for them would take longer than all the rest of --help
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: sana embed, sana train, sana sample '4 two 4 six', sana inspect",
)

T = TypeVar("T", str, Path)


def _at_home(given: T | None) -> T | None:
    """`~` is the home folder: a shell leaves it as it is behind `--option=`. A slash at the end of a text stays."""
    return None if given is None else type(given)(os.path.expanduser(given))  # noqa: PTH111 (Path would take the slash away)


SOLVERS = list(get_args(Solver))
STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def _solvers(given: list[str] | None) -> list[str] | None:
    """A repeatable choice, which Typer knows no type for."""
    for solver in given or ():
        if solver not in SOLVERS:
            raise typer.BadParameter(f"{solver!r} is not one of {', '.join(map(repr, SOLVERS))}.")
    return given


ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE|NAME", callback=_at_home, help="A YAML file, or the name of a shipped config."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set train.lr=1e-3. Repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors; results stay on stdout.")]
WeightsOption = Annotated[
    Weights, typer.Option(help="The averaged weights, or those that the optimizer moved, where there are both.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")]


# --- boundary ---------------------------------------------------------------------------------------------------------


def run() -> None:
    """The command line as a process: `app`, and one message where what it printed cannot be written."""
    code: Any = 0
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # of an encoding that lacks a letter, as in the C locale
        app(prog_name="sana")
    except SystemExit as end:
        code = end.code
    except SanaError as problem:  # of --version
        code = console.error(problem).exit_code
    except OSError as problem:  # of --help; what commands print is written by `console`
        if problem.errno not in console.CANNOT_WRITE:
            raise
        console.silence(sys.stdout)
        code = console.error(console.not_written(problem)).exit_code
    try:
        sys.stdout.flush()
    except OSError as problem:
        console.silence(sys.stdout)
        gone = isinstance(problem, BrokenPipeError)  # whoever read it
        code = code or (1 if gone else console.error(console.not_written(problem)).exit_code)
    sys.exit(code)


@contextmanager
def user_errors(quiet: bool = False, distributed: bool = False) -> Iterator[ExitStack]:
    """Every user mistake becomes one message and an exit code; SIGTERM and a lost terminal end a command as Ctrl-C does.

    Gives a stack for what lasts as long as the command. A `distributed` one may be one of several processes, of which the
    first alone speaks.
    """
    with handling(end_at_once):  # an exception would leave the console half loaded, and nothing to tell of it with
        console.begin(quiet)
    with handling(raise_asked):
        try:
            with ExitStack() as work:
                if distributed:
                    console.speak_as(launch())
                yield work
        except SanaError as problem:
            raise typer.Exit(console.error(problem).exit_code) from None
        except (Asked, KeyboardInterrupt) as asked:
            number = asked.number if isinstance(asked, Asked) else signal.SIGINT
            console.error(Interrupted(word_for(number)))
            raise typer.Exit(128 + number) from None
        except BrokenPipeError:  # whoever read our output has gone
            console.silence(sys.stdout)
            raise typer.Exit(1) from None
        except OSError as problem:  # a name that no file system takes, or a folder that nobody may look into
            if problem.filename is None:
                raise
            error = SanaError(f"{one_line(str(problem.filename))[:200]}: {problem.strerror}")
            raise typer.Exit(console.error(error).exit_code) from None


def _load_torch(work: ExitStack) -> None:
    """Import torch, and keep its threads from spinning for as long as `work` lasts.

    An exception that a signal raises while its C++ loads would abort the process: until then one ends it at once.
    """
    with handling(end_at_once):
        import torch  # noqa: F401
    work.enter_context(openmp.watch())


def _config(name: str | None, overrides: list[str] | None) -> "Config":
    from sana_cli.config.file import DEFAULT_CONFIG, load_config

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
        Path | None,
        typer.Option(metavar="DIR", callback=_at_home, help="The dataset directory. Default: data.dir of the config."),
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
    quiet: QuietOption = False,
) -> None:
    """Turn images and captions into a pre-embedded dataset.

    Each distinct caption goes through the encoder once and is stored once, without padding. Interrupted, it goes on
    where it was when it is run again.

    Examples: sana embed; sana embed --config sana --set text.encoder=Efficient-Large-Model/gemma-2-2b-it
    """
    with user_errors(quiet, distributed=True) as work:
        loaded = _config(config, set_)
        _load_torch(work)
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

        def describe(step: object) -> "console.Line | None":
            if not isinstance(step, EmbedStep):
                return None
            what = "embed" if step.split == loaded.data.split else f"embed {step.split}"
            return console.Line(what, step.images, step.total, f"{step.captions} distinct captions")

        summary = console.watch(attentive(run(options)), describe, quiet=json)
        if summary is None:  # one of several processes, of which the first alone speaks
            return None
        if json:
            return console.print_json(summary)
        for part in (summary, summary.held_out):
            if part is not None:
                _tell_embedded(part, held_out=part is summary.held_out)
        return None


def _tell_embedded(summary: "EmbedSummary", held_out: bool) -> None:
    if summary.resumed:
        console.note(f"went on after {summary.resumed} windows that were there")
    if summary.was_there:
        console.note(f"{summary.directory} is finished and matches; nothing to do (--overwrite makes it anew)")
    for text in summary.notes:
        console.note(f"note: {text}")
    if summary.cut:
        console.note(
            f"note: {summary.cut:,} captions are longer than text.max_length and were cut there; a larger one keeps more of them"
        )
    skipped = {}
    if summary.skipped:
        skipped["left out"] = f"{summary.skipped:,}, listed with reasons in {summary.directory / 'skipped.jsonl'}"
        for line in summary.first_skipped:
            console.note(f"left out: {line}")
    if held_out:
        console.facts({**skipped, "held out": f"{summary.images:,} images, {human_bytes(summary.bytes)}, in {summary.directory}"})
        return
    saved = summary.lesson_bytes / summary.bytes
    console.facts(
        {
            "images": summary.images,
            "captions": f"{summary.captions} distinct (the null caption is one of them), {summary.tokens} tokens",
            **skipped,
            "size": f"{human_bytes(summary.bytes)}; the lesson's layout would take "
            f"{human_bytes(summary.lesson_bytes)} ({saved:,.0f} times)",
            "time": f"{summary.seconds:.1f} s, peak memory {human_bytes(summary.peak_memory)}",
            "dataset": str(summary.directory),
        }
    )


# --- train ------------------------------------------------------------------------------------------------------------


def _train_line(step: "TrainStep") -> "console.Line":
    events = [f"step {step.step}: checkpoint {step.saved}"] if step.saved else []
    events += [f"step {step.step}: samples {step.sampled}"] if step.sampled else []
    events += [f"warning: {step.warning}"] if step.warning else []
    info, left = "", ""
    if step.loss == step.loss:  # a step of this process
        held_out = "" if step.held_out_loss is None else f"  held out {step.held_out_loss:.4f}"
        wait = f"  data {step.data_wait:.0%}" if step.data_wait >= 0.005 else ""
        info = (
            f"loss {step.loss:.4f}{held_out}  lr {step.lr:.1e}  grad {step.grad_norm:.2f}  "
            f"{step.samples_per_second:.0f} img/s{wait}  {human_bytes(step.memory)}"
        )
        left = f"{human_time(step.seconds_left)} left" if step.step < step.steps else ""
    return console.Line("train", step.step, step.steps, info, "\n".join(events), step.loss, left)


def _plan_facts(plan: "TrainPlan", keep: int) -> dict[str, Any]:
    cut = "" if plan.batch == plan.micro_batch else f" ({plan.micro_batches} x {plan.micro_batch}"
    cut += f" x {plan.processes} processes)" if cut and plan.processes > 1 else ")" if cut else ""
    facts = {
        "parameters": plan.parameters,
        "dataset": f"{plan.dataset}, {plan.images:,} images",
        "held out": f"{plan.held_out}, {plan.held_out_images:,} images" if plan.held_out else "none",
        "steps": f"{plan.steps:,} of {plan.batch} images{cut}, {plan.epochs:.2f} epochs",
        "precision": f"{plan.precision} ({plan.precision_reason}), on {plan.device}",
        "checkpoint": f"{human_bytes(plan.checkpoint_bytes)} each, {keep} kept, in {plan.run}",
    }
    if plan.memory is not None:
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.memory.parts.items() if size)
        facts["memory"] = f"about {human_bytes(plan.memory.total)}: {parts}"
        facts["disk"] = (
            f"{human_bytes(plan.disk_bytes)} at most, while one more is written; {human_bytes(plan.disk_free)} are free"
        )
    return facts


@app.command()
def train(
    config: ConfigOption = None,
    set_: SetOption = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|PATH|none", callback=_at_home, help="Continue: from the newest whole checkpoint, or a given one."
        ),
    ] = "none",
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train on a pre-embedded dataset.

    Ctrl-C saves the last whole step; --resume auto goes on from it, to the bit.

    Examples: sana train; sana train --config sana --resume auto; sana train --set train.steps=500 --set run.dir=runs/short
    """
    with user_errors(quiet, distributed=True) as work:
        loaded = _config(config, set_)
        _load_torch(work)
        from sana_cli.commands.train import TrainOptions, TrainStart, TrainStep
        from sana_cli.commands.train import plan as make_plan
        from sana_cli.commands.train import train as run

        if dry_run:
            plan = make_plan(TrainOptions(loaded, resume))
            return console.print_json(plan) if json else console.facts(_plan_facts(plan, loaded.train.keep))

        def describe(step: object) -> "console.Line | None":
            if isinstance(step, TrainStart) and not json:
                for name, fact in _plan_facts(step.plan, loaded.train.keep).items():
                    console.note(f"{name:<10}  {fact:,}" if isinstance(fact, int) else f"{name:<10}  {fact}")
                for text in step.notes:
                    console.note(text)
                if step.checkpoint is not None and step.step < step.plan.steps:
                    console.note(f"going on after step {step.step:,}, from {step.checkpoint}")
            return _train_line(step) if isinstance(step, TrainStep) else None

        told = "finishing this micro-batch, then saving (once more quits now)"
        stop = Stop(lambda: console.note(told), launch().by_torchrun)
        summary = console.watch(stop.during(run(TrainOptions(loaded, resume, stop))), describe, quiet=json)
        if json:
            return console.print_json(summary)
        if summary.first_step == summary.steps:
            console.note(f"{summary.run} is finished at step {summary.steps}; nothing to do (a larger train.steps goes on)")
        else:
            console.note(
                f"trained steps {summary.first_step + 1} to {summary.steps} in {human_time(summary.seconds)}, "
                f"peak memory {human_bytes(summary.peak_memory)}"
            )
        if summary.report is not None:
            console.note(f"report: {summary.report}")
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
            callback=_at_home,
            help="A run, a step folder, a diffusers pipeline or transformer, or a file of weights: diffusers', official or the "
            "lesson's; or `shipped`, the weights that come with sana. Default: the newest checkpoint under runs/, else those.",
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=_at_home, help="Prompts, one a line; # begins a comment; - is stdin."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is none; above 1 follows the prompt more.")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LO HI", help="Guide only while sigma is between these.")
    ] = None,
    solver: Annotated[Solver | None, typer.Option(help="scm is for Sprint models, and they are for it.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Moves the solver's steps towards noise.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Image i has seed + i; the same seed gives the same images.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to steer away from, in place of the null caption.")
    ] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 1,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: as trained.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: as trained.")] = None,
    weights: WeightsOption = "ema",
    device: DeviceOption = "auto",
    offload: Annotated[
        Offload, typer.Option(help="model (and auto): encoder, transformer and decoder take turns; none: hold all.")
    ] = "auto",
    precision: Annotated[
        Precision | None, typer.Option(help="What the transformer computes in. Default: as it was trained, or is stored.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", callback=_at_home, help="Where the caption encoder lies: a folder, a Hugging Face id, or tiny."
        ),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Put before each prompt, in place of the family's; '' for none.")
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="PATH", callback=_at_home, help="The DC-AE that decodes latents: a folder or a Hugging Face id."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            callback=_at_home,
            help="Where the grid goes: .png, .jpg or .webp, or DIR/. Default: the run directory.",
        ),
    ] = None,
    separate: Annotated[
        Path | None,
        typer.Option(metavar="DIR", callback=_at_home, help="A PNG for each image, in place of a grid or beside --out."),
    ] = None,
    trajectory: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", callback=_at_home, help="Also the grid from noise to images, animated: .gif, .webp or .png, or DIR/."
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw images for prompts with a checkpoint.

    It may be one of yours, of diffusers, of NVlabs/Sana or of the lesson. Where it was trained on single words, each word of a
    prompt is an image: '4 two 4 six' is a row of four.

    Examples: sana sample '4 two 4 six'; sana sample seven --images-per-prompt 8 --guidance-scale 3 --out seven.png
    """
    with user_errors(quiet) as work:
        _load_torch(work)
        piped = out in STDOUT or trajectory in STDOUT
        if piped and json:
            raise SanaError("--json: stdout has the picture already", "drop it, or give --out a file", exit_code=2)
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

        def describe(step: object) -> "console.Line | None":
            return console.Line(step.stage, step.done, step.total) if isinstance(step, SampleStep) else None

        summary = console.watch(attentive(run(options)), describe, quiet=json)
        if json:
            return console.print_json(summary)
        for text in summary.notes:
            console.note(f"note: {text}")
        settings = summary.settings
        who = "shipped" if summary.shipped else str(summary.checkpoint)
        if summary.shipped and checkpoint is None:
            console.note("no run of your own yet (sana train makes one): drawing with the weights that come with sana")
            who = "them"
        console.note(f"drew {len(summary.images)} images with {who} in {summary.seconds:.1f} s")
        console.note(f"{settings.in_words}, seed {settings.seed}")
        for path in summary.saved:
            (console.note if piped else console.result)(str(path))
        return None


# --- eval -------------------------------------------------------------------------------------------------------------


@app.command(name="eval")
def evaluate(
    target: Annotated[
        Path | None,
        typer.Argument(
            callback=_at_home,
            help="A run, a step folder, a folder of pictures, or `shipped`. Default: the newest checkpoint under runs/.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", callback=_at_home, help="The dataset to judge by. Default: data.dir of the run's config."),
    ] = None,
    images: Annotated[
        int, typer.Option(min=2, help="Images drawn at each setting; with few, the distance is mostly bias.")
    ] = 10_000,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Solver steps. Repeatable: every combination is judged.")] = None,
    guidance_scale: Annotated[list[float] | None, typer.Option(min=0, help="1 is no guidance. Repeatable.")] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(metavar=f"[{'|'.join(SOLVERS)}]", callback=_solvers, autocompletion=lambda: SOLVERS, help="Repeatable."),
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LO HI", help="The range of sigma in which guidance is used.")
    ] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Of the solver's noise levels.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Judge many step counts and guidance scales.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Image i has seed + i.")] = 0,
    weights: WeightsOption = "ema",
    device: DeviceOption = "auto",
    precision: Annotated[
        Precision | None, typer.Option(help="What the transformer computes in. Default: as it was trained.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            callback=_at_home,
            help="Also keep the results in this .json file, or DIR/; until all are there, those so far in PATH.unfinished.",
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", callback=_at_home, help="Also draw them: .png, .svg or .pdf, or DIR/ (needs the plot extra)."
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Judge a checkpoint, or a folder of samples.

    By prompt accuracy, Fréchet distance, and diversity within a caption. The judge is a classifier that is trained once on the
    dataset's labels and kept beside it; real images that it has not seen are judged too, for comparison.

    Examples: sana eval; sana eval runs/quickstart --sweep --images 2000 --plot sweep.png; sana eval samples/ --json
    """
    with user_errors(quiet) as work:
        _load_torch(work)
        for option, given in (("--out", out), ("--plot", plot)):
            if given in STDOUT:
                todo = "--json prints the results there" if option == "--out" else "give it a file"
                raise SanaError(f"{option}: stdout has the tables", todo, exit_code=2)
        from sana_cli.commands.eval import EvalOptions, EvalStep, record
        from sana_cli.commands.eval import evaluate as run

        options = EvalOptions(
            target=target,
            data=data,
            images=images,
            steps=tuple(steps or ()),
            guidance_scale=tuple(guidance_scale or ()),
            solver=cast("tuple[Solver, ...]", tuple(solver or ())),
            guidance_interval=guidance_interval,
            flow_shift=flow_shift,
            sweep=sweep,
            seed=seed,
            weights=weights,
            device=device,
            precision=precision,
            out=out,
            plot=plot,
        )

        def describe(step: object) -> "console.Line | None":
            return console.Line(step.stage, step.done, step.total) if isinstance(step, EvalStep) else None

        summary = console.watch(attentive(run(options)), describe, quiet=json)
        if json:
            return console.print_json(record(summary))
        _tell_judged(summary)
        return None


def _tell_judged(summary: "EvalSummary") -> None:
    console.note(
        f"the judge of {summary.dataset} reads {summary.judge_accuracy:.2%} of {summary.real_images:,} real images that it was "
        "not trained on"
    )
    first = summary.results[0]
    if len(summary.results) == 1:
        shares = [*first.verdict.labels, *(share for share in first.verdict.captions if len(first.verdict.captions) > 1)]
        rows = [
            (f"label {s.name}" if s in first.verdict.labels else s.name, s.accuracy, _between(s.interval), s.count)
            for s in shares
        ]
        console.table(("caption", "as prompted", "95 % interval", "images"), rows)
    table = []
    for result in summary.results:
        verdict, settings = result.verdict, result.settings
        how = "pictures" if settings is None else f"{settings.solver} {settings.steps} x {settings.guidance_scale:g}"
        table.append(
            (
                how,
                verdict.total.accuracy,
                _between(verdict.total.interval),
                f"{verdict.distance:.2f} ± {verdict.distance_spread:.2f}",
                f"{verdict.diversity:.2f}",
                f"{result.seconds:.0f} s",
            )
        )
    console.table(("steps x guidance", "as prompted", "95 %", "Fréchet", "diversity", "time"), table)
    if first.settings is not None and first.settings.guidance_interval != (0, 1):
        console.note("guidance at noise levels {:g} to {:g}".format(*first.settings.guidance_interval))
    console.note(
        f"as many real images have a Fréchet distance of {first.verdict.real_distance:.2f} and a diversity of 1 "
        f"({first.images:,} images each)"
    )
    for path in summary.saved:
        console.result(str(path))


def _between(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"


# --- inspect ----------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    target: Annotated[
        str | None,
        typer.Argument(
            callback=_at_home,
            help="A config, run, checkpoint, dataset, PNG, diffusers folder, or a file of weights. Default: the shipped configs.",
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of a dataset or checkpoint.")] = False,
    yaml: Annotated[
        bool, typer.Option("--yaml", help="Print the whole config, every key explained, to start one's own from.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of configs, for editors to check them by.")
    ] = False,
    env: Annotated[bool, typer.Option("--env", help="What sana runs on here, for a bug report.")] = False,
    json: JsonOption = False,
) -> None:
    """Say what anything is, parameter counts first.

    Examples: sana inspect; sana inspect sana; sana inspect runs/quickstart; sana inspect quickstart --yaml > mine.yaml
    """
    with user_errors() as work:
        if target is not None and (schema or env):
            raise SanaError(f"--{'schema' if schema else 'env'} takes no target: drop {target}", exit_code=2)
        if schema:
            from sana_cli.config.keys import json_schema

            return console.print_json(json_schema())
        _load_torch(work)
        if env:
            from sana_cli.commands.inspect import environment

            return _print_report(environment(), yaml, json)
        from sana_cli.commands.inspect import InspectOptions
        from sana_cli.commands.inspect import inspect as run

        return _print_report(run(InspectOptions(target, verify)), yaml, json)


def _print_report(report: "Report", yaml: bool, json: bool) -> None:
    if yaml:
        if report.config is None:
            raise SanaError(f"--yaml: {report.title} has no config to print", "give a config, a run or a checkpoint", exit_code=2)
        console.print_text(report.config.to_commented_yaml())
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
        console.result(f"{report.kind} {report.title}".rstrip())
        console.facts(report.facts)
    if report.rows:
        console.table(report.columns, report.rows)

"""`sana eval` on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, get_args

import typer

from sana_cli.choices import Solver
from sana_cli.cli.options import ModelOptions, PrintOptions, SamplingOptions, argument, given, grouped, option
from sana_cli.cli.process import console, load_torch, user_errors
from sana_cli.errors import SanaError
from sana_cli.interrupts import attentive

if TYPE_CHECKING:
    from sana_cli.commands.eval import EvalResult, EvalSummary

SOLVERS = list(get_args(Solver))


def _solvers(names: list[str] | None) -> list[str] | None:
    """Check a repeatable choice, for which Typer has no type."""
    for solver in names or ():
        if solver not in SOLVERS:
            raise typer.BadParameter(f"{solver!r} is not one of {', '.join(map(repr, SOLVERS))}.")
    return names


@dataclass(frozen=True)
class JudgingOptions:
    """What is judged, and by which dataset."""

    HEADING: ClassVar = "Judging"

    target: Path | None = argument(
        "A run, a step folder, a folder of pictures, or `shipped`. Default: the newest checkpoint under runs/.",
        path=True,
    )
    images: int = option(
        "Images drawn at each setting. With few, the distance is mostly bias.", default=10_000, min=2
    )
    sweep: bool = option("Judge many step counts and guidance scales.", default=False)
    data: Path | None = option("The dataset to judge by. Default: data.dir of the run's config.", path="DIR")


@dataclass(frozen=True)
class SweepOptions:
    """The settings of the solver that `eval` takes several of."""

    HEADING: ClassVar = SamplingOptions.HEADING

    steps: list[int] | None = option("Solver steps. Repeatable: every combination is judged.", min=1)
    guidance_scale: list[float] | None = option("1 is no guidance. Repeatable.", min=0)
    solver: list[str] | None = option(
        "Repeatable.", metavar=f"[{'|'.join(SOLVERS)}]", callback=_solvers, autocompletion=lambda: SOLVERS
    )


@dataclass(frozen=True)
class FileOptions:
    """Where results go."""

    HEADING: ClassVar = "Files"

    out: str | None = option(
        "Also write the results to this .json file, or DIR/. Until all are there, PATH.unfinished has those so far.",
        path="PATH",
    )
    plot: str | None = option(
        "Also draw them: .png, .svg or .pdf, or DIR/ (needs the plot extra).", path="PATH"
    )


@grouped
def evaluate(
    context: typer.Context,
    judging: JudgingOptions,
    sweep: SweepOptions,
    sampling: SamplingOptions,
    file: FileOptions,
    model: ModelOptions,
    printing: PrintOptions,
) -> None:
    """Judge a checkpoint, or a folder of samples.

    The results are prompt accuracy, Fréchet distance, and diversity within a caption. The judge
    is a classifier, trained once on the dataset's labels and kept beside the dataset. Real
    images that it was not trained on are judged too, for comparison.

    \b
    Examples:
      sana eval
      sana eval runs/quickstart --sweep --images 2000 --plot sweep.png
      sana eval samples/ --json
    """
    with user_errors(context, printing.quiet) as work:
        load_torch(work)
        from sana_cli.commands.eval import EvalOptions, record
        from sana_cli.commands.eval import evaluate as run
        from sana_cli.runtime.outputs import is_stdout

        for setting, path, todo in (
            ("out", file.out, "`json` prints the results there"),
            ("plot", file.plot, "give it a file"),
        ):
            if is_stdout(path):
                raise SanaError(f"`{setting}`: stdout has the tables", todo, exit_code=2)
        options = EvalOptions(**given(judging, sweep, sampling, file, model))
        summary = console.watch(attentive(run(options)), _progress, quiet=printing.json)
        return console.print_json(record(summary)) if printing.json else _print_summary(summary)


def _progress(step: object) -> "console.Line | None":
    from sana_cli.commands.eval import EvalStep

    return console.Line(step.stage, step.done, step.total) if isinstance(step, EvalStep) else None


def _print_summary(summary: "EvalSummary") -> None:
    console.note(
        f"the judge of {summary.dataset} reads {summary.judge_accuracy:.2%} of "
        f"{summary.real_images:,} real images that it was not trained on"
    )
    first = summary.results[0]
    if len(summary.results) == 1:
        _print_captions(first)
    _print_results(summary.results)
    if first.settings is not None and first.settings.guidance_interval != (0, 1):
        console.note("guidance at noise levels {:g} to {:g}".format(*first.settings.guidance_interval))
    console.note(
        f"as many real images have a Fréchet distance of {first.verdict.real_distance:.2f} "
        f"and a diversity of 1 ({first.images:,} images each)"
    )
    for path in summary.saved:
        console.result(str(path))


def _print_captions(result: "EvalResult") -> None:
    """Accuracy of each label, and of each caption if there are several."""
    verdict = result.verdict
    captions = verdict.captions if len(verdict.captions) > 1 else ()
    shares = [(f"label {share.name}", share) for share in verdict.labels] + [
        (share.name, share) for share in captions
    ]
    rows = [(name, share.accuracy, _per_cent(share.interval), share.count) for name, share in shares]
    console.table(("caption", "as prompted", "95 % interval", "images"), rows)


def _print_results(results: "tuple[EvalResult, ...]") -> None:
    """A row for each setting."""
    rows = []
    for result in results:
        verdict, settings = result.verdict, result.settings
        how = (
            "pictures"
            if settings is None
            else f"{settings.solver} {settings.steps} x {settings.guidance_scale:g}"
        )
        rows.append(
            (
                how,
                verdict.total.accuracy,
                _per_cent(verdict.total.interval),
                f"{verdict.distance:.2f} ± {verdict.distance_spread:.2f}",
                f"{verdict.diversity:.2f}",
                f"{result.seconds:.0f} s",
            )
        )
    console.table(("steps x guidance", "as prompted", "95 %", "Fréchet", "diversity", "time"), rows)


def _per_cent(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"

"""`sana eval` on the command line."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, get_args

import typer

from sana_cli.choices import JudgedBy, Solver
from sana_cli.cli.options import (
    ModelOptions,
    PrintOptions,
    SamplingOptions,
    argument,
    given,
    grouped,
    home,
    option,
)
from sana_cli.cli.process import console, load_torch, user_errors
from sana_cli.errors import SanaError
from sana_cli.interrupts import attentive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sana_cli.commands.eval import Comparison, EvalResult, EvalSummary
    from sana_cli.judging.judge import Share
    from sana_cli.judging.verdict import Reading, Verdict

SOLVERS = list(get_args(Solver))
MOST_SWAPS = 10  # rows of their table


def _solvers(names: list[str] | None) -> list[str] | None:
    """Check a repeatable choice, for which Typer has no type."""
    for solver in names or ():
        if solver not in SOLVERS:
            raise typer.BadParameter(f"{solver!r} is not one of {', '.join(map(repr, SOLVERS))}.")
    return names


def _homes(paths: list[Path] | None) -> list[Path] | None:
    """Replace `~` in each path by the home folder."""
    return None if paths is None else [path for path in map(home, paths) if path is not None]


@dataclass(frozen=True)
class JudgingOptions:
    """What is judged, and by which dataset."""

    HEADING: ClassVar = "Judging"

    target: Path | None = argument(
        "A run, a step folder, a folder of pictures, or `shipped:NAME` (also `shipped`). "
        "Default: the newest checkpoint under runs/.",
        path=True,
    )
    beside: list[Path] | None = option(
        "Judge this checkpoint too, at its own settings, in the same table. `teacher` is the one "
        "that the target was distilled from. Repeatable.",
        metavar="PATH|teacher",
        callback=_homes,
    )
    images: int = option(
        "Images drawn at each setting, half of them of unseen combinations where there are any. "
        "With few, the distance is mostly bias.",
        default=10_000,
        min=2,
    )
    sweep: bool = option("Judge many step counts and guidance scales.", default=False)
    data: Path | None = option(
        "The dataset to judge by. Default: data.dir of the checkpoint's config.", path="DIR"
    )
    by: JudgedBy = option(
        "What tells how good a picture is: its attributes, or the rank of its caption. "
        "auto: attributes where the dataset has any.",
        default="auto",
    )


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
        "Also write the results to this .json file, or DIR/. Until all are there, "
        "PATH.unfinished has those so far.",
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
    is a classifier, trained once on the dataset's attributes and kept beside the dataset. Real
    images that it was not trained on are judged too, for comparison.

    \b
    Examples:
      sana eval
      sana eval runs/quickstart --sweep --images 2000 --plot sweep.png
      sana eval shipped:critters --images 2000
      sana eval runs/quickstart-distilled --beside teacher
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
    from sana_cli.judging.verdict import pooled

    for note in summary.notes:
        console.note(note)
    real, first = pooled("real", summary.real), summary.results[0]
    console.note(f"the judge of {summary.dataset} {_judge_in_words(summary.real, real)}")
    verdict = first.verdict
    if len(summary.results) == 1:
        if len(real.attributes) > 1 or verdict.unseen:
            _print_attributes(verdict, real)
            _print_swaps(verdict, real)
        elif real.attributes:
            _print_captions(verdict)
    _print_results(summary)
    _print_intervals(summary)
    count = verdict.seen.total.count
    if verdict.real_distance == verdict.real_distance:
        diversity = "" if verdict.diversity != verdict.diversity else " and a diversity of 1"
        distance = f"a Fréchet distance of {verdict.real_distance:.2f}{diversity}"
        if real.total.count < count:  # fewer pictures are further away, whatever they are
            console.note(f"the {real.total.count:,} real images that there are have {distance}")
        else:
            console.note(f"as many real images have {distance} ({count:,} images each)")
    if summary.comparison is not None:
        _print_comparison(summary.comparison)
    for path in summary.saved:
        console.result(str(path))


def _judge_in_words(readings: "Sequence[Reading]", real: "Reading") -> str:
    """How well the judge reads real pictures, by their readings and these pooled."""
    from sana_cli.judging.retrieval import RPrecision

    images = f"{real.total.count:,} real images that it was not trained on"
    if not real.total.count:
        return "was tested on no real images"
    if isinstance(ranked := readings[0].total, RPrecision):
        return f"ranks the own caption of {ranked.accuracy:.1%} of {images} first among {ranked.of}"
    if len(real.attributes) == 1:
        return f"reads {real.total.accuracy:.2%} of {images}"
    return (
        f"reads {real.single.accuracy:.2%} of the attributes of {images}, "
        f"and all of them in {real.total.accuracy:.1%}"
    )


def _print_attributes(verdict: "Verdict", real: "Reading") -> None:
    """Accuracy of each attribute, of all of them one by one, and of pictures as a whole."""
    readings = (verdict.seen, *verdict.unseen, real)
    rows = list(zip(*(reading.attributes for reading in readings), strict=True))
    shares = [(of[0].name, of) for of in rows]
    shares.append(("one by one", tuple(reading.single for reading in readings)))
    shares.append(("all at once", tuple(reading.total for reading in readings)))
    kinds = ["seen", *(reading.kind for reading in verdict.unseen)]
    console.table(
        ("as prompted", *kinds, "real"),
        [(name, *map(_with_spread, of[:-1]), _plain(of[-1])) for name, of in shares],
    )


def _print_swaps(verdict: "Verdict", real: "Reading") -> None:
    """How often values asked of two attributes are mistaken for one another: the largest shares."""
    from sana_cli.judging.verdict import pooled

    readings = [verdict.seen, *([pooled("unseen", verdict.unseen)] if verdict.unseen else []), real]
    found: list[tuple[Share, ...]] = []
    for swaps in zip(*(reading.swaps for reading in readings), strict=True):
        found.append(tuple(swap.leak for swap in swaps))
        if swaps[0].first < swaps[0].second:  # the same in both orders
            found.append(tuple(swap.exchanged for swap in swaps))
    found = [shares for shares in found if shares[0].count]
    found.sort(key=lambda shares: max(s.accuracy if s.count else 0.0 for s in shares[:-1]), reverse=True)
    if found:
        rows = [(shares[0].name, *map(_with_spread, shares)) for shares in found[:MOST_SWAPS]]
        console.table(("swapped", *(reading.kind for reading in readings)), rows)


def _print_captions(verdict: "Verdict") -> None:
    """Accuracy of each value of the one attribute, and of each caption if there are several."""
    (attribute,) = verdict.seen.attributes
    captions = verdict.captions if len(verdict.captions) > 1 else ()
    shares = [(f"{attribute.name} {share.name}", share) for share in verdict.labels] + [
        (share.name, share) for share in captions
    ]
    rows = [(name, share.accuracy, _per_cent(share.interval), share.count) for name, share in shares]
    console.table(("caption", "as prompted", "95 % interval", "images"), rows)


def _print_results(summary: "EvalSummary") -> None:
    """A row for each setting; of several checkpoints, each row ends with its name."""
    from sana_cli.judging.verdict import pooled

    names = summary.names
    several = len(names) > 1
    unseen = any(result.verdict.unseen for result in summary.results)
    rows = []
    for result in summary.results:
        verdict = result.verdict
        total, diversity = verdict.seen.total, verdict.diversity
        if unseen or several:  # in one column each: they fit into 80 columns
            parts = [verdict.seen, *([pooled("unseen", verdict.unseen)] if verdict.unseen else [])]
            shares: list[float | str] = [_with_spread(part.total) for part in parts]
            shares += ["-"] * (1 + unseen - len(parts))
        else:
            shares = [_plain(total), _per_cent(total.interval)]
        rows.append(
            (
                _settings_in_words(result),
                *shares,
                f"{verdict.distance:.2f} ± {verdict.distance_spread:.2f}",
                f"{diversity:.2f}" if diversity == diversity else "-",
                f"{result.seconds:.0f} s",
                *([names[result.checkpoint]] if several and result.checkpoint is not None else []),
            )
        )
    columns = ["steps x guidance", "R-precision" if summary.by == "captions" else "as prompted"]
    columns += ["unseen"] if unseen else [] if several else ["95 %"]
    columns += ["Fréchet", "diversity", "time", *(["checkpoint"] if several else [])]
    console.table(columns, rows)


def _settings_in_words(result: "EvalResult") -> str:
    settings = result.settings
    if settings is None:
        return "pictures"
    return f"{settings.solver} {settings.steps} x {settings.guidance_scale:g}"


def _print_intervals(summary: "EvalSummary") -> None:
    """Where each checkpoint is guided, unless it is everywhere."""
    names, found = summary.names, dict[str, None]()
    for result in summary.results:
        if result.settings is not None and result.settings.guidance_interval != (0, 1):
            of = f"{names[result.checkpoint]}: " if len(names) > 1 and result.checkpoint is not None else ""
            found[of + "guidance at noise levels {:g} to {:g}".format(*result.settings.guidance_interval)] = (
                None
            )
    for line in found:
        console.note(line)


def _print_comparison(comparison: "Comparison") -> None:
    """How a student differs from its teacher; a warning if it draws few different pictures."""
    from sana_cli.judging.verdict import pooled

    student, teacher = comparison.student.verdict, comparison.teacher.verdict
    pairs = [("as prompted", student.seen.total, teacher.seen.total)]
    if student.unseen:
        own, theirs = pooled("unseen", student.unseen), pooled("unseen", teacher.unseen)
        pairs.append(("unseen", own.total, theirs.total))
    parts = [f"{what} {_points(own, theirs)}" for what, own, theirs in pairs if own.count and theirs.count]
    spread = math.hypot(student.distance_spread, teacher.distance_spread)
    parts.append(f"Fréchet {student.distance - teacher.distance:+.2f} ± {spread:.2f}")
    more = student.diversity - teacher.diversity
    if more == more:
        parts.append(f"diversity {more:+.2f}")
    console.note(f"student ({_settings_in_words(comparison.student)}) minus teacher: {', '.join(parts)}")
    if comparison.collapsed:
        console.note(
            f"warning: the student's diversity is {student.diversity:.2f}, "
            f"and its teacher's {teacher.diversity:.2f}: it draws too few different pictures, however many are as prompted"
        )


def _points(share: "Share", other: "Share") -> str:
    """A difference of shares in points of per cent, with its 95 % interval."""
    from sana_cli.judging.verdict import difference_interval

    low, high = difference_interval(share, other)
    return f"{100 * (share.accuracy - other.accuracy):+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def _plain(share: "Share") -> float | str:
    """Per cent."""
    return share.accuracy if share.count else "-"


def _with_spread(share: "Share") -> str:
    """Per cent, and half the width of the 95 % interval."""
    if not share.count:
        return "-"
    low, high = share.interval
    rounded = f"{100 * share.accuracy:.1f}".replace("100.0", "100")  # five kinds fit into 80 columns
    return f"{rounded} ±{50 * (high - low):.1f}"


def _per_cent(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"

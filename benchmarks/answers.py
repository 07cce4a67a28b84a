"""What the runs of `questions.py` found: tables, differences with their intervals, plots. It trains nothing.

A value is the mean over seeds, with the half of its 95 % interval by Student's t; a difference is one of runs with
the same seed.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from learning import COMBINATIONS
from matplotlib.figure import Figure
from PIL import Image

from sana_cli.runtime import files

Record = Mapping[str, Any]  # of a run, as `experiments.py` writes it
Mark = Mapping[str, Any]  # its scores after some steps
Value = Callable[[Record], float]

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # Student's t by the number of seeds
KINDS = {  # of captions, and what a table calls them
    "seen": "seen",
    "combinations": "new combinations",
    "phrases": "new sentences",
    "synonyms": "new words",
}
BINDING = "head colour of colour"  # pictures whose head has the colour asked of the body


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half: float  # of its 95 % interval; NaN of one seed
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> "Estimate":
        """That of one value for each seed."""
        values = [value for value in values if not math.isnan(value)]
        if not values:
            return Estimate(math.nan, math.nan, 0)
        half = math.nan
        if len(values) > 1:
            half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
        return Estimate(statistics.fmean(values), half, len(values))

    @property
    def settled(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half

    def text(self, digits: int = 1, signed: bool = False) -> str:
        """Mean and half interval, as a table has them."""
        if not self.seeds:
            return ""
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"


class Results:
    """All records, by question, world and name; each has one for each seed."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._found: dict[tuple[str, str, str], dict[int, Record]] = {}
        for record in records:
            run = record["run"]
            of = run["question"], run["world"], run["name"]
            self._found.setdefault(of, {})[run["seed"]] = record

    def runs(self, question: str, world: str, name: str) -> dict[int, Record]:
        """The runs of a name, by seed."""
        return self._found.get((question, world, name), {})

    def seconds_per_step(self, record: Record) -> float:
        """Of the runs of a record's name: the least of their seeds, which other work disturbed least."""
        run = record["run"]
        runs = self.runs(run["question"], run["world"], run["name"]).values()
        return min(float(one["seconds_per_step"]) for one in runs)

    def names(self, question: str, world: str) -> list[str]:
        """The names of a question's runs in a world, in their order."""
        return [name for of, where, name in self._found if (of, where) == (question, world)]

    def estimate(self, question: str, world: str, name: str, value: Value) -> Estimate:
        """A value of the runs of a name."""
        return Estimate.of([value(record) for record in self.runs(question, world, name).values()])

    def difference(self, question: str, world: str, names: tuple[str, str], value: Value) -> Estimate:
        """The value of the first minus that of the second, of the seeds that both have."""
        first, second = (self.runs(question, world, name) for name in names)
        return Estimate.of(
            [value(first[seed]) - value(second[seed]) for seed in sorted(first) if seed in second]
        )


# --- values of a record -----------------------------------------------------------------------


def of_kind(mark: Mark, kind: str, part: str) -> tuple[int, int]:
    """Hits and count of a kind of captions: "all", "each", or one of "leaks" or "exchanged" as PART/NAME."""
    kinds = COMBINATIONS if kind == "combinations" else (kind,)
    readings = [mark["seen"] if one == "seen" else mark["unseen"][one] for one in kinds]
    part, _, name = part.partition("/")
    counts = [reading[part][name] if name else reading[part] for reading in readings]
    return sum(hits for hits, _ in counts), sum(count for _, count in counts)


def share(kind: str, part: str, steps: int | None = None) -> Value:
    """A share in per cent after so many steps; None: at the end."""

    def value(record: Record) -> float:
        hits, count = of_kind(mark_of(record, steps), kind, part)
        return 100 * hits / count if count else math.nan

    return value


def distance(steps: int | None = None) -> Value:
    """The Fréchet distance after so many steps."""
    return lambda record: float(mark_of(record, steps)["distance"])


def place_read(sigma: str, layer: int) -> Value:
    """R^2 of a token's place after so many blocks, at a noise level."""
    return lambda record: float(record["places"][sigma][layer])


def at_size(side: str) -> Value:
    """The share in per cent of pictures that are as asked, drawn at another size."""

    def value(record: Record) -> float:
        hits, count = record["sizes"][side]["all"]
        return float(100 * hits / count)

    return value


def mark_of(record: Record, steps: int | None) -> Mark:
    """The scores after so many steps; None: at the end."""
    marks: list[Mark] = record["marks"]
    return marks[-1] if steps is None else next(mark for mark in marks if mark["steps"] == steps)


def at_time(value: Callable[[int], Value], seconds: float, rate: Value) -> Value:
    """A value after so many seconds of training, between the checkpoints before and after.

    `rate` gives the seconds of a step: not the record's own, which other work on the machine disturbs.
    """

    def found(record: Record) -> float:
        steps = [mark["steps"] for mark in record["marks"]]
        times = [count * rate(record) for count in steps]
        if not times[0] <= seconds <= times[-1] * (1 + 1e-9):
            return math.nan
        values = [value(count)(record) for count in steps]
        return float(np.interp(math.log(seconds), np.log(times), values))

    return found


def far_at_time(seconds: float, rate: Value) -> Value:
    """The Fréchet distance after so many seconds, its logarithm between the checkpoints before and after."""
    logarithm = at_time(lambda count: lambda record: math.log(distance(count)(record)), seconds, rate)
    return lambda record: math.exp(logarithm(record))


# --- tables -----------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def captions_table(results: Results) -> str:
    """Single attributes that are as asked, by encoder and kind of caption; and binding errors."""
    header = ["captions by", *(f"{name}, each" for name in KINDS.values()), "seen, all seven"]
    header += ["head in the body's colour", "digits"]
    rows = []
    for name in results.names("captions", "critters"):
        of = ("captions", "critters", name)
        parts = [results.estimate(*of, share(kind, "each")) for kind in KINDS]
        parts += [results.estimate(*of, share("seen", "all"))]
        parts += [results.estimate(*of, share("seen", f"leaks/{BINDING}"))]
        parts += [results.estimate("captions", "digits", name, share("seen", "all"))]
        rows.append([name, *(part.text() for part in parts)])
    return table(header, rows)


def real_distance(results: Results, question: str, world: str) -> str:
    """What a table calls the distance: with that of as many real pictures, to compare with."""
    found = [
        mark["real_distance"]
        for name in results.names(question, world)
        for record in results.runs(question, world, name).values()
        for mark in record["marks"]
    ]
    return f"distance (real pictures: {found[0]:.1f})" if found else "distance"


def equal_time(results: Results, world: str, leave_out: Sequence[str]) -> float:
    """The seconds that every width of a world was trained for."""
    records = [
        record
        for name in results.names("width", world)
        if name.isdigit() and name not in leave_out
        for record in results.runs("width", world, name).values()
    ]
    return min(
        (record["marks"][-1]["steps"] * results.seconds_per_step(record) for record in records),
        default=math.nan,
    )


def width_values(
    results: Results, world: str, steps: int, part: str, leave_out: Sequence[str] = ()
) -> dict[str, Value]:
    """What widths are compared by: after as many steps, and after as long a time."""
    seconds = equal_time(results, world, leave_out)
    return {
        f"as asked, {steps} steps": share("seen", part, steps),
        "distance": distance(steps),
        f"as asked, {seconds:.0f} s": at_time(
            lambda count: share("seen", part, count), seconds, results.seconds_per_step
        ),
        f"distance, {seconds:.0f} s": far_at_time(seconds, results.seconds_per_step),
    }


def width_table(results: Results, world: str, steps: int, part: str, leave_out: Sequence[str] = ()) -> str:
    """Accuracy and distance by width, after as many steps and after as long a time."""
    seconds = equal_time(results, world, leave_out)
    values = width_values(results, world, steps, part, leave_out).values()
    far = real_distance(results, "width", world)
    header = ["width", "million parameters", "ms a step", f"as asked after {steps} steps", far]
    header += [f"as asked after {seconds:.0f} s", "distance"]
    rows = []
    for name in results.names("width", world):
        if not name.isdigit() or name in leave_out:
            continue
        of = ("width", world, name)
        parts = [results.estimate(*of, lambda record: record["parameters"] / 1e6).mean]
        parts += [results.estimate(*of, lambda record: 1000 * results.seconds_per_step(record)).mean]
        texts = [results.estimate(*of, value).text() for value in values]
        rows.append([name, f"{parts[0]:.2f}", f"{parts[1]:.0f}", *texts])
    return table(header, rows)


def rates_table(results: Results, world: str, steps: int, part: str) -> str:
    """Two widths at half and twice their learning rate."""
    names = [name for name in results.names("width", world) if "rate" in name]
    of = dict.fromkeys(name.partition(",")[0] for name in names)
    rows = []
    for name in [*of, *names]:
        found = results.runs("width", world, name)
        first = {min(found): found[min(found)]} if found else {}
        values = [
            Estimate.of([value(record) for record in first.values()]).text()
            for value in (share("seen", part, steps), distance(steps))
        ]
        rows.append([name, *values])
    return table([f"width, {world}", f"as asked after {steps} steps, seed 0", "distance"], sorted(rows))


def lesson_table(results: Results, world: str, steps: int) -> str:
    """Every width after as many steps as the lesson's own was given, of the first seed."""
    rows = []
    for name in results.names("width", world):
        found = results.runs("width", world, name)
        if name.isdigit() and any(mark["steps"] == steps for mark in found[min(found)]["marks"]):
            record = found[min(found)]
            seconds = steps * results.seconds_per_step(record)
            values = [share("seen", "all", steps)(record), distance(steps)(record), seconds]
            rows.append([name, f"{record['parameters'] / 1e6:.1f}", *(f"{value:.1f}" for value in values)])
    return table(
        ["width", "million parameters", f"as asked after {steps} steps", "distance", "seconds"], rows
    )


def places_table(results: Results, steps: Sequence[int]) -> str:
    """Blocks with and without the convolution's neighbours and fixed positions."""
    header = ["block", *(f"left and right as asked, {count} steps" for count in steps)]
    header += [f"exchanged, {steps[-2]} steps", real_distance(results, "places", "sides")]
    header += ["one shape as asked", real_distance(results, "places", "shapes")]
    rows = []
    for name in results.names("places", "sides"):
        of = ("places", "sides", name)
        values = [share("seen", "all", count) for count in steps]
        values += [share("seen", "exchanged/left of right", steps[-2]), distance()]
        parts = [results.estimate(*of, value).text() for value in values]
        parts += [
            results.estimate("places", "shapes", name, v).text() for v in (share("seen", "all"), distance())
        ]
        rows.append([name, *parts])
    return table(header, rows)


def probe_table(results: Results, sigma: str) -> str:
    """R^2 of a token's place, read from its state."""
    rows, count = [], 0
    for name in results.names("places", "sides"):
        of = ("places", "sides", name)
        count = len(next(iter(results.runs(*of).values()))["places"][sigma])
        read = [results.estimate(*of, place_read(sigma, layer)) for layer in range(count)]
        rows.append([name, *(one.text(2) for one in read)])
    return table(["block", "before any", *(f"after block {layer}" for layer in range(1, count))], rows)


def sizes_table(results: Results, world: str) -> str:
    """Pictures that are as asked at other sizes than the 32 pixels of training."""
    rows, sides = [], list[str]()
    for name in results.names("places", world):
        of = ("places", world, name)
        sides = list(next(iter(results.runs(*of).values()))["sizes"])
        read = [results.estimate(*of, at_size(side)) for side in sides]
        rows.append([name, *(one.text() for one in read)])
    return table([world, *(f"{side} x {side}" for side in sides)], rows)


def differences(
    results: Results, of: tuple[str, str], pairs: Sequence[tuple[str, str]], values: Mapping[str, Value]
) -> str:
    """Differences of runs with the same seed, of a question and a world; bold where the interval leaves 0 out."""
    rows = []
    for first, second in pairs:
        found = [results.difference(*of, (first, second), value) for value in values.values()]
        if found[0].seeds:
            texts = [one.text(signed=True) for one in found]
            marked = [f"**{text}**" if one.settled else text for text, one in zip(texts, found, strict=True)]
            rows.append([f"{first} minus {second}", *marked])
    return table([of[1], *values], rows)


# --- plots ------------------------------------------------------------------------------------

COLOURS = ("#444444", "#1f77b4", "#8fbfe0", "#d62728", "#f0a0a0", "#ff7f0e", "#9467bd", "#2ca02c", "#8c564b")
MARKERS = "osDv^P*Xh"


def _panels(count: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.1 * count, 3.7), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels


def _save(figure: Figure, path: Path) -> None:
    with files.whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _names(results: Results, question: str, worlds: Sequence[str]) -> list[str]:
    """The names in some worlds, each once: a name has one colour in all panels."""
    return list(dict.fromkeys(name for world in worlds for name in results.names(question, world)))


def _curve(panel: Any, number: int, x: Sequence[float], found: Sequence[Estimate], name: str) -> None:
    half = [0 if math.isnan(one.half) else one.half for one in found]
    style = {
        "color": COLOURS[number],
        "marker": MARKERS[number],
        "markersize": 4,
        "linewidth": 1.2,
        "capsize": 2,
    }
    panel.errorbar(x, [one.mean for one in found], half, label=name, elinewidth=0.8, **style)


def _steps(results: Results, of: tuple[str, str, str]) -> list[int]:
    return [mark["steps"] for mark in next(iter(results.runs(*of).values()))["marks"]]


def captions_plot(results: Results, path: Path) -> None:
    """Single attributes as asked over steps, by kind of caption, of those encoders that all seeds have."""
    figure, panels = _panels(len(KINDS))
    names = results.names("captions", "critters")
    seeds = {name: len(results.runs("captions", "critters", name)) for name in names}
    names = [name for name in names if seeds[name] == max(seeds.values())]
    for panel, (kind, title) in zip(panels, KINDS.items(), strict=True):
        for number, name in enumerate(names):
            of = ("captions", "critters", name)
            steps = _steps(results, of)
            _curve(panel, number, steps, [results.estimate(*of, share(kind, "each", s)) for s in steps], name)
        panel.set(xlabel="steps of 32", title=f"captions: {title}", ylim=(10, 101))
    panels[0].set(ylabel="single attributes as asked, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    _save(figure, path)


def width_plot(results: Results, path: Path, parts: Mapping[str, str]) -> None:
    """Accuracy and distance over the seconds of training, by width; `parts` says what a world counts."""
    figure, panels = _panels(2 * len(parts))
    names = sorted(filter(str.isdigit, _names(results, "width", list(parts))), key=int)
    for place, (world, part) in enumerate(parts.items()):
        for number, name in enumerate(names):
            of = ("width", world, name)
            if not results.runs(*of):
                continue
            steps = _steps(results, of)
            rate = results.estimate(*of, results.seconds_per_step).mean
            seconds = [count * rate for count in steps]
            shares = [results.estimate(*of, share("seen", part, count)) for count in steps]
            _curve(panels[2 * place], number, seconds, shares, f"width {name}")
            far = [results.estimate(*of, distance(count)) for count in steps]
            _curve(panels[2 * place + 1], number, seconds, far, f"width {name}")
        what = {"all": "pictures", "each": "single attributes"}[part]
        panels[2 * place].set(
            title=world, ylabel=f"{what} as asked, %", xlabel="seconds of training, one core"
        )
        panels[2 * place + 1].set(title=world, ylabel="Fréchet distance", yscale="log")
        panels[2 * place + 1].set(xlabel="seconds of training, one core")
        panels[2 * place].set_xscale("log")
        panels[2 * place + 1].set_xscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    _save(figure, path)


def places_plot(results: Results, path: Path, sigma: str) -> None:
    """Left and right as asked over steps, what the probe reads, and other sizes."""
    figure, panels = _panels(3)
    for number, name in enumerate(results.names("places", "sides")):
        of = ("places", "sides", name)
        steps, first = _steps(results, of), next(iter(results.runs(*of).values()))
        _curve(
            panels[0], number, steps, [results.estimate(*of, share("seen", "all", s)) for s in steps], name
        )
        layers = range(len(first["places"][sigma]))
        read = [results.estimate(*of, place_read(sigma, layer)) for layer in layers]
        _curve(panels[1], number, list(layers), read, name)
        sides = list(first["sizes"])
        shares = [results.estimate(*of, at_size(side)) for side in sides]
        _curve(panels[2], number, list(map(int, sides)), shares, name)
    panels[0].set(
        xlabel="steps of 32", ylabel="both objects on their sides, %", title="left and right", ylim=(0, 101)
    )
    panels[1].set(xlabel="blocks passed", ylabel="R²", title=f"a token's place, read at noise level {sigma}")
    panels[1].set(ylim=(-0.05, 1.02), xticks=[*layers])
    panels[2].set(xlabel="pixels to a side", title="drawn at other sizes than 32", ylim=(0, 101))
    panels[2].set(xticks=[*map(int, sides)])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    _save(figure, path)


def places_pictures(strips: Path, file_names: Sequence[str], path: Path, scale: int = 3) -> None:
    """The first pictures of each block, a row each: at the size of training, then twice as large."""
    rows = []
    for name in file_names:
        small, large = (Image.open(strips / f"{name}{end}.png").convert("RGB") for end in ("", "-64"))
        half = (large.width // 2, large.height)
        small = small.resize((scale * small.width, scale * small.height), Image.Resampling.NEAREST)
        large = large.crop((0, 0, *half))
        large = large.resize(
            (large.width * small.height // large.height, small.height), Image.Resampling.NEAREST
        )
        rows.append((small, large))
    gap, height = 8, rows[0][0].height
    width = rows[0][0].width + gap + rows[0][1].width
    sheet = Image.new("RGB", (width, len(rows) * (height + gap) - gap), "#888888")
    for number, (small, large) in enumerate(rows):
        sheet.paste(small, (0, number * (height + gap)))
        sheet.paste(large, (small.width + gap, number * (height + gap)))
    with files.whole_file(path) as partial:
        sheet.save(partial, format="PNG")


# --- the page ---------------------------------------------------------------------------------


def fill(text: str, tables: Mapping[str, str]) -> str:
    """A page with each table between its markers, `<!-- NAME -->` and `<!-- end -->`."""
    for name, content in tables.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        if begin not in text:
            raise ValueError(f"the page has no marker {begin.strip()}")
        before, _, rest = text.partition(begin)
        inside, closed, after = rest.partition(end)
        if not closed or "<!-- " in inside:
            raise ValueError(f"the page has no {end} after {begin.strip()}")
        text = f"{before}{begin}\n{content}\n\n{end}{after}"
    return text

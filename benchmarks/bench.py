"""Compare every stage with what a user would run instead: `make bench` prints the ratios.

The lesson's and diffusers' ways are written out here, on diffusers' `SanaTransformer2DModel`
with the same weights. Each way of a case has its own process, and the processes take turns.
The first round is not counted; the ratio is the median of the rounds' ratios. A way that takes
longer than `LONG` seconds runs once.

    python benchmarks/bench.py [--repeats 5] [--only train-sana,sample] [--json FILE]
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.config.keys import Config, ObjectiveConfig
from sana_cli.model import SanaTransformer
from sana_cli.runtime import openmp
from sana_cli.sampling import sampler
from sana_cli.weights import configs

LONG = 20.0  # seconds
TURN = 0.5  # minimum seconds of a turn
CROWD = 3.0  # seconds of a turn beside other work
LESSON_TOKENS = 300
LESSON_STEPS = 1000
Ways = dict[str, Callable[[], object]]  # each runs once, or returns how many times it ran


# --- training ---------------------------------------------------------------------------------------------------------


def training(name: str, tokens: int, precision: str) -> Ways:
    """Forward and backward of a config's micro-batch: ours, diffusers', the lesson's.

    Ours runs all micro-batches of a step, since autocast casts the parameters once for all of
    them, as in `sana train` (`Trainer._weights_cast_once`).
    """
    from sana_cli.runtime.device import autocast

    config, ours, theirs = _models(name)
    train, batch, side = config.train, config.train.batch_size, 32
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(batch, 1, side, side, generator=generator) for _ in range(2))
    distinct = torch.randn(21, tokens, ours.config.caption_channels, generator=generator)
    which = torch.randint(21, (batch,), generator=generator)
    kinds, index = which.unique(return_inverse=True)
    timestep = torch.rand(batch, generator=generator) * 1000
    padded = F.pad(distinct, (0, 0, 0, LESSON_TOKENS - tokens))
    lesson_mask = (torch.arange(LESSON_TOKENS) < tokens).float().expand(batch, -1)
    mask = torch.ones(21, tokens)

    def learn(model: torch.nn.Module, velocity: Callable[[], Tensor]) -> None:
        with autocast(torch.device("cpu"), precision):
            predicted = velocity()
        F.mse_loss(predicted.float(), target).backward()
        for parameter in model.parameters():
            parameter.grad = None

    def call(states: Tensor, mask: Tensor) -> Tensor:
        return theirs(x, states, timestep, encoder_attention_mask=mask).sample

    def step() -> int:
        with torch.autocast("cpu", enabled=False):
            for _ in range(train.accumulate):
                learn(
                    ours,
                    lambda: ours(
                        x, distinct[kinds], timestep, encoder_attention_mask=mask[kinds], caption_index=index
                    ),
                )
        return train.accumulate

    return {
        "ours": step,
        "diffusers": lambda: learn(theirs, lambda: call(distinct[which], mask[which])),
        "lesson": lambda: learn(theirs, lambda: call(padded[which], lesson_mask)),
    }


def _models(name: str) -> tuple[Config, SanaTransformer, Any]:
    """A config, its transformer, and diffusers' with the same weights."""
    from diffusers import SanaTransformer2DModel

    from sana_cli.config.file import load_config
    from sana_cli.model import build

    config = load_config(name)
    architecture = config.model.resolved(32, 128)
    ours = build(architecture, 0)
    theirs = SanaTransformer2DModel.from_config(configs.diffusers_config(architecture))
    theirs.load_state_dict(ours.state_dict())
    return config, ours, theirs


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampling() -> Ways:
    """64 images at the quickstart's defaults: ours, diffusers', the lesson's 1,000 Euler steps.

    diffusers' transformer runs in the same solver, with both branches at every step, as in
    `SanaPipeline`. Its captions are as short as ours, or padded to 300 tokens as the pipeline
    pads them. A third way leaves the null branch out where ours does.
    """
    from sana_cli import flow
    from sana_cli.text import pad_states

    config, ours, theirs = _models("quickstart")
    settings, predicted = config.sample, config.objective.prediction_type
    count, shape = 64, (1, 32, 32)
    states = [torch.randn(2, 128, generator=torch.Generator().manual_seed(n)) for n in range(20)]
    null = torch.randn(1, 128, generator=torch.Generator().manual_seed(99))
    captions = [states[n % 20] for n in range(count)]
    both, mask = pad_states([*captions, *[null] * count])

    def solve(solver: str, steps: int, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
        noise = sampler.Noise(range(count), shape)
        *_, last = flow.SOLVERS[solver](
            velocity, noise(), flow.solver_sigmas(solver, steps, settings.flow_shift), noise
        )
        return last.x

    def padded(tokens: int) -> tuple[Tensor, Tensor]:
        more = tokens - both.shape[1]
        return F.pad(both.float(), (0, 0, 0, more)), F.pad(mask.float(), (0, more))

    @torch.no_grad()
    def same_solver(given: Tensor, given_mask: Tensor, interval: tuple[float, float] = (0, 1)) -> Tensor:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            guided = flow.in_interval(sigma, interval)
            rows = 2 * count if guided else count
            timestep = torch.full((rows,), flow.model_timestep(settings.solver, sigma))
            both_x = x.repeat(2, 1, 1, 1) if guided else x
            output = theirs(both_x, given[:rows], timestep, encoder_attention_mask=given_mask[:rows]).sample
            v = flow.velocity_of(output, both_x, sigma, predicted)
            return flow.guide(v[:count], v[count:], settings.guidance_scale) if guided else v

        return solve(settings.solver, settings.steps, velocity)

    short, long = padded(both.shape[1]), padded(LESSON_TOKENS)

    @torch.no_grad()
    def lesson() -> Tensor:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            timestep = torch.full((count,), 1000 * sigma)
            output = theirs(x, long[0][:count], timestep, encoder_attention_mask=long[1][:count]).sample
            return flow.velocity_of(output, x, sigma, predicted)

        return solve("euler", LESSON_STEPS, velocity)

    recipe = sampler.Recipe(settings, shape, predicted, "fp32")
    return {
        "ours": lambda: sampler.final_images(
            sampler.sample_images(ours, captions, [null] * count, range(count), recipe)
        ),
        "diffusers": lambda: same_solver(*short),
        "diffusers, same interval": lambda: same_solver(*short, settings.guidance_interval),
        "diffusers, 300 tokens": lambda: same_solver(*long),
        "lesson": lesson,
    }


def drawing(dtype: torch.dtype) -> Ways:
    """A guided pass of the 0.6B for a picture of 512 x 512: ours, and diffusers' as its pipeline calls it.

    The prompt has 60 tokens and the null caption three. diffusers pads both to 300, and makes keys and values of
    them at every step. Weights are random.
    """
    from diffusers import SanaTransformer2DModel

    from sana_cli.config.file import load_config
    from sana_cli.text import pad_states

    architecture = load_config("sana-0.6b").model.resolved(32, 2304)
    with torch.device("meta"):
        ours = SanaTransformer(architecture).to(dtype)
        theirs = SanaTransformer2DModel.from_config(configs.diffusers_config(architecture)).to(dtype)
    prompt, null = (torch.randn(tokens, 2304) for tokens in (60, 3))
    sample, timestep = torch.randn(2, 32, 16, 16).to(dtype), torch.full((2,), 500.0)

    def drawn(model: Any) -> Any:
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.uniform_(-0.03, 0.03)
        return model.eval()

    @torch.inference_mode()
    def our_way() -> Callable[[], Tensor]:
        model = drawn(ours).ready_to_draw()
        states, mask = pad_states([prompt, null])
        captions = model.captions(states.to(dtype), mask)
        return lambda: model(sample, captions, timestep[:1])  # (2, 32, 16, 16)

    @torch.inference_mode()
    def their_way() -> Callable[[], Tensor]:
        model = drawn(theirs)
        states, mask = (t.to(dtype) for t in pad_states([prompt, null, torch.zeros(LESSON_TOKENS, 2304)]))
        given = {"encoder_attention_mask": mask[:2], "return_dict": False}
        return lambda: model(sample, states[:2], timestep.to(dtype), **given)[0]

    made: dict[str, Callable[[], object]] = {}  # one of them, in each process

    def run(name: str, make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
        def way() -> object:
            if name not in made:
                made[name] = make()
            with torch.inference_mode():
                return made[name]()

        return way

    return {"ours": run("ours", our_way), "diffusers": run("diffusers", their_way)}


# --- embedding and reading --------------------------------------------------------------------------------------------


def embedding() -> Ways:
    """48 captions through the same random Gemma 2: ours, and the lesson's one by one."""
    import embed  # beside this file

    from sana_cli.config.keys import TextConfig
    from sana_cli.text import load_encoder

    folder = Path(tempfile.mkdtemp())
    embed.make(folder, 48, 256, 4)
    captions = [
        json.loads(line)["text"] for line in (folder / "images" / "metadata.jsonl").read_text().splitlines()
    ]
    encoder = load_encoder(TextConfig(encoder=str(folder / "gemma")), torch.device("cpu"))
    lesson, _ = embed.lesson_encoder(folder)
    return {
        "ours": lambda: list(encoder.encode(captions)),
        "lesson": lambda: [lesson(caption) for caption in captions],
    }


def reading() -> Ways:
    """20 batches of 64 at Gemma 2's width: ours, and the lesson's four memory maps a sample."""
    from sana_cli.dataset.reader import Dataset
    from sana_cli.dataset.trainset import SingleDataset
    from sana_cli.dataset.writer import DatasetWriter, Images
    from sana_cli.training.batches import training_batch
    from sana_cli.training.objective import RectifiedFlow

    folder, images, width, tokens = Path(tempfile.mkdtemp()), 128, 2304, 13
    names = ["", *(str(n) for n in range(20))]
    pixels = torch.randint(0, 256, (images, 1, 32, 32), dtype=torch.uint8)
    writer = DatasetWriter(folder / "ours", {})
    shard = writer.write_captions(0, 0, {name: torch.randn(tokens, width).bfloat16() for name in names})
    ids = [str(n) for n in range(images)]
    captions = [[names[1 + n % 20]] for n in range(images)]
    ours = Images(
        pixels, [(32, 32)] * images, ids, captions, [None] * images, [{}] * images, [None] * images, []
    )
    writer.write(0, [shard], [ours], {name: n for n, name in enumerate(names)}, [])
    image = {"kind": "pixels", "channels": 1, "height": 32, "width": 32}
    encoder = {"encoder": "drawn", "architecture": "none", "weights": "", "dtype": "fp32"}
    facts = {"image": image, "caption_dim": width, "encoder": encoder, "source": {}, "attributes": {}}
    writer.finish(1, facts | {"one_word_captions": True})
    train_set, objective = (
        SingleDataset(Dataset(folder / "ours"), 0),
        RectifiedFlow(ObjectiveConfig(), 1.0, "fp32"),
    )

    shapes = {
        "images": (1, 32, 32),
        "labels": (),
        "states": (LESSON_TOKENS, width),
        "masks": (LESSON_TOKENS,),
    }
    for name, shape in shapes.items():
        array = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(images, *shape)
        )
        array[:] = 1.0
        array.flush()
    order = np.random.default_rng(0)

    def lesson() -> None:
        for _ in range(20):
            rows = order.integers(0, images, 64)
            samples = [
                [np.array(np.load(folder / f"{name}.npy", mmap_mode="r")[row]) for name in shapes]
                for row in rows
            ]
            for column in zip(*samples, strict=True):
                torch.from_numpy(np.stack(column))

    def ours_way() -> None:
        for n in range(20):
            training_batch(train_set, objective, 0, 64 * n + np.arange(64))

    return {"ours": ours_way, "lesson": lesson}


# --- waiting ----------------------------------------------------------------------------------------------------------


def waiting() -> Ways:
    """The quickstart's step alone, twice at once, and beside two busy loops.

    Each with the waiting that `sana` asks OpenMP for, and with OpenMP's default.
    """
    step = training("quickstart", 2, "fp32")["ours"]

    def for_a_while() -> int:
        count, end = 0, time.perf_counter() + CROWD
        while time.perf_counter() < end:
            count += times(step())
        return count

    def twice(way: str) -> Callable[[], int]:
        other: list[Runner] = []

        def run() -> int:
            if not other:
                other.append(Runner("waiting", way))
                other[0].seconds()  # wait until it has started
            other[0].begin(CROWD)
            count = for_a_while()
            other[0].end()
            return count

        return run

    def beside_loops() -> int:
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        try:
            return for_a_while()
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()

    return {
        "ours": step,
        "default": step,
        "ours, two at once": twice("ours"),
        "default, two at once": twice("default"),
        "ours, beside two loops": beside_loops,
        "default, beside two loops": beside_loops,
    }


# --- the command line -------------------------------------------------------------------------------------------------


def start_up() -> Ways:
    """`sana --help` and a Python that does nothing, as processes."""

    def process(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run(arguments, capture_output=True, check=True)

    script = str(Path(sys.executable).with_name("sana"))
    return {"ours": process(script, "--help"), "python -c pass": process(sys.executable, "-c", "pass")}


# --- measuring --------------------------------------------------------------------------------------------------------

STEP = ("ours", "diffusers", "lesson")
WAITING = tuple(
    f"{who}{where}" for where in ("", ", two at once", ", beside two loops") for who in ("ours", "default")
)
DRAWING = ("ours", "diffusers", "diffusers, same interval", "diffusers, 300 tokens", "lesson")
CASES: dict[str, tuple[str, tuple[str, ...], Callable[[], Ways]]] = {
    "train-sana": (
        "(a) micro-batch of sana.yaml, 16 images, 13 caption tokens",
        STEP,
        lambda: training("sana", 13, "fp32"),
    ),
    "train-sana-bf16": (
        "(a) the same under bf16 autocast, as its config says",
        STEP,
        lambda: training("sana", 13, "bf16"),
    ),
    "train-quickstart": (
        "(b) quickstart's step, 32 images, 2 caption tokens",
        STEP,
        lambda: training("quickstart", 2, "fp32"),
    ),
    "train-quickstart-bf16": (
        "(b) the same under bf16 autocast",
        STEP,
        lambda: training("quickstart", 2, "bf16"),
    ),
    "sample": ("(c) 64 images by the quickstart's defaults", DRAWING, sampling),
    "draw-published": (
        "(j) a guided pass of the 0.6B for 512 x 512 pixels, 60 caption tokens",
        STEP[:2],
        lambda: drawing(torch.float32),
    ),
    "draw-published-bf16": ("(j) the same in bf16", STEP[:2], lambda: drawing(torch.bfloat16)),
    "embed": ("(d) 48 distinct captions, Gemma 2 of 4 layers of 256", ("ours", "lesson"), embedding),
    "read": ("(e) 20 batches of 64 images", ("ours", "lesson"), reading),
    "waiting": ("(i) quickstart's step in float32, alone and beside other work", WAITING, waiting),
    "help": ("(f) sana --help", ("ours", "python -c pass"), start_up),
}


class Runner:
    """A process that repeats one way of a case for some seconds at each request.

    Our ways get the OpenMP settings of the command line; the others get Python's defaults.
    """

    def __init__(self, case: str, way: str) -> None:
        command = [sys.executable, __file__, "--case", case, "--way", way]
        environment = {name: value for name, value in os.environ.items() if name not in openmp.USERS}
        if way.startswith("ours"):
            openmp.ask_for_short_waits(environment)
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self) -> float:
        """Take a turn; return the seconds that the way takes."""
        self.begin(TURN)
        return self.end()

    def begin(self, seconds: float) -> None:
        """Begin a turn of this many seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def end(self) -> float:
        """Wait for the end of the turn; return the seconds that the way took."""
        return float(self._answer())

    def memory(self) -> int:
        """End the process; return its peak memory in bytes, without that of its children."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return int(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline() or sys.exit(f"{self.process.args!r} ended")


def times(done: object) -> int:
    """How many times a way ran, from its return value."""
    return done if isinstance(done, int) else 1


def serve(case: str, way: str) -> None:
    """Run a way for the seconds in each line of stdin; print its time, and peak memory last."""
    from sana_cli.runtime.device import peak_memory, resolve_device

    if way == "ours":
        resolve_device("cpu")  # as every command does; it also sets how memory is kept
    ours = openmp.watch() if way.startswith("ours") else contextlib.nullcontext()
    with contextlib.redirect_stdout(sys.stderr), ours:
        ways = CASES[case][2]()
        for turn in map(float, sys.stdin):
            start, count, elapsed = time.perf_counter(), 0, 0.0
            while elapsed < turn:
                count, elapsed = count + times(ways[way]()), time.perf_counter() - start
            print(elapsed / count, file=sys.__stdout__, flush=True)
    with contextlib.suppress(BrokenPipeError):  # the benchmark has ended
        print(peak_memory(torch.device("cpu")), flush=True)


def rounds(runners: dict[str, Runner], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way in each round. The first one only warms up, except for long ways."""
    seconds: dict[str, list[float]] = {way: [] for way in runners}
    first = {way: runner.seconds() for way, runner in runners.items()}
    for _ in range(repeats):
        for way, runner in runners.items():
            if first[way] < LONG:
                seconds[way].append(runner.seconds())
    return {way: found or [first[way]] for way, found in seconds.items()}


def peak_arithmetic(dtype: torch.dtype, side: int) -> float:
    """The fastest of ten matrix products, by whichever library, in operations per second."""
    from sana_cli.kernels import linear

    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    best = float("inf")
    for product in (F.linear, linear):
        for _ in range(10):
            start = time.perf_counter()
            product(a, b)
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def operations(ways: Ways) -> int:
    """Multiplications and additions in the matrix products of our way, forward and backward.

    Without convolutions: PyTorch counts the depthwise one, 1 % of the work, as a full one.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def of_onednn(x: list[int], weight: list[int], *_: object, **__: object) -> int:
        return 2 * x[0] * x[1] * weight[0]

    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: of_onednn}
    ) as counter:
        done = ways["ours"]()
    counts = counter.get_flop_counts()["Global"]
    kinds = ("mm", "linear_pointwise")
    products = [count for operation, count in counts.items() if any(kind in str(operation) for kind in kinds)]
    return int(sum(products)) // times(done)


def measure(names: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each way of each case."""
    for name in names:
        title, ways, make = CASES[name]
        runners = {way: Runner(name, way) for way in ways}
        seconds = rounds(runners, repeats)
        memories = {way: runner.memory() for way, runner in runners.items()}
        ours = seconds["ours"]
        reached = {}
        if name.startswith(("train-sana", "draw-published")):
            reached = {"operations_per_second": operations(make()) / statistics.median(ours)}
        for way, found in seconds.items():
            ratios = [theirs / mine for theirs, mine in zip(found, ours, strict=False)]
            if len(found) < len(ours):
                ratios = [found[0] / statistics.median(ours)]
            memory = None if name == "help" else memories[way]
            row = {
                "case": name,
                "title": title,
                "way": way,
                "seconds": statistics.median(found),
                "runs": len(found),
            }
            yield (
                row
                | {"ratio": statistics.median(ratios), "memory": memory}
                | (reached if way == "ours" else {})
            )


def main() -> None:
    """Measure and print the table."""
    from sana_cli.runtime.device import has_native_bf16
    from sana_cli.units import human_bytes

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        serve(options.case, options.way)
        return
    cpu = torch.device("cpu")
    names = options.only.split(",")
    native = "native" if has_native_bf16(cpu) else "emulated"
    threads, versions = (
        torch.get_num_threads(),
        f"torch {torch.__version__}, Python {platform.python_version()}",
    )
    print(
        f"{versions}, {threads} threads, {platform.machine()}, bf16 {native}; {os.cpu_count()} cores; medians of {options.repeats} rounds"
    )
    rows, last = [], ""
    for row in measure(names, options.repeats):
        rows.append(row)
        if row["title"] != last:
            print(f"\n{row['title']}")
            last = row["title"]
        memory = "" if row["memory"] is None else human_bytes(row["memory"])
        ratio = (
            ""
            if row["way"] == "ours"
            else f"{row['ratio']:.2f} x"
            if row["ratio"] > 1
            else f"1/{1 / row['ratio']:.2f} x"
        )
        once = "  (one run)" if row["runs"] == 1 else ""
        print(f"  {row['way']:<24}{row['seconds']:>8.3f} s {ratio:>10} {memory:>10}{once}", flush=True)
        if "operations_per_second" in row:
            for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                emulated = kind == "bf16" and not has_native_bf16(cpu)
                best = peak_arithmetic(dtype, 256 if emulated else 2048)
                reached = row["operations_per_second"]
                row[f"share_of_{kind}_peak"] = reached / best
                print(
                    f"  (h) {reached / 1e9:.0f} GFLOP/s, {reached / best:.0%} of the best {kind} product's {best / 1e9:.1f}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

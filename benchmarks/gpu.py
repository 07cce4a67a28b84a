"""Measure on a GPU what was built without one: `make gpu` prints one table and writes it.

The machine needs CUDA and PyTorch, and no network: what else is imported travels with the checkout, in the file that
`--pack` makes. Each section has a process of its own and a time limit, so that one which fails leaves the others.
Nothing is guessed: what could not be measured has no value, and its note says why.

    python benchmarks/gpu.py [--only parity,step] [--budget 460] [--out runs/gpu]
    python benchmarks/gpu.py --device cpu --small    # every section, with tiny shapes
    python benchmarks/gpu.py --pack dist/gpu         # where there is a network: the libraries to take along

`beside` is what a value is compared with, as the note says; `ratio` is `beside` over the value. This file imports the
standard library alone until a section runs, since anything else may be missing.
"""

from __future__ import annotations  # types of libraries that may be missing

import argparse
import contextlib
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sana_cli.config.keys import Architecture, Config
    from sana_cli.dataset.reader import Dataset
    from sana_cli.model import SanaTransformer
    from sana_cli.runtime.distributed import World
    from sana_cli.training.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[1]
PACKS = REPOSITORY / "dist" / "gpu"
LEAST = 5.0  # seconds: with less of the budget left, no section is begun
NEEDS_CUDA = "needs CUDA"
LESSON_MINUTES = 120.0  # of the lesson's 10,000 steps, on an A10, as it says
LESSON_TOKENS = 300
BY_LESSON = "from the step above; beside: the lesson, on an A10"
# imported by the package, its tests, or what is compared with; torch is there
LIBRARIES = (
    "pydantic", "safetensors", "einops", "pillow", "numpy", "pyyaml", "typer", "rich", "typing-extensions",
    "diffusers", "transformers", "peft", "pytest", "hypothesis",
)  # fmt: skip
NOT_PACKED = re.compile(r"torch|triton|nvidia-.*|cuda-.*|hf-xet")  # there with torch, or only for downloads
WHEELS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    section: str
    what: str
    value: float | None = None  # None: not measured, and the note says why
    unit: str = ""
    beside: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """`beside` over the value."""
        return self.beside / self.value if self.value and self.beside is not None else None

    def as_json(self) -> dict[str, Any]:
        """All of it, by name."""
        return asdict(self) | {"ratio": self.ratio}

    def as_markdown(self) -> str:
        """A line of a markdown table."""
        numbers = ("" if number is None else f"{number:.4g}" for number in (self.value, self.beside))
        value, beside = numbers
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        note = self.note.replace("|", "/").replace("\n", " ")
        return f"| {self.section} | {self.what} | {value} | {self.unit} | {beside} | {ratio} | {note} |"


HEADER = "| section | what | value | unit | beside | ratio | note |\n|---|---|---|---|---|---|---|"


def why(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"missing: {error.name}"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]:.200}"


# --- what sections use ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to do something, and the bytes of its models and optimizers; None where nothing counts them."""

    action: Callable[[], object]
    kept: int | None


@dataclass(frozen=True)
class Job:
    """What a section is given: where to compute, how large, and where its rows go."""

    section: str
    device_name: str
    small: bool
    rows: Path  # a line of JSON for each row
    folder: Path  # empty, for its files

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        import torch

        return torch.device("cuda:0" if self.device_name == "cuda" else self.device_name)

    @property
    def on_cuda(self) -> bool:
        """Whether it is CUDA."""
        return self.device_name == "cuda"

    def write(self, line: Mapping[str, Any]) -> None:
        """Hand over a line."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def row(
        self,
        what: str,
        value: float | None = None,
        unit: str = "",
        beside: float | None = None,
        note: str = "",
    ) -> None:
        """Hand over a row."""
        self.write(asdict(Row(self.section, what, value, unit, beside, note)))

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Go on after an error in the block, with a row that says what it was. Frees what the block has used."""
        try:
            yield
        except Exception as error:
            self.row(what, note=why(error))
            print(f"--- {what}", file=sys.stderr)
            sys.excepthook(type(error), error, error.__traceback__)
        self.free()

    def free(self) -> None:
        """Give back memory that nothing uses, and forget its peak."""
        import torch

        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Wait until the device has done everything."""
        import torch

        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds_of(self, action: Callable[[], object], times: int = 1) -> float:
        """The seconds of one of so many calls in a row, with all that they leave to the device."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(times):
            action()
        self.wait()
        return (time.perf_counter() - begin) / times

    def in_turn(
        self, ways: Mapping[str, Callable[[], object]], rounds: int = 5, times: int = 1
    ) -> dict[str, float]:
        """Median seconds of each way over rounds in which they take turns, after one that is not counted."""
        rounds, times = (2, 1) if self.small else (rounds, times)
        for action in ways.values():
            self.seconds_of(action)
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, action in ways.items():
                found[way].append(self.seconds_of(action, times))
        return {way: statistics.median(seconds) for way, seconds in found.items()}

    def built(self, make: Callable[[], Callable[[], object]]) -> Way:
        """What `make` gives, called once, and the memory that it then keeps."""
        import torch

        self.free()
        before = torch.cuda.memory_allocated() if self.on_cuda else 0
        action = make()
        action()
        self.free()
        return Way(action, torch.cuda.memory_allocated() - before if self.on_cuda else None)

    def gigabytes_of(self, way: Way) -> float | None:
        """The most that a way's tensors hold during a call, beside whatever else is there; None: nothing counts them."""
        import torch

        if way.kept is None:
            return None
        self.free()
        before = torch.cuda.memory_allocated()
        way.action()
        self.wait()
        return (way.kept + torch.cuda.max_memory_allocated() - before) / 1e9


# --- models, data, trainers -------------------------------------------------------------------------------------------

SMALL_MODEL = (
    "model.num_layers=2", "model.num_attention_heads=2", "model.attention_head_dim=8",
    "model.num_cross_attention_heads=2", "model.cross_attention_head_dim=8", "model.caption_channels=16",
)  # fmt: skip
SMALL_LATENTS = ("data.image_size=128", "model.sample_size=4")


def config_of(job: Job, name: str, *overrides: str) -> Config:
    """A config of this repository on the job's device; with `small`, of a tiny model."""
    from sana_cli.config.file import load_config

    latents = name != "quickstart" and name != "sana"
    small = (*SMALL_MODEL, *(SMALL_LATENTS if latents else ())) if job.small else ()
    places = (
        f"data.dir={job.folder / name}",
        f"run.dir={job.folder / 'run'}",
        f"run.device={job.device_name}",
    )
    return load_config(name, [*places, *small, *overrides])


def architecture_of(config: Config) -> Architecture:
    """The model of a config, without a dataset."""
    from sana_cli.dataset.match import resolve_architecture

    return resolve_architecture(config, None)


def drawn(model: Architecture, job: Job, spread: float = 0.0) -> SanaTransformer:
    """A model with random float32 weights, drawn on the device. `spread` is added to biases and norms, which begin even."""
    import torch

    from sana_cli.model import build, initialize

    made = build(model, seed=None).to_empty(device=job.device)
    generator = torch.Generator(job.device).manual_seed(0)
    initialize(made, generator)
    with torch.no_grad():
        for parameter in made.parameters():
            if spread and parameter.ndim == 1:
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator, device=job.device))
    return made


def of_diffusers(ours: SanaTransformer, job: Job) -> Any:
    """diffusers' transformer with the same weights."""
    import torch
    from diffusers import SanaTransformer2DModel

    from sana_cli.weights import configs

    with torch.device(job.device):
        theirs = SanaTransformer2DModel.from_config(configs.diffusers_config(ours.config))
    theirs.load_state_dict(ours.state_dict())
    return theirs


def dataset_of(config: Config, images: int, tokens: int) -> Dataset:
    """Random samples and captions of a config's shapes, as `sana embed` would write them."""
    import torch

    from sana_cli.dataset.reader import Dataset
    from sana_cli.dataset.writer import DatasetWriter, Images

    (height, width), model = config.data.sample_sides, architecture_of(config)
    shape, latents = (images, model.in_channels, height, width), config.data.autoencoder is not None
    pixels = torch.randn(shape).bfloat16() if latents else torch.randint(0, 256, shape, dtype=torch.uint8)
    texts = ["", *(f"caption {n}" for n in range(images))]
    writer = DatasetWriter(config.data.dir, {})
    states = {text: torch.randn(tokens, model.caption_channels).bfloat16() for text in texts}
    shard = writer.write_captions(0, 0, states)
    one = Images(
        pixels=pixels,
        original_sizes=[config.data.size] * images,
        sample_ids=[str(n) for n in range(images)],
        captions=[[text] for text in texts[1:]],
        weights=[None] * images,
        attributes=[{}] * images,
        says=[None] * images,
        names=[],
    )
    writer.write(0, [shard], [one], {text: n for n, text in enumerate(texts)}, [])
    image = {
        "kind": "latents" if latents else "pixels",
        "channels": shape[1],
        "height": height,
        "width": width,
    }
    if latents:
        image["factor"] = config.data.factor
    encoder = {"encoder": "drawn", "architecture": "none", "weights": "", "dtype": "fp32"}
    facts = {"image": image, "caption_dim": model.caption_channels, "encoder": encoder, "source": {}}
    writer.finish(1, facts | {"attributes": {}, "one_word_captions": False})
    return Dataset(config.data.dir)


def trainer_of(job: Job, config: Config, dataset: Dataset, world: World | None = None) -> Trainer:
    """A trainer with random weights, whose types and adapters are those that training has."""
    import torch

    from sana_cli.adapters import attach, matching, new_changes, scale_of
    from sana_cli.dataset.match import resolve_architecture
    from sana_cli.runtime.device import has_native_bf16
    from sana_cli.runtime.distributed import World
    from sana_cli.training.task import make_task
    from sana_cli.training.trainable import Trainable
    from sana_cli.training.trainer import Placement, Trainer

    model, precision = resolve_architecture(config, dataset), precision_of(config)
    made, adapter = drawn(model, job), config.adapter
    if adapter.on:
        if precision == "bf16" and has_native_bf16(job.device):
            Trainable().to_bf16(made)
        made.requires_grad_(False)
        names, generator = matching(made, adapter.targets), torch.Generator().manual_seed(0)
        dora, scale = adapter.kind == "dora", scale_of(adapter)
        changes = new_changes(made, names, adapter.rank, scale, dora, generator)
        attach(made, changes)
    placement = Placement(job.device, precision, world or World())
    task = make_task(config, model, precision, dataset, None)
    images = config.train.batch_size * config.train.accumulate
    return Trainer(made, task, config, placement, images)


def precision_of(config: Config) -> str:
    """The precision of a config that names one."""
    assert config.train.precision != "auto"
    return config.train.precision


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors, over the largest number of the second."""
    wide = other.detach().float()
    return float((one.detach().float() - wide).abs().max() / wide.abs().max())


# --- sections ---------------------------------------------------------------------------------------------------------


def facts(job: Job) -> None:
    """What the device is, and how fast it multiplies."""
    import torch

    from sana_cli.runtime.device import free_memory, has_native_bf16, tf32

    device, known = job.device, dict[str, Any]()
    known |= {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    known |= {
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }
    known |= {"native_bf16": has_native_bf16(device), "device": job.device_name, "name": None, "driver": None}
    if job.on_cuda:
        found = torch.cuda.get_device_properties(device)
        known |= {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "cudnn": torch.backends.cudnn.version(),
        }
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout
            known["driver"] = driver.split()[0] if driver.split() else None
        job.row(
            "memory of the device",
            found.total_memory / 1e9,
            "GB",
            (free_memory(device) or 0) / 1e9,
            "beside: free",
        )
    job.write({"facts": known})
    side = 128 if job.small else 8192
    for what, dtype, fast in (
        ("float32", torch.float32, False), ("TF32", torch.float32, True), ("bf16", torch.bfloat16, False),
    ):  # fmt: skip
        if what == "TF32" and not job.on_cuda:
            job.row("products in TF32", note=NEEDS_CUDA)
            continue
        with job.attempt(f"products in {what}"), tf32(fast):
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            seconds = job.in_turn({"product": partial(torch.matmul, a, b)}, times=10)["product"]
            job.row(
                f"products in {what}",
                2 * side**3 / seconds / 1e12,
                "TFLOP/s",
                note=f"of {side} x {side} matrices",
            )


def parity(job: Job) -> None:
    """Ours and diffusers' transformer with the same weights: outputs, gradients, and the CPU's."""
    for name in ("quickstart", "sana", "sana-0.6b", "finetune-1.6b"):
        with job.attempt(name):
            _parity(job, name, architecture_of(config_of(job, name)))


def _parity(job: Job, name: str, model: Architecture) -> None:
    import torch

    from sana_cli.runtime.device import autocast, tf32

    ours = drawn(model, job, spread=0.1).eval()
    theirs = of_diffusers(ours, job).eval()
    generator, tokens = torch.Generator().manual_seed(1), 4 if job.small else 20
    x = torch.randn(2, model.in_channels, model.sample_size, model.sample_size, generator=generator)
    states = torch.randn(2, tokens, model.caption_channels, generator=generator)
    mask = (torch.arange(tokens) < torch.tensor([[tokens], [tokens // 2]])).float()
    cpu = (x, states, torch.tensor([3.0, 700.0]), None, mask)
    inputs = tuple(None if given is None else given.to(job.device) for given in cpu)

    def output(network: Any, given: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        x, states, time_, guidance, mask = given
        made = network(x.to(dtype), states.to(dtype), time_, guidance, mask)
        return made if isinstance(made, torch.Tensor) else made.sample

    def both(what: str, dtype: torch.dtype = torch.float32, precision: str = "fp32") -> None:
        with torch.no_grad(), autocast(job.device, precision):
            mine, his = (output(network, inputs, dtype) for network in (ours, theirs))
        note = (
            "largest error over the largest output; beside: diffusers'. Both against its float32 without TF32"
        )
        job.row(f"{name}: {what}", apart(mine, exact), "", apart(his, exact), note)

    with tf32(False), torch.no_grad():
        exact = output(theirs, inputs)
        note = "largest difference over the largest output of diffusers' transformer"
        job.row(f"{name}: float32, TF32 off", apart(output(ours, inputs), exact), note=note)
        if name in ("quickstart", "sana") and job.on_cuda:
            on_cpu = output(drawn_copy(ours), cpu)
            job.row(f"{name}: float32 against the CPU", apart(output(ours, inputs).cpu(), on_cpu))
    if job.on_cuda:
        with tf32(True):
            both("float32, TF32 on")
    else:
        job.row(f"{name}: float32, TF32 on", note=NEEDS_CUDA)
    both("bf16 autocast", precision="bf16")
    for precision in ("fp32", "bf16"):
        with tf32(False):
            of_ours: dict[str, Tensor] = {}
            of_theirs: dict[str, Tensor] = {}
            for network, found in ((ours, of_ours), (theirs, of_theirs)):
                with autocast(job.device, precision):
                    made = output(network, inputs)
                made.float().square().mean().backward()
                found |= {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
                network.zero_grad(set_to_none=True)
        square = sum(float((of_ours[n] - g).double().square().sum()) for n, g in of_theirs.items())
        size = sum(float(g.double().square().sum()) for g in of_theirs.values())
        job.row(
            f"{name}: gradient, {precision}",
            (square / size) ** 0.5,
            note="norm of the difference over the norm",
        )
        del of_ours, of_theirs
    ours.to(torch.bfloat16)
    theirs.to(torch.bfloat16)
    both("bf16 weights", torch.bfloat16)


def drawn_copy(model: SanaTransformer) -> SanaTransformer:
    """A copy of a model on the CPU."""
    from sana_cli.model import build

    made = build(model.config, seed=None)
    made.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()}, assign=True)
    return made


def tests(job: Job) -> None:
    """Every test that can use the device: those whose name says cuda, in the files that ask whether it is there."""
    if not job.on_cuda:
        job.row("tests that can use the device", note=NEEDS_CUDA)
        return
    import pytest  # noqa: F401 (whether it is there)

    paths = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    asking = [str(path) for path in paths if "cuda.is_available" in path.read_text(encoding="utf-8")]
    options = [
        "-k",
        "cuda",
        "-q",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        f"--basetemp={job.folder / 'pytest'}",
    ]
    command = [sys.executable, "-m", "pytest", *options, *asking]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # whatever else is installed there
    done = subprocess.run(command, cwd=REPOSITORY, env=alone, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)
    }
    if not counts:
        job.row(
            "tests that can use the device",
            note=f"pytest ended with {done.returncode}; its output is in the log",
        )
        return
    wrong = re.findall(r"^(?:FAILED|ERROR) \S*?([\w/]+\.py\S*)", done.stdout, re.MULTILINE)
    note = "beside: all that ran" + (f"; not passed: {', '.join(wrong)}" if wrong else "")
    ran = sum(count for word, count in counts.items() if word != "skipped")
    job.row("tests that passed", counts.get("passed", 0), "tests", ran, note)


def quickstart(job: Job) -> None:
    """`sana embed`, `sana train` and `sana sample` of the default config, as a user runs them."""
    few = ["--set", "train.steps=6", "--set", "log.sample_every=6"] if job.small else []
    place = ["--set", f"run.device={job.device_name}"]
    commands = {
        "sana embed": ["embed", *place, *(["--limit", "64"] if job.small else [])],
        "sana train": ["train", *place, *few],
        "sana sample": ["sample", "4 two 4 six", "--device", job.device_name],
    }
    total = 0.0
    for what, arguments in commands.items():
        command = [sys.executable, "-m", "sana_cli", *arguments]
        begin = time.perf_counter()
        done = subprocess.run(
            command, cwd=job.folder, check=False, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
        )
        seconds = time.perf_counter() - begin
        print(done.stderr, file=sys.stderr)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            job.row(what, note=f"failed with exit code {done.returncode}: {last:.200}")
            return
        job.row(what, seconds, "s")
        total += seconds
    lines = (job.folder / "runs/quickstart/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last_line = json.loads(lines[-1])
    job.row("all three", total, "s", note=f"{last_line['step']} steps")
    job.row("held-out loss after it", last_line.get("held_out_loss"), note="of metrics.jsonl")
    job.row(
        "speed of training",
        last_line["samples_per_second"],
        "images/s",
        note="of the last line of metrics.jsonl",
    )


def learning(job: Job, model: Any, tokens: int, config: Config, precision: str) -> Callable[[], None]:
    """A step of `config` with diffusers' transformer and PyTorch's plain AdamW, on tensors that are there already."""
    import torch
    import torch.nn.functional as F

    from sana_cli.runtime.device import autocast

    train, architecture = config.train, architecture_of(config)
    model.train()
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, config.optim.lr, config.optim.betas, weight_decay=0.0)
    side = architecture.sample_size
    x, target = (
        torch.randn(train.batch_size, architecture.in_channels, side, side, device=job.device)
        for _ in range(2)
    )
    states = torch.randn(train.batch_size, tokens, architecture.caption_channels, device=job.device)
    mask, dtype = torch.ones(train.batch_size, tokens, device=job.device), model.dtype
    timestep = torch.rand(train.batch_size, device=job.device) * 1000

    def step() -> None:
        for _ in range(train.accumulate):
            with autocast(job.device, precision):
                found = model(x.to(dtype), states.to(dtype), timestep, encoder_attention_mask=mask).sample
            (F.mse_loss(found.float(), target) / train.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(moving, config.optim.grad_clip or 1e9)
        optimizer.step()
        optimizer.zero_grad()

    return step


def step(job: Job) -> None:
    """A step of sana.yaml: ours with all that `sana train` does, diffusers' transformer, the lesson's way."""
    tokens = 4 if job.small else 13
    config = config_of(job, "sana", *(("train.batch_size=2", "train.accumulate=2") if job.small else ()))
    trainer = trainer_of(job, config, dataset_of(config, 8 if job.small else 256, tokens))
    lengths = {"diffusers": tokens, "lesson": 8 if job.small else LESSON_TOKENS}
    ways = {"ours": job.built(lambda: trainer.advance)}
    for way, length in lengths.items():
        with job.attempt(f"step beside {way}"):
            theirs = of_diffusers(drawn(trainer.model.config, job), job)
            ways[way] = job.built(lambda: learning(job, theirs, length, config, precision_of(config)))  # noqa: B023
    found = job.in_turn({way: made.action for way, made in ways.items()})
    most = {way: job.gigabytes_of(made) for way, made in ways.items()}
    trainer.close()
    images = config.train.batch_size * config.train.accumulate
    reads = f"{images} images, {tokens} caption tokens; ours also reads, averages weights and clips"
    for way, length in lengths.items():
        if way in found:
            beside = f"{reads}; beside: diffusers' transformer, plain AdamW, {length} caption tokens"
            job.row(f"step beside {way}", found["ours"], "s", found[way], beside)
            if most["ours"] is not None:
                job.row(f"memory beside {way}", most["ours"], "GB", most[way])
    if len(found) == 1:
        job.row("step", found["ours"], "s", note=reads)
    if not job.on_cuda or job.small:
        job.row("10,000 steps", note=NEEDS_CUDA)
        return
    minutes = config.train.steps * found["ours"] / 60
    job.row("10,000 steps", minutes, "min", LESSON_MINUTES, BY_LESSON)
    if "lesson" in found:
        there = config.train.steps * found["lesson"] / 60
        job.row("10,000 steps, beside the lesson's way here", minutes, "min", there, "from the steps above")


MEMORY = {  # config, changes
    "sana.yaml": ("sana", ()),
    "sana-0.6b.yaml": ("sana-0.6b", ("train.accumulate=2",)),
    "finetune-1.6b.yaml": ("finetune-1.6b", ("train.accumulate=2",)),
    "finetune-1.6b.yaml, all weights, bf16, CAME": (
        "finetune-1.6b",
        (
            "adapter.kind=none", "train.weights=bf16", "optim.optimizer=came", "optim.ema_decay=null",
            "train.accumulate=2",
        ),
    ),
}  # fmt: skip


def memory(job: Job) -> None:
    """What `sana train --dry-run` expects, and what two steps take."""
    import torch

    from sana_cli.dataset.match import resolve_architecture
    from sana_cli.training.estimate import training_memory
    from sana_cli.training.task import make_train_set
    from sana_cli.training.trainer import Placement

    for number, (what, (name, changes)) in enumerate(MEMORY.items()):
        with job.attempt(what):
            few = ("train.batch_size=1", "train.accumulate=2") if job.small else ()
            place = (f"data.dir={job.folder / str(number)}", "objective.flow_shift=3")
            config = config_of(job, name, *changes, *few, *place)
            dataset = dataset_of(config, 4 if name != "sana" else 64, 4 if job.small else LESSON_TOKENS)
            model, placement = (
                resolve_architecture(config, dataset),
                Placement(job.device, precision_of(config)),
            )
            expected = (
                training_memory(model, config, make_train_set(config, dataset), placement, 1).total / 1e9
            )
            trainer = trainer_of(job, config, dataset)
            job.free()
            for _ in range(2):
                trainer.advance()
            if job.on_cuda:
                peak, held = (
                    of() / 1e9 for of in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
                )
                job.row(
                    what, peak, "GB", expected, f"beside: the estimate; PyTorch has reserved {held:.3g} GB"
                )
            else:
                job.row(what, None, "GB", expected, f"{NEEDS_CUDA}; beside: the estimate")
            trainer.close()
            del trainer


def sampling(job: Job) -> None:
    """Latents of 20 steps of DPM-Solver++ with guidance: `sana sample`'s way and diffusers' SanaPipeline."""
    for name in ("sana-0.6b", "finetune-1.6b"):
        with job.attempt(name):
            _sampling(job, name)


def _sampling(job: Job, name: str) -> None:
    import torch

    from sana_cli.config.keys import SampleConfig
    from sana_cli.sampling import sampler
    from sana_cli.weights import configs

    model = architecture_of(config_of(job, name))
    side, steps, tokens = model.sample_size, 2 if job.small else 20, 4 if job.small else 40
    settings = SampleConfig(steps=steps, guidance_scale=4.5, flow_shift=3.0)
    shape = (model.in_channels, side, side)
    ours = drawn(model, job).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(2)
    captions = [torch.randn(tokens, model.caption_channels, generator=generator) for _ in range(4)]
    null = torch.randn(1, model.caption_channels, generator=generator)
    recipe = sampler.Recipe(settings, shape, "flow_prediction", "bf16")

    def mine(count: int) -> Tensor:
        drawn_steps = sampler.sample_images(ours, captions[:count], [null] * count, range(count), recipe)
        return sampler.final_images(drawn_steps)

    pipeline: Any = None
    with job.attempt(f"{name}: diffusers' pipeline"):
        from diffusers import DPMSolverMultistepScheduler, SanaPipeline

        scheduler = DPMSolverMultistepScheduler.from_config(
            configs.scheduler_config(settings, "flow_prediction")
        )
        transformer = of_diffusers(ours.float(), job).to(torch.bfloat16).eval()
        ours.to(torch.bfloat16)
        pipeline = SanaPipeline(None, None, None, transformer, scheduler)
        pipeline.set_progress_bar_config(disable=True)
    length = 8 if job.small else LESSON_TOKENS  # as its pipeline pads captions

    def padded(states: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows, mask = (
            torch.zeros(len(states), length, model.caption_channels),
            torch.zeros(len(states), length),
        )
        for row, one in enumerate(states):
            rows[row, : len(one)], mask[row, : len(one)] = one, 1
        return rows.to(job.device, torch.bfloat16), mask.to(job.device)

    def theirs(count: int) -> Tensor:
        given, given_mask = padded(captions[:count])
        nothing, null_mask = padded([null] * count)
        found = pipeline(
            height=side * 32, width=side * 32, num_inference_steps=steps, guidance_scale=4.5, output_type="latent",
            negative_prompt=None, prompt_embeds=given, negative_prompt_embeds=nothing, prompt_attention_mask=given_mask,
            negative_prompt_attention_mask=null_mask, latents=sampler.Noise(range(count), shape, job.device)(),
            use_resolution_binning=False,
        ).images  # fmt: skip
        assert isinstance(found, torch.Tensor)
        return found.cpu()

    kept = sum(p.numel() * p.element_size() for p in ours.parameters()) if job.on_cuda else None
    note = f"beside: SanaPipeline, captions padded to {length} tokens, ours have {tokens}; bf16"
    for count in (1, 4):
        what = f"{name}: {count} of {shape[0]} x {side} x {side}, {steps} steps"
        ways = {"ours": Way(partial(mine, count), kept)}
        if pipeline is not None:
            ways["diffusers"] = Way(partial(theirs, count), kept)
        found = job.in_turn({way: made.action for way, made in ways.items()}, rounds=3)
        most = {way: job.gigabytes_of(made) for way, made in ways.items()}
        said = note if pipeline is not None else ""
        job.row(what, found["ours"], "s", found.get("diffusers"), said)
        if most["ours"] is not None:
            job.row(f"{what}: memory", most["ours"], "GB", most.get("diffusers"), said)
    if pipeline is not None:
        job.row(
            f"{name}: latents apart",
            apart(mine(1), theirs(1)),
            note="largest difference over the largest number; bf16",
        )


def finetune(job: Job) -> None:
    """Steps of finetune-1.6b.yaml with adapters: ours, and diffusers' transformer with peft's."""
    tokens = 8 if job.small else LESSON_TOKENS
    few = (
        "train.batch_size=1",
        "train.accumulate=1",
        "objective.flow_shift=3",
        "adapter.rank=4" if job.small else "adapter.rank=16",
    )
    config = config_of(job, "finetune-1.6b", *few)
    dataset = dataset_of(config, 8, tokens)
    trainers, ways = {}, dict[str, Way]()
    for kind in ("lora", "dora"):
        with job.attempt(f"{kind}: step of 1 image"):
            there = config_of(job, "finetune-1.6b", *few, f"adapter.kind={kind}")
            trainers[kind] = trainer_of(job, there, dataset)
            ways[kind] = job.built(lambda: trainers[kind].advance)  # noqa: B023
    with job.attempt("peft: step of 1 image"):
        ways["peft"] = job.built(lambda: _with_peft(job, config, tokens))
    found = job.in_turn({way: made.action for way, made in ways.items()})
    most = {way: job.gigabytes_of(made) for way, made in ways.items()}
    note = "beside: diffusers' transformer in bf16 with peft's LoRA of the same layers, checkpointing, AdamW"
    for kind in [kind for kind in trainers if kind in ways]:
        said = note if "peft" in found else ""
        job.row(f"{kind}: step of 1 image", found[kind], "s", found.get("peft"), said)
        if most[kind] is not None:
            job.row(f"{kind}: memory", most[kind], "GB", most.get("peft"), said)
        trainers[kind].close()


def _with_peft(job: Job, config: Config, tokens: int) -> Callable[[], None]:
    """A step of diffusers' transformer with peft's adapters, as diffusers' SANA script has them."""
    import torch
    from peft import LoraConfig

    theirs = of_diffusers(drawn(architecture_of(config), job), job).to(torch.bfloat16)
    theirs.requires_grad_(False)
    theirs.enable_gradient_checkpointing()
    targets = [target.removesuffix(".") for target in config.adapter.targets]
    rank = config.adapter.rank
    theirs.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    )
    return learning(job, theirs, tokens, config, "bf16")


class _Several(int):
    """The number 1 that says it is more, so that one process takes the way of several."""

    def __eq__(self, other: object) -> bool:
        return False if other == 1 else int(self) == other

    def __gt__(self, other: int) -> bool:
        return True if other == 1 else int(self) > other

    __hash__ = int.__hash__


def parallel(job: Job) -> None:
    """DDP and FSDP with one process, through the trainer's own ways of several: the same step, and its time."""
    import torch

    from sana_cli.runtime import distributed
    from sana_cli.runtime.launch import Launch

    if not torch.distributed.is_available():
        job.row("DDP and FSDP", note="missing: torch.distributed")
        return
    where = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ |= {name: str(value) for name, value in where.items()}
    few = ("train.batch_size=2", "train.accumulate=2") if job.small else ()
    config = config_of(job, "sana", *few)
    dataset = dataset_of(config, 8 if job.small else 128, 4 if job.small else 13)
    one = mock.patch.object(distributed, "launch", return_value=Launch(0, _Several(1), 0))
    with one, distributed.world(cuda=job.on_cuda) as here:
        plain = _steps(job, config, dataset, None)
        for kind in ("ddp", "fsdp"):
            with job.attempt(kind):
                there = config_of(job, "sana", *few, f"train.parallel={kind}")
                found = _steps(job, there, dataset, here)
                backend = torch.distributed.get_backend_config()
                job.row(f"{kind}: step", found.seconds, "s", plain.seconds, f"beside: without; {backend}")
                job.row(f"{kind}: norm of the gradient", found.norm, "", plain.norm, "beside: without")
                wrong = max(apart(found.weights[name], tensor) for name, tensor in plain.weights.items())
                job.row(
                    f"{kind}: weights",
                    wrong,
                    note="largest difference from those after the same steps without",
                )
                if found.gigabytes is not None:
                    job.row(f"{kind}: memory", found.gigabytes, "GB", plain.gigabytes, "beside: without")


@dataclass(frozen=True)
class _Steps:
    seconds: float  # of one
    gigabytes: float | None
    norm: float  # of the last gradient
    weights: dict[str, Tensor]


def _steps(job: Job, config: Config, dataset: Dataset, world: World | None) -> _Steps:
    """Train some steps, the same number each time."""
    trainer = trainer_of(job, config, dataset, world)
    kind = "none" if world is None else config.train.parallel
    assert trainer.sharded == (kind == "fsdp")
    assert (trainer.replicas.model is trainer.loss_module) == (kind != "ddp")
    way = job.built(lambda: trainer.advance)
    seconds = job.in_turn({"step": way.action})["step"]
    most, norm = job.gigabytes_of(way), trainer.advance().grad_norm
    weights = trainer.weights()
    trainer.close()
    return _Steps(seconds, most, norm, weights)


def kernels(job: Job) -> None:
    """Forms of the same arithmetic, side by side: fused attention, compiled blocks, pinned copies."""
    for what, section in (
        ("fused attention", _attention),
        ("pinned copies", _copies),
        ("compiled blocks", _compiled),  # takes longest
    ):
        with job.attempt(what):
            section(job)


def _attention(job: Job) -> None:
    import torch
    import torch.nn.functional as F

    def forward_and_back(attention: Callable[[], Tensor]) -> None:
        attention().sum().backward()

    shapes = {"sana.yaml": (16, 16, 16, 13, 72), "1.6B": (2, 20, 1024, 300, 112)}  # B, heads, N, L, d
    for name, shape in shapes.items():
        batch, heads, tokens, length, width = (2, 2, 4, 3, 8) if job.small else shape
        q, k, v = (
            torch.randn(
                batch, heads, count, width, device=job.device, dtype=torch.bfloat16, requires_grad=True
            )
            for count in (tokens, length, length)
        )
        bias = torch.zeros(batch, 1, 1, length, device=job.device, dtype=torch.bfloat16)

        def fused(q: Tensor = q, k: Tensor = k, v: Tensor = v, bias: Tensor = bias) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        def plain(q: Tensor = q, k: Tensor = k, v: Tensor = v, bias: Tensor = bias) -> Tensor:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            return (scores + bias).softmax(-1).to(v.dtype) @ v

        ways = {"fused": partial(forward_and_back, fused), "plain": partial(forward_and_back, plain)}
        found = job.in_turn(ways, times=20)
        note = "forward and backward; beside: in plain operations"
        job.row(f"fused attention, {name}", 1e6 * found["fused"], "us", 1e6 * found["plain"], note)
        job.row(f"fused attention, {name}: apart", apart(fused(), plain()))


def _compiled(job: Job) -> None:
    what = "step of sana.yaml, compiled blocks"
    if not job.on_cuda:
        job.row(what, note=NEEDS_CUDA)
        return
    config = config_of(job, "sana", *(("train.batch_size=2", "train.accumulate=2") if job.small else ()))
    trainer = trainer_of(job, config, dataset_of(config, 8 if job.small else 128, 13))
    plain = job.in_turn({"step": trainer.advance})["step"]
    start, _ = trainer.compile()
    compiled = job.in_turn({"step": trainer.advance})["step"]
    trainer.close()
    job.row(what, compiled, "s", plain, f"beside: as written; the first micro-batch takes {start:.3g} s")
    if not job.small:
        minutes = (start + config.train.steps * compiled) / 60
        job.row("10,000 steps, compiled blocks", minutes, "min", LESSON_MINUTES, BY_LESSON)


def _copies(job: Job) -> None:
    if not job.on_cuda:
        job.row("pinned copies", note=NEEDS_CUDA)
        return
    import torch

    for name, shape in {"sana.yaml": (16, 2, 1, 32, 32), "sana-0.6b.yaml": (4, 2, 32, 32, 32)}.items():
        samples, states = torch.randn(shape), torch.randn(shape[0], LESSON_TOKENS, 2304, dtype=torch.float32)
        pageable, pinned = (samples, states), (samples.pin_memory(), states.pin_memory())

        def copy(given: tuple[Tensor, ...], ahead: bool) -> None:
            for tensor in given:
                tensor.to(job.device, non_blocking=ahead)

        ways = {"pinned": partial(copy, pinned, True), "pageable": partial(copy, pageable, False)}
        found = job.in_turn(ways, times=20)
        note = f"a micro-batch with {LESSON_TOKENS} caption tokens each; beside: from ordinary memory"
        job.row(f"pinned copies, {name}", 1e6 * found["pinned"], "us", 1e6 * found["pageable"], note)


@dataclass(frozen=True)
class Section:
    """A part of the table, in a process of its own."""

    run: Callable[[Job], None]
    seconds: float  # at most


SECTIONS = {  # in order of worth
    "device": Section(facts, 40),
    "parity": Section(parity, 90),
    "tests": Section(tests, 90),
    "step": Section(step, 60),
    "quickstart": Section(quickstart, 150),
    "memory": Section(memory, 75),
    "sampling": Section(sampling, 75),
    "finetune": Section(finetune, 60),
    "parallel": Section(parallel, 60),
    "kernels": Section(kernels, 90),
}


# --- processes --------------------------------------------------------------------------------------------------------


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def child(options: argparse.Namespace) -> None:
    """Run one section in this process."""
    rows = Path(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(options.section, options.device, options.small, rows, Path(folder))
        try:
            if job.on_cuda and not _has_cuda():
                job.row("all of it", note=f"{NEEDS_CUDA}, and PyTorch sees none")
                return
            SECTIONS[options.section].run(job)
        except Exception as error:
            job.row("all of it" if not rows.exists() else "the rest", note=why(error))
            raise


def measure(
    name: str, options: argparse.Namespace, paths: list[str], seconds: float
) -> Iterator[dict[str, Any]]:
    """Run a section in a process of its own; yield its lines as they come, and one more if it does not end well."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        # the script that was started, which may have sections of its own
        command = [
            sys.executable,
            sys.argv[0],
            "--section",
            name,
            "--rows",
            str(rows),
            "--device",
            options.device,
        ]
        command += ["--small"] if options.small else []
        inherited = os.environ.get("PYTHONPATH")
        places = [*paths, str(REPOSITORY), str(Path(__file__).parent), *([inherited] if inherited else [])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(places),
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": folder,
        }
        with (options.out / f"{name}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            seen, end = 0, time.monotonic() + seconds
            try:
                while True:
                    ended = process.poll() is not None
                    lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
                    for line in lines[seen:]:
                        yield json.loads(line)
                    seen = len(lines)
                    if ended or time.monotonic() > end:
                        break
                    time.sleep(0.05)
            finally:
                with contextlib.suppress(ProcessLookupError):  # and its own children
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not ended:
            yield asdict(Row(name, "the rest", note=f"stopped after {seconds:.0f} s"))
        elif process.returncode < 0:
            yield asdict(Row(name, "the rest", note=f"ended by signal {-process.returncode}"))
        elif process.returncode and not any("failed" in line or "missing" in line for line in lines):
            yield asdict(
                Row(name, "the rest", note=f"ended with exit code {process.returncode}; see {name}.log")
            )


def write(out: Path, device: Mapping[str, Any], rows: list[Row], took: Mapping[str, float]) -> None:
    """Write gpu.md and gpu.json, whole; the second also says how many seconds each section took."""
    told = ", ".join(f"{key} {value}" for key, value in device.items() if value is not None)
    table = "\n".join([HEADER, *(row.as_markdown() for row in rows)])
    found = {"device": dict(device), "seconds": dict(took), "rows": [row.as_json() for row in rows]}
    content = json.dumps(found, indent=1)
    for name, text in (("gpu.md", f"{told}\n\n{table}\n"), ("gpu.json", content + "\n")):
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)


def run_all(names: list[str], options: argparse.Namespace) -> None:
    """Run sections within the budget, print their rows as they come, and write them."""
    begin, rows, device, took = time.monotonic(), list[Row](), dict[str, Any](), dict[str, float]()
    options.out.mkdir(parents=True, exist_ok=True)
    paths = unpacked(options.packs)
    print(HEADER, flush=True)

    def add(row: Row) -> None:
        rows.append(row)
        print(row.as_markdown(), flush=True)

    for name in names:
        left = options.budget - (begun := time.monotonic() - begin)
        limit = min(SECTIONS[name].seconds if options.limit is None else options.limit, left)
        if left < LEAST:
            add(Row(name, "all of it", note="left out: no time"))
            continue
        for line in measure(name, options, paths, limit):
            if "facts" in line:
                device |= line["facts"]
            else:
                add(Row(**line))
        took[name] = time.monotonic() - begin - begun
        write(options.out, device, rows, took)
    write(options.out, device, rows, took)
    print(f"\n{time.monotonic() - begin:.0f} s; written to {options.out}", flush=True)


# --- libraries that travel --------------------------------------------------------------------------------------------


def unpacked(folder: Path) -> list[str]:
    """Where the libraries of a pack for this Python are, if there is a pack; unpacked at first use."""
    version = ".".join(map(str, sys.version_info[:2]))
    pack = folder / f"packages-{version}.tar.xz"
    if not pack.is_file():
        return []
    digest = hashlib.sha256(pack.read_bytes()).hexdigest()[:16]
    there = Path(tempfile.gettempdir()) / f"sana-gpu-{digest}"
    if not there.is_dir():
        partial = Path(tempfile.mkdtemp(dir=there.parent))
        with tarfile.open(pack) as archive:
            archive.extractall(partial, filter="data")
        partial.rename(there)
    return [str(there)]


def pack(folder: Path, version: str) -> Path:
    """Download what is imported beside torch, for a Python version on Linux x86-64, into one compressed file.

    What a library needs is read from its metadata, one round after another, since pip would download torch to do so.
    """
    from packaging.markers import default_environment
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    tested = [
        line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line[:1].isalpha()
    ]
    pins = {canonicalize_name(Requirement(line).name): line for line in tested}
    target = {"python_version": version, "python_full_version": f"{version}.0", "extra": ""}
    environment = {key: str(value) for key, value in default_environment().items()} | target
    wanted, done = {canonicalize_name(name): name for name in LIBRARIES}, set[str]()
    platforms = [option for wheel in WHEELS for option in ("--platform", f"{wheel}_x86_64")]
    with tempfile.TemporaryDirectory() as temporary:
        wheels, site = Path(temporary) / "wheels", Path(temporary) / "site"
        while new := wanted.keys() - done:
            done |= new
            asked = [pins.get(name, wanted[name]) for name in new if not NOT_PACKED.fullmatch(name)]
            if not asked:
                break
            options = [
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--python-version",
                version,
                "--dest",
                str(wheels),
            ]
            subprocess.run(
                [sys.executable, "-m", "pip", "download", *options, *platforms, *asked], check=True
            )
            for wheel in wheels.glob("*.whl"):
                for need in map(Requirement, _needs(wheel)):
                    if need.marker is None or need.marker.evaluate(environment):
                        wanted.setdefault(canonicalize_name(need.name), f"{need.name}{need.specifier}")
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        for inner in site.glob("*.data/*lib"):
            shutil.copytree(inner, site, dirs_exist_ok=True)
        for spare in [*site.glob("*.data"), *site.glob("*/tests"), *site.glob("numpy/*/tests")]:
            shutil.rmtree(spare)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"packages-{version}.tar.xz"
        with tarfile.open(path.with_suffix(".partial"), "w:xz") as archive:
            archive.add(site, ".")
        path.with_suffix(".partial").replace(path)
    return path


def _needs(wheel: Path) -> list[str]:
    """The requirements in a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        head = archive.read(name).decode().partition("\n\n")[0]
    return re.findall(r"^Requires-Dist: (.*)$", head, re.MULTILINE)


def main() -> None:
    """Print and write the table, or make the pack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    add(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="cuda: the first that CUDA_VISIBLE_DEVICES shows",
    )
    add("--small", action="store_true", help="tiny shapes, to see that every section works")
    add("--budget", type=float, default=460.0, help="seconds for all sections")
    add("--limit", type=float, help="seconds for each section, in place of its own limit")
    add(
        "--out",
        type=Path,
        default=Path("runs/gpu"),
        help="a folder for gpu.md, gpu.json and a log of each section",
    )
    add("--packs", type=Path, default=PACKS, help="the folder that --pack wrote to")
    add(
        "--pack",
        type=Path,
        metavar="FOLDER",
        help="download the libraries to take along, and measure nothing",
    )
    add("--python", default="3.12", help="the version of Python there, for --pack")
    add("--section", help=argparse.SUPPRESS)
    add("--rows", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        child(options)
    elif options.pack:
        made = pack(options.pack, options.python)
        print(f"{made}: {made.stat().st_size / 2**20:.1f} MiB")
    else:
        names = options.only.split(",")
        if unknown := [name for name in names if name not in SECTIONS]:
            parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
        run_all(names, options)


if __name__ == "__main__":
    main()

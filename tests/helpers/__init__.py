"""Shared helpers: small configs, datasets and runs; `sana` in this process or in its own."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from sana_cli.cli import app
from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed
from sana_cli.commands.sample import SampleOptions, SampleSummary, sample
from sana_cli.commands.train import TrainOptions, TrainSummary, train
from sana_cli.config.file import parse_config
from sana_cli.config.keys import Config
from sana_cli.config.renamed import RENAMED
from sana_cli.dataset.match import resolve_architecture
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import SingleDataset
from sana_cli.model import build
from sana_cli.runtime.distributed import World
from sana_cli.training.objective import RectifiedFlow
from sana_cli.training.task import Task
from sana_cli.training.trainer import Placement, Trainer

Sana = Callable[..., subprocess.CompletedProcess[str]]  # the fixture `sana`
REPOSITORY = Path(__file__).parents[2]
PYTHON_SANA = (sys.executable, "-m", "sana_cli")

# --- configs, datasets, runs ------------------------------------------------------------------------------------------

SMALL = """
data: {image_size: 16, held_out_split: null}
model: {patch_size: 8, num_layers: 1, num_attention_heads: 2, attention_head_dim: 8,
        num_cross_attention_heads: 2, cross_attention_head_dim: 8}
optim: {warmup_steps: 1}
train: {steps: 4, batch_size: 4, precision: fp32}
log: {every: 1, sample_every: 4}
save: {every: 2}
sample: {steps: 2, prompts: ["4 two"]}
"""
HELD_OUT = ("data.held_out_split=test", "log.held_out_every=2", "log.held_out_images=9")


def small_config(folder: Path, *overrides: str) -> Config:
    """A config whose dataset and run lie in `folder`."""
    places = (f"data.dir={folder / 'data'}", f"run.dir={folder / 'run'}", "run.device=cpu")
    return parse_config(SMALL, "small.yaml", (*places, *overrides))


def again(config: Config, *overrides: str) -> Config:
    """The small config of the same folder, with only these overrides."""
    return small_config(config.data.dir.parent, *overrides)


def embedded(config: Config, limit: int | None = 40) -> EmbedSummary:
    """Embed the first `limit` images of a config's source; None: all of them."""
    *_, summary = embed(EmbedOptions(config, limit=limit))
    assert isinstance(summary, EmbedSummary)
    return summary


def trained(config: Config, **options: Any) -> TrainSummary:
    """Train to the end."""
    *_, summary = train(TrainOptions(config, **options))
    assert isinstance(summary, TrainSummary)
    return summary


def sampled(checkpoint: Path | None, *prompts: str, **options: Any) -> SampleSummary:
    """Sample on the CPU to the end. None: from the checkpoint that `sana sample` finds."""
    if checkpoint is not None:
        options["checkpoint"] = checkpoint
    *_, summary = sample(SampleOptions(prompts, device="cpu", **options))
    assert isinstance(summary, SampleSummary)
    return summary


def train_set(config: Config, seed: int | None = None) -> SingleDataset:
    """A config's dataset in the order of its seed, or of `seed`."""
    return SingleDataset(Dataset(config.data.dir), config.train.seed if seed is None else seed)


def rectified_flow(config: Config, precision: str = "fp32", **changes: Any) -> RectifiedFlow:
    """A config's objective, with some keys changed."""
    return RectifiedFlow(config.objective.model_copy(update=changes), config.model.timestep_scale, precision)


def make_trainer(config: Config, images: int, precision: str = "fp32", world: World | None = None) -> Trainer:
    """A trainer at the start of a run, on the CPU."""
    data = train_set(config)
    model = build(resolve_architecture(config, data.dataset), config.train.seed, config.train.init)
    placement = Placement(torch.device("cpu"), precision, World() if world is None else world)
    return Trainer(model, Task(rectified_flow(config, precision), data), config, placement, images)


def close(generator: Iterator[object]) -> None:
    """Close the generator of a command, whose declared type is an iterator."""
    cast("Generator[object]", generator).close()


# --- contents of files ------------------------------------------------------------------------------------------------

TIMES = {"samples_per_second", "data_wait", "memory_bytes"}  # these differ between equal runs


def metrics_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without times and memory."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a step folder: averaged and raw weights, optimizer, null caption."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {
        f"{path.relative_to(folder)}:{key}": tensor
        for path in paths
        for key, tensor in load_file(path).items()
    }


def assert_same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Assert equal names and bitwise equal values."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of each file in a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as the bytes of a file of this format."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


# --- the command line -------------------------------------------------------------------------------------------------

# Refuses sockets and records each attempt, so that the command line works offline in tests. As
# in conftest.py, SANA_TESTS_BF16 decides whether the processor has bf16 arithmetic.
NO_NETWORK = """
import importlib.abc, importlib.util, os, pathlib, socket, sys
said = os.environ.get("SANA_TESTS_BF16")
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "sana_cli.runtime.device":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.cpu_has_bf16 = lambda: said == "yes"
        spec.loader.exec_module = exec_module
        return spec
if said:
    sys.meta_path.insert(0, Finder())
def refuse(*a, **k):
    pathlib.Path(__file__).with_name("attempts").touch()
    raise RuntimeError("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
"""


def invoke(*arguments: str, columns: int = 80) -> Result:
    """Run `sana ...` in this process, without colours, this many columns wide."""
    return CliRunner().invoke(
        app, arguments, prog_name="sana", env={"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}
    )


def process_environment(folder: Path) -> dict[str, str]:
    """For a process: one thread, no colours, 80 columns; offline if site/ has NO_NETWORK."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(REPOSITORY)]),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "80",
        "TERM": "dumb",
    }


def start_sana(
    folder: Path, *arguments: str, launcher: tuple[str, ...] = PYTHON_SANA
) -> subprocess.Popen[str]:
    """Start `sana ...` in `folder` as a process, with its output in pipes."""
    return subprocess.Popen(
        [*launcher, *arguments],
        cwd=folder,
        env=process_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(
    condition: Callable[[], bool],
    process: subprocess.Popen[Any] | BaseProcess | None = None,
    seconds: float = 120,
) -> None:
    """Wait until `condition` holds, which must happen while `process` runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        if isinstance(process, BaseProcess):
            assert process.is_alive(), process.exitcode
        elif process is not None:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.0005)


def child(work: Callable[[], object]) -> BaseProcess:
    """Start `work` as a process, which ends with the exit code of `sana`."""

    def process() -> None:
        torch.set_num_threads(1)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would stay ignored
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            work()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(0)

    started = multiprocessing.get_context("fork").Process(target=process, daemon=True)  # ends with the suite
    started.start()
    return started


# --- files from before keys were renamed ------------------------------------------------------------------------------


def in_old_names(content: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections of keys, each key under its name from before `RENAMED`."""
    old_of = {new: old for old, new in RENAMED.items()}
    found: dict[str, dict[str, Any]] = {}
    for section, keys in content.items():
        for key, value in keys.items():
            place, _, name = old_of.get(f"{section}.{key}", f"{section}.{key}").partition(".")
            found.setdefault(place, {})[name] = value
    return found

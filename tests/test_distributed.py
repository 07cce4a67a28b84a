"""Several processes against one: gradients, weights, checkpoints. Real processes, connected by gloo on the CPU."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # here, and not again in each of many processes: it is slow
from conftest import embedded, process_environment, small_config
from safetensors.torch import load_file, save_file

from sana_cli.commands.train import TrainOptions, TrainStart, TrainSummary, train
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime.distributed import whole, world
from sana_cli.training.batches import blocks
from sana_cli.training.trainer import Place, Trainer
from sana_cli.weights import checkpoint
from sana_cli.weights.reader import read_weights


def in_processes(count: int, work: Callable[[], Any]) -> None:
    """Do `work` in so many processes, as torchrun would start them; each must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")

    def process(rank: int) -> None:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in places.items()})
        torch.set_num_threads(1)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    children = [fork.Process(target=process, args=(rank,)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        child.kill()
    assert [child.exitcode for child in children] == [0] * count


def trainer(config: Config, images: int, here: Any = None) -> Trainer:
    dataset = Dataset(config.data.dir)
    model = config.model.model_copy(update={"sample_size": 16, "caption_channels": dataset.index["caption_dim"]})
    place = Place(torch.device("cpu"), "fp32") if here is None else Place(torch.device("cpu"), "fp32", here)
    return Trainer(model, config.train, place, dataset, images)


def gradients(config: Config, images: int, here: Any = None) -> dict[str, torch.Tensor]:
    made = trainer(config, images, here)
    made._gradients(lambda: None)
    found = {name: whole(p.grad).clone() for name, p in made.model.named_parameters() if p.grad is not None}
    made.close()
    return found


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm."""
    assert found.keys() == expected.keys()
    wrong = sum(float((found[n] - t).double().square().sum()) for n, t in expected.items())
    return (wrong / sum(float(t.double().square().sum()) for t in expected.values())) ** 0.5


def test_blocks_are_those_of_the_design() -> None:
    for images, size, processes in ((12, 3, 2), (64, 64, 1), (13, 4, 3), (5, 4, 4), (1, 8, 2)):
        shares = [blocks(images, size, rank, processes) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1  # all go the same number of rounds
        rounds = [share[m] for m in range(len(shares[0])) for share in shares]  # block m * processes + r
        covered = [image for block in rounds if not block.padding for image in range(block.first, block.first + block.count)]
        assert covered == list(range(images))
        assert all(block.count <= size for block in rounds)


@pytest.mark.parametrize("overrides", [(), ("model.dropout=0.2", "train.activation_checkpointing=true")])
def test_gradients_do_not_depend_on_how_a_step_is_cut(config: Config, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    def cut(size: int, *more: str) -> Config:
        return small_config(config.data.dir.parent, f"train.batch_size={size}", "model.num_layers=2", *overrides, *more)

    images = 12
    expected = gradients(cut(images), images)
    for size in (6, 5, 1):  # 5: a ragged last micro-batch
        assert error(gradients(cut(size), images), expected) < 1e-6, size
    for processes, size, kind in ((2, 6, "ddp"), (2, 5, "ddp"), (4, 5, "ddp"), (2, 5, "fsdp"), (4, 2, "fsdp")):

        def work(size: int = size, kind: str = kind) -> None:
            with world() as here:
                found = gradients(cut(size, f"train.parallel={kind}"), images, here)
                save_file(found, tmp_path / f"{here.rank}.safetensors")

        in_processes(processes, work)
        for rank in range(processes):
            assert error(load_file(tmp_path / f"{rank}.safetensors"), expected) < 1e-6, (processes, size, kind, rank)


def run(config: Config, **options: Any) -> TrainSummary:
    *_, summary = train(TrainOptions(config, **options))
    assert isinstance(summary, TrainSummary)
    return summary


def assert_near(one: Path, two: Path, tolerance: float = 2e-5) -> None:
    for name in ("transformer/diffusion_pytorch_model.safetensors", "training/raw.safetensors", "training/optimizer.safetensors"):
        assert error(load_file(one / name), load_file(two / name)) < tolerance, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_runs_do_not_depend_on_the_number_of_processes(config: Config, optimizer: str) -> None:
    def cut(name: str, size: int, accumulate: int, *more: str) -> Config:
        places = (f"run.dir={config.run.dir}-{name}", f"train.batch_size={size}", f"train.accumulate={accumulate}")
        rules = ("train.keep=9", "train.save_every=1", "train.sample_every=2", f"train.optimizer={optimizer}", "train.lr=1e-3")
        held_out = ("data.held_out_split=test", "train.held_out_every=2", "train.held_out_images=7")
        return small_config(config.data.dir.parent, *places, *rules, *held_out, *more)

    embedded(cut("alone", 8, 1))
    alone = run(cut("alone", 8, 1))
    lines = [json.loads(line) for line in (alone.run / "metrics.jsonl").read_text().splitlines()]
    assert "held_out_loss" in lines[1]
    for name, processes, size, accumulate, kind in (
        ("two", 2, 4, 1, "ddp"), ("two-sharded", 2, 2, 2, "fsdp"), ("four", 4, 2, 1, "ddp"), ("four-sharded", 4, 2, 1, "fsdp"),
    ):  # fmt: skip
        there = cut(name, size, accumulate, f"train.parallel={kind}")
        in_processes(processes, lambda there=there: run(there))  # type: ignore[misc]
        for folder in checkpoint.steps(alone.run):
            # Muon makes its matrices orthogonal in bf16
            assert_near(there.run.dir / "checkpoints" / folder.name, folder, 2e-5 if optimizer == "adamw" else 1e-3)
        found = [json.loads(line) for line in (there.run.dir / "metrics.jsonl").read_text().splitlines()]
        # as far as a loss tells of weights that Muon's bf16 products keep apart by 1e-3
        rounding = 1e-6 if optimizer == "adamw" else 1e-5
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in lines], rel=rounding)
        assert found[1]["held_out_loss"] == pytest.approx(lines[1]["held_out_loss"], rel=1e-5)
        assert sorted(path.name for path in (there.run.dir / "samples").iterdir()) == [f"step-00000{n}.png" for n in (0, 2, 4)]


@pytest.mark.parametrize(("first", "second"), [((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (4, "fsdp")), ((4, "ddp"), (2, "fsdp"))])
def test_any_number_of_processes_resumes(config: Config, first: tuple[int, str], second: tuple[int, str]) -> None:
    """A step keeps its images: with the same config, another number of processes only cuts it otherwise."""
    straight = small_config(
        config.data.dir.parent, f"run.dir={config.run.dir}-straight", "train.batch_size=6", "train.keep=9", "train.lr=1e-3"
    )
    run(straight)

    def part(processes: int, kind: str, steps: int) -> Config:
        size = 6 // first[0]  # a step of the first part: 6 images, or with four processes 4
        return small_config(
            config.data.dir.parent, f"train.parallel={kind}", f"train.batch_size={size}", f"train.steps={steps}", "train.schedule=constant", "train.lr=1e-3"
        )  # fmt: skip

    straight = small_config(
        config.data.dir.parent, f"run.dir={config.run.dir}-constant", f"train.batch_size={6 // first[0] * first[0]}", "train.schedule=constant", "train.lr=1e-3"
    )  # fmt: skip
    expected = run(straight)
    for (processes, kind), steps in ((first, 2), (second, 4)):
        there = part(processes, kind, steps)
        if processes == 1:
            summary = run(there, resume="auto")
            assert summary.steps == steps
        else:
            in_processes(processes, lambda there=there: run(there, resume="auto"))  # type: ignore[misc]
    assert_near(config.run.dir / "checkpoints" / "step-000004", expected.checkpoint)


def test_another_step_is_refused_and_the_same_cut_otherwise_is_not(config: Config) -> None:
    run(small_config(config.data.dir.parent, "train.steps=2"))
    with pytest.raises(SanaError, match=r"train\.batch_size: the run's steps have 4 images, and 2 x 1 are 2"):
        run(small_config(config.data.dir.parent, "train.batch_size=2"), resume="auto")
    start, *_ = train(
        TrainOptions(small_config(config.data.dir.parent, "train.batch_size=1", "train.accumulate=4"), resume="auto")
    )
    assert isinstance(start, TrainStart)
    assert (start.step, start.plan.batch, start.plan.micro_batches) == (2, 4, 4)


def test_one_problem_is_told_once(config: Config, tmp_path: Path) -> None:
    """What goes wrong in one process ends all, with its message at the first."""

    def work() -> None:
        def alone() -> None:
            with world() as here, here.together():
                if here.rank == 1:
                    raise SanaError("no dataset in data", "make one")

        with pytest.raises(SanaError) as caught:
            alone()
        assert str(caught.value) == "process 1 of 2: no dataset in data\nmake one"
        assert caught.value.told == (os.environ["RANK"] != "0")

    in_processes(2, work)


def torchrun(folder: Path, processes: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, "-m", "sana_cli", "train", "--config", "small.yaml", *arguments],
        cwd=folder, env=process_environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_torchrun_speaks_with_one_voice_and_saves_when_it_is_stopped(config: Config, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(config.to_yaml())
    done = torchrun(tmp_path, 2)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert out == f"{config.run.dir}/checkpoints/step-000004\n"
    assert err.count("parameters") == err.count("step 4: checkpoint") == err.count("trained steps 1 to 4") == 1
    assert "4 processes" not in err

    long = ("--set", f"run.dir={tmp_path / 'long'}", "--set", "train.steps=100000", "--set", "train.save_every=100000")
    running = torchrun(tmp_path, 2, *long)
    lines = tmp_path / "long" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (lines.is_file() and len(lines.read_text().splitlines()) > 3):
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert err.count("error: stopped after step") == 1
    folder, skipped = checkpoint.newest_step(tmp_path / "long", hashes=True)
    assert folder is not None
    assert skipped == []
    assert checkpoint.step_of(folder) >= 4
    assert read_weights(folder / "transformer").tensors

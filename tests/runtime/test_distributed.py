"""Several real processes on the CPU against one: gradients, weights, checkpoints."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp  # slow, so imported once here and not in each process
from helpers import again, embedded, make_trainer, metrics_lines, trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_cli.config.keys import Config
from sana_cli.errors import SanaError
from sana_cli.runtime.distributed import World, whole, world
from sana_cli.weights import checkpoint


def in_processes(count: int, work: Callable[[], object]) -> None:
    """Run `work` in this many processes, as torchrun would start them; each must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")

    def process(rank: int) -> None:
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
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


def gradients(config: Config, images: int, here: World | None = None) -> dict[str, Tensor]:
    """Gradients of the first step."""
    trainer = make_trainer(config, images, world=here)
    trainer._gradients(lambda: None)
    found = {
        name: whole(p.grad).clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }
    trainer.close()
    return found


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference, relative to the norm."""
    assert found.keys() == expected.keys()
    wrong = sum(float((found[n] - t).double().square().sum()) for n, t in expected.items())
    right = sum(float(t.double().square().sum()) for t in expected.values())
    return float((wrong / right) ** 0.5)


@pytest.mark.parametrize("overrides", [(), ("train.activation_checkpointing=true",)])
def test_gradients_do_not_depend_on_how_a_step_is_cut(
    config: Config, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    def cut(size: int, *more: str) -> Config:
        return again(config, f"train.batch_size={size}", "model.num_layers=2", *overrides, *more)

    images = 12
    expected = gradients(cut(images), images)
    for size in (6, 5, 1):  # 5: a smaller last micro-batch
        assert error(gradients(cut(size), images), expected) < 1e-6, size
    for processes, size, kind in (
        (2, 6, "ddp"),
        (2, 5, "ddp"),
        (4, 5, "ddp"),
        (2, 5, "fsdp"),
        (4, 2, "fsdp"),
    ):

        def work(size: int = size, kind: str = kind) -> None:
            with world() as here:
                found = gradients(cut(size, f"train.parallel={kind}"), images, here)
                save_file(found, tmp_path / f"{here.rank}.safetensors")

        in_processes(processes, work)
        for rank in range(processes):
            found = load_file(tmp_path / f"{rank}.safetensors")
            assert error(found, expected) < 1e-6, (processes, size, kind, rank)


def assert_near(one: Path, two: Path, tolerance: float = 5e-5) -> None:
    names = (
        "transformer/diffusion_pytorch_model.safetensors",
        "training/raw.safetensors",
        "training/optimizer.safetensors",
    )
    for name in names:
        assert error(load_file(one / name), load_file(two / name)) < tolerance, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_runs_do_not_depend_on_the_number_of_processes(config: Config, optimizer: str) -> None:
    def cut(name: str, size: int, accumulate: int, *more: str) -> Config:
        return again(
            config, f"run.dir={config.run.dir}-{name}", f"train.batch_size={size}",
            f"train.accumulate={accumulate}", "save.keep=9", "save.every=1", "log.sample_every=2",
            f"optim.optimizer={optimizer}", "optim.lr=1e-3",
            "data.held_out_split=test", "log.held_out_every=2", "log.held_out_images=7", *more,
        )  # fmt: skip

    embedded(cut("alone", 8, 1))
    alone = trained(cut("alone", 8, 1))
    lines = metrics_lines(alone.run)
    assert "held_out_loss" in lines[1]
    for name, processes, size, accumulate, kind in (
        ("two", 2, 4, 1, "ddp"),
        ("two-sharded", 2, 2, 2, "fsdp"),
        ("four", 4, 2, 1, "ddp"),
        ("four-sharded", 4, 2, 1, "fsdp"),
    ):
        there = cut(name, size, accumulate, f"train.parallel={kind}")
        in_processes(processes, lambda there=there: trained(there))  # type: ignore[misc]
        for folder in checkpoint.steps(alone.run):
            # Muon orthogonalises its matrices in bf16
            assert_near(
                there.run.dir / "checkpoints" / folder.name, folder, 2e-5 if optimizer == "adamw" else 1e-3
            )
        found = metrics_lines(there.run.dir)
        # Muon's bf16 products let weights differ by 1e-3, so losses differ slightly
        rounding = 1e-6 if optimizer == "adamw" else 1e-5
        assert [line["loss"] for line in found] == pytest.approx(
            [line["loss"] for line in lines], rel=rounding
        )
        assert found[1]["held_out_loss"] == pytest.approx(lines[1]["held_out_loss"], rel=1e-5)
        grids = sorted(path.name for path in (there.run.dir / "samples").iterdir())
        assert grids == [f"step-00000{n}.png" for n in (0, 2, 4)]


@pytest.mark.parametrize(
    ("first", "second"), [((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (4, "fsdp")), ((4, "ddp"), (2, "fsdp"))]
)
def test_any_number_of_processes_resumes(
    config: Config, first: tuple[int, str], second: tuple[int, str]
) -> None:
    """A step keeps its images; another number of processes only splits it differently."""
    size = 6 // first[0]  # a step of the first part has 6 images, or 4 with four processes
    rules = ("optim.schedule=constant", "optim.lr=1e-3")
    expected = trained(
        again(config, f"run.dir={config.run.dir}-straight", f"train.batch_size={size * first[0]}", *rules)
    )
    for (processes, kind), steps in ((first, 2), (second, 4)):
        there = again(
            config, f"train.parallel={kind}", f"train.batch_size={size}", f"train.steps={steps}", *rules
        )
        if processes == 1:
            assert trained(there, resume="auto").steps == steps
        else:
            in_processes(processes, lambda there=there: trained(there, resume="auto"))  # type: ignore[misc]
    assert_near(config.run.dir / "checkpoints" / "step-000004", expected.checkpoint)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_do_not_depend_on_the_number_of_processes(config: Config, kind: str) -> None:
    """Sharded or copied: weights, average, optimizer, movement, the file for diffusers, and a resume."""
    base = config.run.dir.with_name("base")
    trained(again(config, "train.steps=2", "optim.lr=0.02", f"run.dir={base}"))

    def cut(name: str, size: int, *more: str) -> Config:
        return again(
            config, f"run.dir={config.run.dir}-{name}", f"train.batch_size={size}", f"train.init_from={base}",
            f"adapter.kind={kind}", "adapter.rank=2", "optim.lr=1e-3", "save.every=2", "log.sample_every=4", *more,
        )  # fmt: skip

    alone = trained(cut("alone", 6))
    for parallel in ("ddp", "fsdp"):
        there = cut(parallel, 3, f"train.parallel={parallel}", "train.steps=2", "optim.warmup_steps=1")
        in_processes(2, lambda there=there: trained(there))  # type: ignore[misc]
        longer = cut(parallel, 3, f"train.parallel={parallel}")
        in_processes(2, lambda longer=longer: trained(longer, resume="auto"))  # type: ignore[misc]
        last = there.run.dir / "checkpoints" / "step-000004"
        names = ("pytorch_lora_weights", "training/raw", "training/average", "training/optimizer")
        for name in names:
            one, two = (load_file(folder / f"{name}.safetensors") for folder in (last, alone.checkpoint))
            assert error(one, two) < 2e-5, (parallel, name)
        found, expected = metrics_lines(there.run.dir)[-1], metrics_lines(alone.run)[-1]
        assert found["adapter_movement"] == pytest.approx(expected["adapter_movement"], rel=1e-4)
        assert (there.run.dir / "samples" / "step-000004.png").is_file()


def test_a_problem_of_one_process_is_reported_once() -> None:
    """A problem in one process ends all of them, and only rank 0 reports it."""

    def work() -> None:
        def alone() -> None:
            with world() as here, here.together():
                if here.rank == 1:
                    raise SanaError("no dataset in data", "make one")

        with pytest.raises(SanaError) as caught:
            alone()
        assert str(caught.value) == "process 1 of 2: no dataset in data\nmake one"
        assert caught.value.silent == (os.environ["RANK"] != "0")

    in_processes(2, work)

"""Training in little memory: bf16 weights, CAME in several processes, an average on the CPU."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    again,
    assert_same_tensors,
    checkpoint_tensors,
    child,
    make_trainer,
    metrics_lines,
    trained,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sana_cli.commands.train import TrainOptions, TrainStep, plan, train
from sana_cli.config.keys import Config
from sana_cli.errors import SanaError
from sana_cli.model import is_matrix
from sana_cli.runtime.distributed import World
from sana_cli.training.batches import cut as cut_into_batches
from sana_cli.training.trainable import Trainable, WeightAverage
from sana_cli.training.trainer import most_micro_batches

BF16 = ("train.weights=bf16", "train.precision=bf16")


@pytest.fixture(autouse=True)
def has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this processor had bf16 arithmetic, so that nothing is refused or computed in float32."""
    monkeypatch.setattr("sana_cli.runtime.device.cpu_has_bf16", lambda: True)


def cut(config: Config, name: str, *overrides: str) -> Config:
    """A config with a run directory of its own."""
    return again(config, f"run.dir={config.run.dir}-{name}", *overrides)


def in_two_processes(work: Callable[[], object]) -> None:
    """Run `work` as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> Callable[[], object]:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}

        def start() -> None:
            os.environ.update({key: str(value) for key, value in places.items()}, MASTER_ADDR="127.0.0.1")
            try:
                work()
            except BaseException as error:
                raise SystemExit(1) from error

        return start

    children = [child(process(rank)) for rank in range(2)]
    for one in children:
        one.join(120)
        one.kill()
    assert [one.exitcode for one in children] == [0, 0]


# --- bf16 weights -------------------------------------------------------------------------------------


def test_bf16_weights_compute_what_their_float32_copies_do(config: Config) -> None:
    """To the bit: autocast rounds float32 weights too. Gradients are bf16 from the start."""
    half, full = make_trainer(again(config, *BF16), 4, "bf16"), make_trainer(config, 4, "bf16")
    for name, parameter in full.model.named_parameters():
        own = half.model.get_parameter(name)
        assert own.dtype == (torch.bfloat16 if is_matrix(name, parameter) else torch.float32)
        parameter.data.copy_(own)
    losses, expected = (trainer._gradients(lambda: None)[0] for trainer in (half, full))
    assert (losses == expected).all()
    for name, parameter in full.model.named_parameters():
        gradient = half.model.get_parameter(name).grad
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.equal(gradient, parameter.grad.to(gradient.dtype)), name
    norms = [float(nn.utils.clip_grad_norm_(trainer.parameters, 1.0)) for trainer in (half, full)]
    assert norms[0] == pytest.approx(norms[1], rel=5e-3)
    half.close()
    full.close()


def test_gradients_of_many_micro_batches_are_added_in_bf16_with_little_loss(config: Config) -> None:
    """The error is far below the difference that other images would make."""

    def gradients(*overrides: str) -> dict[str, Tensor]:
        trainer = make_trainer(again(config, "train.batch_size=1", *overrides), 32, "bf16")
        for parameter in trainer.model.parameters():
            parameter.data.copy_(parameter.data.bfloat16())  # equal weights
        trainer._gradients(lambda: None)
        trainer.close()
        return {name: p.grad.float() for name, p in trainer.model.named_parameters() if p.grad is not None}

    exact, found = gradients(), gradients(*BF16)
    wrong = sum(float((found[name] - gradient).square().sum()) for name, gradient in exact.items())
    assert (wrong / sum(float(gradient.square().sum()) for gradient in exact.values())) ** 0.5 < 0.01


def test_more_micro_batches_than_bf16_gradients_can_add_up_are_refused(config: Config) -> None:
    """Before a run, and by a trainer, whose images may be those of a run that goes on."""
    too_many = "train.weights: bf16 gradients add up at most 256 micro-batches, and a step may have 257"
    settings = ("train.batch_size=1", *BF16)
    for call in (trained, lambda config: plan(TrainOptions(config))):
        with pytest.raises(SanaError, match=too_many):
            call(again(config, *settings, "train.accumulate=257"))
    plan(TrainOptions(again(config, *settings, "train.accumulate=256")))
    plan(TrainOptions(again(config, "train.accumulate=257")))
    with pytest.raises(SanaError, match=too_many):
        make_trainer(again(config, *settings), 257, "bf16")
    make_trainer(again(config, *settings, "train.batch_size=2"), 257, "bf16").close()


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    batch_size=st.integers(1, 9),
    processes=st.integers(1, 4),
)
def test_the_most_micro_batches_of_a_step(counts: list[int], batch_size: int, processes: int) -> None:
    numbers = np.repeat(np.arange(len(counts)), counts)
    found = len(cut_into_batches(numbers, batch_size, World(0, processes)))
    most = most_micro_batches(len(numbers), len(counts), batch_size, processes)
    assert found <= most <= found + len(counts)
    if len(counts) == 1:
        assert found == most
    assert most_micro_batches(len(numbers), 99, batch_size, processes) <= -(-len(numbers) // processes)


@pytest.mark.parametrize("optimizer", ["adamw", "came"])
def test_a_run_with_bf16_weights_is_resumed_to_the_bit(config: Config, optimizer: str) -> None:
    settings = (*BF16, f"optim.optimizer={optimizer}", "optim.lr=1e-3", "train.accumulate=2")
    straight = trained(cut(config, "straight", *settings))
    there = cut(config, "cut", *settings)
    done = [0]

    def until_the_third() -> None:
        for step in train(TrainOptions(there, stop=lambda: 15 if done[-1] == 3 else None)):
            done.append(step.step if isinstance(step, TrainStep) else 0)

    with pytest.raises(SanaError, match="stopped after step 3"):
        until_the_third()
    resumed = trained(there, resume="auto")
    assert resumed.first_step == 3
    found = checkpoint_tensors(straight.checkpoint)
    assert_same_tensors(checkpoint_tensors(resumed.checkpoint), found)
    types: dict[str, set[torch.dtype]] = {}
    for name, tensor in found.items():
        file, _, key = name.partition(":")
        parameter = key.partition(".")[2] if "optimizer" in file else key
        if parameter.endswith("to_q.weight"):
            types.setdefault(key.partition(".")[0] if "optimizer" in file else Path(file).name, set()).add(
                tensor.dtype
            )
    assert types["raw.safetensors"] == {torch.bfloat16}
    assert types["diffusion_pytorch_model.safetensors"] == {torch.float32}, "the average"
    assert types["exp_avg"] == ({torch.bfloat16} if optimizer == "came" else {torch.float32})
    other = trained(cut(config, "seed", *settings, "train.seed=1"))
    assert any(not torch.equal(found[name], t) for name, t in checkpoint_tensors(other.checkpoint).items())


def test_two_processes_move_bf16_weights_as_one_does(config: Config) -> None:
    """To the bit, if one takes their micro-batches: sums of two gradients are rounded alike."""
    settings = (*BF16, "optim.optimizer=came", "optim.lr=1e-3", "train.batch_size=2")
    alone = trained(cut(config, "alone", *settings, "train.accumulate=2"))
    there = cut(config, "two", *settings)
    in_two_processes(lambda: trained(there))
    assert_same_tensors(
        checkpoint_tensors(there.run.dir / "checkpoints" / "step-000004"),
        checkpoint_tensors(alone.checkpoint),
    )


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("train.weights=bf16", "train.precision=fp32"),
            "train.weights: bf16 needs train.precision bf16 or auto",
        ),
        ((*BF16, "train.parallel=fsdp"), "train.weights: bf16 cannot be sharded"),
        ((*BF16, "adapter.kind=lora", "train.init_from=x"), "train.weights: adapters are few, and stay fp32"),
        (("optim.ema_device=cpu", "train.parallel=fsdp"), "optim.ema_device: shards of the average"),
    ],
)
def test_what_does_not_go_together_is_refused(
    config: Config, overrides: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(SanaError, match=problem):
        again(config, *overrides)


def test_bf16_weights_are_refused_without_bf16_arithmetic(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana_cli.runtime.device.cpu_has_bf16", lambda: False)
    for precision in ("auto", "bf16"):
        with pytest.raises(
            SanaError, match="train.weights: bf16 needs a device with native bf16, and cpu has none"
        ):
            trained(again(config, "train.weights=bf16", f"train.precision={precision}"))


# --- CAME in several processes ------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_came_does_not_depend_on_the_number_of_processes(config: Config, parallel: str) -> None:
    """Also with shards: means over rows and columns are those of the whole matrix."""
    settings = ("optim.optimizer=came", "optim.lr=1e-4", "log.sample_every=4")
    alone = trained(cut(config, "alone", *settings))
    there = cut(config, "two", *settings, "train.batch_size=2", f"train.parallel={parallel}")
    in_two_processes(
        lambda: trained(there.model_copy(update={"train": there.train.model_copy(update={"steps": 2})}))
    )
    in_two_processes(lambda: trained(there, resume="auto"))
    found = checkpoint_tensors(there.run.dir / "checkpoints" / "step-000004")
    for name, tensor in checkpoint_tensors(alone.checkpoint).items():
        assert found[name].shape == tensor.shape
        if name.endswith("attn2.to_k.bias"):
            continue  # its gradient is zero but for rounding, and the update is as large as any
        size = float(tensor.double().norm())
        assert float((found[name] - tensor).double().norm()) <= 1e-4 * size + 1e-9, name
    losses = [[line["loss"] for line in metrics_lines(run)] for run in (there.run.dir, alone.run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- the average --------------------------------------------------------------------------------------


def test_an_average_on_the_cpu_is_the_same_average(config: Config) -> None:
    settings = (*BF16, "optim.lr=1e-2", "data.held_out_split=null")
    runs = [trained(cut(config, place, *settings, f"optim.ema_device={place}")) for place in ("same", "cpu")]
    assert_same_tensors(*(checkpoint_tensors(run.checkpoint) for run in runs))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_average_elsewhere_is_moved_while_it_is_in_use(config: Config, device: str) -> None:
    """To the device of the weights, in their type. At home the average is untouched."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    trainer = make_trainer(again(config, *BF16), 4, "bf16")
    model = trainer.model.to(device)
    average = WeightAverage(model, Trainable(), home=torch.device("cpu"))
    model.proj_out.weight.data.zero_()
    average.update(0.5)
    before = {name: parameter.clone() for name, parameter in average.model.named_parameters()}
    assert {(p.device.type, p.dtype) for p in before.values()} == {("cpu", torch.float32)}
    with average.in_use() as used:
        for name, parameter in used.named_parameters():
            weight = model.get_parameter(name)
            assert (parameter.device, parameter.dtype) == (weight.device, weight.dtype)
            assert torch.equal(parameter, before[name].to(weight))
    for name, parameter in average.model.named_parameters():
        assert (parameter.device.type, parameter.dtype) == ("cpu", torch.float32)
        assert torch.equal(parameter, before[name])
    trainer.close()


def test_the_average_of_bf16_weights_is_kept_in_float32(config: Config) -> None:
    """Steps of the average are smaller than bf16 can show."""
    trainer = make_trainer(again(config, *BF16), 4, "bf16")
    weight, average = trainer.model.proj_out.weight, trainer.average.model.proj_out.weight
    start = average.clone()
    with torch.no_grad():
        weight.add_(0.01)
    moved = weight.float() - start
    trainer.average.update(0.999)
    torch.testing.assert_close(average - start, 0.001 * moved, rtol=1e-2, atol=1e-8)
    trainer.close()

"""Schedules, parameter groups, CAME, and bf16 weights that are rounded at random."""

import math

import numpy as np
import pytest
import torch
from helpers import again
from torch import Tensor, nn

from sana_cli.config.keys import Config, OptimConfig
from sana_cli.model import build, is_matrix
from sana_cli.training import optim

CPU = torch.device("cpu")


def test_schedules() -> None:
    settings = OptimConfig(warmup_steps=10, schedule="cosine", ema_decay=0.998)
    factors = [optim.lr_factor(settings, step, 110) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[-1] < 0.001
    linear = settings.model_copy(update={"schedule": "linear"})
    assert optim.lr_factor(linear, 60, 110) == pytest.approx(0.5)
    assert optim.lr_factor(settings.model_copy(update={"schedule": "constant"}), 109, 110) == 1
    assert [optim.average_decay(0.998, step) for step in (0, 8, 10**6)] == pytest.approx([0.1, 0.5, 0.998])


def test_weight_decay_spares_biases_norms_and_tables(config: Config) -> None:
    model = build(config.model.resolved(16, 8))
    for kind in ("adamw", "muon", "came"):
        settings = again(config, f"optim.optimizer={kind}").optim
        made = optim.Optimizer(dict(model.named_parameters()), settings, torch.device("cpu"))
        groups = []
        for group in made.param_groups:
            parameters = group["params"]
            assert isinstance(parameters, list)
            groups.append({made.names[p] for p in parameters})
        assert [group["weight_decay"] for group in made.param_groups] == [0.05, 0.0, 0.05][: len(groups)]
        assert {
            n for n in made.names.values() if n.endswith(("bias", "scale_shift_table", "norm.weight"))
        } == groups[1]
        assert set().union(*groups) == {name for name, _ in model.named_parameters()}
        if kind == "muon":
            attentions = [
                f"{attn}.{part}"
                for attn in ("attn1", "attn2")
                for part in ("to_q", "to_k", "to_v", "to_out.0")
            ]
            parts = (*attentions, "ff.conv_inverted", "ff.conv_point")
            assert groups[2] == {f"transformer_blocks.0.{part}.weight" for part in parts}


# --- CAME ---------------------------------------------------------------------------------------------


def drawn(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(
    start: Tensor, steps: int, settings: OptimConfig, shape: tuple[int, ...] | None = None, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """A parameter after steps with random gradients, and its state; of another shape where one is given."""
    parameter = nn.Parameter(start.clone().reshape(shape or start.shape))
    optimizer = optim.Optimizer({"transformer_blocks.0.w": parameter}, settings, CPU)
    for step in range(steps):
        gradient = drawn(tuple(start.shape), 100 + step, scale)
        parameter.grad = gradient.reshape(parameter.shape).to(parameter.dtype)
        optimizer.step(settings.lr * (step + 1) / steps)
    return parameter.detach(), dict(optimizer.state())


def came_by_the_paper(start: np.ndarray, steps: int, settings: OptimConfig) -> np.ndarray:
    """Algorithm 2 of arXiv 2307.02047 in float64, as the authors' code has it: a threshold of 1, no eps in U."""
    (b1, b2), b3, shape = settings.betas, 0.9999, start.shape
    weight, average = start.astype(np.float64), np.zeros(shape)
    memory: dict[str, np.ndarray] = {}

    def estimated(kind: str, squares: np.ndarray, beta: float) -> np.ndarray:
        for axis in (1, 0):
            key = f"{kind}{axis}"
            memory[key] = beta * memory.get(key, 0) + (1 - beta) * squares.mean(axis)
        rows, columns = memory[f"{kind}1"], memory[f"{kind}0"]
        return np.outer(rows, columns) / rows.mean()

    for step in range(steps):
        gradient = drawn(shape, 100 + step).double().numpy()
        square = gradient**2 + 1e-30
        if len(shape) == 2:
            update = gradient / np.sqrt(estimated("v", square, b2))
        else:
            memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * square
            update = gradient / np.sqrt(memory["v"])
        update /= max(1, math.sqrt((update**2).mean()))
        average = b1 * average + (1 - b1) * update
        lr = settings.lr * (step + 1) / steps
        trusted = average
        if len(shape) == 2:
            trusted = average / np.sqrt(estimated("s", (update - average) ** 2 + 1e-16, b3))
            weight = weight * (1 - lr * settings.weight_decay)
        weight = weight - lr * trusted
    return weight


CAME = OptimConfig(optimizer="came", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1)


@pytest.mark.parametrize("shape", [(24, 40), (1, 7), (65,)])
def test_came_is_that_of_its_paper(shape: tuple[int, ...]) -> None:
    start = drawn(shape, 0)
    found, _ = moved(start, 50, CAME)
    expected = came_by_the_paper(start.numpy(), 50, CAME)
    travelled = np.abs(expected - start.numpy()).max()
    assert travelled > 0.001
    assert np.abs(found.numpy() - expected).max() < 1e-5 * travelled + 1e-6


def test_came_takes_a_pointwise_convolution_for_its_matrix_and_a_depthwise_one_for_its_numbers() -> None:
    start = drawn((24, 9), 0)
    as_matrix, state = moved(start, 5, CAME)
    as_convolution, same_state = moved(start, 5, CAME, (24, 9, 1, 1))
    assert torch.equal(as_convolution.flatten(1), as_matrix)
    assert {name.split(".")[0]: tensor.shape for name, tensor in state.items()} == {
        "exp_avg": (24, 9), "exp_avg_sq_row": (24,), "exp_avg_sq_col": (9,),
        "exp_avg_res_row": (24,), "exp_avg_res_col": (9,),
    }  # fmt: skip
    assert all(torch.equal(same_state[name], tensor) for name, tensor in state.items())
    plain = CAME.model_copy(update={"weight_decay": 0.0})
    as_depthwise, state = moved(start, 5, plain, (24, 1, 3, 3))
    as_vector, _ = moved(start.flatten(), 5, plain)
    torch.testing.assert_close(as_depthwise.flatten(), as_vector)
    assert {name.split(".")[0] for name in state} == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "muon", "came"])
def test_the_bytes_of_the_state_are_counted(config: Config, kind: str, weights: torch.dtype) -> None:
    model = build(config.model.resolved(16, 8))
    for name, parameter in model.named_parameters():
        if is_matrix(name, parameter):
            parameter.data = parameter.data.to(weights)
        parameter.grad = torch.zeros_like(parameter)
    settings = again(config, f"optim.optimizer={kind}").optim
    named = dict(model.named_parameters())
    made = optim.Optimizer(named, settings, CPU)
    made.step(0.0)
    state = list(made.state())
    assert sum(t.numel() * t.element_size() for _, t in state) == optim.optimizer_bytes(
        named.items(), settings
    )
    half = {name.partition(".")[0] for name, tensor in state if tensor.dtype == torch.bfloat16}
    assert half == ({"exp_avg"} if kind == "came" and weights == torch.bfloat16 else set())


# --- bf16 weights -------------------------------------------------------------------------------------


def rounded(tensor: Tensor, key: str) -> Tensor:
    into = torch.empty(tensor.shape, dtype=torch.bfloat16)
    optim.round_at_random(tensor, into, key)
    return into


def test_rounding_at_random_gives_a_neighbour_and_is_right_on_average() -> None:
    values = torch.cat([drawn((200,), 0), drawn((200,), 1, 1e-30), drawn((200,), 2, 1e30)])
    down = (values.view(torch.int32) & -0x10000).view(torch.float32)  # towards zero
    up = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    many = torch.stack([rounded(values, str(key)).float() for key in range(4000)])
    assert ((many == down) | (many == up)).all()
    share = (many == up).double().mean(0)
    wanted = ((values - down) / (up - down)).double()
    deviation = (share - wanted) / (wanted * (1 - wanted) / 4000).sqrt().clamp_min(1 / 4000)
    assert deviation.abs().max() < 5
    assert float(deviation.square().mean()) == pytest.approx(1, abs=0.25)
    exact = values.bfloat16()
    assert torch.equal(rounded(exact.float(), "any"), exact), "what needs no rounding stays"


def test_what_is_not_finite_stays_so() -> None:
    """NaNs of any payload too: noise would carry from the lower half of some into the sign."""
    payloads = [0x7FC00000, 0x7FFFFFFF, 0x7FFF8000, 0x7F800001, 0x7F80FFFF, 0x7FBFFFFF]
    bits = torch.tensor([*payloads, *(payload - (1 << 31) for payload in payloads)], dtype=torch.int32)
    infinities = torch.tensor([math.inf, -math.inf])
    for key in range(50):
        assert rounded(bits.view(torch.float32), str(key)).isnan().all()
        assert torch.equal(rounded(infinities, str(key)).float(), infinities)


def test_random_bits_depend_on_the_key_and_the_index_alone() -> None:
    values = drawn((3, optim.CHUNK // 2 + 7), 0)  # more than is rounded at once
    first = rounded(values, "0 1 name")
    assert torch.equal(rounded(values.T.contiguous().T, "0 1 name"), first), "in whatever order of memory"
    assert torch.equal(rounded(values.flatten()[:1000], "0 1 name"), first.flatten()[:1000])
    for key in ("0 2 name", "1 1 name", "0 1 other"):
        different = (rounded(values, key) != first).float().mean()
        assert float(different) == pytest.approx(1 / 3, abs=0.01), "2 p (1 - p) for a uniform p"
    keys = ((0, 0x1D872B41), (1, -0x2545F491), (99, 0x6C8E9CF5))
    noise = [optim._hash(torch.arange(1 << 16, dtype=torch.int32), *key).double() for key in keys]
    for one in noise:
        assert float(one.mean()) == pytest.approx(2**15, rel=0.01)
    correlations = torch.corrcoef(torch.stack([*noise, *(one.roll(1) for one in noise)]))
    assert float((correlations - torch.eye(6)).abs().max()) < 0.02


@pytest.mark.parametrize("kind", ["adamw", "muon", "came"])
def test_small_updates_move_bf16_weights_as_they_move_float32_ones(kind: str) -> None:
    """Updates of a hundredth of a weight's last place: rounded to nearest, each of them is lost."""
    start, steps = (drawn((64, 48), 0, 0.1) + 0.25).bfloat16().float(), 200
    lr = 2e-7 if kind == "came" else 1e-5  # CAME goes far where gradients agree
    settings = OptimConfig(optimizer=kind, lr=lr, betas=(0.9, 0.999), weight_decay=0)  # type: ignore[arg-type]
    direction = drawn((64, 48), 1).sign()

    def walked(dtype: torch.dtype) -> Tensor:
        parameter = nn.Parameter(start.to(dtype, copy=True))
        optimizer = optim.Optimizer({"transformer_blocks.0.w": parameter}, settings, CPU)
        for step in range(steps):
            parameter.grad = (direction + drawn((64, 48), 100 + step, 0.1)).to(dtype)
            optimizer.step(settings.lr)
        return parameter.detach().float() - start

    exact, found = walked(torch.float32), walked(torch.bfloat16)
    assert float((exact.abs() / start.abs()).mean()) < 0.02
    along = float((found * exact).sum() / exact.square().sum())
    assert along == pytest.approx(1, abs=0.05)
    one_update = exact / steps
    nearest = start.bfloat16()
    for _ in range(steps):
        nearest = (nearest.float() + one_update).bfloat16()
    lost = (nearest.float() - start) * exact
    assert float(lost.sum() / exact.square().sum()) < 0.2


@pytest.mark.parametrize("kind", ["adamw", "muon", "came"])
def test_the_state_of_bf16_weights_goes_on_to_the_bit(kind: str) -> None:
    settings = OptimConfig(optimizer=kind, lr=1e-3)  # type: ignore[arg-type]

    def made(start: dict[str, Tensor]) -> tuple[dict[str, nn.Parameter], optim.Optimizer]:
        named = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
        return named, optim.Optimizer(named, settings, CPU, seed=3)

    def go(named: dict[str, nn.Parameter], optimizer: optim.Optimizer, steps: range) -> None:
        for step in steps:
            for seed, parameter in enumerate(named.values()):
                parameter.grad = drawn(tuple(parameter.shape), 10 * step + seed).to(parameter.dtype)
            optimizer.step(1e-3)

    shapes = {"transformer_blocks.0.a": (8, 6), "transformer_blocks.0.b": (8, 6, 1, 1), "c": (8, 1, 3, 3)}
    start = {name: drawn(shape, 1).bfloat16() for name, shape in shapes.items()} | {"bias": drawn((8,), 2)}
    straight, optimizer = made(start)
    go(straight, optimizer, range(3))
    kept = {name: parameter.detach().clone() for name, parameter in straight.items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state()}
    go(straight, optimizer, range(3, 6))
    resumed, again_ = made(kept)
    again_.load(state, 3)
    go(resumed, again_, range(3, 6))
    for name, parameter in straight.items():
        assert torch.equal(parameter, resumed[name]), name
    for name, tensor in optimizer.state():
        assert torch.equal(dict(again_.state())[name], tensor), name

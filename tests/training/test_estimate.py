"""Estimated memory against a known computation, a trainer's tensors, and a run."""

import json
from pathlib import Path

import pytest
import torch
from helpers import Sana, again, embedded, small_config
from torch._subclasses.fake_tensor import FakeTensorMode

from sana_cli.config.file import load_config
from sana_cli.config.keys import Config
from sana_cli.dataset.match import resolve_architecture
from sana_cli.dataset.reader import Dataset
from sana_cli.model import build, is_matrix
from sana_cli.runtime.device import cpu_has_bf16
from sana_cli.training import estimate
from sana_cli.training.optim import Optimizer
from sana_cli.training.task import make_train_set
from sana_cli.training.trainer import Placement
from sana_cli.weights.checkpoint import adapter_parameters


def test_the_peak_of_a_known_computation() -> None:
    """a @ b in float32: a (10, 20), b (20, 30) and the product exist at once, then its sum."""
    with FakeTensorMode(), estimate._Peak() as peak:
        product = torch.empty(10, 20) @ torch.empty(20, 30)
        assert peak.peak == 4 * (200 + 600 + 300)
        assert peak.live == 4 * 300
        total = product.view(300).sum()
        assert peak.live == 4 * 301
        del product, total
        assert peak.live == 0


def on_cuda(config: Config, dataset: Dataset, images: int, precision: str = "fp32") -> estimate.Memory:
    """The estimate for a GPU, in a run that samples this many images at once."""
    model = resolve_architecture(config, dataset)
    placement = Placement(torch.device("cuda"), precision)
    return estimate.training_memory(model, config, make_train_set(config, dataset), placement, images)


def test_what_was_there_before_is_not_counted() -> None:
    with FakeTensorMode():
        weight = torch.empty(10, 20)
        with estimate._Peak() as peak:
            made = torch.empty(5, 20) @ weight.t()  # a view of the weight
            assert peak.peak == 4 * (100 + 50)
            del made
            assert peak.live == 0


@pytest.mark.parametrize(("optimizer", "checkpointing"), [("adamw", False), ("muon", True), ("came", True)])
def test_what_training_holds_is_counted(config: Config, optimizer: str, checkpointing: bool) -> None:
    wider = (
        "model.num_layers=4",
        "model.num_attention_heads=8",
        "model.patch_size=4",
        f"optim.optimizer={optimizer}",
    )

    def cut(checkpointing: bool) -> Config:
        return again(config, *wider, f"train.activation_checkpointing={str(checkpointing).lower()}")

    settings, dataset = cut(checkpointing), Dataset(config.data.dir)
    found = on_cuda(settings, dataset, 4)
    model = build(resolve_architecture(settings, dataset))
    parameters = sum(p.numel() for p in model.parameters())
    assert (found.program, found.dataset) == (0, 0)  # CUDA memory holds only tensors
    assert found.weights == found.gradients == found.average == 4 * parameters
    assert on_cuda(again(config, *wider, "optim.ema_decay=null"), dataset, 4).average == 0
    moments = Optimizer(dict(model.named_parameters()), settings.optim, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    moments.step(0.0)
    assert found.optimizer == sum(4 * tensor.numel() for _, tensor in moments.state())
    assert (on_cuda(cut(True), dataset, 1).activations < found.activations) != checkpointing


def test_bf16_weights_and_adapters_are_counted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "has_native_bf16", lambda _: True)
    dataset = Dataset(config.data.dir)
    model = build(resolve_architecture(config, dataset))
    matrices = sum(p.numel() for name, p in model.named_parameters() if is_matrix(name, p))
    rest = sum(p.numel() for p in model.parameters()) - matrices
    half = on_cuda(again(config, "train.weights=bf16", "train.precision=bf16"), dataset, 1, "bf16")
    assert half.weights == half.gradients == 2 * matrices + 4 * rest
    assert half.average == 4 * (matrices + rest)
    assert half.optimizer == 8 * (matrices + rest)
    away = on_cuda(again(config, "optim.ema_device=cpu"), dataset, 1)
    assert away.average == 0
    lora = ("adapter.kind=lora", "adapter.rank=2", "train.init_from=any")
    adapters = adapter_parameters(model.config, again(config, *lora).adapter)
    moved = sum(tensor.numel() for tensor in adapters.values())
    for precision, base in (("bf16", half.weights), ("fp32", 4 * (matrices + rest))):
        found = on_cuda(again(config, *lora, f"train.precision={precision}"), dataset, 1, precision)
        assert found.weights == base + 4 * moved
        assert found.gradients == found.average == 4 * moved
        assert found.optimizer == 8 * moved


def test_a_step_of_several_micro_batches_holds_gradients_while_it_computes(config: Config) -> None:
    dataset = Dataset(config.data.dir)
    one, two, many = (on_cuda(again(config, f"train.accumulate={n}"), dataset, 1) for n in (1, 2, 5))
    assert many.total == two.total > one.total


def test_further_datasets_are_counted(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is as large as one of the largest samples; steps of several shapes have several micro-batches."""
    other = small_config(tmp_path / "larger", "data.image_size=32")
    embedded(other)
    small, large = Dataset(config.data.dir), Dataset(other.data.dir)
    monkeypatch.setattr(Dataset, "longest_caption", lambda it: 9 if it.directory == other.data.dir else 2)

    def found(of: Config, dataset: Dataset, *overrides: str) -> estimate.Memory:
        size = f"data.image_size={dataset.image_shape[1]}"
        return on_cuda(small_config(of.data.dir.parent, size, *overrides), dataset, 1)

    also, more = f"data.also={{{other.data.dir}: 0.5}}", ("train.batch_size=32", "train.accumulate=2")
    as_large = found(other, large, *more)
    assert found(config, small, also, *more) == as_large
    assert found(config, small, *more).activations < as_large.activations / 2
    assert found(config, small, also, more[0]) == as_large, "images of two shapes are two micro-batches"
    assert found(other, large, more[0]).total < as_large.total
    ones = found(config, small, also, "train.batch_size=1"), found(other, large, "train.batch_size=1")
    assert ones[0].activations == ones[1].activations, "but not of a single image"
    monkeypatch.setattr(estimate, "program_memory", lambda *_: 0)
    monkeypatch.setattr(estimate, "MAPPED", 1)  # as if Linux mapped no more of a file than is read
    train_set = make_train_set(again(config, also), small)
    for steps, (once, half) in ((4, (16 / 60, 8 / 60)), (1000, (1, 1))):  # an epoch has 40 + 20 images
        read = estimate.training_memory(
            resolve_architecture(config, small), again(config, f"train.steps={steps}"),
            train_set, Placement(torch.device("cpu"), "fp32"), 1,
        )  # fmt: skip
        assert read.dataset == pytest.approx(once * small.bytes + half * large.bytes, abs=2)


def test_files_count_as_they_become_resident(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: what is mapped around images that are read, of held-out images too, and the base meanwhile."""
    monkeypatch.setattr(estimate, "program_memory", lambda *_: 0)
    monkeypatch.setattr(estimate, "mkl_keeps_to_avx2", lambda: False)
    dataset = Dataset(config.data.dir)

    def found(*overrides: str) -> estimate.Memory:
        settings = again(config, *overrides)
        model, train_set = resolve_architecture(settings, dataset), make_train_set(settings, dataset)
        return estimate.training_memory(model, settings, train_set, Placement(torch.device("cpu"), "fp32"), 1)

    plain = found("train.steps=2")
    assert plain.dataset == dataset.bytes
    monkeypatch.setattr(estimate, "open_held_out", lambda *_: dataset)
    assert found("train.steps=2").dataset == 2 * dataset.bytes
    assert plain.overhead == int(estimate.HOLES["fp32"] * plain.activations)
    assert found("train.steps=2", "train.activation_checkpointing=true").overhead > plain.overhead / 2
    with monkeypatch.context() as patched:
        patched.setattr(estimate, "mkl_keeps_to_avx2", lambda: True)
        assert found("train.steps=2").overhead == plain.overhead + estimate.KERNELS
    base = config.data.dir.parent / "base.safetensors"
    with base.open("wb") as file:
        file.truncate(10**9)
    monkeypatch.setattr(estimate, "find_base_model", lambda path: path)
    assert found("train.steps=2", f"train.init_from={base}").total > 10**9 > 10 * plain.total


@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        pytest.param("bf16", marks=pytest.mark.skipif(not cpu_has_bf16(), reason="no bf16 arithmetic here")),
    ],
)
def test_the_estimated_memory_is_what_is_then_measured(
    sana: Sana, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Within 15 %, in its own process, for a model whose tensors are most of the memory."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(
        "data: {held_out_split: null}\nmodel: {num_layers: 8, num_attention_heads: 14}\ntext: {}\n"
        f"optim: {{warmup_steps: 1}}\ntrain: {{steps: 2, batch_size: 48, precision: {precision}}}\n"
        "sample: {steps: 2}\nrun: {device: cpu}\n"
    )
    embedded(load_config("c.yaml", ()), limit=100)
    estimated = json.loads(sana("train", "--config", "c.yaml", "--dry-run", "--json").stdout)["memory"]
    assert not (tmp_path / "runs").exists()
    tensors = sum(size for name, size in estimated["parts"].items() if name not in ("program", "dataset"))
    assert tensors > estimated["total"] / 2
    measured = json.loads(sana("train", "--config", "c.yaml", "--json").stdout)["peak_memory"]
    print(f"estimated {estimated['total']:,}, measured {measured:,}: {estimated['total'] / measured:.3f}")
    assert estimated["total"] == pytest.approx(measured, rel=0.15)

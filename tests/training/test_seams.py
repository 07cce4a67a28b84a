"""Extension points, each shown by a sketch: a second objective, a set of two sizes, adapters.

Each sketch is one class and changes nothing in the package.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import embedded, small_config
from torch import Tensor, nn

from sana_cli.adapters import attach, is_adapter, layers_of, matching, new_changes
from sana_cli.commands.train import TrainOptions, TrainSummary, train
from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset.match import resolve_architecture
from sana_cli.dataset.order import Shuffle
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import Shape, SingleDataset
from sana_cli.errors import Interrupted
from sana_cli.model import SanaTransformer, build
from sana_cli.runtime import files
from sana_cli.runtime.distributed import World
from sana_cli.runtime.records import Origin
from sana_cli.training import task
from sana_cli.training.batches import cut
from sana_cli.training.objective import MicroBatch, Objective, RectifiedFlow
from sana_cli.training.task import Task, make_objective
from sana_cli.training.trainable import Trainable
from sana_cli.training.trainer import Placement, Trainer
from sana_cli.weights import checkpoint
from sana_cli.weights.reader import read_weights

CPU = Placement(torch.device("cpu"), "fp32")


# --- a second objective -----------------------------------------------------------------------------------------------


class Weighted(RectifiedFlow):
    """Rectified flow weighted by a learned uncertainty u(sigma) (EDM2, arXiv 2312.02696).

    The loss, error / exp(u) + u, is lowest where exp(u) is the mean error of the level. u is
    trained together with the transformer.
    """

    def __init__(self, config: Config, model: Architecture, precision: str) -> None:
        super().__init__(config.objective, model.timestep_scale, precision)
        self.uncertainty = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.uncertainty.weight)
        self.modules = {"uncertainty": self.uncertainty}

    def losses(self, transformer: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        error = super().losses(transformer, batch)["loss"]
        u = self.uncertainty(torch.stack([batch.sigma, 1 - batch.sigma], dim=-1)).squeeze(-1)
        return {"loss": error / u.exp() + u}


def run(config: Config, resume: str = "none", until: int | None = None) -> Path:
    """Train, or stop after this many steps as if asked to; returns the run directory."""
    seen = 0

    def stop() -> int | None:
        return 15 if until is not None and seen >= until else None

    steps: Iterator[Any] = train(TrainOptions(config, resume, stop))
    try:
        for step in steps:
            seen = getattr(step, "step", seen)
            assert not isinstance(step, TrainSummary) or step.steps == config.train.steps
    except Interrupted:
        assert until is not None
    return config.run.dir


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.name}/{name}": tensor for name, tensor in files.read_tensors(path).items()}
    return found


def test_a_second_objective_is_a_class_and_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own parameters are trained, saved, and resumed bitwise."""

    def weighted(config: Config, model: Architecture, precision: str, _teacher: object = None) -> Weighted:
        return Weighted(config, model, precision)

    monkeypatch.setattr(task, "make_objective", weighted)
    config = small_config(tmp_path, "save.every=2", "objective.prediction_type=sample")
    embedded(config)
    whole = checkpoint.steps(run(config))[-1]
    learned = files.read_tensors(whole / checkpoint.OBJECTIVE)
    assert [*learned] == ["uncertainty.weight"]
    assert learned["uncertainty.weight"].abs().min() > 0
    cut_short = small_config(
        tmp_path, "save.every=2", "objective.prediction_type=sample", f"run.dir={tmp_path / 'cut'}"
    )
    run(cut_short, until=2)
    resumed = checkpoint.steps(run(cut_short, "auto"))[-1]
    ours, theirs = tensors_of(whole), tensors_of(resumed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_weights(resumed / "transformer").prediction_type == "sample"


def test_its_first_losses_are_those_of_rectified_flow(config: Config) -> None:
    """u starts at 0, where error / exp(u) + u is the error."""
    dataset = Dataset(config.data.dir)
    model = resolve_architecture(config, dataset)
    found = []
    objectives: list[Objective] = [make_objective(config, model, "fp32"), Weighted(config, model, "fp32")]
    for objective in objectives:
        trainer = Trainer(build(model, 0), Task(objective, SingleDataset(dataset, 0)), config, CPU, 8)
        found.append([trainer.advance().losses for _ in range(2)])
        trainer.close()
    (first, second), (weighed_first, weighed_second) = found
    assert np.array_equal(first, weighed_first)
    assert not np.array_equal(second, weighed_second)


# --- a set of two sizes -----------------------------------------------------------------------------------------------


class TwoSizes:
    """Two datasets of different image sizes as one; the second's rows and ids come last."""

    def __init__(self, first: Dataset, second: Dataset, seed: int) -> None:
        self.parts, self.seed = (first, second), seed
        self.shapes: tuple[Shape, ...] = (first.image_shape, second.image_shape)
        self.null_caption = first.index.null_caption
        self.captions_before = first.index.counts.captions

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def rows(self, first: int, count: int) -> np.ndarray:
        epochs, places = np.divmod(np.arange(first, first + count), len(self))
        return np.array(
            [
                int(Shuffle(len(self), (self.seed, int(epoch)))(places[at : at + 1])[0])
                for at, epoch in enumerate(epochs)
            ]
        )

    def shape_numbers(self, rows: np.ndarray) -> np.ndarray:
        return (rows >= len(self.parts[0])).astype(np.int64)

    def _part(self, rows: np.ndarray) -> tuple[Dataset, np.ndarray, int]:
        (number,) = np.unique(self.shape_numbers(rows))
        return self.parts[number], rows - number * len(self.parts[0]), int(number) * self.captions_before

    def samples(self, rows: np.ndarray) -> Tensor:
        part, inside, _ = self._part(rows)
        return part.images(inside)

    def captions(self, rows: np.ndarray) -> list[tuple[list[int], list[float] | None]]:
        part, inside, before = self._part(rows)
        found = zip(part.caption_ids(inside), part.caption_weights(inside), strict=True)
        return [([before + caption_id for caption_id in ids], weights) for ids, weights in found]

    def states(self, caption_ids: Iterable[int]) -> list[Tensor]:
        places = (divmod(caption_id, self.captions_before) for caption_id in caption_ids)
        return [self.parts[number].states([inside])[0] for number, inside in places]

    def names(self, rows: np.ndarray) -> list[str]:
        return [
            self.parts[row >= len(self.parts[0])].sample_ids(np.array([row % len(self.parts[0])]))[0]
            for row in rows
        ]

    def record(self) -> Origin:
        return Origin(sha256="+".join(part.index.sha256 for part in self.parts), images=len(self))


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, TwoSizes]:
    folder = tmp_path_factory.mktemp("sizes")
    large = small_config(folder, "data.image_size=[32, 16]", f"data.dir={folder / 'large'}")
    small = small_config(folder, f"data.dir={folder / 'small'}")
    embedded(large, 30)
    embedded(small, 12)
    return small, TwoSizes(Dataset(large.data.dir), Dataset(small.data.dir), seed=0)


def gradients(config: Config, train_set: TwoSizes, batch_size: int, processes: int) -> dict[str, Tensor]:
    """Gradients of the first step of 11 images, in micro-batches on simulated processes."""
    changed = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": batch_size})})
    model = resolve_architecture(changed, train_set.parts[0])
    total: dict[str, Tensor] = {}
    seen: list[int] = []
    for rank in range(processes):
        objective = make_objective(changed, model, "fp32")
        trainer = Trainer(build(model, 0), Task(objective, train_set), changed, CPU, 11)
        parts = cut(train_set.shape_numbers(train_set.rows(0, 11)), batch_size, World(rank, processes))
        for part in parts:
            batch = trainer.batches.make(0, part)
            assert len(batch.x_0) == len(part.numbers) <= batch_size
            if not part.padding:
                seen += part.numbers.tolist()
                (objective.losses(trainer.model, batch)["loss"].sum() / 11).backward()
        for name, parameter in trainer.model.named_parameters():
            total[name] = total.get(name, torch.zeros(())) + (0 if parameter.grad is None else parameter.grad)
        trainer.close()
    assert sorted(seen) == list(range(11)), "each image of the step is used once"
    return total


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (4, 1), (3, 2), (2, 3)])
def test_a_step_of_two_sizes_does_not_depend_on_its_cut(
    two_sizes: tuple[Config, TwoSizes], batch_size: int, processes: int
) -> None:
    config, train_set = two_sizes
    kinds = train_set.shape_numbers(train_set.rows(0, 11))
    assert 0 < kinds.sum() < 11, "the step has images of both sizes"
    whole, parts = gradients(config, train_set, 11, 1), gradients(config, train_set, batch_size, processes)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_two_sizes_are_trained_and_resumed_like_one(two_sizes: tuple[Config, TwoSizes]) -> None:
    config, train_set = two_sizes
    model = resolve_architecture(config, train_set.parts[0])

    def trainer(weights: dict[str, Tensor] | None = None) -> Trainer:
        made = build(model, 0)
        if weights is not None:
            made.load_state_dict(weights)
        return Trainer(
            made, Task(make_objective(config, model, "fp32"), train_set, train_set), config, CPU, 6
        )

    straight = trainer()
    before = straight.evaluate()
    losses = [straight.advance().losses for _ in range(2)]
    kept = {name: tensor.clone() for name, tensor in straight.weights().items()}
    remembered = {name: tensor.clone() for name, tensor in straight.optimizer_state().items()}
    losses += [straight.advance().losses for _ in range(2)]
    again = trainer(kept)
    again.resume(remembered, {}, 2)
    assert np.array_equal(np.stack([again.advance().losses for _ in range(2)]), np.stack(losses[2:]))
    for name, tensor in straight.weights().items():
        assert torch.equal(again.weights()[name], tensor), name
    assert before.images == len(train_set)
    straight.close()
    again.close()


# --- adapters, and other things on layers ----------------------------------------------------------------------------


ARCHITECTURE = Architecture(
    sample_size=8, caption_channels=12, in_channels=3, patch_size=1, num_layers=1, num_attention_heads=2, attention_head_dim=8,
    num_cross_attention_heads=2, cross_attention_head_dim=8, qk_norm="rms_norm_across_heads",
)  # fmt: skip
LAYERS = list(layers_of(build(ARCHITECTURE, seed=None)))


def output(model: SanaTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, states = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad():
        return model(x, states, torch.tensor([300.0, 700.0]))


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_parametrizations_and_replaced_forwards_act(name: str) -> None:
    """Other ways to attach something to a layer."""

    layer = build(ARCHITECTURE, seed=0).get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    vector = torch.randn(len(layer.weight), generator=torch.Generator().manual_seed(2))
    offset = (
        vector if isinstance(layer, nn.Linear) else vector[:, None, None]
    )  # a constant would vanish in a norm

    class Moved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + vector.view(-1, *[1] * (weight.ndim - 1))

    def hook(layer: nn.Module) -> None:
        layer.register_forward_hook(lambda _module, _given, made: made + offset)

    def parametrize(layer: nn.Module) -> None:
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Moved())

    def replace(layer: nn.Module) -> None:
        forward = layer.forward
        layer.forward = lambda x: forward(x) + offset

    plain = output(build(ARCHITECTURE, seed=0))
    ways: list[Callable[[nn.Module], None]] = [hook, parametrize, replace]
    for change in ways:
        model = build(ARCHITECTURE, seed=0)
        change(model.get_submodule(name))
        assert not torch.allclose(output(model), plain, atol=1e-5), change.__name__


def test_adapters_alone_move_are_averaged_and_are_what_a_checkpoint_is_given(config: Config) -> None:
    dataset = Dataset(config.data.dir)
    model = resolve_architecture(config, dataset)
    adapted = build(model, 0)
    attach(
        adapted, new_changes(adapted, matching(adapted, ["to_q", "to_v"]), 2, 1.0, False, torch.Generator())
    )
    base = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if "lora" not in name}
    objective: Objective = make_objective(config, model, "fp32")
    adapters = Task(objective, SingleDataset(dataset, 0), trainable=Trainable(is_adapter))
    trainer = Trainer(adapted, adapters, config, CPU, 8)
    for _ in range(3):
        trainer.advance()
    assert all("lora" in name for name in trainer.weights())
    assert trainer.weights().keys() == trainer.average_weights().keys()
    assert {name.split(".", 1)[1] for name in trainer.optimizer_state()} == set(trainer.weights())
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in base.items())
    averaged = dict(trainer.average.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        shared = averaged[name].data_ptr() == parameter.data_ptr()
        assert shared == ("lora" not in name), f"{name}: frozen tensors must be shared, trained ones not"
    trainer.close()


def test_the_average_can_be_off(config: Config) -> None:
    """Then the raw weights are used, and exist once in memory and once in a checkpoint."""
    off = config.model_copy(update={"optim": config.optim.model_copy(update={"ema_decay": None})})
    folder = checkpoint.steps(run(off))[-1]
    assert not (folder / checkpoint.RAW_WEIGHTS).exists()
    on = config.model_copy(
        update={"run": config.run.model_copy(update={"dir": config.run.dir.with_name("on")})}
    )
    raw = files.read_tensors(checkpoint.steps(run(on))[-1] / checkpoint.RAW_WEIGHTS)
    used = files.read_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(raw[name], used[name]) for name in raw)
    cut_short = off.model_copy(
        update={"run": config.run.model_copy(update={"dir": config.run.dir.with_name("cut")})}
    )
    run(cut_short, until=2)
    resumed = tensors_of(checkpoint.steps(run(cut_short, "auto"))[-1])
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in tensors_of(folder).items())

"""Few-step distillation: how a student begins, what moves what, and runs that are cut, stopped, resumed and drawn from.

Every key of `distill` that matters is given: recipes change.
"""

import itertools
import json
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    assert_same_tensors,
    checkpoint_tensors,
    child,
    contents,
    embedded,
    invoke,
    metrics_lines,
    small_config,
    trained,
    wait_until,
    without_times,
)
from helpers.steps import perturb
from PIL import Image
from runtime.test_distributed import error, in_processes
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_cli.commands.train import TrainOptions, plan, train
from sana_cli.config.keys import Config
from sana_cli.dataset.match import open_held_out, resolve_architecture
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import Interrupted, SanaError
from sana_cli.kernels import arithmetic_as_asked
from sana_cli.model import TIMESTEP_CHANNELS, TwoLayer, sinusoid
from sana_cli.runtime.distributed import World, whole, world
from sana_cli.sampling import sampler
from sana_cli.training.batches import cut, training_batch
from sana_cli.training.critics import Critic
from sana_cli.training.distillation import (
    CRITIC,
    WEIGHTING,
    Distillation,
    critic_loss,
    student_loss,
)
from sana_cli.training.estimate import training_memory
from sana_cli.training.initial import Beginning, begin
from sana_cli.training.objective import MicroBatch, total
from sana_cli.training.student import GUIDANCE_EMBEDDER, TIME_EMBEDDER, refit_time
from sana_cli.training.task import make_task, make_train_set
from sana_cli.training.trainer import Placement, Trainer
from sana_cli.weights import checkpoint

MODEL = (
    "model.patch_size=4", "model.num_layers=2", "model.num_attention_heads=4",
    "model.num_cross_attention_heads=4", "data.held_out_split=test", "log.held_out_every=2", "log.held_out_images=6",
)  # fmt: skip
STUDENT = (
    "model.guidance_embeds=true", "model.guidance_embeds_scale=0.1", "model.timestep_scale=0.001",
    "sample.solver=scm", "sample.steps=1", "sample.flow_shift=1", "sample.guidance_scale=2",
    "objective.caption_dropout=0", "optim.lr=1e-3", "optim.weight_decay=0", "optim.ema_decay=0.9",
    "optim.betas=[0.0, 0.99]", "optim.schedule=constant", "optim.optimizer=adamw", "log.sample_every=4",
    "save.every=2", "save.keep=9",
)  # fmt: skip
RECIPE = {
    "method": "consistency", "tangent": "difference", "tangent_warmup": 4, "steps": [1, 2, 4], "largest": 0.4,
    "stride": [0.1, 0.3], "anchor": 0.35, "guidance": [1.0, 4.0], "guidance_interval": [0.0, 1.0],
    "critic": True, "critic_loss": "relativistic", "critic_weight": 0.5, "critic_warmup": 1, "critic_rate": 2.0,
    "critic_blocks": None, "critic_logit_mean": -1.0, "critic_logit_std": 1.0,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "consistency": {},
    "scm": {"method": "scm", "critic_loss": "hinge"},
}
JVP = {"tangent": "jvp"}
ROUNDING = {"consistency": 5e-6, "scm": 1e-4}  # a difference over 0.002 of t makes it larger
KINDS = ("sample", "flow_prediction")


@dataclass(frozen=True)
class Ground:
    """A dataset, and a teacher of each prediction type."""

    folder: Path

    def teacher(self, kind: str = "sample") -> Path:
        return self.folder / f"teacher-{kind}"

    def student(
        self,
        run: Path,
        distill: Mapping[str, Any] = {},
        *overrides: str,
        kind: str = "sample",
        teacher: Path | None = None,
    ) -> Config:
        """The config of a distillation into `run`."""
        recipe = {**RECIPE, **distill, "teacher": str(teacher or self.teacher(kind))}
        keys = [
            f"distill.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in recipe.items()
        ]
        return small_config(
            self.folder,
            *MODEL,
            *STUDENT,
            *keys,
            f"objective.prediction_type={kind}",
            f"run.dir={run}",
            *overrides,
        )


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    embedded(small_config(folder, *MODEL))
    for kind in KINDS:
        run = folder / kind
        config = small_config(
            folder, *MODEL, f"objective.prediction_type={kind}", "train.steps=2", f"run.dir={run}"
        )
        shutil.copytree(trained(config).checkpoint, folder / f"teacher-{kind}")
        perturb(folder / f"teacher-{kind}", smooth_in_time=True)
    return Ground(folder)


def begun(config: Config, half: bool = False) -> Beginning:
    return begin(config, resolve_architecture(config, Dataset(config.data.dir)), None, None, half)


def make_trainer(config: Config, images: int, here: World | None = None, precision: str = "fp32") -> Trainer:
    """A trainer at the start of a distillation, on the CPU."""
    dataset = Dataset(config.data.dir)
    model, models = resolve_architecture(config, dataset), begun(config, precision == "bf16")
    task = make_task(config, model, precision, dataset, open_held_out(config, dataset), models.teacher)
    return Trainer(
        models.transformer, task, config, Placement(torch.device("cpu"), precision, here or World()), images
    )


def objective_of(trainer: Trainer) -> Distillation:
    assert isinstance(trainer.task.objective, Distillation)
    return trainer.task.objective


def batch_of(trainer: Trainer, numbers: range, step: int = 5) -> MicroBatch:
    return training_batch(trainer.task.train_set, trainer.task.objective, 0, np.array(numbers), step)


def gradients_of(term: Tensor, module: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of a sum by a module's parameters that move, without those that it does not depend on."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(term.sum(), list(named.values()), retain_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def last_step(config: Config) -> Path:
    return checkpoint.steps(config.run.dir)[-1]


# --- how a student begins -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_begins_as_its_teacher(ground: Ground, tmp_path: Path, kind: str) -> None:
    """At each noise level and guidance scale, but for its time embedding, which is as far off as is said."""
    models = begun(ground.student(tmp_path, kind=kind))
    assert models.teacher is not None
    teacher, student = models.teacher, models.transformer
    (note,) = models.notes
    said = float(note.split(" is ")[1].split("%")[0]) / 100
    assert 0 < said < 0.02
    assert not any(p.requires_grad for p in teacher.parameters())
    theirs = {name: tensor for name, tensor in teacher.state_dict().items() if "time_embed.emb" not in name}
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in theirs.items())
    x, states = torch.randn(9, 1, 16, 16), torch.randn(9, 3, teacher.config.caption_channels)
    sigma = torch.linspace(0, 1, 9)
    with torch.no_grad():
        expected = teacher(x, states, 1000 * sigma)
        shifted = teacher(x, states, 1000 * (sigma + 0.1))
        for scale in (1.0, 4.0):
            found = student(x, states, sigma, guidance=torch.full((9,), 0.1 * scale))
            assert float((found - expected).norm() / expected.norm()) < 2 * said
    assert float((shifted - expected).norm() / expected.norm()) > 4 * said, "time matters less than the bound"


def test_a_time_embedder_is_refitted_in_closed_form() -> None:
    """The ridge keeps its weights small. Of a teacher whose timestep is sigma itself it is a copy."""
    torch.manual_seed(0)
    teacher, student = (TwoLayer(TIMESTEP_CHANNELS, 64, torch.nn.SiLU()) for _ in range(2))
    with torch.no_grad():
        teacher.linear_1.weight.unflatten(1, (2, -1))[:, :, :90] = 0
    said = refit_time(teacher, student, 1000)
    sigma = torch.rand(500)
    with torch.no_grad():
        target, found = teacher(sinusoid(1000 * sigma)), student(sinusoid(sigma))
    off = float(((found - target).square().mean() / target.var(0).mean()).sqrt())
    assert off == pytest.approx(said, rel=0.2)
    assert said < 0.05
    assert student.linear_2.weight.abs().max() < 1
    time = torch.full((1,), 0.4)
    ahead, behind = (student(sinusoid(time + h)) for h in (1e-3, -1e-3))
    slope = ((ahead - behind) / 2e-3).norm() / target.std(0).norm()
    assert slope < 50, "through sinusoids of 1000 sigma it could be a thousand"
    assert refit_time(teacher, student, 1.0) == 0
    assert_same_tensors(student.state_dict(), teacher.state_dict())


def test_a_teacher_of_sigma_itself_is_copied_exactly(ground: Ground, tmp_path: Path) -> None:
    """Every output is the teacher's, to the bit."""
    teacher = tmp_path / "teacher"
    config = small_config(
        ground.folder, *MODEL, "model.timestep_scale=0.001", "train.steps=2", f"run.dir={tmp_path / 'run'}"
    )
    shutil.copytree(trained(config).checkpoint, teacher)
    perturb(teacher)
    models = begun(ground.student(tmp_path / "student", kind="flow_prediction", teacher=teacher))
    assert models.teacher is not None
    assert "0.0% off" in models.notes[0]
    x, states, sigma = torch.randn(4, 1, 16, 16), torch.randn(4, 3, 128), torch.linspace(0.1, 1, 4)
    with torch.no_grad():
        expected = models.teacher(x, states, sigma)
        assert torch.equal(models.transformer(x, states, sigma, guidance=torch.full((4,), 0.3)), expected)


def test_the_guidance_embedder_is_alive(ground: Ground, tmp_path: Path) -> None:
    """All its layers learn from the second step on, and outputs come to differ by the scale."""
    trainer = make_trainer(ground.student(tmp_path, {"critic": False}, "optim.lr=5e-3"), 16)
    embedder = trainer.model.time_embed.guidance_embedder
    assert embedder is not None
    knots = torch.asin(-embedder.linear_1.bias / embedder.linear_1.weight.sum(1)).detach()
    assert -0.1 < float(knots.min()) < 0.1 < 0.4 < float(knots.max()) < 0.7, "around 0.1 times the scales"
    learned: dict[str, list[float]] = {}
    for step in range(6):
        trainer._gradients(lambda: None)
        for name, parameter in trainer.model.named_parameters():
            if name.startswith(GUIDANCE_EMBEDDER):
                assert parameter.grad is not None
                learned.setdefault(name, []).append(float(parameter.grad.norm()))
        trainer.advance()
        assert trainer.step == step + 1
    assert len(learned) == 4
    assert all(min(norms[1:]) > 0 for norms in learned.values()), learned
    x, states, sigma = torch.randn(4, 1, 16, 16), torch.randn(4, 3, 128), torch.ones(4)
    with torch.no_grad():
        low, high = (trainer.model(x, states, sigma, guidance=torch.full((4,), g)) for g in (0.1, 0.4))
    assert float((low - high).norm() / low.norm()) > 1e-3
    trainer.close()


# --- what moves what ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "scm by jvp"])
def test_terms_move_what_they_are_for(ground: Ground, tmp_path: Path, method: str) -> None:
    distill = METHODS["scm"] | JVP if method == "scm by jvp" else METHODS[method]
    trainer = make_trainer(ground.student(tmp_path, distill), 4)
    objective = objective_of(trainer)
    for parameter in trainer.model.time_embed.guidance_embedder.parameters():  # type: ignore[union-attr]
        parameter.data += 0.01  # else its first layer has no gradient yet
    terms = objective.losses(trainer.model, batch_of(trainer, range(4)))
    assert {*terms} == {"loss", "adversarial", "critic"}
    assert all(term.shape == (4,) and term.dtype == torch.float32 for term in terms.values())
    critic = objective.modules[CRITIC]
    moving = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(TIME_EMBEDDER) for name in moving)
    assert gradients_of(terms["critic"], trainer.model) == {}
    assert gradients_of(terms["adversarial"], critic) == gradients_of(terms["loss"], critic) == {}
    of_critic = gradients_of(terms["critic"], critic)
    assert {*of_critic} == {name for name, _ in critic.named_parameters()}
    assert (
        sum(gradient.any() for gradient in of_critic.values()) >= len(of_critic) - 3
    )  # a last bias may cancel
    for name in ("adversarial", "loss"):
        found = gradients_of(terms[name], trainer.model)
        assert {*found} == moving, name
        silent = [key for key, gradient in found.items() if not gradient.any()]
        assert all(key.endswith("attn2.to_k.bias") for key in silent), name  # softmax does not see it
    if method.startswith("scm"):
        weighting = objective.modules[WEIGHTING]
        assert all(g.any() for g in gradients_of(terms["loss"], weighting).values())
        assert gradients_of(terms["adversarial"], weighting) == {}
    assert not any(p.requires_grad or p.grad is not None for p in objective.teacher.parameters())
    assert objective.average is not None
    assert not any(p.requires_grad for p in objective.average.parameters())
    trainer.close()


def test_the_adversarial_loss_grows_to_its_weight(ground: Ground, tmp_path: Path) -> None:
    """Over its warm-up; the critic learns from the start."""
    trainer = make_trainer(ground.student(tmp_path, {"critic_warmup": 4, "critic_weight": 0.8}), 4)
    found = {}
    for step in (0, 1, 4, 9):
        terms = objective_of(trainer).losses(trainer.model, batch_of(trainer, range(4), step))
        found[step] = float(terms["adversarial"].detach().mean())
        assert any(
            g.any() for g in gradients_of(terms["critic"], objective_of(trainer).modules[CRITIC]).values()
        )
    assert found[0] == 0
    assert found[1] == pytest.approx(found[4] / 4)
    assert found[9] == found[4] > 0
    trainer.close()


def test_relativistic_losses_compare_real_and_drawn() -> None:
    """Of the mean logits of an image: the critic wants real above drawn, and the student drawn above real."""
    real, drawn = torch.tensor([[1.0, 3.0]]), torch.tensor([[-1.0, 0.0]])
    for loss, apart in ((critic_loss, 2.5), (student_loss, -2.5)):
        assert loss("relativistic", real, drawn).item() == pytest.approx(np.log1p(np.exp(-apart)))
        assert loss("relativistic", drawn, real).item() == pytest.approx(np.log1p(np.exp(apart)))


def test_rates_are_those_of_each_part(ground: Ground, tmp_path: Path) -> None:
    config = ground.student(tmp_path, METHODS["scm"] | {"critic_rate": 3.0, "guidance_rate": 0.3})
    trainer = make_trainer(config, 4)
    objective = objective_of(trainer)
    assert objective.rate(f"{GUIDANCE_EMBEDDER}linear_1.weight") == 0.3
    assert objective.rate(f"{CRITIC}.x.weight") == 3.0
    assert objective.rate("proj_out.weight") == objective.rate(f"{WEIGHTING}.linear.bias") == 1.0
    trainer.close()


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_untouched(ground: Ground, tmp_path: Path, method: str) -> None:
    """Its files by a whole run, and its tensors by steps; the student and the critic move."""
    config = ground.student(tmp_path / "run", METHODS[method], "train.steps=2", kind="flow_prediction")
    before = contents(ground.teacher("flow_prediction"))
    trainer = make_trainer(config, 4)
    objective = objective_of(trainer)
    modules: dict[str, torch.nn.Module] = {
        "student": trainer.model,
        "teacher": objective.teacher,
        **objective.modules,
    }
    was = {name: {k: t.clone() for k, t in module.state_dict().items()} for name, module in modules.items()}
    for _ in range(2):
        trainer.advance()
    for name, module in modules.items():
        moved = [
            key for key, tensor in module.state_dict().items() if not torch.equal(tensor, was[name][key])
        ]
        assert bool(moved) == (name != "teacher"), name
        assert not any(key.startswith(TIME_EMBEDDER) for key in moved)
    trainer.close()
    trained(config)
    assert contents(ground.teacher("flow_prediction")) == before


def test_losses_of_consistency_in_numbers(ground: Ground, tmp_path: Path) -> None:
    """Of each image, by itself: the teacher's guided step, the averaged target, its cut, the anchor."""
    trainer = make_trainer(ground.student(tmp_path, {"critic": False, "guidance_interval": [0.0, 0.8]}), 8)
    objective, batch = objective_of(trainer), batch_of(trainer, range(8))
    for parameter in trainer.model.parameters():  # otherwise than the average
        parameter.data *= 1.05
    losses = objective.losses(trainer.model, batch)["loss"]
    assert batch.uniforms is not None
    assert batch.null_index is not None
    for i in range(8):
        s, (w, u) = float(batch.sigma[i]), batch.uniforms[i, :2].tolist()
        scale, stride = 1 + 3 * w, 0.1 + 0.2 * u
        x = (1 - s) * batch.x_0[i : i + 1] + s * batch.noise[i : i + 1]

        def of(model: torch.nn.Module, x: Tensor, time: float, scale: float | None, which: Tensor) -> Tensor:
            guidance = None if scale is None else torch.tensor([0.1 * scale])
            mask = batch.mask[which]
            made: Tensor = model(x, batch.states[which].float(), torch.tensor([time]), guidance, mask)
            return made

        own = batch.caption_index[i : i + 1]
        with torch.no_grad():
            given, null = (
                of(objective.teacher, x, 1000 * s, None, which) for which in (own, batch.null_index)
            )
            data = null + (scale if s <= 0.8 else 1.0) * (given - null)
            nearer = x + (s * (1 - stride) - s) * (x - data) / s
            assert objective.average is not None
            target = of(objective.average, nearer, s * (1 - stride), scale, own).clamp(-1, 1)
            target = data if s < 0.35 else target
            drawn = of(trainer.model, x, s, scale, own)
            drawn = drawn.clamp(-1, 1) + 0.02 * (drawn - drawn.clamp(-1, 1))
        distance = float((drawn - target).square().mean() + 1e-4) ** 0.5 - 1e-2
        assert losses[i].item() == pytest.approx(0.1 * distance / stride, rel=1e-4, abs=1e-7), (i, s)
    levels = {round(float(level), 3) for level in batch.sigma}
    assert levels <= {1.0, 0.783, 0.707, 0.5, 0.293}
    assert len(levels) > 2
    trainer.close()


def test_noise_levels_are_those_of_the_solver(ground: Ground, tmp_path: Path) -> None:
    config = ground.student(tmp_path, {"largest": 0.25, "steps": [1, 2, 4]})
    trainer = make_trainer(config, 4)
    found = objective_of(trainer).noise_levels((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    values, counts = found.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.29289, 0.5, 0.70711, 0.78273, 1.0]), rtol=0, atol=1e-4)
    assert counts.tolist() == [750, 750, 750, 750, 1000]
    trainer.close()
    only_one = make_trainer(ground.student(tmp_path, {"steps": [1]}), 4)
    assert set(objective_of(only_one).noise_levels(torch.rand(50, dtype=torch.float64)).tolist()) == {1.0}
    only_one.close()


# --- how a step is cut --------------------------------------------------------------------------


def step_gradients(config: Config, images: int, here: World | None = None) -> dict[str, Tensor]:
    """The gradients of a step late enough that all terms act, of the student and of what learns beside it."""
    trainer = make_trainer(config, images, here)
    trainer.step = 3
    trainer._gradients(lambda: None)
    if trainer.sharded:
        from sana_cli.runtime.distributed import average_gradients

        average_gradients(trainer.others)
    named = itertools.chain(
        trainer.model.named_parameters(), trainer.loss_module.objective_modules.named_parameters()
    )
    found = {name: whole(p.grad).clone() for name, p in named if p.grad is not None}
    trainer.close()
    return found


def in_worlds(config: Config, images: int, processes: int) -> dict[str, Tensor]:
    """The same, added up over simulated processes."""
    added: dict[str, Tensor] = {}
    for rank in range(processes):
        trainer = make_trainer(config, images)
        rows = trainer.task.train_set.rows(3 * images, images)
        parts = cut(
            trainer.task.train_set.shape_numbers(rows), config.train.batch_size, World(rank, processes)
        )
        for part in parts:
            batch = trainer.batches.make(3, part)
            if not part.padding:
                (total(trainer.task.objective.losses(trainer.model, batch)).sum() / images).backward()
        modules = (trainer.model, trainer.loss_module.objective_modules)
        for name, parameter in itertools.chain(*(module.named_parameters() for module in modules)):
            if parameter.grad is not None:
                added[name] = added.get(name, torch.zeros(())) + parameter.grad
        trainer.close()
    return added


@pytest.mark.parametrize("method", METHODS)
def test_gradients_do_not_depend_on_how_a_step_is_cut(ground: Ground, tmp_path: Path, method: str) -> None:
    def sized(size: int) -> Config:
        return ground.student(tmp_path, METHODS[method], f"train.batch_size={size}")

    expected = step_gradients(sized(7), 7)
    assert any(name.startswith(f"{CRITIC}.") for name in expected)
    for size in (4, 3, 1):
        assert error(step_gradients(sized(size), 7), expected) < ROUNDING[method], size
    for size, processes in ((4, 2), (2, 3), (3, 4)):  # the last with a process that has none
        assert error(in_worlds(sized(size), 7, processes), expected) < ROUNDING[method], (size, processes)


def test_gradients_of_two_processes_are_those_of_one(ground: Ground, tmp_path: Path) -> None:
    """Copied or sharded, through gloo, with a micro-batch that one process has not."""
    kinds = [(method, parallel) for method in METHODS for parallel in ("ddp", "fsdp")]

    def cut_in(method: str, parallel: str, size: int) -> Config:
        # the draws of seed 0 make the gradient of one of these images ten times as sensitive to rounding
        return ground.student(
            tmp_path,
            METHODS[method],
            f"train.batch_size={size}",
            f"train.parallel={parallel}",
            "train.seed=1",
        )

    def work() -> None:
        with world() as here:
            for method, parallel in kinds:
                found = step_gradients(cut_in(method, parallel, 2), 5, here)
                save_file(found, tmp_path / f"{method}-{parallel}-{here.rank}.safetensors")

    in_processes(2, work)
    for method, parallel in kinds:
        expected = step_gradients(cut_in(method, "ddp", 5), 5)
        for rank in range(2):
            found = load_file(tmp_path / f"{method}-{parallel}-{rank}.safetensors")
            assert error(found, expected) < ROUNDING[method], (method, parallel, rank)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_runs_do_not_depend_on_the_number_of_processes(ground: Ground, tmp_path: Path, parallel: str) -> None:
    """With a resume between; weights, average, critic, optimizer, metrics."""

    def sized(name: str, size: int, *more: str) -> Config:
        return ground.student(
            tmp_path / name, METHODS["consistency"], f"train.batch_size={size}", "log.sample_every=100", *more
        )

    alone, two, half = (
        sized(name, size, *more)
        for name, size, more in (
            ("alone", 4, ()),
            ("two", 2, (f"train.parallel={parallel}",)),
            ("two", 2, (f"train.parallel={parallel}", "train.steps=2")),
        )
    )
    trained(alone)
    in_processes(2, lambda: trained(half))
    in_processes(2, lambda: trained(two, resume="auto"))
    found, expected = (checkpoint_tensors(last_step(config)) for config in (two, alone))
    assert any(name.startswith("training/objective") for name in found)
    assert error(found, expected) < 1e-4
    lines = [metrics_lines(config.run.dir) for config in (two, alone)]
    for key in ("loss", "held_out_loss", "adversarial", "critic"):
        values = [[line[key] for line in of if key in line] for of in lines]
        assert values[0]
        assert values[0] == pytest.approx(values[1], rel=1e-4), key


# --- stops and resumes --------------------------------------------------------------------------


def stopped_after(config: Config, calls: int) -> None:
    """Train until the run has asked this often whether to stop."""
    asked = itertools.count(1)
    with pytest.raises(Interrupted):
        for _ in train(TrainOptions(config, "auto", lambda: 15 if next(asked) >= calls else None)):
            pass


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_at_five_places_is_the_run(ground: Ground, tmp_path: Path, method: str) -> None:
    """Within a step, between steps, in a held-out loss; weights, averages, critic, optimizer, metrics, to the bit."""
    cut = ("train.steps=6", "train.accumulate=2", "train.batch_size=3", "log.sample_every=6")
    straight, often = (
        ground.student(tmp_path / name, METHODS[method], *cut) for name in ("straight", "often")
    )
    trained(straight)
    places = []
    for calls in (2, 4, 3, 5, 4):
        stopped_after(often, calls)
        folders = checkpoint.steps(often.run.dir)
        places.append(checkpoint.step_of(folders[-1]) if folders else 0)
    assert places[-1] < 6, "it was stopped before its end"
    assert sorted(places) == places
    assert len({*places}) > 2, places
    trained(often, resume="auto")
    found, expected = (checkpoint_tensors(last_step(config)) for config in (often, straight))
    assert {name.split(":")[0] for name in found} >= {
        "training/objective.safetensors",
        "training/raw.safetensors",
    }
    assert_same_tensors(found, expected)
    assert without_times(metrics_lines(often.run.dir)) == without_times(metrics_lines(straight.run.dir))


def test_a_killed_run_goes_on_to_the_bit(ground: Ground, tmp_path: Path) -> None:
    straight, killed = (
        ground.student(tmp_path / name, {}, "train.steps=12", "save.every=3", "log.sample_every=50")
        for name in ("straight", "killed")
    )
    trained(straight)
    process = child(lambda: trained(killed))
    wait_until(lambda: checkpoint.steps(killed.run.dir) != [], process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 0 < trained(killed, resume="auto").first_step < 12
    assert_same_tensors(checkpoint_tensors(last_step(killed)), checkpoint_tensors(last_step(straight)))


def test_a_student_goes_on_with_its_own_teacher_alone(ground: Ground, tmp_path: Path) -> None:
    """Wherever that lies: it is known by the hash of its tensors."""
    own, moved, other = (tmp_path / name for name in ("own", "moved", "other"))
    for place in (own, other):
        shutil.copytree(ground.teacher(), place)
    perturb(other)

    def taught_by(teacher: Path, steps: int) -> Config:
        return ground.student(tmp_path / "run", {}, f"train.steps={steps}", teacher=teacher)

    trained(taught_by(own, 2))
    before = contents(tmp_path / "run")
    with pytest.raises(SanaError, match=r"other is not the model that .*step-000002 .*sha256"):
        trained(taught_by(other, 4), resume="auto")
    assert contents(tmp_path / "run") == before
    own.rename(moved)
    assert trained(taught_by(moved, 4), resume="auto").first_step == 2
    plain = small_config(
        ground.folder, *MODEL, f"run.dir={tmp_path / 'plain'}", "objective.prediction_type=sample"
    )
    trained(plain)
    with pytest.raises(SanaError, match=r"step-000004"):
        trained(ground.student(tmp_path / "plain", {}, "train.steps=6"), resume="auto")


@pytest.mark.parametrize("method", METHODS)
def test_the_held_out_loss_depends_on_the_weights_alone(ground: Ground, tmp_path: Path, method: str) -> None:
    """Not on the step, the critic, or how many images are computed at once."""
    trainer = make_trainer(ground.student(tmp_path, METHODS[method]), 4)
    other = make_trainer(
        ground.student(tmp_path, METHODS[method] | {"critic": False}, "train.batch_size=5"), 8
    )
    first = trainer.evaluate().mean
    other.step = 1000
    assert first == trainer.evaluate().mean
    assert first == pytest.approx(other.evaluate().mean, rel=1e-5)
    trainer.advance()
    assert trainer.evaluate().mean != first
    trainer.close()
    other.close()


def test_the_held_out_loss_of_scm_does_not_depend_on_its_warm_up(ground: Ground, tmp_path: Path) -> None:
    found = []
    for warmup in (0, 10):
        trainer = make_trainer(ground.student(tmp_path, METHODS["scm"] | {"tangent_warmup": warmup}), 4)
        found.append(trainer.evaluate().mean)
        trainer.close()
    assert found[0] == found[1]


# --- what is said beforehand, and what is refused -----------------------------------------------


def test_memory_counts_teacher_and_critics(ground: Ground, tmp_path: Path) -> None:
    """Each in its place: the teacher whole; gradients, average and moments of what moves alone."""
    dataset = Dataset(ground.folder / "data")
    models = begun(ground.student(tmp_path))
    assert models.teacher is not None
    moving = sum(
        p.numel() for name, p in models.transformer.named_parameters() if not name.startswith(TIME_EMBEDDER)
    )
    found: dict[bool, Any] = {}
    for critic in (False, True):
        config = ground.student(tmp_path, {"critic": critic})
        trainer = make_trainer(config, 4)
        learned = moving + sum(p.numel() for p in trainer.others)
        found[critic] = memory = training_memory(
            resolve_architecture(config, dataset), config, make_train_set(config, dataset),
            Placement(torch.device("cuda"), "fp32"), 1, teacher=models.teacher.config,
        )  # fmt: skip
        assert memory.weights == 4 * sum(p.numel() for p in models.transformer.parameters())
        assert memory.teacher == 4 * sum(p.numel() for p in models.teacher.parameters())
        assert memory.gradients == 4 * learned
        trainer.advance()
        assert memory.optimizer == sum(4 * tensor.numel() for _, tensor in trainer.optimizer.state())
        trainer.close()
    assert found[False].activations <= found[True].activations


REFUSED: list[Any] = [
    ({}, ("model.guidance_embeds=false", "sample.solver=dpm++"), "model.guidance_embeds: a student has its"),
    ({}, ("sample.solver=dpm++",), r"sample.solver: a student is drawn with scm, not dpm\+\+"),
    ({}, ("adapter.kind=lora", "train.init_from=x"), "adapter.kind: a student learns with all its weights"),
    ({}, ("train.init_from=x",), "train.init_from: a student begins as distill.teacher"),
    ({"guidance": [2.0, 2.0]}, (), "distill.guidance: 2 must be below 2"),
    ({"guidance": [0.0, 2.0]}, (), "distill.guidance must be greater than 0"),
    ({"guidance_interval": [0.5, 0.2]}, (), "distill.guidance_interval: 0.5 must be below 0.2"),
    ({"stride": [0.4, 0.3]}, (), "distill.stride: 0.4 must be below 0.3"),
    ({"stride": [0.0, 0.3]}, (), "distill.stride: must begin above 0"),
    ({"largest": 1.5}, (), "distill.largest must be less than or equal to 1"),
    ({"critic_blocks": [0, 2]}, (), "distill.critic_blocks: 2, and the model has blocks 0 to 1"),
    ({"method": "scm", "tangent": "jvp"}, ("train.parallel=fsdp",), "distill.tangent: jvp does not pass"),
    ({}, ("optim.ema_device=cpu",), "optim.ema_device: consistency uses the average"),
    ({}, ("adapter.kind=lora",), "adapter.kind: a student learns with all its weights"),
    ({"critic_blocks": []}, (), "distill.critic_blocks"),
    ({"critic_blocks": [1, 1]}, (), "distill.critic_blocks"),
    ({}, ("optim.optimizer=came", "optim.betas=[0.0, 0.99]"), "optim.betas"),
    (METHODS["scm"], ("train.weights=bf16", "train.precision=bf16"), "train.weights: scm's tangent needs float32"),
]  # fmt: skip


@pytest.mark.parametrize(("distill", "overrides", "message"), REFUSED)
def test_keys_that_do_not_go_together_are_refused(
    ground: Ground, tmp_path: Path, distill: dict[str, Any], overrides: tuple[str, ...], message: str
) -> None:
    """Each problem in one line that begins with its key."""
    with pytest.raises(SanaError, match=message) as caught:
        ground.student(tmp_path, distill, *overrides)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) <= max(1, len(overrides))


def test_keys_of_distillation_need_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(SanaError, match=r"distill.largest: is given, and .* sana distill TEACHER"):
        small_config(tmp_path, "distill.largest=0.123")


def test_teachers_that_cannot_teach_are_refused(ground: Ground, tmp_path: Path) -> None:
    """Before anything is written, by training and by its plan."""
    own, adapters = tmp_path / "student", tmp_path / "adapters"
    trained(ground.student(own, {}, "train.steps=1", "optim.warmup_steps=0"))
    trained(
        small_config(
            ground.folder, *MODEL, "adapter.kind=lora", f"train.init_from={ground.teacher()}", "train.steps=1",
            "objective.prediction_type=sample", "optim.warmup_steps=0", f"run.dir={adapters}",
        )
    )  # fmt: skip
    run = tmp_path / "run"
    cases: list[tuple[Config, str]] = [
        (ground.student(run, teacher=own), r"distill.teacher: .*student is itself a few-step model"),
        (ground.student(run, teacher=adapters), r"distill.teacher: .* has adapters alone\n.*sana merge"),
        (ground.student(run, teacher=tmp_path / "none"), r"distill.teacher: "),
        (ground.student(run, {}, "model.num_layers=3"), r"distill.teacher: .*is not the model .*\nmodel.num_layers: it has 2, not 3"),
        (ground.student(run, kind="flow_prediction", teacher=ground.teacher("sample")), "objective.prediction_type: it has 'sample'"),
    ]  # fmt: skip
    for config, message in cases:
        with pytest.raises(SanaError, match=message) as caught:
            trained(config)
        assert len(str(caught.value).splitlines()) <= 4
        if "few-step" in message or "layers" in message:
            with pytest.raises(SanaError, match=message):
                plan(TrainOptions(config))
        assert not run.exists()


def test_a_distillation_that_diverges_is_not_told_to_begin_from_its_student(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = Distillation.losses, itertools.count(1)

    def broken(self: Distillation, *given: Any) -> dict[str, Tensor]:
        scale = float("nan") if next(calls) > 2 else 1.0
        return {name: scale * term for name, term in honest(self, *given).items()}

    monkeypatch.setattr(Distillation, "losses", broken)
    with pytest.raises(SanaError, match="step 3: the loss is not finite") as caught:
        trained(ground.student(tmp_path / "run"))
    assert "train.init_from" not in str(caught.value)


# --- what a student is to others ----------------------------------------------------------------


def test_diffusers_draws_a_velocity_student_as_we_do(ground: Ground, tmp_path: Path) -> None:
    """It loads strictly; `SanaSprintPipeline` draws the same in 1, 2 and 4 steps, by each guidance."""
    diffusers = pytest.importorskip("diffusers")
    config = ground.student(tmp_path / "run", METHODS["consistency"], "optim.lr=1e-2", kind="flow_prediction")
    folder = trained(config).checkpoint
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    transformer = diffusers.SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert transformer.config.guidance_embeds
    assert_same_tensors(dict(transformer.state_dict()), state)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline"
    scheduler = diffusers.SCMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = diffusers.SanaSprintPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    dataset, model = Dataset(config.data.dir), checkpoint.load_transformer(folder)
    caption, null = dataset.states([0, dataset.index.null_caption])
    drawn = []
    for steps, scale in itertools.product((1, 2, 4), (1.0, 3.5)):
        theirs = pipeline(
            prompt_embeds=caption[None].float(), prompt_attention_mask=torch.ones(1, len(caption)),
            height=16 * 32, width=16 * 32, num_inference_steps=steps, guidance_scale=scale, output_type="latent",
            intermediate_timesteps=1.3 if steps == 2 else None, generator=torch.Generator().manual_seed(7),
            use_resolution_binning=False,
        ).images  # fmt: skip
        sample = config.sample.model_copy(update={"steps": steps, "guidance_scale": scale})
        recipe = sampler.Recipe(sample, dataset.image_shape, "flow_prediction", "fp32")
        ours = sampler.final_images(sampler.sample_images(model, [caption], [null], [7], recipe))
        assert float((ours - theirs).abs().max()) < 1e-4, (steps, scale)
        drawn.append(ours)
    assert all(float((one - two).abs().max()) > 1e-2 for one, two in itertools.combinations(drawn[::2], 2))
    assert not torch.equal(drawn[0], drawn[1]), "guidance does nothing"


def test_a_student_says_what_it_is(ground: Ground, tmp_path: Path) -> None:
    """In its card and by `sana inspect`; one that predicts data is refused by diffusers, in its own words."""
    for kind in KINDS:
        folder = trained(ground.student(tmp_path / kind, {}, "train.steps=2", kind=kind)).checkpoint
        card = (folder / "README.md").read_text()
        assert f"Its teacher is {ground.teacher(kind).name}, " in card
        assert ("SanaSprintPipeline cannot" in card) == (kind == "sample")
        shown = invoke("inspect", str(folder), columns=300)
        assert shown.exit_code == 0, shown.output
        (line,) = [line for line in shown.output.splitlines() if "distilled from" in line]
        assert ground.teacher(kind).name in line
        assert checkpoint.read_record(folder).teacher is not None
        assert str(ground.folder) not in (folder / "sana.json").read_text(), "a path means nothing elsewhere"
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert scheduler["_class_name"] == "SCMScheduler"
        assert scheduler["prediction_type"] == ("sample" if kind == "sample" else "trigflow")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.SCMScheduler.from_pretrained(
        tmp_path / "sample" / "checkpoints" / "step-000002" / "scheduler"
    )
    theirs.set_timesteps(1, intermediate_timesteps=None)
    with pytest.raises(ValueError, match="Unsupported parameterization: sample"):
        theirs.step(torch.zeros(1, 1, 4, 4), theirs.timesteps[0], torch.zeros(1, 1, 4, 4))


def test_sana_sample_draws_from_a_student(ground: Ground, tmp_path: Path) -> None:
    config = ground.student(tmp_path / "run", {}, "train.steps=2")
    trained(config)
    assert (config.run.dir / "samples" / "step-000002.png").is_file()
    for steps in (1, 2, 4):
        out = tmp_path / f"{steps}.png"
        given = ("--steps", str(steps), "--guidance-scale", "3", "--out", str(out))
        result = invoke("sample", "--checkpoint", str(config.run.dir), "4 two", *given)
        assert result.exit_code == 0, result.output
        assert out.is_file()


# --- shapes, types, latents ---------------------------------------------------------------------


def test_critics_take_other_shapes_and_see_images_alone() -> None:
    states = [torch.randn(5, 8 * 4, 24) for _ in range(2)]
    features = Critic(2, 24)
    assert features(states, 8).shape == (5, 2 * 8 * 4)
    torch.testing.assert_close(features([of[3:] for of in states], 8), features(states, 8)[3:])
    moved = [of.clone() for of in states]
    moved[0][0, 0, :5] += 1  # the corner: of 8 rows of 4 tokens, its neighbours see it
    seen = (features(moved, 8) - features(states, 8))[0, :32].view(8, 4).abs() > 1e-7
    assert seen.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ground, tuple[str, ...]]:
    """The same on pictures of three shapes, with the keys that are theirs."""
    folder, generator = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number, (height, width) in enumerate([(32, 32), (24, 40), (40, 24)] * 4):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:02}.png")
        (folder / "pictures" / f"{number:02}.txt").write_text(f"number {number}\n")
    keys = (
        "data.source=folder", f"data.path={folder / 'pictures'}", "data.workers=0", "data.buckets=[32]",
        "model.in_channels=3", "model.patch_size=2", "data.held_out_split=null", "sample.prompts=[number 1]",
        "log.sample_every=50", "train.steps=2",
    )  # fmt: skip
    teacher = small_config(folder, *MODEL, *keys, f"run.dir={folder / 'teacher-flow_prediction'}")
    embedded(teacher, None)
    trained(teacher)
    return Ground(folder), keys


@pytest.mark.parametrize("method", METHODS)
def test_a_dataset_of_many_shapes_is_distilled(
    shapes: tuple[Ground, tuple[str, ...]], tmp_path: Path, method: str
) -> None:
    """Its steps have micro-batches of several shapes, and their gradients do not depend on the cut."""
    ground, keys = shapes

    def sized(size: int) -> Config:
        batch = f"train.batch_size={size}"
        return ground.student(tmp_path / "run", METHODS[method], *keys, batch, kind="flow_prediction")

    assert len(make_train_set(sized(8), Dataset(sized(8).data.dir)).shapes) == 3
    expected = step_gradients(sized(8), 8)
    assert error(step_gradients(sized(3), 8), expected) < 10 * ROUNDING[method]
    assert np.isfinite(trained(sized(4)).loss)


@pytest.mark.parametrize(
    ("method", "weights"),
    [("consistency", "fp32"), ("consistency", "bf16"), ("scm", "fp32"), ("scm by jvp", "fp32")],
)
def test_arithmetic_in_bf16(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, weights: str
) -> None:
    """Losses are near those in float32, and the student learns; with CAME on bf16 matrices too."""
    for place in ("runtime.device.cpu_has_bf16", "kernels.has_native_bf16"):
        monkeypatch.setattr(f"sana_cli.{place}", lambda *_: True)
    distill = METHODS["scm"] | JVP if method == "scm by jvp" else METHODS[method]
    came = (
        ("train.weights=bf16", "optim.optimizer=came", "optim.lr=1e-4", "optim.betas=[0.9, 0.99]")
        if weights == "bf16"
        else ()
    )
    config = ground.student(
        tmp_path / "run", distill, "train.precision=bf16", "train.steps=2", "optim.warmup_steps=0", *came
    )
    trainers = [
        make_trainer(config, 6, precision="bf16"),
        make_trainer(ground.student(tmp_path / "wide", distill, "optim.warmup_steps=0"), 6),
    ]
    with arithmetic_as_asked():
        half, wide = (trainer.advance() for trainer in trainers)
    assert half.loss == pytest.approx(wide.loss, rel=0.1, abs=0.02)
    assert half.others["critic"] == pytest.approx(wide.others["critic"], rel=0.1)
    kinds = {p.dtype for p in trainers[0].model.parameters()}
    assert kinds == ({torch.float32, torch.bfloat16} if weights == "bf16" else {torch.float32})
    assert {p.dtype for p in trainers[0].others} == {torch.float32}
    for trainer in trainers:
        trainer.close()
    assert np.isfinite(trained(config).loss)


def test_a_pipeline_of_latents_is_distilled(
    tmp_path: Path, gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small random one, on photos of three shapes: what it takes is said, it runs, and it is drawn from."""
    pytest.importorskip("diffusers")
    from whole import test_finetuning as latents

    monkeypatch.chdir(tmp_path)
    latents.save_pipeline(latents.BASE, gemma, sprint=False)
    latents.save_photos(Path("photos"))
    for number in (*range(2), *range(5, 12)):  # three are left, each of another shape
        Path(f"photos/{number:02}.jpg").unlink()
        Path(f"photos/{number:02}.txt").unlink()
    latents.save_config(latents.CONFIG)
    before = contents(latents.BASE)

    def sana(*arguments: str) -> str:
        result = invoke(*arguments, columns=200)
        assert result.exit_code == 0, result.output
        return result.output

    sana("embed", "--config", "finetune-1.6b", "--set", "data.path=photos")
    result = invoke("distill", str(latents.BASE), columns=200)
    assert result.exit_code == 2
    assert "does not say which dataset" in result.output
    assert "--config finetune-1.6b" in result.output
    keys = {
        **RECIPE, "run.dir": "runs/few", "train.steps": 2, "train.accumulate": 2,
        "train.precision": "fp32", "optim.warmup_steps": 1, "log.sample_every": 10, "optim.optimizer": "came",
        "optim.lr": 1e-4, "sample.steps": 1, "sample.prompts": [latents.PROMPT],
    }  # fmt: skip
    named = {key if "." in key else f"distill.{key}": value for key, value in keys.items()}
    given = [
        word
        for key, value in named.items()
        for word in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    ]
    command = ("distill", str(latents.BASE), "--config", "finetune-1.6b", *given)
    said = sana(*command, "--dry-run")
    (memory,) = [line for line in said.splitlines() if line.startswith("memory")]
    assert "teacher" in memory
    assert not Path("runs").exists()
    sana(*command)
    (folder,) = [path for path in checkpoint.steps(Path("runs/few")) if checkpoint.step_of(path) == 2]
    assert len(metrics_lines(Path("runs/few"))) >= 1
    out = Path("drawn.png")
    size = ("--height", str(latents.SIDE), "--width", str(latents.SIDE))
    sana("sample", "--checkpoint", str(folder), latents.PROMPT, "--steps", "1", "--out", str(out), *size)
    with Image.open(out) as image:
        assert np.asarray(image).std() > 0
    assert contents(latents.BASE) == before

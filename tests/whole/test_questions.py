"""The experiments of docs/questions.md: what they change, measure and keep."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import answers
import experiments
import numpy as np
import pytest
import questions
import torch
from experiments import OBJECTS, Place, Run, World, twisted
from helpers import contents
from PIL import Image

from sana_cli.commands.train import TrainOptions, TrainStart, TrainStep, train
from sana_cli.config.keys import Architecture
from sana_cli.errors import SanaError
from sana_cli.model import build

ARCHITECTURE = Architecture(
    in_channels=3, patch_size=4, num_layers=2, sample_size=16, caption_channels=8,
    num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
)  # fmt: skip

SHORT_WARMUP = ("optim.warmup_steps=1",)


def by_patches(images: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The patches of images (B, 3, 16, 16) in another order."""
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(images), 3, 16, 4, 4)[:, :, order]
    return patches.reshape(-1, 3, 4, 4, 4, 4).transpose(3, 4).reshape(-1, 3, 16, 16)


@torch.no_grad()
def moved_with_patches(twist: str, interpolation_scale: float | None) -> float:
    """How far the output is from moving as the patches of the input do: 0 where nothing knows a place."""
    config = ARCHITECTURE.model_copy(update={"interpolation_scale": interpolation_scale})
    model = build(config, seed=1, init="fan_in")
    generator = torch.Generator().manual_seed(0)
    images, states = torch.randn(2, 3, 16, 16, generator=generator), torch.randn(2, 5, 8, generator=generator)
    order = torch.randperm(16, generator=generator)
    with twisted(twist):
        one = by_patches(model(images, states, torch.tensor([500.0])), order)
        other = model(by_patches(images, order), states, torch.tensor([500.0]))
    return float((one - other).abs().max())


def test_the_four_blocks_know_places_by_what_they_are_said_to() -> None:
    assert moved_with_patches("centre", None) < 1e-5
    assert moved_with_patches("", None) > 0.01
    assert moved_with_patches("centre", 1.0) > 0.01


@torch.no_grad()
def test_the_centre_alone_is_the_convolution_with_its_other_weights_at_zero() -> None:
    model = build(ARCHITECTURE, seed=2, init="fan_in")
    x, states = torch.randn(1, 3, 16, 16), torch.randn(1, 5, 8)
    with twisted("centre"):
        held = model(x, states, torch.tensor([300.0]))
    for name, weight in model.named_parameters():
        if name.endswith("conv_depth.weight"):
            centre = 3 * weight[:, :, 1, 1]
            weight.zero_()
            weight[:, :, 1, 1] = centre
    torch.testing.assert_close(model(x, states, torch.tensor([300.0])), held)


@torch.no_grad()
def test_without_the_caption_norm_the_size_of_states_counts() -> None:
    model = build(ARCHITECTURE, seed=3, init="fan_in")
    for name, parameter in model.named_parameters():
        if name.startswith("caption_projection") and name.endswith("bias"):
            parameter.zero_()
    given = torch.randn(1, 3, 16, 16), 1e-2 * torch.randn(1, 5, 8), torch.tensor([300.0])

    def change() -> float:  # from states a tenth as large, whose projection is nearly linear
        return float((model(*given) - model(given[0], given[1] / 10, given[2])).abs().max())

    with_norm = change()
    with twisted("unscaled"):
        assert change() > 0
        sizes = [float(model.caption_norm(scale * torch.ones(1, 1, 16)).abs().max()) for scale in (1.0, 3.0)]
    assert sizes[1] == pytest.approx(3 * sizes[0])
    assert with_norm == pytest.approx(change())  # the twist is undone


def test_the_probe_reads_a_place_that_is_there_and_none_that_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    row, column = torch.meshgrid(*[torch.linspace(-1, 1, 4, dtype=torch.float64)] * 2, indexing="ij")
    places = torch.stack([row, column], dim=-1).flatten(0, 1)
    one, other = (torch.randn(300, 16, 8, generator=generator) for _ in "ab")
    assert abs(experiments._r_squared(one, other, places)) < 0.05

    def beside(states: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return torch.cat([states, more.float().expand(300, -1, -1)], dim=-1)

    both = 0.5 * places + 1
    assert experiments._r_squared(beside(one, both), beside(other, both), places) > 0.999
    rows = places[:, :1]
    half = experiments._r_squared(beside(one, rows), beside(other, rows), places)
    assert half == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_of_sides_say_what_stands_where(split: str) -> None:
    import random

    draws = random.Random(f"sides {split}")
    for _ in range(50):
        picture, caption, shown = experiments._picture("sides", draws)
        pixels = np.asarray(picture).astype(float)
        halves = {"left": pixels[:, :16], "right": pixels[:, 16:]}
        colours = {side: shown[side].split()[0] for side in halves}
        for side, half in halves.items():
            for colour in set(colours.values()):
                wanted = np.array([int(experiments.PAINTS[colour][at : at + 2], 16) for at in (1, 3, 5)])
                close = np.abs(half - wanted).max(-1) < 8
                assert (close.sum() > 10) == (colour == colours[side])
        first, second = (shown[side] for side in ("left", "right"))
        assert caption in (f"a {first} left of a {second}", f"a {second} right of a {first}")


@pytest.mark.parametrize("count", list(answers.T_975))
def test_an_interval_holds_95_per_cent_of_students_t(count: int) -> None:
    freedom = count - 1
    t = np.linspace(0, answers.T_975[count], 200_001)
    density = math.gamma(count / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    inside = 2 * np.trapezoid(density * (1 + t * t / freedom) ** (-count / 2), t)
    assert inside == pytest.approx(0.95, abs=1e-4)
    values = [1.0, 2.5, 2.0, 7.0, 3.0, 4.0][:count]
    found = answers.Estimate.of(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half == pytest.approx(answers.T_975[count] * np.std(values, ddof=1) / count**0.5)


def test_one_seed_has_no_interval_and_settles_nothing() -> None:
    found = answers.Estimate.of([3.0])
    assert math.isnan(found.half)
    assert not found.settled
    assert found.text() == "3.0"


def record(name: str, seed: int, hits: int, seconds_per_step: float = 0.1) -> dict[str, object]:
    marks = [
        {"steps": steps, "seen": {"all": [hits * steps // 100, 1000]}, "distance": 100.0 / steps}
        for steps in (100, 200)
    ]
    run = {"question": "width", "world": "digits", "name": name, "seed": seed, "short": seed == 0}
    return {"run": run, "marks": marks, "seconds_per_step": seconds_per_step, "parameters": 1}


def test_differences_are_of_the_same_seed() -> None:
    records = [record("48", seed, 100 + 10 * seed) for seed in range(3)]
    records += [record("96", seed, 130 + 10 * seed) for seed in range(2)]
    found = answers.Results(records).difference(
        "width", "digits", ("96", "48"), answers.share("seen", "all", 100)
    )
    assert found == answers.Estimate(pytest.approx(3.0), pytest.approx(0.0, abs=1e-9), 2)  # type: ignore[arg-type]


def test_equal_time_reads_between_checkpoints() -> None:
    value = answers.at_time(lambda steps: answers.share("seen", "all", steps), 15.0, lambda _: 0.1)
    half_way = 10 * (math.log(1.5) / math.log(2)) + 10  # between 10 % after 10 s and 20 % after 20 s
    assert value(record("48", 0, 100)) == pytest.approx(half_way)
    far = answers.far_at_time(15.0, lambda _: 0.1)
    assert far(record("48", 0, 100)) == pytest.approx(1 / 1.5)  # the distance is as one over the steps
    assert math.isnan(answers.far_at_time(5.0, lambda _: 0.1)(record("48", 0, 100)))  # before the first


def test_a_page_is_filled_between_its_markers_and_again() -> None:
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n"
    filled = answers.fill(page, {"one": "new"})
    assert filled == "a\n<!-- one -->\n\nnew\n\n<!-- end -->\nb\n"
    assert answers.fill(filled, {"one": "newer"}) == filled.replace("new", "newer")
    with pytest.raises(ValueError, match="two"):
        answers.fill(page, {"two": "x"})
    with pytest.raises(ValueError, match="end"):
        answers.fill("<!-- one -->\n<!-- two -->\n<!-- end -->\n", {"one": "x"})


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(experiments.PACKAGES, "MiniLM", ("no_such_module", "pip install it"))
    with pytest.raises(SanaError, match="MiniLM is not installed\ninstall it with: pip install it"):
        experiments.package("MiniLM")


def test_every_run_has_a_name_of_its_own_and_the_short_form_is_a_part() -> None:
    every = questions.runs(questions.QUESTIONS, short=False)
    assert len({run.file_name for run in every}) == len(every)
    short = questions.runs(questions.QUESTIONS, short=True)
    assert set(short) < set(every)
    assert {run.question for run in short} == set(questions.QUESTIONS)


@pytest.mark.parametrize("world", ["digits", "critters"])
def test_widths_differ_in_heads_and_rate_alone(world: str, tmp_path: Path) -> None:
    of = [run for run in questions.width(0) if run.world == world]
    found = [Place(tmp_path)._run_config(run).model_dump() for run in of]
    for one in found:
        for key in ("num_attention_heads", "num_cross_attention_heads"):
            del one["model"][key]
        for key in ("attention_head_dim", "cross_attention_head_dim"):
            del one["model"][key]
        del one["optim"]["lr"], one["train"]["steps"], one["save"]["every"]
    assert all(one == found[0] for one in found)
    assert found[0]["model"]["patch_size"] == 8


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(experiments, "DRAWN", {"train": 40, "test": 12})
    monkeypatch.setattr(experiments, "PROBED", 12)
    sets = (*OBJECTS, "data.held_out_split=test", "model.num_layers=1")
    monkeypatch.setitem(experiments.WORLDS, "shapes", World("quickstart", sets, 8))
    return Place(tmp_path)


def test_a_run_is_kept_and_not_made_again(small: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("places", "as published", "shapes", (2, 4), 0, SHORT_WARMUP, probe=True)
    small.prepare("shapes", run.encoder, for_judge=True)
    small.carry_out(run)
    found = small.record(run)
    assert found is not None
    assert [mark["steps"] for mark in found["marks"]] == [2, 4]
    assert found["marks"][0]["seen"]["all"][1] == 8
    assert set(found["sizes"]) == {"24", "32", "48", "64"}
    assert [len(read) for read in found["places"].values()] == [2, 2]
    with Image.open(small.folder / "strips" / f"{run.file_name}-64.png") as strip:
        assert strip.size == (8 * 64, 64)
    assert not list((small.folder / "runs").iterdir())

    before = contents(small.folder)
    monkeypatch.setattr(experiments, "train", lambda options: pytest.fail("it is there"))
    small.carry_out(run)
    assert contents(small.folder) == before
    assert (
        small.record(Run("places", "as published", "shapes", (2, 4), 1, SHORT_WARMUP, probe=True)) is None
    )  # another seed
    monkeypatch.undo()
    assert small.record(run) is None  # of another world: what is kept is not taken for it


def test_a_run_that_was_stopped_goes_on(small: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("places", "neither", "shapes", (2, 4), 0, SHORT_WARMUP, twist="centre")
    small.prepare("shapes", run.encoder, for_judge=True)

    def stopped(options: TrainOptions) -> Iterator[object]:
        for event in train(options):
            if isinstance(event, TrainStep) and event.step == 3:
                raise KeyboardInterrupt
            yield event

    with monkeypatch.context() as patched:
        patched.setattr(experiments, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            small.carry_out(run)
    assert small.record(run) is None
    begun = list[object]()

    def watched(options: TrainOptions) -> Iterator[object]:
        for event in train(options):
            begun.append(event)
            yield event

    monkeypatch.setattr(experiments, "train", watched)
    small.carry_out(run)
    assert isinstance(begun[0], TrainStart)
    assert begun[0].step == 2
    assert small.record(run) is not None


class Diary(Place):
    """A place where nothing is made, but what was asked for is kept in its order."""

    def encoder_sets(self, name: str) -> tuple[str, ...]:
        return ()

    def prepare(self, world: str, encoder: str, for_judge: bool) -> None:
        self._write(f"{world} {'judge' if for_judge else encoder}")

    def judge(self, world: str) -> Any:
        if world == "shapes":
            raise SanaError("it learns nothing")

    def record(self, run: Run) -> dict[str, Any] | None:
        return {"hash": ""} if run.seed == 1 else None

    def carry_out(self, run: Run) -> None:
        self._write(f"run {run.world} {run.encoder}")

    def _write(self, line: str) -> None:
        with (self.folder / "diary").open("a") as diary:
            diary.write(f"{line}\n")


def test_each_run_comes_after_its_datasets_and_judge(tmp_path: Path) -> None:
    def runs(world: str, encoder: str) -> list[Run]:
        return [Run("captions", encoder, world, (1,), seed, encoder=encoder) for seed in (0, 1, 2)]

    wanted = [*runs("critters", "tiny"), *runs("critters", "MiniLM"), *runs("digits", "MiniLM")]
    questions.carry_out(Diary(tmp_path), wanted, 2)
    lines = (tmp_path / "diary").read_text().splitlines()
    # digits are judged by what learns from the same dataset
    datasets = ["critters judge", "critters tiny", "critters MiniLM", "digits judge", "digits MiniLM"]
    assert sorted(lines) == sorted(
        [*datasets, *(f"run {run.world} {run.encoder}" for run in wanted if run.seed != 1)]
    )
    for at, line in enumerate(lines):
        if line.startswith("run "):
            _, world, encoder = line.split()
            assert {f"{world} judge", f"{world} {encoder}"} <= set(lines[:at])

    with pytest.raises(SanaError, match="it learns nothing"):
        questions.carry_out(Diary(tmp_path), runs("shapes", "tiny"), 2)
    assert "run shapes tiny" not in (tmp_path / "diary").read_text()

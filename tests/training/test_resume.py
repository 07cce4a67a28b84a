"""A resumed run is bitwise equal to an uninterrupted one; what does not fit is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    again,
    assert_same_tensors,
    checkpoint_tensors,
    close,
    embedded,
    metrics_lines,
    trained,
    without_times,
)

from sana_cli.commands.train import TrainOptions, TrainStart, TrainStep, train
from sana_cli.config.keys import Config
from sana_cli.errors import Interrupted, SanaError
from sana_cli.runtime import files
from sana_cli.weights import checkpoint, configs


def stopped(config: Config, step: int, polls: int = 1, resume: str = "none") -> Interrupted:
    """Train until `step` is done, then ask for a stop at poll number `polls`."""
    asked = -1

    def stop() -> int | None:
        nonlocal asked
        asked += asked >= 0
        return 15 if asked >= polls else None

    def go() -> None:
        nonlocal asked
        for found in train(TrainOptions(config, resume, stop)):
            if isinstance(found, TrainStep) and found.step == step:
                asked = 0

    with pytest.raises(Interrupted) as caught:
        go()
    assert caught.value.exit_code == 143
    return caught.value


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_resumed_at_any_step_is_bitwise_one_never_stopped(config: Config, accumulate: int) -> None:
    """Also if it stops between two lines of metrics, or in a held-out loss."""

    def cut(name: str) -> Config:
        return again(
            config, f"run.dir={config.run.dir}-{name}", f"train.accumulate={accumulate}", "train.steps=12",
            "log.every=3",
            "save.every=12", "log.sample_every=12", "optim.ema_decay=0.9", "data.held_out_split=test",
            "log.held_out_every=4", "log.held_out_images=6",
        )  # fmt: skip

    embedded(cut("straight"))
    straight = trained(cut("straight"))
    weights, lines = checkpoint_tensors(straight.checkpoint), without_times(metrics_lines(straight.run))
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [4, 8, 12]
    for step in range(12):
        for polls in {1, accumulate}:  # the second stops inside a step, whose gradients are dropped
            there = cut(f"{step}-{polls}")
            message = str(stopped(there, step, polls))
            assert message.startswith(
                f"stopped after step {step}" + (", which is saved" if step else "; nothing was saved")
            )
            summary = trained(there, resume="auto")
            assert (summary.first_step, summary.steps) == (step, 12)
            assert_same_tensors(checkpoint_tensors(summary.checkpoint), weights)
            assert without_times(metrics_lines(there.run.dir)) == lines


def test_what_a_stop_cut_short_is_made_up_for(config: Config) -> None:
    """A pending line of metrics, and an unfinished grid."""

    def cut(name: str) -> Config:
        return again(
            config, f"run.dir={config.run.dir}-{name}", "log.every=2", "log.sample_every=2", "save.every=4",
            "data.held_out_split=test", "log.held_out_every=2", "log.held_out_images=8", "sample.steps=3",
        )  # fmt: skip

    embedded(cut("straight"))
    straight = trained(cut("straight"))
    # step 2: one micro-batch, a held-out loss of two, and a grid of three solver steps
    for polls in range(1, 9):
        there = cut(str(polls))
        stopped(there, 1, polls)
        summary = trained(there, resume="auto")
        assert without_times(metrics_lines(there.run.dir)) == without_times(metrics_lines(straight.run)), (
            polls
        )
        grids = sorted(path.name for path in (there.run.dir / "samples").iterdir())
        assert grids == [f"step-00000{n}.png" for n in (0, 2, 4)]
        assert_same_tensors(checkpoint_tensors(summary.checkpoint), checkpoint_tensors(straight.checkpoint))


def test_resume_rules(config: Config) -> None:
    with pytest.raises(SanaError, match="no checkpoint at"):
        trained(config, resume=str(config.run.dir / "checkpoints" / "step-000002"))
    first = trained(again(config, "train.steps=2"), resume="auto")  # starts a new run
    assert first.first_step == 0
    with pytest.raises(
        SanaError, match=r"has checkpoints already, the newest step-000002\ncontinue it with `resume` auto"
    ):
        trained(config)
    with pytest.raises(SanaError) as caught:
        trained(again(config, "optim.lr=0.5", "model.num_layers=2"), resume="auto")
    assert "model.num_layers: the run has 1, not 2" in str(caught.value)
    assert "optim.lr: the run has 0.006, not 0.5" in str(caught.value)
    last = trained(again(config, "save.every=1", "log.every=3", "sample.steps=1"), resume="auto")
    assert (last.first_step, last.steps) == (2, 4)
    assert trained(config, resume="auto").first_step == 4  # already finished
    with pytest.raises(SanaError, match=r"later checkpoints than step-000003: step-000004\n.*another run"):
        trained(again(config, "train.steps=9"), resume=str(config.run.dir / "checkpoints" / "step-000003"))
    other = again(config, f"data.dir={config.data.dir}-other", "train.steps=9")
    embedded(other, limit=30)
    with pytest.raises(SanaError, match="is not the dataset that the run was trained on"):
        trained(other, resume="auto")


def test_another_step_is_refused_and_the_same_cut_otherwise_is_not(config: Config) -> None:
    trained(again(config, "train.steps=2"))
    with pytest.raises(SanaError, match=r"train\.batch_size: the run's steps have 4 images, and 2 x 1 are 2"):
        trained(again(config, "train.batch_size=2"), resume="auto")
    start, *_ = train(TrainOptions(again(config, "train.batch_size=1", "train.accumulate=4"), resume="auto"))
    assert isinstance(start, TrainStart)
    assert (start.step, start.plan.batch, start.plan.micro_batches) == (2, 4, 4)


def test_damaged_checkpoints_are_passed_over_by_name(config: Config) -> None:
    trained(again(config, "save.every=1", "save.keep=4"))
    folders = checkpoint.steps(config.run.dir)
    assert [folder.name for folder in folders] == [f"step-{n:06d}" for n in (1, 2, 3, 4)]
    (folders[3] / "manifest.json").unlink()
    raw = folders[2] / "training" / "raw.safetensors"
    content = bytearray(raw.read_bytes())
    content[-1] ^= 1
    raw.write_bytes(content)
    summary = trained(again(config, "save.keep=1"), resume="auto")
    assert summary.first_step == 2
    assert "step-000004 lacks manifest.json" in summary.skipped[0]
    assert "raw.safetensors is damaged" in summary.skipped[1]
    assert list(checkpoint.verify(config.run.dir / "checkpoints" / "step-000004", hashes=True))


def test_init_from_starts_with_the_weights_of_another_run(config: Config) -> None:
    first = trained(config)
    place = f"train.init_from={config.run.dir}"
    summary = trained(
        again(config, f"run.dir={config.run.dir}-2", place, "optim.lr=1e-12", "optim.weight_decay=0")
    )
    old = files.read_tensors(first.checkpoint / "transformer" / configs.WEIGHTS)
    new = files.read_tensors(summary.checkpoint / checkpoint.RAW_WEIGHTS)
    assert old.keys() == new.keys()
    assert all(torch.allclose(old[name], new[name], atol=1e-9) for name in old)
    with pytest.raises(
        SanaError, match=r"is not the model of this config:\nmodel\.num_layers: it has 1, not 2"
    ):
        trained(again(config, f"run.dir={config.run.dir}-3", place, "model.num_layers=2"))


def test_given_weights_draw_no_random_model_first(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """For resume and init_from: it would take seconds in every process, then be overwritten."""
    first = trained(config)

    def drawn(*_: object) -> None:
        raise AssertionError("a random model was drawn")

    monkeypatch.setattr("sana_cli.model.initialize", drawn)
    assert trained(again(config, "train.steps=6"), resume="auto").steps == 6
    place = f"train.init_from={first.checkpoint}"
    done = trained(again(config, place, f"run.dir={config.run.dir}-again", "optim.lr=1e-12"))
    found = files.read_tensors(done.checkpoint / checkpoint.RAW_WEIGHTS)
    given = files.read_tensors(first.checkpoint / "transformer" / configs.WEIGHTS)
    assert all(torch.allclose(found[name], given[name], atol=1e-6) for name in given), (
        "they are the given weights"
    )
    with pytest.raises(AssertionError, match="a random model was drawn"):
        trained(again(config, f"run.dir={config.run.dir}-new"))


def test_a_longer_run_keeps_the_warm_up_that_it_began_with(config: Config) -> None:
    """The default depends on the steps; with more steps, a run must not warm up again."""

    def cut(steps: int, warmup: int | None) -> Config:
        warm = "null" if warmup is None else warmup
        return again(
            config,
            f"train.steps={steps}",
            f"optim.warmup_steps={warm}",
            "optim.schedule=constant",
            f"save.every={steps}",
        )

    done = trained(cut(20, None))
    assert checkpoint.read_state(done.checkpoint).config["optim"]["warmup_steps"] == 2
    longer, rates = cut(1000, None), list[float]()
    steps = train(TrainOptions(longer, resume="auto"))
    for step in steps:
        if isinstance(step, TrainStep) and step.step > 20:
            rates.append(step.lr)
        if len(rates) == 3:
            break
    close(steps)
    assert rates == [longer.optim.lr] * 3
    with pytest.raises(SanaError, match=re.escape("optim.warmup_steps: the run has 2, not 5")):
        trained(cut(30, 5), resume="auto")


def test_a_run_without_an_average_is_resumed_to_the_bit(config: Config) -> None:
    def cut(name: str) -> Config:
        return again(config, f"run.dir={config.run.dir}-{name}", "optim.ema_decay=null")

    straight = trained(cut("straight"))
    stopped(cut("cut"), 3)
    summary = trained(cut("cut"), resume="auto")
    assert summary.first_step == 3
    assert_same_tensors(checkpoint_tensors(summary.checkpoint), checkpoint_tensors(straight.checkpoint))


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's state.json, with a manifest that fits it."""
    state = files.read_json(folder / checkpoint.STATE)
    change(state)
    files.write_json(folder / checkpoint.STATE, state)
    (folder / checkpoint.MANIFEST).unlink()
    checkpoint._seal(folder)


def test_states_of_other_versions(config: Config) -> None:
    """An unknown key is refused by name; a warm-up that is not on record is the former default of 50 steps."""
    long = again(config, "optim.warmup_steps=null", "train.steps=60", "save.every=30", "log.sample_every=60")
    stopped(long, 3)
    folder = checkpoint.steps(long.run.dir)[-1]
    rewrite_state(folder, lambda state: state["config"]["optim"].pop("warmup_steps"))
    steps = [step for step in train(TrainOptions(long, "auto")) if isinstance(step, TrainStep)]
    assert [step.lr for step in steps[1:3]] == pytest.approx(
        [long.optim.lr * n / 50 for n in (4, 5)], rel=1e-9
    )
    rewrite_state(checkpoint.steps(long.run.dir)[-1], lambda state: state["config"]["train"].update(foo=1))
    with pytest.raises(SanaError, match=r"train.foo: the run has 1, not None"):
        list(train(TrainOptions(again(long, "train.steps=70"), "auto")))


def test_dropout_is_refused_where_training_begins(config: Config) -> None:
    with pytest.raises(SanaError, match=r"model.dropout: models are trained without dropout here"):
        list(train(TrainOptions(again(config, "model.dropout=0.1"))))

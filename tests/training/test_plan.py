"""The figures of a dry run against the run that follows."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import HELD_OUT, again, embedded, trained

from sana_cli.commands.train import TrainOptions, plan
from sana_cli.config.keys import Config
from sana_cli.errors import SanaError


def test_a_dry_run_reports_and_writes_nothing(config: Config) -> None:
    watched = again(config, *HELD_OUT)
    embedded(watched)
    folder = watched.data.dir.parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    found = plan(TrainOptions(watched))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert (found.steps, found.batch, found.images, found.held_out_images) == (4, 4, 40, 9)
    assert found.epochs == 4 * 4 / 40
    sizes = [path.stat().st_size for path in trained(watched).checkpoint.rglob("*.safetensors")]
    # rel: in a small model, the tensors' names take much of the file
    assert sum(sizes) == pytest.approx(found.checkpoint_bytes, rel=0.2)
    assert found.disk_bytes == 3 * found.checkpoint_bytes
    assert found.memory is not None


def test_a_dry_run_refuses_what_training_would(config: Config, tmp_path: Path) -> None:
    with pytest.raises(SanaError, match="no checkpoint at"):
        plan(TrainOptions(config, resume=str(tmp_path / "nowhere")))
    with pytest.raises(SanaError, match="no checkpoint at"):
        plan(TrainOptions(again(config, f"train.init_from={tmp_path / 'nowhere'}")))
    trained(config)
    with pytest.raises(SanaError, match="has checkpoints already"):
        plan(TrainOptions(config))
    with pytest.raises(SanaError, match="optim.lr: the run has"):
        plan(TrainOptions(again(config, "optim.lr=0.5"), resume="auto"))
    found = plan(TrainOptions(again(config, "train.batch_size=2", "train.accumulate=2"), resume="auto"))
    assert (found.batch, found.micro_batch, found.micro_batches) == (4, 2, 2)


@pytest.mark.parametrize(
    "overrides", [(), ("optim.optimizer=came",), ("optim.ema_decay=null", "train.weights=bf16")]
)
def test_the_bytes_of_a_checkpoint_are_counted(
    config: Config, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    monkeypatch.setattr("sana_cli.runtime.device.cpu_has_bf16", lambda: True)
    wide = again(config, "model.num_attention_heads=12", "train.precision=bf16", "train.steps=2", *overrides)
    found = plan(TrainOptions(wide))
    sizes = [path.stat().st_size for path in trained(wide).checkpoint.rglob("*.safetensors")]
    assert sum(sizes) == pytest.approx(found.checkpoint_bytes, rel=0.1)


def test_a_dry_run_says_what_would_fit(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana_cli.training.plan.free_memory", lambda _: 0)
    monkeypatch.setattr("sana_cli.runtime.device.cpu_has_bf16", lambda: True)

    def advice(room: int, *overrides: str) -> str | None:
        monkeypatch.setattr("sana_cli.training.plan.resident_memory", lambda: room)
        found = plan(TrainOptions(again(config, "train.batch_size=30", *overrides))).memory
        assert found is not None
        assert found.available == room
        return found.advice

    assert advice(1 << 40) is None
    impossible = advice(1000)
    assert impossible is not None
    assert impossible == "more than the 1.0 kB that cpu has free; no setting makes it fit"

    # what each change takes: the program alone is most of it here
    def total(config: Config, *_: object) -> SimpleNamespace:
        train, optim = config.train, config.optim
        small = [train.activation_checkpointing, train.batch_size == 1, optim.optimizer == "came"]
        return SimpleNamespace(total=10_000 - 1000 * sum(small))

    monkeypatch.setattr("sana_cli.training.estimate.training_memory", lambda model, config, *_: total(config))
    assert (advice(9500) or "").endswith("9.0 kB would do with --set train.activation_checkpointing=true")
    assert (advice(8500) or "").endswith(
        "--set train.batch_size=1 --set train.accumulate=30 --set train.activation_checkpointing=true"
    )
    assert "train.weights=bf16" in (advice(7500, "train.precision=bf16") or "")
    assert "train.weights=bf16" not in (advice(7500) or ""), "fp32 was asked for"
    too_many = advice(7500, "train.precision=bf16", "train.accumulate=10")  # 300 micro-batches of one image
    assert "train.weights=bf16" not in (too_many or "")

"""What a run says of itself: losses by noise level and held out, the report, TensorBoard, the plan before it, its progress."""

import base64
import io
import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import embedded, process_environment, small_config
from PIL import Image

from sana_cli import console
from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed
from sana_cli.commands.train import TrainOptions, TrainStart, TrainStep, TrainSummary, plan, train
from sana_cli.config.keys import Config, ModelConfig, TrainConfig
from sana_cli.dataset import layout
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.training import batches, estimate, metrics, report, trainer
from sana_cli.weights import checkpoint

HELD_OUT = ("data.held_out_split=test", "train.held_out_every=2", "train.held_out_images=9")


@pytest.fixture
def watched(config: Config) -> Config:
    """A config with its held-out split embedded too."""
    made = small_config(config.data.dir.parent, *HELD_OUT)
    embedded(made)
    return made


def run(config: Config) -> TrainSummary:
    *_, summary = train(TrainOptions(config))
    assert isinstance(summary, TrainSummary)
    return summary


def lines(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_by_bin_are_means() -> None:
    counted = metrics.Losses()
    counted.add([1.0, 3.0, 5.0, 7.0], [0.0, 0.09, 0.95, 1.0])
    assert counted.mean == 4
    assert counted.bins() == {"loss": [2.0, *[None] * 8, 6.0], "images": [2, *[0] * 8, 2]}
    again = metrics.Losses.from_state(json.loads(json.dumps(counted.state())))
    assert vars(again) == vars(counted)


def test_the_lines_say_what_the_steps_were(watched: Config) -> None:
    steps = [step for step in train(TrainOptions(watched)) if isinstance(step, TrainStep)]
    found = lines(watched)
    assert [line["loss"] for line in found] == [step.loss for step in steps[1:]]
    dataset = Dataset(watched.data.dir)
    for line in found:
        sigma = batches.training_batch(dataset, watched.train, 4 * (line["step"] - 1), 4).sigma
        counts = np.histogram(sigma.numpy(), bins=10, range=(0, 1))[0].tolist()
        assert line["sigma_bins"]["images"] == counts
        total = sum(mean * count for mean, count in zip(line["sigma_bins"]["loss"], counts, strict=True) if count)
        assert total / 4 == pytest.approx(line["loss"], rel=1e-12)
        assert 0 <= line["data_wait"] <= 1
        assert {"lr", "grad_norm", "samples_per_second", "memory_bytes"} <= line.keys()
        assert ("held_out_loss" in line) == (line["step"] % 2 == 0)
    assert [step.held_out_loss for step in steps[1:]] == [None] + [found[1]["held_out_loss"]] * 2 + [found[3]["held_out_loss"]]


def test_held_out_loss_is_that_of_the_averaged_weights_on_fixed_draws(watched: Config) -> None:
    """Computed here image by image, with the weights that were saved."""
    summary = run(watched)
    model = checkpoint.load_transformer(summary.checkpoint)
    held_out = Dataset(layout.held_out_dir(watched.data.dir, "test"))
    losses = []
    for image in range(9):
        batch = batches.held_out_batch(held_out, watched.train, image, 1, 9)
        with torch.no_grad():
            losses.append(float(trainer.batch_loss(model, batch, model.config, 0.5, torch.device("cpu"), "fp32")))
    assert lines(watched)[-1]["held_out_loss"] == pytest.approx(sum(losses) / 9, rel=1e-5)
    assert summary.held_out_loss == lines(watched)[-1]["held_out_loss"]


def test_held_out_noise_levels_are_the_quantiles_of_the_training_density(watched: Config) -> None:
    held_out = Dataset(layout.held_out_dir(watched.data.dir, "test"))
    settings = watched.train.model_copy(update={"logit_mean": 0.5, "logit_std": 0.7, "flow_shift": 2.0})
    count = 400
    sigma = np.sort(batches.held_out_batch(held_out, settings, 0, count, count).sigma.numpy())
    logits = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count) * 0.7 + 0.5
    plain = torch.sigmoid(logits).numpy()
    assert np.allclose(sigma, 2 * plain / (1 + plain), atol=1e-6)
    batch = batches.held_out_batch(held_out, settings, 3, 2, 9)
    whole = batches.held_out_batch(held_out, settings, 0, 9, 9)
    assert torch.equal(batch.noise, whole.noise[3:5])
    assert torch.equal(batch.sigma, whole.sigma[3:5])
    assert not torch.equal(whole.noise, batches.training_batch(held_out, settings, 0, 9).noise)
    assert whole.mask.sum(1).min() > 1  # no caption is dropped


def test_embed_makes_the_held_out_split_a_dataset_of_its_own(config: Config) -> None:
    made = small_config(config.data.dir.parent, *HELD_OUT)
    *_, summary = embed(EmbedOptions(made, limit=40))  # the other is there already
    assert isinstance(summary, EmbedSummary)
    assert summary.held_out is not None
    assert (summary.was_there, summary.held_out.was_there) == (True, False)
    dataset = Dataset(Path(f"{config.data.dir}-test"))
    assert (len(dataset), dataset.index["source"]["split"]) == (40, "test")
    assert list(dataset.verify())
    with pytest.raises(SanaError, match=r"data\.held_out_split: train is what is trained on"):
        small_config(config.data.dir.parent, "data.held_out_split=train")


def test_a_held_out_split_that_is_missing_or_of_another_kind(watched: Config, config: Config) -> None:
    other = small_config(config.data.dir.parent, "data.held_out_split=other", "data.source=folder", "data.path=nowhere")
    start = next(iter(train(TrainOptions(other))))
    assert isinstance(start, TrainStart)
    assert start.plan.held_out is None
    assert re.search(r"no held-out loss: there is no .*data-other \(sana embed makes it; data.held_out_split\)", start.notes[0])
    path = Path(f"{watched.data.dir}-test") / "index.json"
    index = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    index["encoder"]["max_length"] = 7
    from sana_cli.runtime import files

    files.write_sealed_json(path, index)
    with pytest.raises(SanaError, match=r"data\.held_out_split: .*data-test has encoder max_length 7, and .*data has 300"):
        run(watched)


# --- the report -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page refers to, and the text of its script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.script = ""
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.script += data


def test_the_report_holds_everything_and_loads_nothing(watched: Config, tmp_path: Path) -> None:
    watched = small_config(
        watched.data.dir.parent, *HELD_OUT, "train.sample_every=2", 'sample.prompts=["4 two", "</script><img src=x>"]'
    )
    summary = run(watched.model_copy(update={"sample": watched.sample.model_copy(update={"prompts": ("4 two",)})}))
    assert summary.report == watched.run.dir / "report.html"
    (watched.run.dir / "config.yaml").write_text(watched.to_yaml())  # with a caption that would end the script
    page = Page(report.write(watched.run.dir, model(watched)).read_text())
    assert page.links == []
    assert page.tags.count("script") == 1
    assert "img" in page.tags
    assert "http:" not in page.script.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page.script
    found = re.search(r"const data = (.*);\n", page.script)
    assert found is not None
    data = json.loads(found[1])
    assert [line["step"] for line in data["lines"]] == [1, 2, 3, 4]
    assert data["lines"][3]["held_out_loss"] == lines(watched)[3]["held_out_loss"]
    assert [grid["step"] for grid in data["grids"]] == [0, 2, 4]
    for grid in data["grids"]:
        with Image.open(watched.run.dir / "samples" / f"step-{grid['step']:06d}.png") as drawn:
            shown = Image.open(io.BytesIO(base64.b64decode(grid["image"].partition(",")[2])))
            assert np.array_equal(np.asarray(shown), np.asarray(drawn))
    assert "</script><img src=x>" in data["config"]
    assert sum(row[1] for row in data["modules"] if not row[0].startswith(" ")) == data["parameters"]


def model(config: Config) -> ModelConfig:
    return config.model.model_copy(update={"sample_size": 16, "caption_channels": 128})


def test_a_long_run_is_averaged_for_the_page(config: Config) -> None:
    folder = config.run.dir
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 2501):
            bins = {"loss": [float(step)] + [None] * 9, "images": [step % 2, *[0] * 9]}
            line = {"step": step, "loss": float(step), "sigma_bins": bins} | ({"held_out_loss": 7.0} if step == 4 else {})
            file.write(json.dumps(line) + "\n")
        file.write('{"step": 2501, "lo')  # cut short
    data = report.collect(folder, model(config))
    assert len(data["lines"]) == 834
    assert data["lines"][1] == {
        "step": 6, "loss": 5.0, "held_out_loss": 7.0, "sigma_bins": {"loss": [5.0] + [None] * 9, "images": [1, *[0] * 9]}
    }  # fmt: skip
    Image.new("L", (3000, 1500)).save((folder / "samples").mkdir() or folder / "samples" / "step-000007.png")
    (grid,) = report.collect(folder, model(config))["grids"]
    assert grid["step"] == 7
    assert Image.open(io.BytesIO(base64.b64decode(grid["image"].partition(",")[2]))).size == (1200, 600)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_the_same_numbers_also_after_resuming(watched: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched = small_config(watched.data.dir.parent, *HELD_OUT, "train.tensorboard=true", "train.sample_every=2")
    steps = train(TrainOptions(watched))
    for step in steps:
        if isinstance(step, TrainStep) and step.step == 3:  # saved at 2, and a step more
            steps.close()
            break
    list(train(TrainOptions(watched, resume="auto")))
    events = EventAccumulator(str(watched.run.dir / "tensorboard"))
    events.Reload()
    for key in ("loss", "lr", "grad_norm", "held_out_loss"):
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == {line["step"]: pytest.approx(line[key], rel=1e-6) for line in lines(watched) if key in line}
    assert {event.step for event in events.Images("samples")} == {0, 2, 4}
    bins = [tag for tag in events.Tags()["scalars"] if tag.startswith("sigma_bins/")]
    assert all(re.fullmatch(r"sigma_bins/0\.\d-[01]\.\d", tag) for tag in bins)
    assert bins


def test_tensorboard_that_is_missing_is_said_before_anything_is_done(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda _: None)
    with pytest.raises(SanaError, match=r"TensorBoard is not installed\npip install 'sana-cli\[tensorboard\]'"):
        run(small_config(config.data.dir.parent, "train.tensorboard=true"))
    assert not config.run.dir.exists()


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_peak_of_a_known_computation() -> None:
    """a @ b, 4 bytes each: a (10, 20), b (20, 30) and the product live at once, then the sum of it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), estimate._Peak() as peak:
        product = torch.empty(10, 20) @ torch.empty(20, 30)
        assert peak.peak == 4 * (200 + 600 + 300)
        assert peak.live == 4 * 300
        total = product.view(300).sum()
        assert peak.live == 4 * 301
        del product, total
        assert peak.live == 0


@pytest.mark.parametrize(("optimizer", "checkpointing"), [("adamw", False), ("muon", True)])
def test_what_training_holds_is_counted(optimizer: str, checkpointing: bool) -> None:
    settings = TrainConfig(batch_size=4, optimizer=optimizer, activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    config = ModelConfig(sample_size=32, caption_channels=16)
    found = estimate.training_memory(config, settings, (32, 32), 5, "fp32", torch.device("cuda"), 1, 10**9, 4)
    parameters = sum(p.numel() for p in trainer.build(config, seed=None).parameters())
    assert (found.program, found.dataset) == (0, 0)  # CUDA's own memory holds tensors alone
    assert found.weights == found.gradients == found.average == 4 * parameters
    moments = trainer.Optimizer(trainer.build(config), settings, torch.device("cpu"))
    for parameter in moments.names:
        parameter.grad = torch.zeros_like(parameter)
    moments._parts[0].step()
    for part in moments._parts[1:]:
        part.step()
    assert found.optimizer == sum(4 * tensor.numel() for _, tensor in moments.state())
    less = estimate.training_memory(
        config, settings.model_copy(update={"activation_checkpointing": True}), (32, 32), 5, "fp32", torch.device("cuda"), 1, 0, 1
    )
    assert (less.activations < found.activations) != checkpointing


def test_dry_run_tells_and_writes_nothing(watched: Config) -> None:
    before = {path: path.stat().st_mtime_ns for path in watched.data.dir.parent.rglob("*")}
    found = plan(TrainOptions(watched))
    assert {path: path.stat().st_mtime_ns for path in watched.data.dir.parent.rglob("*")} == before
    assert (found.steps, found.batch, found.images, found.held_out_images) == (4, 4, 40, 9)
    assert found.epochs == 4 * 4 / 40
    summary = run(watched)
    sizes = [path.stat().st_size for path in (summary.checkpoint).rglob("*.safetensors")]
    assert sum(sizes) == pytest.approx(found.checkpoint_bytes, rel=0.2)  # small tensors, whose names take as much
    assert found.disk_bytes == 3 * found.checkpoint_bytes
    assert found.memory is not None


def test_the_estimated_memory_is_what_is_then_measured(sana: Any, tmp_path: Path) -> None:
    """Within 25 %, in a process of its own, for a model whose tensors are most of it."""
    (tmp_path / "c.yaml").write_text(
        "data: {held_out_split: null}\nmodel: {num_layers: 8, num_attention_heads: 14}\ntext: {}\n"
        "train: {steps: 3, warmup_steps: 1, batch_size: 48, precision: fp32}\nsample: {steps: 2}\nrun: {device: cpu}\n"
    )
    assert sana("embed", "--config", "c.yaml", "--limit", "500").returncode == 0
    told = json.loads(sana("train", "--config", "c.yaml", "--dry-run", "--json").stdout)["memory"]
    assert not (tmp_path / "runs").exists()
    tensors = sum(size for name, size in told["parts"].items() if name not in ("program", "dataset"))
    assert tensors > told["total"] / 2
    measured = json.loads(sana("train", "--config", "c.yaml", "--json").stdout)["peak_memory"]
    print(f"estimated {told['total']:,}, measured {measured:,}: {told['total'] / measured:.3f}")
    assert told["total"] == pytest.approx(measured, rel=0.25)


# --- speed, and its switches ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_give_the_same_run(config: Config) -> None:
    plain = run(small_config(config.data.dir.parent, f"run.dir={config.run.dir}-plain", "train.steps=2"))
    compiled = run(small_config(config.data.dir.parent, "train.compile=true", "train.steps=2"))
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)


def test_batches_come_in_order_whether_foreseen_or_not(config: Config) -> None:
    dataset = Dataset(config.data.dir)
    made: list[tuple[int, int]] = []

    def make(first: int, count: int) -> batches.Batch:
        made.append((first, count))
        return batches.training_batch(dataset, config.train, first, count)

    reader = batches.Reader(make)
    for wanted, following in (((0, 4), (4, 4)), ((4, 4), (8, 2)), ((100, 1), None)):
        batch = reader.get(wanted, following)
        assert torch.equal(batch.noise, batches.training_batch(dataset, config.train, *wanted).noise)
        deadline = time.monotonic() + 60
        while following is not None and following not in made:  # once begun, what was foreseen is not called off
            assert time.monotonic() < deadline
            time.sleep(0.001)
    reader.close()
    assert sorted(made) == [(0, 4), (4, 4), (8, 2), (100, 1)]
    assert reader.waited > 0


# --- what a person sees -----------------------------------------------------------------------------------------------


def test_the_curve_is_logarithmic_and_as_wide_as_it_may_be() -> None:
    assert console.curve([math.exp(-x) for x in range(8)]) == "█▇▆▅▄▃▂▁"
    assert len(console.curve([1.0 / (x + 1) for x in range(1000)])) == console.CURVE_WIDTH
    assert console.curve([1.0]) == ""
    assert set(console.curve([2.0, 2.0, 2.0])) == {"▁"}


def test_lines_of_a_log_grow_rarer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    told: list[str] = []
    monkeypatch.setattr(console, "note", told.append)
    console._watch_plain(range(1, 20001), lambda n: console.Line("train", n, 20000, f"loss {n}"))
    assert told[0].startswith("train 10/20000")
    assert told[-1].startswith("train 20000/20000")
    assert 200 < len(told) < 600  # every ten seconds at first, then every fiftieth of the time


def test_training_goes_on_when_nobody_reads_what_it_says(config: Config) -> None:
    path = config.run.dir.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "sana_cli", "train", "--config", str(path)]
    environment = process_environment(config.run.dir.parent)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.readline()
        process.stderr.close()
        said = process.stdout.read()
    assert process.returncode == 0
    assert said.strip() == str(config.run.dir / "checkpoints" / "step-000004")

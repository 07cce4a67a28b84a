"""A folder of images of thirty shapes, from the folder to a trained run."""

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands.test_embed import embed_process
from helpers import (
    again,
    assert_same_tensors,
    checkpoint_tensors,
    contents,
    embedded,
    invoke,
    metrics_lines,
    small_config,
    trained,
)
from PIL import Image
from runtime.test_distributed import error, in_processes
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_cli import buckets
from sana_cli.commands.train import TrainOptions, plan
from sana_cli.config.keys import Config
from sana_cli.dataset import layout, shapes, writer
from sana_cli.dataset.match import resolve_architecture
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import Mixture
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.runtime.distributed import World, whole, world
from sana_cli.sampling import pictures
from sana_cli.training.batches import training_batch
from sana_cli.training.task import make_task, make_train_set
from sana_cli.training.trainer import Placement, Trainer

IMAGES = 200
SIZES = (32, 64)
OVERRIDES = (
    "data.source=folder", "model.in_channels=3", "model.patch_size=2", f"data.buckets={list(SIZES)}",
    "sample.prompts=null", "objective.caption_dropout=0", "train.batch_size=7",
)  # fmt: skip


def colour(number: int) -> tuple[int, int, int]:
    """A colour of its own for each image, which no resizing changes."""
    return number, 255 - number, number // 2


def size(number: int) -> tuple[int, int]:
    """Height and width of an image: thirty different ones, some of just a shape, some too small."""
    exact = (*buckets.shapes(32)[::7], *buckets.shapes(64)[::7])
    others = [(14 + 13 * n % 60, 14 + 29 * n % 100) for n in range(30 - len(exact))]
    return (*exact, *others)[number % 30]


def caption_of(number: int) -> str:
    """A caption of its own for each image."""
    return f"number {number}" if number < IMAGES else f"further number {number}"


def make_pictures(folder: Path, first: int = 0, count: int = IMAGES) -> Path:
    """Images of one colour, each with its caption."""
    folder.mkdir()
    rows = []
    for number in range(first, first + count):
        height, width = size(number)
        Image.new("RGB", (width, height), colour(number)).save(folder / f"{number:03d}.png")
        rows.append({"file_name": f"{number:03d}.png", "text": caption_of(number)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a dataset of many shapes, embedded."""
    folder = tmp_path_factory.mktemp("shapes")
    make_pictures(folder / "pictures")
    made = small_config(folder, *OVERRIDES, f"data.path={folder / 'pictures'}")
    assert len({size(number) for number in range(IMAGES)}) == 30
    assert embedded(made, None).images == IMAGES
    return made


def changed(config: Config, *overrides: str) -> Config:
    """The same dataset with other settings."""
    return again(config, *OVERRIDES, f"data.path={config.data.path}", *overrides)


def mixture(config: Config) -> Mixture:
    found = make_train_set(config, Dataset(config.data.dir))
    assert isinstance(found, Mixture)
    return found


def seen(train_set: Mixture, rows: np.ndarray) -> Iterator[tuple[int, str, str, tuple[int, ...]]]:
    """Of each row: the number that its pixels show, its caption, its name, its shape."""
    parts = [part.dataset for part in train_set.parts]
    texts = [text for dataset in parts for text in dataset.texts()]
    for row in rows:
        one = np.array([row])
        pixels = (train_set.samples(one)[0] + 1) * 127.5
        number = round(float(pixels[0, 0, 0]))
        assert torch.allclose(pixels, torch.tensor(colour(number))[:, None, None].float().expand_as(pixels))
        ((ids, _),) = train_set.captions(one)
        yield number, texts[ids[0]], train_set.names(one)[0], tuple(pixels.shape)


@pytest.mark.parametrize("chunk", [1, 4])
def test_each_epoch_has_every_image_once_under_its_own_caption(many: Config, chunk: int) -> None:
    train_set = mixture(changed(many, f"train.chunk={chunk}"))
    orders = []
    for epoch in range(2):
        found = list(seen(train_set, train_set.rows(epoch * IMAGES, IMAGES)))
        orders.append([number for number, *_ in found])
        assert sorted(orders[-1]) == list(range(IMAGES))
        for number, caption, name, shape in found:
            assert (caption, name) == (caption_of(number), f"{number:03d}.png")
            assert shape[1:] == buckets.choose(SIZES, *size(number))
    assert orders[0] != orders[1]
    assert len(train_set.shapes) > 15


def test_pixels_of_the_right_size_are_untouched(tmp_path: Path) -> None:
    folder, noise = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    exact = [*buckets.shapes(32), *buckets.shapes(64)]
    drawn = {f"{n:03d}.png": noise.integers(0, 256, (*shape, 3), np.uint8) for n, shape in enumerate(exact)}
    for name, pixels in drawn.items():
        Image.fromarray(pixels).save(folder / name)
        (folder / name).with_suffix(".txt").write_text("noise")
    config = small_config(tmp_path, *OVERRIDES, f"data.path={folder}")
    summary = embedded(config, None)
    assert all(not shape.enlarged and shape.worst_share == 0 for shape in summary.shapes)
    dataset = Dataset(config.data.dir)
    for row in range(len(exact)):
        name = dataset.sample_ids(np.array([row]))[0]
        assert np.array_equal(dataset.pixels(np.array([row]))[0].numpy().transpose(1, 2, 0), drawn[name])


def test_embed_and_inspect_report_each_shape(many: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = embedded(many, None)
    assert summary.was_there
    assert sum(shape.images for shape in summary.shapes) == IMAGES
    enlarged: dict[str, float] = {}
    of_shape: dict[tuple[int, int], list[float]] = {}
    for number in range(IMAGES):
        height, width = size(number)
        shape = buckets.choose(SIZES, height, width)
        times = max(shape[0] / height, shape[1] / width)
        if times > 1:
            enlarged[f"{number:03d}.png"] = times
            of_shape.setdefault(shape, []).append(times)
        (row,) = (one for one in summary.shapes if (one.height, one.width) == shape)
        cut = 1 - shape[0] * shape[1] / times**2 / (height * width)
        assert row.worst_share >= cut - 1e-9
        assert times <= 1 or shape in buckets.shapes(min(SIZES)), "only the smallest size enlarges"
    for row in summary.shapes:
        expected = sorted(of_shape.get((row.height, row.width), []), reverse=True)
        assert row.enlarged == len(expected)
        assert [one.times for one in row.most_enlarged] == pytest.approx(expected)
        assert all(enlarged[one.name] == pytest.approx(one.times) for one in row.most_enlarged)
    assert len(enlarged) > 10
    assert summary.most_enlarged[0].endswith(f" x{max(enlarged.values()):.2g}")
    (many.run.dir.parent / "config.yaml").write_text(many.to_yaml())
    shown = invoke("embed", "--config", str(many.run.dir.parent / "config.yaml"))
    table = shown.stdout[shown.stdout.index("height x width") :]
    assert (
        f"note: {len(enlarged)} of 200 images are smaller than their shape and were enlarged, the most: "
        in (shown.stderr.replace("\n", " "))
    )
    assert table in invoke("inspect", str(many.data.dir)).stdout
    document = json.loads(invoke("inspect", str(many.data.dir), "--json").stdout)
    assert sum(shape["enlarged"] for shape in document["shapes"]) == len(enlarged)
    listed = {one["name"]: one["times"] for shape in document["shapes"] for one in shape["most_enlarged"]}
    assert listed == pytest.approx(enlarged)
    monkeypatch.setattr(shapes, "NAMED", 2)
    few = shapes.report(Dataset(many.data.dir))
    assert [row.enlarged for row in few] == [row.enlarged for row in summary.shapes]
    assert [row.most_enlarged for row in few] == [row.most_enlarged[:2] for row in summary.shapes]
    assert max(map(len, of_shape.values())) > 2


# --- embedding --------------------------------------------------------------------------------


def test_killed_and_shared_work_gives_the_same_bytes(
    tmp_path: Path, many: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str, *overrides: str) -> Config:
        (tmp_path / name).mkdir(exist_ok=True)
        return small_config(tmp_path / name, *OVERRIDES, f"data.path={many.data.path}", *overrides)

    monkeypatch.setattr(writer, "WINDOW", 64)
    monkeypatch.setattr(writer, "WINDOW_BYTES", 65536)
    made = config("whole", "data.workers=0")
    embedded(made, None)
    expected = contents(made.data.dir)
    assert len([name for name in expected if name.startswith("images-")]) > 40  # windows x shapes
    cut = config("cut")
    start, partial = embed_process(tmp_path / "cut", cut), layout.partial_dir(cut.data.dir)
    kills = 0
    for target in (8, 40):
        process = start()
        while process.poll() is None and len(list(partial.glob("*"))) < target:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    _, stderr = (process := start()).communicate()
    assert process.returncode == 0, stderr.decode()
    assert kills >= 1
    assert contents(cut.data.dir) == expected
    two = config("two")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    _, stderr = (process := embed_process(tmp_path / "two", two, *launch)()).communicate()
    assert process.returncode == 0, stderr.decode()
    assert contents(two.data.dir) == expected


def test_other_tables_are_another_dataset(many: Config) -> None:
    for override, message in (
        ("data.buckets=[32]", r"was made with image.buckets \[32, 64\], not \[32\]"),
        ("data.buckets=null", r"was made with image.buckets \[32, 64\], not None"),
        ("data.fit=pad", "was made with image.fit 'crop', not 'pad'"),
    ):
        with pytest.raises(SanaError, match=message):
            embedded(changed(many, override, "data.image_size=32"), None)
    with pytest.raises(SanaError, match=r"data\.buckets: .* has \[32, 64\], not \[32\]"):
        trained(changed(many, "data.buckets=[32]"))
    with pytest.raises(SanaError, match=r"data\.buckets: .* has \[32, 64\], not none"):
        trained(changed(many, "data.buckets=null", "data.image_size=32"))


# --- training ---------------------------------------------------------------------------------


def trainer_of(config: Config, images: int, here: World | None = None) -> Trainer:
    dataset = Dataset(config.data.dir)
    model = resolve_architecture(config, dataset)
    placement = Placement(torch.device("cpu"), "fp32", here or World())
    task = make_task(config, model, "fp32", dataset, None)
    return Trainer(build(model, 0, "fan_in"), task, config, placement, images)


def gradients(config: Config, images: int, here: World | None = None) -> dict[str, Tensor]:
    """Gradients of the first step."""
    trainer = trainer_of(config, images, here)
    losses, *_ = trainer._gradients(lambda: None)
    assert (losses > 0).all(), "every image of the step counts"
    found = {
        name: whole(p.grad).clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }
    trainer.close()
    return found


@pytest.mark.parametrize("chunk", [1, 4])
def test_gradients_do_not_depend_on_how_a_step_is_cut(many: Config, tmp_path: Path, chunk: int) -> None:
    images = 22
    config = changed(many, f"train.chunk={chunk}")
    trainer = trainer_of(config, images)
    train_set, objective = trainer.task.train_set, trainer.task.objective
    numbers = train_set.shape_numbers(train_set.rows(0, images))
    for shape in set(numbers):  # all images of a shape at once, the mean over all of the step
        batch = training_batch(train_set, objective, config.train.seed, np.flatnonzero(numbers == shape))
        (objective.losses(trainer.model, batch)["loss"].sum() / images).backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.close()
    assert len(set(numbers)) > 3
    for batch_size in (1, 2, 7, 22):
        cut = changed(many, f"train.chunk={chunk}", f"train.batch_size={batch_size}")
        assert error(gradients(cut, images), expected) < 1e-6, batch_size

    def work() -> None:
        with world() as here:
            two = changed(many, f"train.chunk={chunk}", "train.batch_size=3")
            save_file(gradients(two, images, here), tmp_path / f"{here.rank}.safetensors")

    in_processes(2, work)
    for rank in range(2):
        assert error(load_file(tmp_path / f"{rank}.safetensors"), expected) < 1e-6, rank


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_run_goes_on_to_the_bit(many: Config, tmp_path: Path, chunk: int) -> None:
    """Its epoch of 200 images ends inside a step."""
    more = (
        f"train.chunk={chunk}", "train.accumulate=6", "train.steps=5", "save.every=1", "save.keep=9",
        "log.sample_every=100",
    )  # fmt: skip
    straight = trained(changed(many, f"run.dir={tmp_path / 'straight'}", *more))
    for step in (1, 4):
        resumed = trained(
            changed(many, f"run.dir={tmp_path / str(step)}", *more),
            resume=str(straight.run / "checkpoints" / f"step-{step:06d}"),
        )
        assert_same_tensors(checkpoint_tensors(straight.checkpoint), checkpoint_tensors(resumed.checkpoint))
    with pytest.raises(SanaError, match=r"train\.chunk: the run has "):
        trained(changed(many, f"run.dir={straight.run}", *more, "train.chunk=2"), resume="auto")


def test_the_held_out_loss_of_many_shapes_does_not_depend_on_the_cut(many: Config, tmp_path: Path) -> None:
    """The held-out part is the dataset itself, embedded as another split."""
    losses = []
    held_out = ("data.held_out_split=other", "log.held_out_every=2", "log.held_out_images=31")
    for name, batch_size in (("a", 3), ("b", 31)):
        config = changed(many, *held_out, f"train.batch_size={batch_size}", f"run.dir={tmp_path / name}")
        link = layout.held_out_dir(config.data.dir, "other")
        if not link.exists():
            link.symlink_to(config.data.dir)
        trainer = trainer_of(config, 4)
        task = make_task(config, trainer.model.config, "fp32", Dataset(config.data.dir), Dataset(link))
        trainer.task = task
        losses.append(trainer.evaluate().mean)
        trainer.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# --- several datasets -------------------------------------------------------------------------


def test_repeats_and_further_datasets_are_occurrences(many: Config, tmp_path: Path) -> None:
    make_pictures(tmp_path / "more", first=200, count=15)
    more = changed(
        many, f"data.path={tmp_path / 'more'}", f"data.dir={tmp_path / 'more-data'}", "data.buckets=[64]"
    )
    embedded(more, None)
    also = f"data.also={{{more.data.dir}: 2.5}}"
    for chunk in (1, 4):
        train_set = mixture(changed(many, "data.repeats=0.3", also, f"train.chunk={chunk}"))
        counts: Counter[int] = Counter()
        for epoch, (few, extra) in enumerate([(60, 37), (60, 38), (60, 37), (60, 38)]):
            assert train_set.starts(epoch + 1) - train_set.starts(epoch) == few + extra
            rows = train_set.rows(train_set.starts(epoch), few + extra)
            found = list(seen(train_set, rows))
            assert all(caption == caption_of(n) and name == f"{n:03d}.png" for n, caption, name, _ in found)
            counts.update(number for number, *_ in found)
            assert sum(number >= 200 for number, *_ in found) == extra
        assert {counts[number] for number in range(200)} == {1, 2}  # 240 of 200
        assert {counts[number] for number in range(200, 215)} == {10}
    config = changed(many, also, "train.steps=2", "log.sample_every=100", f"run.dir={tmp_path / 'run'}")
    assert plan(TrainOptions(config)).epochs == pytest.approx(2 * 7 / (200 + 37.5))
    summary = trained(config)
    record = json.loads((summary.checkpoint / "sana.json").read_text())
    assert record["dataset"]["sha256"] == mixture(config).record().sha256
    assert record["dataset"]["sha256"] != Dataset(many.data.dir).index.sha256
    assert {"number", "further"} <= set(record["words"])
    moved = tmp_path / "moved"
    more.data.dir.rename(moved)
    longer = (
        "train.steps=3",
        "log.sample_every=100",
        f"run.dir={tmp_path / 'run'}",
        "optim.schedule=constant",
    )
    for other in ("data.repeats=2", f"data.also={{{moved}: 2}}", "data.also={}"):
        with pytest.raises(SanaError, match=r"data\.\w+.*: .* the run was trained on"):
            trained(changed(many, f"data.also={{{moved}: 2.5}}", *longer, other), resume="auto")
    with pytest.raises(SanaError, match="no dataset in .*nowhere"):
        trained(changed(many, f"data.also={{{tmp_path / 'nowhere'}: 1}}", f"run.dir={tmp_path / 'no'}"))
    again_moved = changed(
        many, f"data.also={{{moved}: 2.5}}", "train.steps=2", "log.sample_every=100",
        f"run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert trained(again_moved, resume="auto").first_step == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("text.max_length=20",), "has encoder max_length 20, and .* has 300"),
        (("model.in_channels=1",), "has image channels 1, and .* has 3"),
        (("data.buckets=null", "data.image_size=33", "model.patch_size=1"), "has samples of 33x33, which"),
    ],
)
def test_a_further_dataset_that_does_not_fit_is_refused(
    many: Config, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    make_pictures(tmp_path / "more", count=3)
    embedded(
        changed(many, f"data.path={tmp_path / 'more'}", f"data.dir={tmp_path / 'data'}", *overrides), None
    )
    with pytest.raises(SanaError, match=rf"data\.also: .* {message}"):
        trained(changed(many, f"data.also={{{tmp_path / 'data'}: 1}}", f"run.dir={tmp_path / 'run'}"))


# --- a run ------------------------------------------------------------------------------------


def test_a_run_draws_its_grid_in_the_most_common_shapes(many: Config, tmp_path: Path) -> None:
    summary = trained(changed(many, "train.steps=2", f"run.dir={tmp_path / 'run'}"))
    assert summary.grid is not None
    record = pictures.read_record(summary.grid)
    dataset = Dataset(many.data.dir)
    common = sorted(dataset.shapes, key=lambda shape: -dataset.shapes[shape])[:4]
    assert [cell.size for cell in record.cells] == [list(common[n % 4]) for n in range(len(record.cells))]
    assert len(metrics_lines(summary.run)) == 2
    record_of_step = json.loads((summary.checkpoint / "sana.json").read_text())["image"]
    assert (3, record_of_step["height"], record_of_step["width"]) == common[0]
    drawn = invoke(
        "sample", "--checkpoint", str(summary.checkpoint), "number 3", "--out", str(tmp_path / "o.png")
    )
    assert drawn.exit_code == 0, drawn.stderr
    assert pictures.read_record(tmp_path / "o.png").size == list(common[0])
    shown = invoke("inspect", str(summary.checkpoint), "--yaml")
    assert "buckets: [32, 64]" in shown.stdout
    judged = invoke("eval", str(summary.run))
    assert judged.exit_code == 1
    assert f"{many.data.dir}: images of {len(dataset.shapes)} shapes" in judged.stderr


def test_images_of_a_sheet_are_in_the_middle_of_their_cells() -> None:
    sizes = [(32, 128), (128, 32), (64, 64), (92, 44)]
    cells = pictures.grid_cells([(f"{n}",) for n in range(4)], 1, 7)
    images = [torch.tensor([200, 40 + n, 90], dtype=torch.uint8) for n in range(4)]
    filled = [
        image[:, None, None].expand(3, height, width)
        for image, (height, width) in zip(images, sizes, strict=True)
    ]
    sheet = np.asarray(pictures.grid(filled, cells))
    even = np.asarray(pictures.grid([image[:, None, None].expand(3, 128, 128) for image in images], cells))
    assert sheet.shape == even.shape
    for number, (height, width) in enumerate(sizes):
        ys, xs = np.nonzero((sheet == [200, 40 + number, 90]).all(-1))
        cell_ys, cell_xs = np.nonzero((even == [200, 40 + number, 90]).all(-1))
        assert (len(set(ys)), len(set(xs)), len(ys)) == (height, width, height * width)
        assert abs(ys.min() + ys.max() - cell_ys.min() - cell_ys.max()) <= 1
        assert abs(xs.min() + xs.max() - cell_xs.min() - cell_xs.max()) <= 1


def test_latents_of_many_shapes(tmp_path: Path) -> None:
    """Each image is encoded in its own shape, and the pictures of a run are decoded in those."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks: dict[str, Any] = {
        "block_types": "ResBlock", "block_out_channels": (8, 8, 8), "qkv_multiscales": ((), (), ()),
        "layers_per_block": (1, 1, 1),
    }  # fmt: skip
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    vae = diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.5, **sides)
    vae.eval().save_pretrained(tmp_path / "vae")
    make_pictures(tmp_path / "pictures", count=60)
    config = small_config(
        tmp_path, *OVERRIDES, f"data.path={tmp_path / 'pictures'}", "data.buckets=[64, 128]",
        f"data.autoencoder={tmp_path / 'vae'}", "data.latent_factor=4", "model.in_channels=4",
        "model.patch_size=1", "train.steps=2",
    )  # fmt: skip
    embedded(config, None)
    dataset = Dataset(config.data.dir)
    assert len(dataset.shapes) > 8
    for row in range(0, 60, 7):
        one = np.array([row])
        number = int(dataset.sample_ids(one)[0][:3])
        height, width = buckets.choose((64, 128), *size(number))
        pixels = torch.tensor(colour(number)).float()[:, None, None].expand(1, 3, height, width)
        with torch.no_grad():
            expected = vae.encode(pixels / 127.5 - 1).latent * 0.5
        assert dataset.images(one).shape == expected.shape == (1, 4, height // 4, width // 4)
        assert torch.allclose(dataset.images(one), expected, rtol=2**-7, atol=1e-3)
    summary = trained(config)
    assert summary.grid is not None
    sizes = [cell.size for cell in pictures.read_record(summary.grid).cells]
    common = sorted(dataset.shapes, key=lambda shape: -dataset.shapes[shape])[:4]
    assert sizes[:4] == [[3, 4 * height, 4 * width] for _, height, width in common]
    assert resolve_architecture(config, dataset).sample_size == 32

"""Grids of images, and files that say how they were made."""

import hashlib
from pathlib import Path

import pytest
from helpers import sampled, trained
from helpers.steps import drawn
from PIL import GifImagePlugin, Image

from sana_cli.config.keys import Config
from sana_cli.errors import SanaError
from sana_cli.runtime import files
from sana_cli.sampling import pictures
from sana_cli.weights import checkpoint


def test_grids_keep_how_they_were_made(step: Path, tmp_path: Path) -> None:
    summary = drawn(
        step, "4 two", "six", out=tmp_path / "grid.png", seed=11, trajectory=tmp_path / "appearing.gif"
    )
    record = pictures.read_record(tmp_path / "grid.png")
    assert record.as_json()["images"] == [
        [{"prompt": "4", "seed": 11}, {"prompt": "two", "seed": 12}], [{"prompt": "six", "seed": 13}]
    ]  # fmt: skip
    assert [(cell.prompt, cell.seed) for cell in record.cells] == [("4", 11), ("two", 12), ("six", 13)]
    assert record.settings["solver"] == "dpm++"
    assert record.checkpoint == "mine"
    with Image.open(tmp_path / "appearing.gif") as gif:
        assert isinstance(gif, GifImagePlugin.GifImageFile)
        assert gif.n_frames == 1 + summary.settings.steps
    with Image.open(tmp_path / "grid.png") as grid:
        cell = max(1, -(-pictures.MIN_CELL // 16)) * 16
        assert grid.width == 2 * (cell + pictures.GRID_GAP) + pictures.GRID_GAP
    separate = drawn(step, "4 two", separate=tmp_path / "each")
    assert [path.name for path in separate.saved] == ["0000-4.png", "0001-two.png"]
    with Image.open(tmp_path / "each" / "0001-two.png") as image:
        assert (image.size, image.mode) == ((16, 16), "L")
        assert image.tobytes() == separate.pixels[1].numpy().tobytes()
    default = drawn(step, "4", out=None), drawn(step, "4", out=None)
    assert [summary.saved[0].name for summary in default] == ["sample-mine.png", "sample-mine-2.png"]
    plain = tmp_path / "plain.png"
    Image.new("L", (4, 4)).save(plain)
    with pytest.raises(SanaError, match="does not say how it was made"):
        pictures.read_record(plain)


def test_sentences_stand_in_a_square(step: Path) -> None:
    cells = pictures.grid_cells(pictures.prompt_rows([f"a red {n}" for n in range(9)], one_word=False), 1, 0)
    assert [len(row) for row in cells] == [3, 3, 3]
    assert pictures.prompt_rows(["4 two", "six"], one_word=True) == [("4", "two"), ("six",)]
    repeated = pictures.grid_cells([("4", "two")], 2, 5)
    assert [(cell.prompt, cell.seed) for cell in repeated[0]] == [("4", 5), ("4", 6), ("two", 7), ("two", 8)]


def test_pictures_speak_the_language_of_other_tools(config: Config, tmp_path: Path) -> None:
    folder, path = trained(config).checkpoint, tmp_path / "o.png"
    sampled(folder, "4 two", out=path)
    with Image.open(path) as image:
        text = image.info["parameters"]
    assert text.splitlines()[:2] == ["4", "two"]
    assert "Steps: 2, Sampler: dpm++, CFG scale: 2.5, Seed: 0, Model: run/step-000004" in text
    assert pictures.read_record(path).settings["steps"] == 2
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"Model hash: {digest[:10]}" in text
    assert pictures.read_record(path).weights_sha256 == digest
    raw = hashlib.sha256((folder / checkpoint.RAW_WEIGHTS).read_bytes()).hexdigest()
    assert checkpoint.weights_sha256(folder, "raw") == raw != digest
    assert checkpoint.weights_sha256(weights.parent) is None
    metadata = files.read_metadata(weights)
    assert metadata["modelspec.architecture"] == "sana"
    assert metadata["modelspec.title"] == "run step-000004"

"""`sana sample`: pictures depend only on prompt, seed and settings; and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, SMALL, embedded, invoke
from helpers.steps import drawn, perturb
from PIL import GifImagePlugin, Image

from sana_cli import text
from sana_cli.commands.sample import SampleOptions, sample
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.file import parse_config
from sana_cli.errors import SanaError
from sana_cli.sampling import conditioning, pictures, sampler
from sana_cli.weights import checkpoint


def test_the_guide_to_weights_draws_our_image_with_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the page's code unchanged, on a checkpoint of that name."""
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    own = (
        "data.image_size=32",
        "run.dir=runs/quickstart",
        "data.dir=data",
        "run.device=cpu",
        "objective.prediction_type=sample",
    )
    config = parse_config(SMALL, "small", own)
    embedded(config)
    list(train(TrainOptions(config)))
    checkpoints = Path("runs/quickstart/checkpoints")
    (checkpoints / "step-000004").rename(checkpoints / "step-002000")
    perturb(checkpoints / "step-002000")
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "weights.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "DPMSolverMultistepScheduler" in block]
    drawn_there: dict[str, Any] = {}
    exec(code, drawn_there)
    quickstart = {"steps": 8, "guidance_scale": 3.3, "guidance_interval": (0.7, 1.0)}
    summary = drawn(
        checkpoints / "step-002000", "4", **quickstart, seed=0, precision="fp32", out=tmp_path / "o.png"
    )
    difference = (sampler.to_pixels(drawn_there["x"]).int() - summary.pixels.int()).abs()
    assert int(difference.max()) <= 1
    assert float(summary.pixels.float().std()) > 10


def test_an_image_depends_on_prompt_and_seed_alone(step: Path) -> None:
    row = drawn(step, "4 two 4 six", seed=3)
    assert [image["seed"] for image in row.images] == [3, 4, 5, 6]
    alone = drawn(step, "4", seed=5)
    assert int((row.pixels[2].int() - alone.pixels[0].int()).abs().max()) <= 1
    assert int((row.pixels[0].int() - row.pixels[2].int()).abs().max()) > 1
    assert torch.equal(drawn(step, "4 two 4 six", seed=3).pixels, row.pixels)
    assert not torch.equal(drawn(step, "4 two 4 six", seed=4).pixels, row.pixels)
    many = drawn(step, "two", images_per_prompt=70, seed=3)
    assert int((many.pixels[1].int() - row.pixels[1].int()).abs().max()) <= 1


def test_negative_prompt_takes_the_null_captions_place(step: Path) -> None:
    plain, empty = drawn(step, "4"), drawn(step, "4", negative_prompt="")
    assert torch.equal(plain.pixels, empty.pixels)
    away = drawn(step, "4", negative_prompt="two")
    assert not torch.equal(plain.pixels, away.pixels)
    same = drawn(step, "4", negative_prompt="4")  # guidance towards and away from the same prompt cancels
    assert int((same.pixels.int() - drawn(step, "4", guidance_scale=1.0).pixels.int()).abs().max()) <= 1


def test_other_sizes_and_weights(step: Path) -> None:
    assert drawn(step, "4", height=24, width=8).pixels.shape == (1, 1, 24, 8)
    with pytest.raises(SanaError, match=r"`width`: 12 is not a multiple of the patch size 8"):
        drawn(step, "4", width=12)
    typed = invoke("sample", "4", "--checkpoint", str(step), "--width", "12", "--device", "cpu")
    assert (typed.exit_code, typed.stderr) == (
        2,
        "error: --width: 12 is not a multiple of the patch size 8\n",
    )
    assert not torch.equal(drawn(step, "4", weights="raw").pixels, drawn(step, "4").pixels)


def test_odd_prompts_are_drawn(step: Path, tmp_path: Path) -> None:
    odd = "x" * 5000 + " [red]\x07../../etc/passwd עברית 🎈"
    summary = drawn(step, odd, separate=tmp_path / "odd")
    assert len(summary.images) == 4
    assert all(path.parent == tmp_path / "odd" for path in summary.saved)


def test_encoder_and_transformer_take_turns(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With offload, the encoder is freed before the transformer loads; with "none" it stays."""
    import gc
    import weakref

    encoders: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    load_encoder, load_transformer = text.load_encoder, checkpoint.load_transformer

    def recorded(*arguments: Any) -> Any:
        encoder = load_encoder(*arguments)
        encoders.append(weakref.ref(encoder.model))
        return encoder

    def watched(*arguments: Any) -> Any:
        gc.collect()
        alive.append(encoders[-1]() is not None)
        return load_transformer(*arguments)

    monkeypatch.setattr(conditioning, "load_encoder", recorded)
    monkeypatch.setattr(checkpoint, "load_transformer", watched)
    images = [drawn(step, "4", offload=offload).pixels for offload in ("auto", "model", "none")]
    assert alive == [False, False, True]
    assert torch.equal(images[0], images[2])


def test_what_is_missing_is_said(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SanaError, match="no checkpoint at nowhere: there is no such file"):
        list(sample(SampleOptions(("4",), Path("nowhere"))))
    with pytest.raises(SanaError, match="nothing to draw: give prompts(.|\n)*captions such as '5' 'five'"):
        drawn(step)
    for options, message in (
        ({"solver": "ddim"}, "`solver`: input should be 'dpm\\+\\+', 'euler', 'heun' or 'scm'"),
        ({"guidance_scale": -1.0}, "`guidance_scale`: input should be greater than or equal to 0"),
        ({"guidance_interval": (0.9, 0.1)}, "`guidance_interval`: 0.9 must be below 0.1"),
        ({"weights": "best"}, "`weights`: 'best' is not one of ema, raw"),
        ({"device": "cuda:77"}, "no device cuda:77"),
        ({"prompts_file": Path("no.txt")}, "`prompts_file`: no.txt: No such file"),
    ):
        with pytest.raises(SanaError, match=message):
            list(sample(SampleOptions(("4",), step, **({"device": "cpu"} | options))))
    empty = tmp_path / "runs" / "empty" / "checkpoints" / "step-000005"
    empty.mkdir(parents=True)
    with pytest.raises(SanaError, match=r"no checkpoint in runs/empty \(step-000005 lacks manifest\.json"):
        list(sample(SampleOptions(("4",), Path("runs/empty"))))


def test_a_table_draws_what_its_prompts_draw_one_by_one(step: Path, tmp_path: Path) -> None:
    """Image i of the table has seed + i, with the images of a cell side by side."""
    files = {"separate": tmp_path / "each", "out": tmp_path / "grid.png", "trajectory": tmp_path / "film.gif"}
    table = drawn(step, grid="{4,two}{a,b}", images_per_prompt=2, seed=3, **files)
    prompts = ["4a", "4a", "4b", "4b", "twoa", "twoa", "twob", "twob"]
    assert [(image["prompt"], image["seed"]) for image in table.images] == list(
        zip(prompts, range(3, 11), strict=True)
    )
    plain = drawn(step, "4a 4b", "twoa twob", images_per_prompt=2, seed=3)
    assert torch.equal(table.pixels, plain.pixels)
    record = pictures.read_record(tmp_path / "grid.png")
    assert [[(image.prompt, image.seed) for image in row] for row in record.images] == [
        list(zip(prompts[:4], range(3, 7), strict=True)), list(zip(prompts[4:], range(7, 11), strict=True))
    ]  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "each").iterdir())
    assert names[:2] == ["0000-4a.png", "0001-4a.png"]
    assert len(names) == 8
    with Image.open(tmp_path / "grid.png") as grid, Image.open(tmp_path / "film.gif") as film:
        assert isinstance(film, GifImagePlugin.GifImageFile)
        assert grid.size == film.size
        assert film.n_frames == 1 + table.settings.steps
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("L"), dtype=int)
        assert np.abs(last - np.asarray(grid.convert("L"), dtype=int)).mean() < 4, (
            "the last frame is the grid"
        )


def test_a_table_from_the_command_line(step: Path, tmp_path: Path) -> None:
    typed = ("sample", "--checkpoint", str(step), "--device", "cpu", "--grid")
    out = ("--out", str(tmp_path / "o.png"))
    drawn_one = invoke(*typed, "{4, two}", *out, "--json")
    assert drawn_one.exit_code == 0
    assert json.loads(drawn_one.stdout)["images"] == [
        {"prompt": "4", "seed": 0},
        {"prompt": "two", "seed": 1},
    ]
    shown = invoke("inspect", str(tmp_path / "o.png")).stdout.splitlines()
    assert [line.split() for line in shown[-2:]] == [["4", "0"], ["two", "1"]]
    (tmp_path / "prompts.txt").write_text("4\n")
    for more, message in (
        (("4",), "--grid: '4' has no braces"),
        (("a {4,two}",), "--grid: 'a 4' is not a single word, as the captions of this checkpoint are"),
        (
            ("{4,two}", "six"),
            "--grid: there is the prompt 'six' too, and a grid's template has all its prompts",
        ),
        (
            ("{4,two}", "--prompts-file", str(tmp_path / "prompts.txt")),
            "--grid: there is --prompts-file too, and a grid's template has all its prompts",
        ),
    ):
        refused = invoke(*typed, *more, *out)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert refused.stderr.startswith(f"error: {message}\n")
        assert refused.stderr.count("error") == 1

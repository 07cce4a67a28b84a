"""`sana sample`: pictures depend only on prompt, seed and settings; and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, SMALL, embedded, invoke
from helpers.steps import drawn, perturb

from sana_cli import text
from sana_cli.commands.sample import SampleOptions, sample
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.file import parse_config
from sana_cli.errors import SanaError
from sana_cli.sampling import conditioning, sampler
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
    (checkpoints / "step-000004").rename(checkpoints / "step-003000")
    perturb(checkpoints / "step-003000")
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "weights.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "DPMSolverMultistepScheduler" in block]
    drawn_there: dict[str, Any] = {}
    exec(code, drawn_there)
    quickstart = {"steps": 8, "guidance_scale": 2.7, "guidance_interval": (0.7, 1.0)}
    summary = drawn(
        checkpoints / "step-003000", "4", **quickstart, seed=0, precision="fp32", out=tmp_path / "o.png"
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
    pictures = [drawn(step, "4", offload=offload).pixels for offload in ("auto", "model", "none")]
    assert alive == [False, False, True]
    assert torch.equal(pictures[0], pictures[2])


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

"""Step folders: as other tools read them, found, checked, shared."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import in_old_names, invoke
from helpers.steps import drawn

from sana_cli import __version__
from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.commands.sample import SampleOptions, SampleSummary, sample
from sana_cli.config.renamed import RENAMED
from sana_cli.errors import SanaError
from sana_cli.runtime import files
from sana_cli.sampling import pictures
from sana_cli.sampling.pipeline import open_pipeline
from sana_cli.weights import checkpoint, configs
from sana_cli.weights.checkpoint import load_transformer


def test_diffusers_loads_the_step_folder_and_computes_the_same(step: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.SanaTransformer2DModel.from_pretrained(step, subfolder="transformer").eval()
    ours = checkpoint.load_transformer(step)
    x, captions = torch.randn(2, 1, 16, 16), torch.randn(2, 4, 128)
    timestep, mask = torch.tensor([3.0, 700.0]), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    with torch.no_grad():
        expected = theirs(x, captions, timestep, encoder_attention_mask=mask).sample
        assert torch.allclose(ours(x, captions, timestep, None, mask), expected, atol=1e-5)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(step, subfolder="scheduler")
    assert (scheduler.config.prediction_type, scheduler.config.use_flow_sigmas) == ("flow_prediction", True)


def test_what_is_predicted_goes_with_the_weights(predicts_samples: Path, tmp_path: Path) -> None:
    """In our folder, in its weights file alone, in the scheduler of a diffusers pipeline."""
    diffusers = pytest.importorskip("diffusers")
    assert (
        json.loads((predicts_samples / "transformer" / "config.json").read_text())["prediction_type"]
        == "sample"
    )
    for path in (
        predicts_samples,
        predicts_samples / "transformer",
        predicts_samples / "transformer" / configs.WEIGHTS,
    ):
        assert open_pipeline(path, "tiny").prediction_type == "sample"
    diffusers.SanaTransformer2DModel.from_pretrained(
        predicts_samples, subfolder="transformer"
    ).save_pretrained(tmp_path / "transformer")
    diffusers.DPMSolverMultistepScheduler.from_pretrained(
        predicts_samples, subfolder="scheduler"
    ).save_pretrained(tmp_path / "scheduler")
    config = files.read_json(tmp_path / "transformer" / "config.json")
    files.write_json(
        tmp_path / "transformer" / "config.json", {k: v for k, v in config.items() if k != "prediction_type"}
    )
    files.write_json(tmp_path / "model_index.json", {"_class_name": "SanaPipeline"})
    assert open_pipeline(tmp_path, "tiny").prediction_type == "sample"
    settings: dict[str, Any] = {"steps": 6, "guidance_scale": 2.0, "seed": 7}
    expected = drawn(predicts_samples, "4", **settings, solver="dpm++")
    again = drawn(tmp_path, "4", **settings, encoder="tiny")
    assert int((again.pixels.int() - expected.pixels.int()).abs().max()) <= 1


def test_step_folders_tell_no_paths_and_no_pickle(step: Path) -> None:
    for path in step.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".safetensors", ".md"), path
            content = path.read_bytes()
            if path.suffix == ".safetensors":  # only the header has text
                content = content[: 8 + int.from_bytes(content[:8], "little")]
            for secret in (
                b"/tmp",
                b"/home",
                b"/root",
                str(Path.cwd()).encode(),
                f"@{os.uname().nodename}".encode(),
            ):
                assert secret not in content, (path, secret)


def test_another_encoder_is_refused_by_field(step: Path, tmp_path: Path, gemma: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(step, changed)
    record = json.loads((changed / "sana.json").read_text())
    record["encoder"]["max_length"] = 299
    (changed / "manifest.json").unlink()
    with pytest.raises(SanaError, match=r"changed lacks manifest\.json"):
        drawn(changed, "4")
    with pytest.raises(
        SanaError, match=r"text\.weights: .* has .*, not .*\n(.|\n)*`encoder` PATH must be the model"
    ):
        drawn(step, "4", encoder=str(gemma))


def test_the_newest_whole_checkpoint_is_the_default(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(
        ("old/checkpoints/step-000900", "new/checkpoints/step-000002", "new/checkpoints/step-000003")
    ):
        shutil.copytree(step, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "manifest.json", (1000 + age, 1000 + age))
    (tmp_path / "runs" / "new" / "checkpoints" / "step-000003" / "manifest.json").unlink()
    *_, summary = sample(SampleOptions(("4",), device="cpu"))
    assert isinstance(summary, SampleSummary)
    assert summary.checkpoint == Path("runs/new/checkpoints/step-000002")
    assert summary.saved == (Path("runs/new/sample-step-000002.png"),)


def test_the_weights_that_come_with_sana(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Used and named if there is no run; pictures go to the working directory."""
    monkeypatch.chdir(tmp_path)
    *_, summary = sample(SampleOptions(("4 two 4 six",), device="cpu"))
    assert isinstance(summary, SampleSummary)
    assert summary.shipped
    assert summary.saved == (Path("sample-quickstart.png"),)
    list(checkpoint.verify(checkpoint.shipped(), hashes=True))
    assert checkpoint.find_checkpoint(Path("shipped")) == checkpoint.shipped()
    assert not (checkpoint.shipped() / "training").exists()
    record = checkpoint.read_record(checkpoint.shipped())
    assert record.config is not None
    assert record.score is not None
    assert str(Path.home()) not in str(record.as_json())
    assert load_transformer(checkpoint.shipped()).proj_out.weight.dtype == torch.float32
    assert sum(path.stat().st_size for path in checkpoint.shipped().rglob("*") if path.is_file()) < 4_000_000

    shutil.copytree(step, tmp_path / "runs" / "mine" / "checkpoints" / "step-000004")
    *_, summary = sample(SampleOptions(("4",), device="cpu"))
    assert isinstance(summary, SampleSummary)
    assert not summary.shipped
    assert summary.checkpoint.parts[:2] == ("runs", "mine")


def test_other_weights_that_come_with_sana_have_names(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = tmp_path / "assets"
    shutil.copytree(step, assets / "quickstart")
    shutil.copytree(step, assets / "creatures")
    (assets / "no-checkpoint").mkdir()
    monkeypatch.setattr(checkpoint, "ASSETS", assets)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name, folder in (
        ("shipped", "quickstart"),
        ("shipped:quickstart", "quickstart"),
        ("shipped:creatures", "creatures"),
    ):
        assert checkpoint.find_checkpoint(Path(name)) == assets / folder
        assert inspect(InspectOptions(name)).title == str(assets / folder)
    assert checkpoint.find_checkpoint(None) == assets / "quickstart"
    *_, summary = sample(SampleOptions(("4",), Path("shipped:creatures"), device="cpu"))
    assert isinstance(summary, SampleSummary)
    assert summary.shipped
    assert summary.saved == (Path("sample-creatures.png"),)
    assert pictures.read_record(summary.saved[0]).checkpoint == f"sana {__version__}, creatures"
    typed = invoke("sample", "4", "--checkpoint", "shipped:creatures", "--device", "cpu")
    assert "drew 1 images with shipped:creatures in " in typed.stderr
    assert "no run of your own" not in typed.stderr
    assert "no run of your own yet" in invoke("sample", "4", "--device", "cpu").stderr
    for name in ("shipped:cretures", "shipped:", "shipped:no-checkpoint", "shipped:../assets/creatures"):
        for command in (("sample", "4", "--checkpoint", name), ("inspect", name), ("eval", name)):
            refused = invoke(*command)
            assert refused.exit_code
            assert refused.stderr == (
                f"error: no checkpoint {name}: none of this name comes with sana\n"
                "there are: shipped:creatures, shipped:quickstart\n"
            )
    for name in ("shipped", "shipped:creatures"):  # the user's own come first
        shutil.copytree(step, name)
        assert checkpoint.find_checkpoint(Path(name)) == Path(name)
        *_, summary = sample(SampleOptions(("4",), Path(name), device="cpu"))
        assert isinstance(summary, SampleSummary)
        assert not summary.shipped


def test_a_release_is_its_checkpoint_in_bf16(step: Path, tmp_path: Path) -> None:
    score = {"accuracy": 0.5, "images": 10, "frechet_distance": 1.0, "real_frechet_distance": 0.5}
    given = checkpoint.release(step, tmp_path / "given", {"guidance_scale": 1.75}, {"score": score})
    list(checkpoint.verify(given, hashes=True))
    record = checkpoint.read_record(given)
    assert record.score is not None
    assert record.score.as_json() == score
    assert record.config is not None
    assert (
        record.sample
        == record.config["sample"]
        == {**checkpoint.read_record(step).sample, "guidance_scale": 1.75}
    )
    theirs, ours = (load_transformer(place, dtype=None).state_dict() for place in (step, given))
    assert all(torch.equal(theirs[name].bfloat16(), tensor) for name, tensor in ours.items())
    assert not (given / "training").exists()
    assert inspect(InspectOptions(str(given))).facts["step"] == 4


# --- records from before keys were renamed ------------------------------------------------------------------


def test_a_record_with_old_names_is_read_with_the_new_ones(tmp_path: Path) -> None:
    """sana's shipped record in its first form, with the sections model, train and sample."""
    record = checkpoint.read_record(checkpoint.shipped())
    assert record.config is not None
    old = in_old_names(record.config)
    assert set(old) == {"model", "train", "sample"}
    assert {"lr", "caption_dropout", "log_every", "save_every", "keep"} <= set(old["train"])
    files.write_json(tmp_path / checkpoint.RECORD, record.as_json() | {"config": old})
    found = checkpoint.read_record(tmp_path).config
    assert found == record.config
    for name, new in RENAMED.items():
        section, key = name.split(".")
        assert key not in found.get(section, {}), name
        place, key_now = new.split(".")
        assert found[place][key_now] == old[section][key], name


def test_a_step_folder_with_old_names_is_read_with_the_new_ones(step: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(step, tmp_path / "old")
    state = checkpoint.read_state(step)
    files.write_json(folder / checkpoint.STATE, state.as_json() | {"config": in_old_names(state.config)})
    assert "lr" in json.loads((folder / checkpoint.STATE).read_text())["config"]["train"]
    assert checkpoint.read_state(folder) == state
    assert checkpoint.read_state(folder).config["optim"] == state.config["optim"]
    record = checkpoint.read_record(step).as_json()
    files.write_json(folder / checkpoint.RECORD, record | {"config": in_old_names(state.config)})
    assert checkpoint.read_record(folder).config == state.config

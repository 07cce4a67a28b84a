"""Checkpoints as others read them, found and refused; and pictures that depend on prompt, seed and settings alone."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, SMALL, embedded, small_config
from PIL import Image

from sana_cli.commands import sample as sampling
from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.commands.sample import SampleOptions, SampleSummary, sample
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.file import parse_config
from sana_cli.config.keys import Config, ModelConfig, SampleConfig
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.runtime import files
from sana_cli.sampling import pictures, sampler
from sana_cli.weights import checkpoint, configs
from sana_cli.weights.checkpoint import load_transformer


def perturb(folder: Path) -> None:
    """Make the weights of a step folder ones in which captions matter, and its manifest true again."""
    model = checkpoint.load_transformer(folder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))

    path = folder / "transformer" / configs.WEIGHTS
    files.write_tensors(path, model.state_dict(), {"format": "pt"})
    listing = files.read_sealed_json(folder / "manifest.json")["files"]
    listing[f"transformer/{configs.WEIGHTS}"] = {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
    files.write_sealed_json(folder / "manifest.json", {"files": listing})


def step_folder(tmp_path_factory: pytest.TempPathFactory, *overrides: str) -> Path:
    """A step folder on its own, away from the run that made it."""
    folder = tmp_path_factory.mktemp("training")
    config = small_config(folder, *overrides)
    embedded(config)
    list(train(TrainOptions(config)))
    alone = tmp_path_factory.mktemp("copied") / "mine"
    shutil.copytree(folder / "run" / "checkpoints" / "step-000004", alone)
    shutil.rmtree(folder)
    perturb(alone)
    return alone


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that predicts velocities, as the published models do."""
    return step_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def foreseeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that predicts samples, and is to be drawn by a solver that diffusers could not be told of."""
    return step_folder(tmp_path_factory, "model.prediction_type=sample", "sample.solver=heun")


def drawn(step: Path, *prompts: str, **options: Any) -> SampleSummary:
    if "separate" not in options:
        options.setdefault("out", step.parent / "out.png")
    *_, summary = sample(SampleOptions(prompts, step, device="cpu", **options))
    assert isinstance(summary, SampleSummary)
    return summary


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


def test_what_diffusers_saves_loads_here(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = ModelConfig(
        sample_size=8, patch_size=2, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, caption_channels=10,
    )  # fmt: skip
    theirs = diffusers.SanaTransformer2DModel.from_config(configs.diffusers_config(config)).eval()
    theirs.save_pretrained(tmp_path / "saved")
    ours = checkpoint.load_transformer(tmp_path / "saved")
    assert ours.config == config
    x, captions, timestep = torch.randn(1, 1, 8, 8), torch.randn(1, 3, 10), torch.tensor([500.0])
    with torch.no_grad():
        assert torch.allclose(ours(x, captions, timestep), theirs(x, captions, timestep).sample, atol=1e-5)


@pytest.mark.parametrize("which", ["step", "foreseeing"])
def test_our_pictures_are_those_of_diffusers(which: str, request: pytest.FixtureRequest) -> None:
    """The dozen lines with which a user of diffusers draws what `sana sample` draws, from the same noise."""
    diffusers = pytest.importorskip("diffusers")
    step: Path = request.getfixturevalue(which)
    summary = drawn(step, "4 two", steps=6, guidance_scale=2.0, seed=7, solver="dpm++")
    transformer = diffusers.SanaTransformer2DModel.from_pretrained(step, subfolder="transformer").eval()
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(step, subfolder="scheduler")
    from sana_cli.text import load_encoder, pad_states, text_config

    record = checkpoint.read_record(step)
    states = dict(load_encoder(text_config(record["encoder"]), torch.device("cpu")).encode(["4", "two", ""]))
    captions, mask = pad_states([states["4"], states["two"], states[""], states[""]])
    x = torch.stack([torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)])
    scheduler.set_timesteps(6)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            v = transformer(x.repeat(2, 1, 1, 1), captions.float(), timestep.expand(4), encoder_attention_mask=mask).sample
        v_caption, v_null = v.chunk(2)
        x = scheduler.step(v_null + 2.0 * (v_caption - v_null), timestep, x).prev_sample
    difference = (sampler.to_pixels(x).int() - summary.pixels.int()).abs()
    assert int(difference.max()) <= 1


def test_what_is_predicted_goes_with_the_weights(foreseeing: Path, tmp_path: Path) -> None:
    """In our folder, in its file alone, and after diffusers has saved a pipeline, whose scheduler alone knows of it then."""
    diffusers = pytest.importorskip("diffusers")
    assert json.loads((foreseeing / "transformer" / "config.json").read_text())["prediction_type"] == "sample"
    for path in (foreseeing, foreseeing / "transformer", foreseeing / "transformer" / configs.WEIGHTS):
        assert checkpoint.load_transformer(path).config.prediction_type == "sample"
    diffusers.SanaTransformer2DModel.from_pretrained(foreseeing, subfolder="transformer").save_pretrained(
        tmp_path / "transformer"
    )
    diffusers.DPMSolverMultistepScheduler.from_pretrained(foreseeing, subfolder="scheduler").save_pretrained(
        tmp_path / "scheduler"
    )
    config = files.read_json(tmp_path / "transformer" / "config.json")
    files.write_json(tmp_path / "transformer" / "config.json", {k: v for k, v in config.items() if k != "prediction_type"})
    files.write_json(tmp_path / "model_index.json", {"_class_name": "SanaPipeline"})
    assert checkpoint.load_transformer(tmp_path).config.prediction_type == "sample"
    settings: dict[str, Any] = {"steps": 6, "guidance_scale": 2.0, "seed": 7}
    expected = drawn(foreseeing, "4", **settings, solver="dpm++")
    again = drawn(tmp_path, "4", **settings, encoder="tiny")
    assert int((again.pixels.int() - expected.pixels.int()).abs().max()) <= 1


def test_the_readme_draws_our_image_with_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code as it stands there, on a checkpoint of that name."""
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    own = ("data.image_size=32", "run.dir=runs/quickstart", "data.dir=data", "run.device=cpu", "model.prediction_type=sample")
    config = parse_config(SMALL, "small", own)
    embedded(config)
    list(train(TrainOptions(config)))
    checkpoints = Path("runs/quickstart/checkpoints")
    (checkpoints / "step-000004").rename(checkpoints / "step-003000")
    perturb(checkpoints / "step-003000")
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "DPMSolverMultistepScheduler" in block]
    drawn_there: dict[str, Any] = {}
    exec(code, drawn_there)
    quickstart = {"steps": 8, "guidance_scale": 2.7, "guidance_interval": (0.7, 1.0)}
    summary = drawn(checkpoints / "step-003000", "4", **quickstart, seed=0, precision="fp32", out=tmp_path / "o.png")
    difference = (sampler.to_pixels(drawn_there["x"]).int() - summary.pixels.int()).abs()
    assert int(difference.max()) <= 1
    assert float(summary.pixels.float().std()) > 10


def test_step_folders_tell_no_paths_and_no_pickle(step: Path) -> None:
    for path in step.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".safetensors", ".md"), path
            content = path.read_bytes()
            if path.suffix == ".safetensors":  # its header; the rest is numbers
                content = content[: 8 + int.from_bytes(content[:8], "little")]
            for secret in (b"/tmp", b"/home", b"/root", str(Path.cwd()).encode(), f"@{os.uname().nodename}".encode()):
                assert secret not in content, (path, secret)


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


def test_guidance_is_the_formula(step: Path) -> None:
    """One Euler step from sigma 1: x_0 = noise - guided velocity, with the null caption's own states and mask."""
    model, record = checkpoint.load_transformer(step), checkpoint.read_record(step)
    null = files.read_tensors(step / checkpoint.NULL_CAPTION)["states"]
    from sana_cli.text import load_encoder, text_config

    states = dict(load_encoder(text_config(record["encoder"]), torch.device("cpu")).encode(["seven", ""]))
    assert torch.equal(states[""], null)
    noise = sampler.Noise([9], (1, 16, 16))()[0]
    time = torch.tensor([1000.0])
    with torch.no_grad():
        conditional = model(noise[None], states["seven"][None].float(), time)
        unconditional = model(noise[None], null[None].float(), time)

    def one(**settings: Any) -> torch.Tensor:
        chosen = SampleConfig(steps=1, solver="euler").model_copy(update=settings)
        return sampler.final_images(sampler.sample_images(model, [states["seven"]], [null], [9], (1, 16, 16), chosen, "fp32"))

    guided = noise - (unconditional + 3.0 * (conditional - unconditional))
    assert torch.allclose(one(guidance_scale=3.0), guided, atol=1e-5)
    assert torch.allclose(one(guidance_scale=1.0), noise - conditional, atol=1e-5)
    assert torch.allclose(one(guidance_scale=0.0), noise - unconditional, atol=1e-5)
    assert torch.allclose(one(guidance_scale=3.0, guidance_interval=(0.0, 0.9)), noise - conditional, atol=1e-5)


FAULTS = """
import resource
import torch
from sana_cli import device, draw
from sana_cli.config import load_config
from sana_cli.model import build

config = load_config("quickstart")
model = build(config.model.model_copy(update={"sample_size": 32, "caption_channels": 128}))
state = torch.ones(2, 128)
torch.set_num_threads(1)
device.resolve_device("cpu")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    sampler.final_images(sampler.sample_images(model, [state] * 64, [state[:1]] * 64, range(64), (1, 32, 32), config.sample, "fp32"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory in their own way")
def test_drawing_again_takes_the_memory_that_it_has() -> None:
    """Forty thousand page faults and more, where the C library returns to the system what each layer frees."""
    answer = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 5000


def test_negative_prompt_takes_the_null_captions_place(step: Path) -> None:
    plain, empty = drawn(step, "4"), drawn(step, "4", negative_prompt="")
    assert torch.equal(plain.pixels, empty.pixels)
    away = drawn(step, "4", negative_prompt="two")
    assert not torch.equal(plain.pixels, away.pixels)
    same = drawn(step, "4", negative_prompt="4")  # guidance towards and away from the same prompt cancels
    assert int((same.pixels.int() - drawn(step, "4", guidance_scale=1.0).pixels.int()).abs().max()) <= 1


def test_other_sizes_and_weights(step: Path) -> None:
    assert drawn(step, "4", height=24, width=8).pixels.shape == (1, 1, 24, 8)
    with pytest.raises(SanaError, match=r"--width: 12 is not a multiple of the patch size 8"):
        drawn(step, "4", width=12)
    assert not torch.equal(drawn(step, "4", weights="raw").pixels, drawn(step, "4").pixels)


def test_grids_keep_how_they_were_made(step: Path, tmp_path: Path) -> None:
    summary = drawn(step, "4 two", "six", out=tmp_path / "grid.png", seed=11, trajectory=tmp_path / "appearing.gif")
    record = pictures.read_record(tmp_path / "grid.png")
    assert record["images"] == [[{"prompt": "4", "seed": 11}, {"prompt": "two", "seed": 12}], [{"prompt": "six", "seed": 13}]]
    assert record["settings"]["solver"] == "dpm++"
    assert record["checkpoint"] == "mine"
    with Image.open(tmp_path / "appearing.gif") as gif:
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


def test_odd_prompts_are_drawn(step: Path, tmp_path: Path) -> None:
    odd = "x" * 5000 + " [red]\x07../../etc/passwd עברית 🎈"
    summary = drawn(step, odd, separate=tmp_path / "odd")
    assert len(summary.images) == 4
    assert all(path.parent == tmp_path / "odd" for path in summary.saved)


def test_sentences_stand_in_a_square(step: Path) -> None:
    cells = pictures.grid_cells(pictures.prompt_rows([f"a red {n}" for n in range(9)], one_word=False), 1, 0)
    assert [len(row) for row in cells] == [3, 3, 3]
    assert pictures.prompt_rows(["4 two", "six"], one_word=True) == [("4", "two"), ("six",)]
    repeated = pictures.grid_cells([("4", "two")], 2, 5)
    assert [(cell.prompt, cell.seed) for cell in repeated[0]] == [("4", 5), ("4", 6), ("two", 7), ("two", 8)]


def test_encoder_and_transformer_take_turns(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under offload, the encoder is gone before the transformer comes; with "none" it stays."""
    import gc
    import weakref

    encoders: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    load_encoder, load_transformer = sampling.load_encoder, checkpoint.load_transformer

    def recorded(*arguments: Any) -> Any:
        encoder = load_encoder(*arguments)
        encoders.append(weakref.ref(encoder.model))
        return encoder

    def watched(*arguments: Any) -> Any:
        gc.collect()
        alive.append(encoders[-1]() is not None)
        return load_transformer(*arguments)

    monkeypatch.setattr(sampling, "load_encoder", recorded)
    monkeypatch.setattr(checkpoint, "load_transformer", watched)
    pictures = [drawn(step, "4", offload=offload).pixels for offload in ("auto", "model", "none")]
    assert alive == [False, False, True]
    assert torch.equal(pictures[0], pictures[2])


def test_another_encoder_is_refused_by_field(step: Path, tmp_path: Path, gemma: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(step, changed)
    record = json.loads((changed / "sana.json").read_text())
    record["encoder"]["max_length"] = 299
    (changed / "manifest.json").unlink()
    with pytest.raises(SanaError, match=r"changed lacks manifest\.json"):
        drawn(changed, "4")
    with pytest.raises(SanaError, match=r"text\.weights: .* has .*, not .*\n(.|\n)*--encoder PATH must be the model"):
        drawn(step, "4", encoder=str(gemma))


def test_what_is_missing_is_said(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SanaError, match="no checkpoint at nowhere: there is no such file"):
        list(sample(SampleOptions(("4",), Path("nowhere"))))
    with pytest.raises(SanaError, match="nothing to draw: give prompts(.|\n)*captions such as '5' 'five'"):
        drawn(step)
    for options, message in (
        ({"solver": "ddim"}, "--solver: input should be 'dpm\\+\\+', 'euler', 'heun' or 'scm'"),
        ({"guidance_scale": -1.0}, "--guidance-scale: input should be greater than or equal to 0"),
        ({"guidance_interval": (0.9, 0.1)}, "--guidance-interval: 0.9 must be below 0.1"),
        ({"weights": "best"}, "weights: 'best' is not one of ema, raw"),
        ({"device": "cuda:77"}, "no device cuda:77"),
        ({"prompts_file": Path("no.txt")}, "--prompts-file: no.txt: No such file"),
    ):
        with pytest.raises(SanaError, match=message):
            list(sample(SampleOptions(("4",), step, **({"device": "cpu"} | options))))
    empty = tmp_path / "runs" / "empty" / "checkpoints" / "step-000005"
    empty.mkdir(parents=True)
    with pytest.raises(SanaError, match=r"no checkpoint in runs/empty \(step-000005 lacks manifest\.json"):
        list(sample(SampleOptions(("4",), Path("runs/empty"))))


def test_the_newest_whole_checkpoint_is_the_default(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("old/checkpoints/step-000900", "new/checkpoints/step-000002", "new/checkpoints/step-000003")):
        shutil.copytree(step, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "manifest.json", (1000 + age, 1000 + age))
    (tmp_path / "runs" / "new" / "checkpoints" / "step-000003" / "manifest.json").unlink()
    *_, summary = sample(SampleOptions(("4",), device="cpu"))
    assert isinstance(summary, SampleSummary)
    assert summary.checkpoint == Path("runs/new/checkpoints/step-000002")
    assert summary.saved == (Path("runs/new/sample-step-000002.png"),)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    config = ModelConfig(sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, caption_channels=10)
    weights = build(config).state_dict()
    weights["proj_out.bias"] = torch.zeros(3)
    weights["extra.weight"] = torch.zeros(1)
    del weights["scale_shift_table"]

    files.write_tensors(tmp_path / configs.WEIGHTS, weights)
    files.write_json(tmp_path / "config.json", configs.diffusers_config(config))
    with pytest.raises(SanaError) as caught:
        checkpoint.load_transformer(tmp_path)
    lines = str(caught.value).splitlines()
    assert "does not fit" in lines[0]
    assert lines[1:] == [
        "  missing: scale_shift_table (2, 16)",
        "  unexpected: extra.weight (1,)",
        "  proj_out.bias is (3,), not (64,)",
    ]
    files.write_json(tmp_path / "config.json", configs.diffusers_config(config) | {"norm_eps": 1e-5})
    with pytest.raises(SanaError, match=r"norm_eps = 1e-05 is not supported"):
        checkpoint.load_transformer(tmp_path)


def test_config_strings_survive(config: Config) -> None:
    assert SampleConfig.model_validate(config.to_dict()["sample"]) == config.sample


def test_the_weights_that_come_with_sana(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They draw where there is no run, say so, and write into the working directory; a run of the user's own goes first."""
    monkeypatch.chdir(tmp_path)
    *_, summary = sample(SampleOptions(("4 two 4 six",), device="cpu"))
    assert isinstance(summary, SampleSummary)
    assert summary.shipped
    assert summary.saved == (Path("sample-quickstart.png"),)
    list(checkpoint.verify(checkpoint.shipped(), hashes=True))
    assert checkpoint.find_checkpoint(Path("shipped")) == checkpoint.shipped()
    assert not (checkpoint.shipped() / "training").exists()
    record = checkpoint.read_record(checkpoint.shipped())
    assert {"config", "score"} <= set(record)
    assert str(Path.home()) not in str(record)
    assert load_transformer(checkpoint.shipped()).proj_out.weight.dtype == torch.float32
    assert sum(path.stat().st_size for path in checkpoint.shipped().rglob("*") if path.is_file()) < 4_000_000

    shutil.copytree(step, tmp_path / "runs" / "mine" / "checkpoints" / "step-000004")
    *_, summary = sample(SampleOptions(("4",), device="cpu"))
    assert isinstance(summary, SampleSummary)
    assert not summary.shipped
    assert summary.checkpoint.parts[:2] == ("runs", "mine")


def test_a_release_is_its_checkpoint_in_bf16(step: Path, tmp_path: Path) -> None:
    score = {"accuracy": 0.5, "images": 10, "frechet_distance": 1.0, "real_frechet_distance": 0.5}
    given = checkpoint.release(step, tmp_path / "given", {"guidance_scale": 1.75}, {"score": score})
    list(checkpoint.verify(given, hashes=True))
    record = checkpoint.read_record(given)
    assert record["score"] == score
    assert record["sample"] == record["config"]["sample"] == {**checkpoint.read_record(step)["sample"], "guidance_scale": 1.75}
    theirs, ours = (load_transformer(place, dtype=None).state_dict() for place in (step, given))
    assert all(torch.equal(theirs[name].bfloat16(), tensor) for name, tensor in ours.items())
    assert not (given / "training").exists()
    assert inspect(InspectOptions(str(given))).facts["step"] == 4

"""Complete diffusers pipelines against diffusers, and which models are on the device when."""

import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Sana, embedded, invoke, sampled, small_config
from PIL import Image
from safetensors.torch import load_file, save_file

from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.commands.sample import SampleOptions, SampleSummary, sample
from sana_cli.commands.train import TrainOptions, train
from sana_cli.errors import SanaError
from sana_cli.play.studio import PictureRequest, Studio
from sana_cli.sampling.opened import open_checkpoint
from sana_cli.weights import checkpoint

diffusers = pytest.importorskip("diffusers")

PROMPT = "  A Small RED cube on a Blue sphere "
CHANNELS, FACTOR, SIDE = 8, 8, 4  # of latents, of the autoencoder, and of a sample


def saved_pipeline(folder: Path, gemma: Path, sprint: bool, scheduler: Any, **fields: Any) -> Path:
    """A tiny random pipeline saved by diffusers, with every folder of an official one."""
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(1)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=32,
        num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=32,
        sample_size=SIDE,
        qk_norm="rms_norm_across_heads" if sprint else None, guidance_embeds=sprint, **fields,
    )  # fmt: skip
    with torch.no_grad():  # weights for which caption, time and guidance all matter
        for parameter in transformer.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    vae = diffusers.AutoencoderDC(
        latent_channels=CHANNELS, attention_head_dim=8, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 16, 16, 16), decoder_block_out_channels=(16, 16, 16, 16),
        encoder_layers_per_block=(1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()), decoder_qkv_multiscales=((), (), (), ()),
        scaling_factor=0.41407,
    )  # fmt: skip
    kind = diffusers.SanaSprintPipeline if sprint else diffusers.SanaPipeline
    kind(
        tokenizer=AutoTokenizer.from_pretrained(gemma),
        text_encoder=AutoModel.from_pretrained(gemma),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    ).save_pretrained(folder)
    return folder


def dpm() -> Any:
    return diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory, gemma: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    return {
        "dpm++": saved_pipeline(folder / "dpm", gemma, False, dpm()),
        "euler": saved_pipeline(folder / "euler", gemma, False, euler, timestep_scale=0.5),
        "heun": saved_pipeline(folder / "heun", gemma, False, heun, interpolation_scale=2.0),
        "scm": saved_pipeline(folder / "sprint", gemma, True, diffusers.SCMScheduler()),
    }


def theirs(folder: Path, sprint: bool, seed: int, size: tuple[int, int], **settings: Any) -> np.ndarray:
    kind = diffusers.SanaSprintPipeline if sprint else diffusers.SanaPipeline
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(
        PROMPT,
        height=size[0],
        width=size[1],
        generator=generator,
        use_resolution_binning=False,
        output_type="np",
        **settings,
    )
    return images[0][0] * 255.0


def ours(folder: Path, **options: Any) -> SampleSummary:
    return sampled(folder, PROMPT, out=folder.parent / "out.png", **options)


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        ("dpm++", {"num_inference_steps": 6, "guidance_scale": 4.5}),
        ("euler", {"num_inference_steps": 5, "guidance_scale": 3.0}),
        ("heun", {"num_inference_steps": 4, "guidance_scale": 1.0}),
        ("scm", {"guidance_scale": 4.5}),
        ("scm", {"num_inference_steps": 1, "guidance_scale": 2.0, "intermediate_timesteps": None}),
        ("scm", {"num_inference_steps": 4, "guidance_scale": 0.0, "intermediate_timesteps": None}),
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_pipelines_draw_what_diffusers_draws(
    pipelines: dict[str, Path], solver: str, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    folder = pipelines[solver]
    expected = theirs(folder, solver == "scm", 11, size, **settings)
    summary = ours(
        folder, seed=11, height=size[0], width=size[1], steps=settings.get("num_inference_steps"),
        guidance_scale=settings["guidance_scale"],
    )  # fmt: skip
    assert summary.settings.solver == solver
    found = summary.pixels[0].permute(1, 2, 0).numpy().astype(float)
    assert found.shape == expected.shape == (*size, 3)
    assert expected.std() > 10  # the picture is not flat
    print(f"{solver} {settings} {size}: largest difference {np.abs(found - expected).max():.2f} of 255")
    assert np.abs(found - expected).max() <= 0.6  # 0.5 of it is rounding to integers


# --- settings that matter -----------------------------------------------------------------------------------


def test_prompts_are_treated_as_diffusers_treats_them(pipelines: dict[str, Path]) -> None:
    """Lower-cased and stripped, after the instruction: recorded settings, and each matters."""
    folder = pipelines["dpm++"]
    base = ours(folder, steps=3)
    assert torch.equal(base.pixels, ours(folder, steps=3).pixels)

    def drawn(prompt: str, **options: Any) -> torch.Tensor:
        return sampled(folder, prompt, out=folder.parent / "o.png", steps=3, **options).pixels

    assert torch.equal(base.pixels, drawn(PROMPT.strip().lower()))
    assert not torch.equal(base.pixels, drawn("another prompt"))
    assert not torch.equal(base.pixels, drawn(PROMPT, instruction=""))
    assert not torch.equal(base.pixels, drawn(PROMPT, negative_prompt="a sphere"))
    assert torch.equal(drawn(PROMPT, instruction=""), drawn(PROMPT, instruction="", offload="none"))


def test_negative_prompts_are_those_of_diffusers(pipelines: dict[str, Path]) -> None:
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": "A Sphere"}
    expected = theirs(pipelines["dpm++"], False, 3, (32, 32), **settings)
    summary = ours(pipelines["dpm++"], seed=3, steps=4, guidance_scale=5.0, negative_prompt="A Sphere")
    assert np.abs(summary.pixels[0].permute(1, 2, 0).numpy() - expected).max() <= 2


def test_several_prompts_and_bf16_weights(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pipelines["dpm++"], tmp_path / "half")
    half = diffusers.SanaTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.bfloat16
    )
    half.save_pretrained(folder / "transformer")
    pipeline = diffusers.SanaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a cube", "a very long prompt about a sphere " * 12, "x"]
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    settings = {
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "output_type": "np",
    }
    exact = 255 * pipeline(prompts, height=32, width=32, generator=generators, **settings)[0]
    pipeline.transformer = half
    pipeline.text_encoder.to(torch.bfloat16)  # as ours
    pipeline.vae.to(torch.bfloat16)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    rounded = 255 * pipeline(prompts, height=32, width=32, generator=generators, **settings)[0]

    def drawn(**options: Any) -> np.ndarray:
        summary = sampled(
            folder, *prompts, seed=4, steps=4, guidance_scale=3.0, out=tmp_path / "o.png", **options
        )
        return summary.pixels.permute(0, 2, 3, 1).numpy()

    assert np.abs(drawn(precision="fp32") - exact).max() <= 0.6
    assert np.abs(drawn(precision="bf16") - exact).mean() < 1.2 * np.abs(np.round(rounded) - exact).mean()


def test_several_images_each_have_their_own_noise(pipelines: dict[str, Path]) -> None:
    """Sprint's solver adds noise at every step: an image must not depend on its batch."""
    for solver in ("dpm++", "scm"):
        row = ours(pipelines[solver], images_per_prompt=3, seed=5)
        alone = ours(pipelines[solver], seed=6).pixels[0]
        assert int((row.pixels[1].int() - alone.int()).abs().max()) <= 1
        assert int((row.pixels[1].int() - row.pixels[2].int()).abs().max()) > 10


def test_latents_appear_in_the_trajectory(pipelines: dict[str, Path], tmp_path: Path) -> None:
    from PIL import GifImagePlugin, Image, PngImagePlugin

    summary = ours(pipelines["dpm++"], steps=3, trajectory=tmp_path / "a.gif", separate=tmp_path)
    with Image.open(tmp_path / "a.gif") as gif:
        assert isinstance(gif, GifImagePlugin.GifImageFile)
        assert gif.n_frames == 4
    with Image.open(summary.saved[0]) as image:
        assert image.size == (32, 32)
        assert np.array_equal(np.asarray(image), summary.pixels[0].permute(1, 2, 0).numpy())
        assert isinstance(image, PngImagePlugin.PngImageFile)
        assert json.loads(image.text["sana"])["autoencoder"] == pipelines["dpm++"].name


def test_a_file_inside_a_pipeline_has_the_pipeline_around_it(pipelines: dict[str, Path]) -> None:
    folder = pipelines["dpm++"]
    whole = ours(folder, steps=2).pixels
    for inner in (folder / "transformer", folder / "transformer" / "diffusion_pytorch_model.safetensors"):
        assert torch.equal(ours(inner, steps=2).pixels, whole)


def test_a_transformer_alone_is_given_the_rest(
    pipelines: dict[str, Path], gemma: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "transformer-alone"
    shutil.copytree(pipelines["dpm++"] / "transformer", alone)
    from sana_cli.config.instructions import DIFFUSERS

    with pytest.raises(
        SanaError,
        match="draws latents of 8 channels, and which autoencoder they are of is not on record\n.*`autoencoder` PATH",
    ):
        ours(alone)
    given = {"autoencoder": str(pipelines["dpm++"] / "vae"), "instruction": DIFFUSERS}
    with pytest.raises(
        SanaError, match="takes caption states 32 wide, and whose they are is not on record\n.*`encoder` PATH"
    ):
        ours(alone, **given)
    with pytest.raises(SanaError, match="the encoder tiny gives states 128 wide; .* takes 32"):
        ours(alone, **given, encoder="tiny")
    summary = sampled(alone, PROMPT.lower().strip(), out=tmp_path / "o.png", encoder=str(gemma), **given)
    assert torch.equal(summary.pixels, ours(pipelines["dpm++"]).pixels)


def test_what_cannot_be_is_said_before_the_long_work(
    pipelines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dpm_folder, sprint = pipelines["dpm++"], pipelines["scm"]
    for folder, options, message in (
        (
            dpm_folder,
            {"height": 36},
            "`height`: 36 is not a multiple of 8, the patch size times the autoencoder's factor of 8",
        ),
        (dpm_folder, {"autoencoder": "/nowhere/at/all"}, "autoencoder: no folder /nowhere/at/all"),
        (
            dpm_folder,
            {"autoencoder": str(dpm_folder / "transformer")},
            "is a SanaTransformer2DModel, not an AutoencoderDC",
        ),
        (dpm_folder, {"weights": "raw"}, "has no raw weights"),
        (sprint, {"negative_prompt": "x"}, "`negative_prompt`: this model has its guidance built in"),
        (
            sprint,
            {"guidance_interval": (0.1, 0.9)},
            "`guidance_interval`: this model has its guidance built in",
        ),
        (sprint, {"flow_shift": 3.0}, "`flow_shift`: the scm solver has noise levels of its own"),
        (sprint, {"solver": "dpm++"}, "`solver`: a Sprint model is for scm, not dpm"),
        (dpm_folder, {"solver": "scm"}, "`solver`: scm is for Sprint models, which this is not"),
    ):
        with pytest.raises(SanaError, match=message):
            ours(folder, **options)
    assert ours(dpm_folder, height=40, width=24, steps=1).pixels.shape == (1, 3, 40, 24)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(SanaError, match=r"not installed\ninstall it with: pip install 'sana-cli\[latent\]'"):
        ours(dpm_folder, steps=1)


def test_inspect_names_what_a_pipeline_has(pipelines: dict[str, Path]) -> None:
    report = inspect(InspectOptions(str(pipelines["scm"])))
    assert report.kind == "pipeline"
    assert report.facts["guidance"] == "an input of the model"
    assert report.facts["encoder"] == report.facts["autoencoder"] == "its own"
    assert report.facts["sampling"] == "scm, 2 steps, guidance 4.5, flow shift 1"
    assert "lower-cased" in report.facts["captions"]
    assert inspect(InspectOptions(str(pipelines["heun"]))).facts["positions"] == "sine-cosine, scale 2"


# --- memory -------------------------------------------------------------------------------------------------


def test_models_take_turns_on_the_device(pipelines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Records each move, and which other models are still alive when one arrives."""
    import gc
    import weakref

    from sana_cli import autoencoder, text
    from sana_cli.sampling import conditioning, opened

    alive: dict[str, weakref.ref[Any]] = {}
    together: list[set[str]] = []

    def watch(name: str, load: Callable[..., Any], inner: Callable[[Any], Any]) -> Callable[..., Any]:
        def loaded(*arguments: Any) -> Any:
            made = load(*arguments)
            alive[name] = weakref.ref(inner(made))
            gc.collect()
            together.append({other for other, model in alive.items() if model() is not None})
            return made

        return loaded

    monkeypatch.setattr(
        conditioning, "load_encoder", watch("encoder", text.load_encoder, lambda made: made.model)
    )
    monkeypatch.setattr(
        checkpoint, "load_transformer", watch("transformer", checkpoint.load_transformer, lambda made: made)
    )
    monkeypatch.setattr(
        opened, "Autoencoder", watch("decoder", autoencoder.Autoencoder, lambda made: made.model)
    )
    names = ("encoder", "transformer", "decoder")
    for offload in ("model", "auto"):
        moves: list[tuple[str, str]] = []
        together.clear()
        ours(
            pipelines["dpm++"],
            steps=2,
            offload=offload,
            report=lambda what, name, moves=moves: moves.append((what, name)),
        )
        assert moves == [(what, name) for name in names for what in ("load", "free")]
        assert together == [{"encoder"}, {"transformer"}, {"decoder"}]
    moves = []
    together.clear()
    ours(pipelines["dpm++"], steps=2, offload="none", report=lambda what, name: moves.append((what, name)))
    assert moves == [("load", name) for name in names]
    assert together == [{"encoder"}, {"encoder", "transformer"}, set(names)]


def test_taking_turns_keeps_memory_low(
    pipelines: dict[str, Path], gemma: Path, tmp_path: Path, sana: Sana
) -> None:
    """Peak resident memory, with an encoder and a transformer of about 200 MB each."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

    folder = tmp_path / "large"
    shutil.copytree(pipelines["dpm++"], folder)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    encoder = Gemma2Model(config)
    encoder.save_pretrained(folder / "text_encoder")
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=20, attention_head_dim=32,
        num_layers=7,
        num_cross_attention_heads=5, cross_attention_head_dim=128, cross_attention_dim=640,
        caption_channels=512, sample_size=SIDE,
    )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    sizes = {
        name: 4 * sum(p.numel() for p in model.parameters())
        for name, model in (("encoder", encoder), ("model", transformer))
    }
    assert min(sizes.values()) > 190e6
    peaks = {}
    for offload in ("model", "none"):
        answer = sana("sample", "a cube", "--checkpoint", str(folder), "--steps", "1", "--offload", offload,
        "--device", "cpu",
                      "--json", "--out", "o.png")  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        peaks[offload] = json.loads(answer.stdout)["peak_memory"]
    print(f"peak memory: {peaks}, sizes {sizes}")
    assert peaks["model"] < peaks["none"] - 0.5 * min(sizes.values())


# --- training on latents ------------------------------------------------------------------------------------


def test_training_on_latents_from_published_weights(
    pipelines: dict[str, Path], gemma: Path, tmp_path: Path
) -> None:
    """Tiny sana-0.6b and sana-1.6b: embed latents, start from given weights, sample images."""
    from PIL import Image

    from sana_cli.dataset.reader import Dataset

    source = pipelines["dpm++"]
    config = small_config(
        tmp_path, f"data.autoencoder={source / 'vae'}", "data.latent_factor=8", "data.image_size=[32, 16]",
        f"text.encoder={gemma}", "text.lowercase=true", "model.in_channels=8", "model.patch_size=1",
        "model.num_layers=2",
        "model.attention_head_dim=32", "model.cross_attention_head_dim=32", f"train.init_from={source}",
        "train.steps=2",
        "optim.lr=1e-12", "sample.steps=2",
    )  # fmt: skip
    embedded(config, limit=6)
    dataset = Dataset(config.data.dir)
    assert dataset.image_shape == (8, 4, 2)
    assert dataset.index.image.autoencoder == "vae"
    vae = diffusers.AutoencoderDC.from_pretrained(source / "vae").eval()
    from sana_cli.sources import Entry, decode_image, fit_image, open_source

    entries = [entry for entry in itertools.islice(open_source(config.data), 6) if isinstance(entry, Entry)]
    assert len(entries) == 6
    images = [entry.image for entry in entries if isinstance(entry.image, np.ndarray)]
    pixels = np.stack([fit_image(decode_image(image), (32, 16), 3) for image in images])
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(pixels).float() / 127.5 - 1).latent * 0.41407
    assert torch.allclose(dataset.images(np.arange(6)), expected, rtol=2**-7, atol=1e-3)
    embedded(config, limit=6)  # nothing to do

    list(train(TrainOptions(config)))
    with Image.open(tmp_path / "run" / "samples" / "step-000002.png") as grid:
        assert grid.mode == "RGB"
    begun = checkpoint.load_transformer(tmp_path / "run", weights="raw").state_dict()
    assert all(
        torch.allclose(begun[k], t, atol=1e-6)
        for k, t in checkpoint.load_transformer(source).state_dict().items()
    )
    summary = sampled(tmp_path / "run", "4")
    assert summary.pixels.shape == (1, 3, 32, 16)
    facts = inspect(InspectOptions(str(tmp_path / "run"))).facts
    assert facts["sample"] == "8 x 4 x 2 latents"
    assert b"/tmp" not in (summary.checkpoint / "sana.json").read_bytes()
    copied = shutil.copytree(summary.checkpoint, tmp_path / "elsewhere" / "step")
    with pytest.raises(SanaError, match="`encoder` PATH says where that lies"):
        list(sample(SampleOptions(("4",), copied, device="cpu", autoencoder=str(source))))
    again = sampled(copied, "4", encoder=str(gemma), autoencoder=str(source))
    assert torch.equal(again.pixels, summary.pixels)

    pixels_now = small_config(
        tmp_path, f"text.encoder={gemma}", "text.lowercase=true", f"run.dir={tmp_path / 'x'}"
    )
    with pytest.raises(SanaError, match=r"data\.autoencoder: .* has vae, not pixels"):
        list(train(TrainOptions(pixels_now)))
    with pytest.raises(SanaError, match=r"data\.latent_factor: 4, where .* has 8"):
        embedded(
            small_config(
                tmp_path,
                f"data.autoencoder={source}",
                "data.latent_factor=4",
                "model.patch_size=4",
                f"data.dir={tmp_path / 'x'}",
            )
        )


# --- folders from others ------------------------------------------------------------------------------------


def test_a_folder_brings_no_code_and_no_pickles(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pipelines["dpm++"], tmp_path / "hostile")
    proof, config = tmp_path / "it-ran", folder / "text_encoder" / "config.json"
    whole = config.read_text()
    (folder / "text_encoder" / "evil.py").write_text(
        f"open({str(proof)!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    changed = json.loads(whole) | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    }
    config.write_text(json.dumps(changed))
    answer = invoke("sample", "x", "--checkpoint", str(folder), "--device", "cpu")
    assert (answer.exit_code, proof.exists()) == (1, False)
    assert isinstance(answer.exception, SystemExit), "a message, and no traceback"
    assert answer.stderr.startswith("error: ")
    config.write_text(whole)
    for part, name in (("text_encoder", "pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin")):
        (weights,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(weights), folder / part / name)
        kept = weights.read_bytes()
        weights.unlink()
        with pytest.raises(SanaError, match="safetensors"):
            ours(folder, steps=1)
        weights.write_bytes(kept)
        (folder / part / name).unlink()
    assert ours(folder, steps=1).pixels.shape == (1, 3, 32, 32)


def test_missing_weights_are_not_made_up(pipelines: dict[str, Path], tmp_path: Path) -> None:
    for part, key in (("text_encoder", r"text\.encoder"), ("vae", "autoencoder")):
        folder = shutil.copytree(pipelines["dpm++"], tmp_path / part)
        (weights,) = (folder / part).glob("*.safetensors")
        tensors = load_file(weights)
        lost = sorted(name for name in tensors if name.endswith("weight"))[3]
        save_file(
            {name: tensor for name, tensor in tensors.items() if name != lost}, weights, {"format": "pt"}
        )
        with pytest.raises(
            SanaError, match=rf"{key}: the files of .* lack weights:\n  missing: .*{lost.split('.')[-2]}"
        ):
            ours(folder, steps=1)


def test_other_pipelines_and_schedulers(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pipelines["dpm++"], tmp_path / "other")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"solver_order": 3}))
    with pytest.raises(SanaError, match="solver_order = 3 is not supported"):
        ours(folder, steps=1)
    assert ours(folder, steps=1, solver="euler").settings.solver == "euler"
    assert "solver_order" in inspect(InspectOptions(str(folder))).facts["sampling"]
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("SanaPipeline", "SanaControlNetPipeline"))
    with pytest.raises(
        SanaError, match="is a SanaControlNetPipeline; the pipelines that can be sampled are SanaPipeline and"
    ):
        ours(folder)


def test_very_large_images_are_decoded_in_tiles(
    pipelines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sana_cli import autoencoder

    decoder = autoencoder.Autoencoder(str(pipelines["dpm++"]), torch.device("cpu"), torch.float32)
    latents = torch.randn(1, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    (whole,) = decoder.decode(latents)
    for name, value in (("TILED", 32), ("TILE", 48), ("STRIDE", 32)):
        monkeypatch.setattr(autoencoder, name, value)
    (tiled,) = decoder.decode(latents)
    assert tiled.shape == whole.shape == (1, 3, 64, 64)
    assert decoder.model.use_tiling
    assert not torch.equal(tiled, whole)  # tile seams are blended, so close but not equal
    assert float((tiled - whole).abs().mean()) < 0.2 * float(whole.std())


def test_images_that_are_not_finite_are_not_saved(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pipelines["dpm++"], tmp_path / "nan")
    (weights,) = (folder / "vae").glob("*.safetensors")
    save_file(
        {name: tensor * float("nan") for name, tensor in load_file(weights).items()},
        weights,
        {"format": "pt"},
    )
    with pytest.raises(SanaError, match="decodes to images that are not finite"):
        ours(folder, steps=1)
    config = folder / "vae" / "config.json"
    for scale in (0, "big", None):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": scale}))
        with pytest.raises(SanaError, match="no usable latent_channels"):
            ours(folder, steps=1)


@pytest.mark.parametrize("solver", ["dpm++", "scm"])
def test_the_page_draws_what_sample_draws(pipelines: dict[str, Path], solver: str) -> None:
    """Latents: the trajectory is decoded too."""
    theirs = ours(pipelines[solver], seed=7, steps=3, guidance_scale=2.0).pixels[0]
    studio = Studio(open_checkpoint(pipelines[solver], device="cpu"))
    asked: dict[str, Any] = {"tab": "a", "prompt": PROMPT, "seed": 7, "steps": 3, "guidance_scale": 2.0}
    drawn = list(studio.draw(PictureRequest(**asked, variations=1, trajectory=True)))
    assert [message.kind for message in drawn] == [
        *(3 * ["step"]),
        "picture",
        *(3 * ["step"]),
        "variation",
        *(4 * ["frame"]),
    ]
    for message in (drawn[3], drawn[-1]):
        with Image.open(io.BytesIO(message.png)) as image:
            assert np.array_equal(np.array(image), theirs.permute(1, 2, 0).numpy())

"""Whole pipelines of other people's against diffusers' own, and the order in which models come to the device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana_cli.commands.sample import SampleOptions, SampleSummary, sample

diffusers = pytest.importorskip("diffusers")

PROMPT = "  A Small RED cube on a Blue sphere "
CHANNELS, FACTOR, SIDE = 8, 8, 4  # of the latents, of the autoencoder, and of a sample


def saved_pipeline(folder: Path, gemma: Path, sprint: bool, scheduler: Any, **fields: Any) -> Path:
    """A random pipeline in miniature, saved by diffusers: every folder that an official one has."""
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(1)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=32, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=32, sample_size=SIDE,
        qk_norm="rms_norm_across_heads" if sprint else None, guidance_embeds=sprint, **fields,
    )  # fmt: skip
    with torch.no_grad():  # weights with which the caption, the time and the guidance all show
        for parameter in transformer.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    vae = diffusers.AutoencoderDC(
        latent_channels=CHANNELS, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 16, 16, 16), decoder_block_out_channels=(16, 16, 16, 16),
        encoder_layers_per_block=(1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()), decoder_qkv_multiscales=((), (), (), ()), scaling_factor=0.41407,
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
    return diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


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
        PROMPT, height=size[0], width=size[1], generator=generator, use_resolution_binning=False, output_type="np", **settings
    )
    return images[0][0] * 255.0


def ours(folder: Path, **options: Any) -> SampleSummary:
    *_, summary = sample(SampleOptions((PROMPT,), folder, device="cpu", out=folder.parent / "out.png", **options))
    assert isinstance(summary, SampleSummary)
    return summary


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
    assert expected.std() > 10  # a picture, if not a pretty one
    print(f"{solver} {settings} {size}: largest difference {np.abs(found - expected).max():.2f} of 255")
    assert np.abs(found - expected).max() <= 2

"""The lesson's files: the same velocity, sampled with the lesson's own null caption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sampled
from helpers.sanas import PIXELS, lesson_file, reference
from torch import Tensor

from sana_cli.sampling import sampler
from sana_cli.sampling.pipeline import open_pipeline
from sana_cli.weights import checkpoint


def test_the_lesson_computes_the_same_field(tmp_path: Path) -> None:
    """Its output: data - noise at 1 - sigma; ours: noise - data at 1000 sigma timestep_scale."""
    theirs = reference(PIXELS)
    path = lesson_file(tmp_path / "diffusion-9999.pt", theirs)
    ours = checkpoint.load_transformer(path)
    assert ours.config == PIXELS.model_copy(update={"timestep_scale": 0.001})
    x, captions = torch.randn(5, 1, 16, 16), torch.randn(5, 3, 128)
    sigma = torch.tensor([0.0, 0.03, 0.5, 0.9, 1.0])
    with torch.no_grad():
        found = ours(x, captions, 1000 * sigma * ours.config.timestep_scale)
        expected = -theirs(x, captions, 1 - sigma).sample
    error = float((found - expected).abs().max() / expected.abs().max())
    print(f"lesson: largest error {error:.1e}")
    assert error < 1e-5
    assert float((found[0] - found[3]).abs().max()) > 0.01  # the time matters


def test_the_lesson_is_sampled_with_its_own_null_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mask of each prompt, as in its training."""
    path = lesson_file(tmp_path / "diffusion-9999.pt", reference(PIXELS))
    pipeline = open_pipeline(path, encoder="tiny")
    assert pipeline.null_caption is not None
    assert pipeline.null_caption.shape == (300, 128)
    assert pipeline.sample.guidance_scale == 1.0

    assert pipeline.null_follows_prompt
    asked: list[list[int]] = []
    original = sampler.sample_images

    def watched(model: Any, captions: Any, nulls: Any, *rest: Any) -> Any:
        asked.append([len(null) - len(caption) for caption, null in zip(captions, nulls, strict=True)])
        return original(model, captions, nulls, *rest)

    monkeypatch.setattr(sampler, "sample_images", watched)

    def draw(**options: Any) -> Tensor:
        return sampled(path, "4 two", encoder="tiny", out=tmp_path / "o.png", **options).pixels

    assert draw().shape == (2, 1, 16, 16)
    guided = draw(guidance_scale=3.0, steps=4)
    lesson_file(path, reference(PIXELS), null_seed=2)
    assert not torch.equal(draw(guidance_scale=3.0, steps=4), guided)
    assert all(differences == [0, 0] for differences in asked)

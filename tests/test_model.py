"""The transformer against diffusers' own, and against properties that the paper promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sana_cli.checkpoint import parameter_count
from sana_cli.config import ModelConfig, load_config
from sana_cli.formats import diffusers_config
from sana_cli.model import SanaTransformer, build, sinusoid


def perturbed(config: ModelConfig, seed: int = 0) -> SanaTransformer:
    """A model whose every parameter matters: the initial caption norm of 0.01 would hide an error in the captions."""
    model = build(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def small(**fields: object) -> ModelConfig:
    """A resolved config of a model that runs in milliseconds."""
    defaults = {
        "sample_size": 8, "patch_size": 2, "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "caption_channels": 10,
    }  # fmt: skip
    return ModelConfig.model_validate(defaults | fields)


def inputs(config: ModelConfig, height: int, width: int, batch: int = 3, tokens: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, height, width, generator=generator)
    captions = torch.randn(batch, tokens, config.caption_channels or 1, generator=generator)
    mask = torch.ones(batch, tokens)
    mask[1, 2:] = 0
    mask[2, :] = 0  # a row without any caption token
    return x, captions, torch.tensor([1.0, 437.5, 999.0])[:batch], mask[:batch]


@settings(max_examples=25, deadline=None)
@given(
    patch=st.sampled_from([1, 2, 4, 8]),
    channels=st.sampled_from([1, 3, 4]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    qk_norm=st.sampled_from([None, "rms_norm_across_heads"]),
    guidance_embeds=st.booleans(),
    attention_bias=st.booleans(),
    layers=st.integers(1, 2),
)
def test_equals_diffusers(
    patch: int,
    channels: int,
    rows: int,
    columns: int,
    qk_norm: str | None,
    guidance_embeds: bool,
    attention_bias: bool,
    layers: int,
) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = small(
        patch_size=patch, in_channels=channels, qk_norm=qk_norm, guidance_embeds=guidance_embeds,
        attention_bias=attention_bias, num_layers=layers, num_attention_heads=2, attention_head_dim=32,
    )  # heads of 32, as published: in narrower ones relu(q) relu(k) may be next to nothing, and gradients noise  # fmt: skip
    ours = perturbed(config)
    theirs = diffusers.SanaTransformer2DModel.from_config(diffusers_config(config)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, captions, timestep, mask = inputs(config, rows * patch, columns * patch)
    guidance = torch.tensor([0.1, 0.45, 2.0]) if guidance_embeds else None
    expected = theirs(x, captions, timestep, guidance=guidance, encoder_attention_mask=mask).sample
    found = ours(x, captions, timestep, guidance, mask)
    scale = max(1.0, float(expected.detach().abs().max()))
    error = (found - expected).detach().abs()
    # the third row sees padding only: its scores lie near -10000, where the last digit of float32 is 0.001
    assert float(error[:2].max()) < 1e-5 * scale
    assert float(error[2].max()) < 1e-3 * scale
    expected[:2].square().sum().backward()
    found[:2].square().sum().backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters() if parameter.grad is not None)
    references = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = references[name]
        assert parameter.grad is not None, name
        assert reference.grad is not None, name
        assert float((parameter.grad - reference.grad).abs().max()) < 1e-5 * largest, name


def test_bf16_equals_diffusers_within_its_rounding() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = small()
    ours = perturbed(config)
    theirs = diffusers.SanaTransformer2DModel.from_config(diffusers_config(config)).eval()
    theirs.load_state_dict(ours.state_dict())
    x, captions, timestep, mask = inputs(config, 8, 6)
    ours.requires_grad_(False)
    theirs.requires_grad_(False)
    exact = ours(x, captions, timestep, None, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(x, captions, timestep, None, mask).float()
        expected = theirs(x, captions, timestep, encoder_attention_mask=mask).sample.float()
    rounding = float((expected - exact).abs().max())
    assert 0 < rounding < 0.2
    assert float((found - exact).abs().max()) < 2 * rounding


def test_padding_of_captions_changes_nothing() -> None:
    config = small()
    model = perturbed(config)
    x, captions, timestep, _ = inputs(config, 8, 8)
    mask = torch.ones(3, 5)
    padded = torch.cat([captions, 100 * torch.ones(3, 295, 10)], dim=1)
    long_mask = torch.cat([mask, torch.zeros(3, 295)], dim=1)
    assert torch.allclose(model(x, captions, timestep, None, mask), model(x, padded, timestep, None, long_mask), atol=1e-5)


def test_a_row_without_caption_gives_numbers() -> None:
    config = small()
    x, captions, timestep, _ = inputs(config, 8, 8)
    out = perturbed(config)(x, captions, timestep, None, torch.zeros(3, 5))
    assert out.isfinite().all()


def test_nope_knows_positions_only_by_its_convolution() -> None:
    """With the depthwise convolution reduced to its centre, permuting patches permutes the output."""
    config = small(patch_size=1, num_layers=2)
    model = perturbed(config)
    x, captions, timestep, mask = inputs(config, 4, 4)
    flipped = model(x.flip(-1), captions, timestep, None, mask).flip(-1)
    assert not torch.allclose(model(x, captions, timestep, None, mask), flipped, atol=1e-3)
    with torch.no_grad():
        for block in model.transformer_blocks:
            kernel = block.ff.conv_depth.weight
            kernel.copy_(kernel * torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0.0]]))
    flipped = model(x.flip(-1), captions, timestep, None, mask).flip(-1)
    assert torch.allclose(model(x, captions, timestep, None, mask), flipped, atol=1e-4)


def test_linear_attention_sums_in_float32_under_autocast() -> None:
    config = small(patch_size=1, num_layers=1)
    attention = perturbed(config).transformer_blocks[0].attn1.requires_grad_(False)
    x = 300 * torch.randn(1, 4096, config.inner_dim, generator=torch.Generator().manual_seed(0))
    exact = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(x)
    assert half.isfinite().all()
    assert float((half - exact).norm() / exact.norm()) < 0.02


def test_sinusoid_is_cosines_then_sines() -> None:
    features = sinusoid(torch.tensor([0.0, 2.0]))
    assert torch.equal(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert features[1, 0] == pytest.approx(math.cos(2.0), abs=1e-6)
    assert features[1, 128] == pytest.approx(math.sin(2.0), abs=1e-6)
    assert features[1, 64] == pytest.approx(math.cos(2.0 * 10000**-0.5), abs=1e-6)


def test_official_initialisation() -> None:
    model = build(small(num_attention_heads=32, attention_head_dim=16, caption_channels=300), seed=0)
    weights = model.state_dict()
    width = 512
    assert (weights["caption_norm.weight"] == 0.01).all()
    assert weights["time_embed.linear.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert weights["caption_projection.linear_1.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert weights["transformer_blocks.0.scale_shift_table"].std() == pytest.approx(width**-0.5, rel=0.1)
    assert weights["transformer_blocks.0.attn1.to_q.weight"].abs().max() == pytest.approx(math.sqrt(6 / (4 * width)), rel=0.01)
    assert weights["transformer_blocks.0.attn1.to_out.0.weight"].abs().max() == pytest.approx(math.sqrt(3 / width), rel=0.01)
    assert (weights["proj_out.weight"] != 0).any()
    assert (weights["proj_out.bias"] == 0).all()
    assert all(torch.equal(weights[name], other) for name, other in build(model.config, seed=0).state_dict().items())


@pytest.mark.parametrize(("name", "count"), [("sana", 220_191_040), ("sana-384", 29_948_224)])
def test_counts_of_the_lesson_configs(name: str, count: int) -> None:
    config = load_config(name)
    model = build(config.model.model_copy(update={"sample_size": 32}), seed=None)
    assert parameter_count(model.parameters()) == count
    assert all(parameter.is_meta for parameter in model.parameters())


def test_published_counts() -> None:
    common = {"in_channels": 32, "patch_size": 1, "sample_size": 32, "caption_channels": 2304, "attention_head_dim": 32}
    published = {
        591_747_872: {
            "num_layers": 28,
            "num_attention_heads": 36,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
        },
        1_604_462_752: {
            "num_layers": 20,
            "num_attention_heads": 70,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
        },
    }
    for count, fields in published.items():
        assert parameter_count(build(ModelConfig.model_validate(common | fields), seed=None).parameters()) == count


def test_wrong_shapes_are_named() -> None:
    config = small()
    model = build(config)
    x, captions, timestep, mask = inputs(config, 8, 8)
    with pytest.raises(ValueError, match="3 channels; this model takes 1"):
        model(x.repeat(1, 3, 1, 1), captions, timestep, None, mask)
    with pytest.raises(ValueError, match="7x8; the patch size 2 must divide both"):
        model(x[:, :, :7], captions, timestep, None, mask)
    with pytest.raises(ValueError, match="guidance is needed by models with guidance_embeds"):
        model(x, captions, timestep, timestep, mask)

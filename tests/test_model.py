"""The transformer against diffusers', and against properties from the paper."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sana_cli.config.file import load_config
from sana_cli.config.keys import Architecture
from sana_cli.dataset.match import resolve_architecture
from sana_cli.model import SanaTransformer, build, positions, sinusoid
from sana_cli.weights.checkpoint import parameter_count
from sana_cli.weights.configs import diffusers_config


def perturbed(config: Architecture, seed: int = 0) -> SanaTransformer:
    """A model in which every parameter matters: a caption norm of 0.01 would hide errors."""
    model = build(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def small(**fields: object) -> Architecture:
    """A model that runs in milliseconds."""
    defaults = {
        "sample_size": 8, "patch_size": 2, "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "caption_channels": 10,
    }  # fmt: skip
    return Architecture.model_validate(defaults | fields)


def inputs(
    config: Architecture, height: int, width: int, batch: int = 3, tokens: int = 5
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, height, width, generator=generator)
    captions = torch.randn(batch, tokens, config.caption_channels, generator=generator)
    mask = torch.ones(batch, tokens)
    mask[1, 2:] = 0
    mask[2, :] = 0  # a row without any caption token
    return x, captions, torch.tensor([1.0, 437.5, 999.0])[:batch], mask[:batch]


CONFIGS = st.fixed_dictionaries(
    {
        "patch_size": st.sampled_from([1, 2, 4, 8]),
        "in_channels": st.sampled_from([1, 3, 32]),
        "qk_norm": st.sampled_from([None, "rms_norm_across_heads"]),
        "guidance_embeds": st.booleans(),
        "attention_bias": st.booleans(),
        "interpolation_scale": st.sampled_from([None, None, 1.0, 2.0]),
        "timestep_scale": st.sampled_from([1.0, 0.001]),
        "dropout": st.sampled_from([0.0, 0.1]),
        "mlp_ratio": st.sampled_from([2.5, 3.0, 1.3]),
        "num_layers": st.integers(1, 2),
        # heads of 32, as published: in narrower ones relu(q) relu(k) may be near 0
        "num_attention_heads": st.integers(1, 3),
        "attention_head_dim": st.just(32),
        "num_cross_attention_heads": st.integers(1, 2),
        "cross_attention_head_dim": st.sampled_from([12, 16]),
    }
)
# tokens down and across, both fewer and more than the width of a head
GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 7))


def a_pair(fields: dict[str, Any]) -> tuple[SanaTransformer, Any]:
    """Our model and diffusers' with the same weights, loaded both ways with strict keys."""
    diffusers = pytest.importorskip("diffusers")
    config = small(**fields, sample_size=2 * fields["patch_size"])
    ours = perturbed(config)
    theirs = diffusers.SanaTransformer2DModel.from_config(diffusers_config(config)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs


def call(
    model: Any, config: Architecture, grid: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The velocity for inputs that follow from the config; the third row sees padding only."""
    x, captions, timestep, mask = inputs(config, grid[0] * config.patch_size, grid[1] * config.patch_size)
    guidance = torch.tensor([0.1, 0.45, 2.0]) if config.guidance_embeds else None
    time = timestep * config.timestep_scale
    out = model(x.to(dtype), captions.to(dtype), time, guidance=guidance, encoder_attention_mask=mask)
    return out if isinstance(out, Tensor) else out.sample


def test_equals_diffusers() -> None:
    """Forward and gradients, over random configurations."""
    drawn, largest = set(), {"forward": 0.0, "gradient": 0.0, "forward of padding only": 0.0}

    @settings(max_examples=220, deadline=None, derandomize=True)
    @given(fields=CONFIGS, grid=GRIDS)
    def check(fields: dict[str, Any], grid: tuple[int, int]) -> None:
        ours, theirs = a_pair(fields)
        drawn.add((*map(str, fields.values()), grid))
        for training in (True, False) if fields["dropout"] else (False,):
            ours.train(training)
            theirs.train(training)
            ours.zero_grad()
            theirs.zero_grad()
            torch.manual_seed(3)
            expected = call(theirs, ours.config, grid)
            torch.manual_seed(3)  # the same dropout
            found = call(ours, ours.config, grid)
            scale = max(1.0, float(expected.detach().abs().max()))
            error = (found - expected).detach().abs() / scale
            largest["forward"] = max(largest["forward"], float(error[:2].max()))
            # the scores of padding are near -10000, where float32 has steps of 0.001
            largest["forward of padding only"] = max(
                largest["forward of padding only"], float(error[2].max())
            )
            assert float(error[:2].max()) < 1e-5
            assert float(error[2].max()) < 1e-3
            expected[:2].square().sum().backward()
            found[:2].square().sum().backward()
            references = dict(theirs.named_parameters())
            steepest = max(float(parameter.grad.abs().max()) for parameter in references.values())
            for name, parameter in ours.named_parameters():
                error = (parameter.grad - references[name].grad).abs() / steepest
                largest["gradient"] = max(largest["gradient"], float(error.max()))
                assert float(error.max()) < 1e-5, name

    check()
    print(f"{len(drawn)} configurations, largest error of {largest}")
    assert len(drawn) >= 200


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_equals_diffusers_within_its_rounding(autocast: bool) -> None:
    """Ours is as close to float32 as diffusers', under autocast and with bf16 weights."""
    ratios = []

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(fields=CONFIGS, grid=GRIDS)
    def check(fields: dict[str, Any], grid: tuple[int, int]) -> None:
        ours, theirs = a_pair(fields)
        ours.requires_grad_(False)
        theirs.requires_grad_(False)
        if not autocast:
            ours.to(torch.bfloat16)
            torch.nn.Module.to(theirs, torch.bfloat16)  # diffusers' own `to` logs a warning each time
        exact = call(ours.float() if autocast else copy.deepcopy(ours).float(), ours.config, grid)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            dtype = torch.float32 if autocast else torch.bfloat16
            found, expected = (call(model, ours.config, grid, dtype).float() for model in (ours, theirs))
        assert found.isfinite().all()
        # not the third row: near -10000, bf16 has steps of 64
        mine, other = (float((out - exact)[:2].norm()) for out in (found, expected))
        ratios.append((mine, other))
        assert 0 < ratios[-1][1] < 0.2 * float(exact.norm())

    check()
    mine, other = (sum(column) for column in zip(*ratios, strict=True))
    print(f"autocast {autocast}: our error is {mine / other:.3f} of theirs over {len(ratios)} configurations")
    assert mine < 1.1 * other
    assert max(a / b for a, b in ratios) < 3


def test_positions_are_those_of_the_published_2k_and_4k_models() -> None:
    """Sines, then cosines, in units of the trained grid; half the width column, half row."""
    table = positions(2, 4, 2, 2.0, 16).view(2, 4, 16)
    for row, column, index in [(0, 0, 0), (1, 3, 2), (1, 1, 3), (0, 2, 1)]:
        frequency = 10000 ** -(index / 4)
        across, down = column / (4 / 2) / 2.0 * frequency, row / (2 / 2) / 2.0 * frequency
        expected = [math.sin(across), math.cos(across), math.sin(down), math.cos(down)]
        assert table[row, column, index::4].tolist() == pytest.approx(expected, abs=1e-6)


def test_padding_of_captions_changes_nothing() -> None:
    config = small()
    model = perturbed(config)
    x, captions, timestep, _ = inputs(config, 8, 8)
    mask = torch.ones(3, 5)
    padded = torch.cat([captions, 100 * torch.ones(3, 295, 10)], dim=1)
    long_mask = torch.cat([mask, torch.zeros(3, 295)], dim=1)
    assert torch.allclose(
        model(x, captions, timestep, None, mask), model(x, padded, timestep, None, long_mask), atol=1e-5
    )


def test_a_row_without_caption_gives_numbers() -> None:
    config = small()
    x, captions, timestep, _ = inputs(config, 8, 8)
    out = perturbed(config)(x, captions, timestep, None, torch.zeros(3, 5))
    assert out.isfinite().all()


def test_nope_knows_positions_only_by_its_convolution() -> None:
    """With only the centre of the convolution left, permuting patches permutes the output."""
    config = small(patch_size=1, num_layers=2)
    model = perturbed(config)
    x, captions, timestep, mask = inputs(config, 4, 4)
    flipped = model(x.flip(-1), captions, timestep, None, mask).flip(-1)
    assert not torch.allclose(model(x, captions, timestep, None, mask), flipped, atol=1e-3)
    with torch.no_grad():
        for block in model.transformer_blocks:
            kernel = block.get_parameter("ff.conv_depth.weight")
            kernel.copy_(kernel * torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0.0]]))
    flipped = model(x.flip(-1), captions, timestep, None, mask).flip(-1)
    assert torch.allclose(model(x, captions, timestep, None, mask), flipped, atol=1e-4)


def test_linear_attention_sums_in_float32_under_autocast() -> None:
    config = small(patch_size=1, num_layers=1)
    attention = perturbed(config).transformer_blocks[0].get_submodule("attn1").requires_grad_(False)
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
    assert weights["transformer_blocks.0.attn1.to_q.weight"].abs().max() == pytest.approx(
        math.sqrt(6 / (4 * width)), rel=0.01
    )
    assert weights["transformer_blocks.0.attn1.to_out.0.weight"].abs().max() == pytest.approx(
        math.sqrt(3 / width), rel=0.01
    )
    assert (weights["proj_out.weight"] != 0).any()
    assert (weights["proj_out.bias"] == 0).all()
    assert all(
        torch.equal(weights[name], other) for name, other in build(model.config, seed=0).state_dict().items()
    )


@pytest.mark.parametrize(("name", "count"), [("sana", 220_191_040), ("sana-384", 29_948_224)])
def test_counts_of_the_lesson_configs(name: str, count: int) -> None:
    config = load_config(name)
    model = build(resolve_architecture(config, None), seed=None)
    assert parameter_count(model.parameters()) == count
    assert all(parameter.is_meta for parameter in model.parameters())


def test_published_counts() -> None:
    common = {
        "in_channels": 32,
        "patch_size": 1,
        "sample_size": 32,
        "caption_channels": 2304,
        "attention_head_dim": 32,
    }
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
        assert (
            parameter_count(build(Architecture.model_validate(common | fields), seed=None).parameters())
            == count
        )


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


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_captions_once_and_gathered_are_captions_each_time(qk_norm: str | None) -> None:
    """Velocity and gradients: distinct captions with an index, and cached keys and values."""
    config = small(qk_norm=qk_norm)
    model = perturbed(config)
    x, captions, timestep, mask = inputs(config, 8, 12)
    index = torch.tensor([2, 0, 0, 1, 2])
    x, time = x[index] + torch.arange(5.0).view(-1, 1, 1, 1), timestep[index]

    def gradients(velocity: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(velocity.square().sum(), list(model.parameters())))

    expected = model(x, captions[index], time, encoder_attention_mask=mask[index])
    gathered = model(x, captions, time, encoder_attention_mask=mask, caption_index=index)
    assert torch.allclose(gathered, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients(gathered), gradients(expected), strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))
    with torch.no_grad():
        made = model.captions(captions, mask, index)
        assert torch.allclose(model(x, made, time), expected, atol=1e-5, rtol=1e-5)
        assert torch.allclose(model(x[1:3], made.rows(1, 3), time[1:3]), expected[1:3], atol=1e-5, rtol=1e-5)
        one = model(x, made, torch.tensor([437.5]))
        assert torch.allclose(one, model(x, made, torch.full((5,), 437.5)), atol=1e-5, rtol=1e-5)


def test_bf16_autocast_on_a_cpu_that_has_none_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    model = perturbed(config)
    x, captions, timestep, mask = inputs(config, 8, 8)
    monkeypatch.setattr("sana_cli.kernels.has_native_bf16", lambda _: False)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, captions, timestep, encoder_attention_mask=mask)
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert torch.equal(found, model(x, captions, timestep, encoder_attention_mask=mask))
    assert product.dtype == torch.bfloat16  # autocast is still on
    with torch.autocast("cpu", torch.bfloat16):  # bf16 weights compute in bf16
        kept = copy.deepcopy(model).bfloat16()(x, captions, timestep, encoder_attention_mask=mask)
    difference = (kept - found)[:2].detach()  # the third row sees padding only
    assert float(difference.norm() / found[:2].detach().norm()) < 0.05
    monkeypatch.setattr("sana_cli.kernels.has_native_bf16", lambda _: True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, captions, timestep, encoder_attention_mask=mask)
    assert not torch.equal(rounded.float(), found)


@pytest.mark.parametrize("init", ["official", "fan_in"])
def test_initial_embedders(init: str) -> None:
    weights = build(small(num_attention_heads=8, caption_channels=64), 0, init).state_dict()
    width = 8 * 16
    for name, fan_in in (("time_embed.emb.timestep_embedder.linear_1", 256), ("time_embed.linear", width)):
        expected = 0.02 if init == "official" else fan_in**-0.5
        assert float(weights[f"{name}.weight"].std()) == pytest.approx(expected, rel=0.03)
    assert weights["caption_norm.weight"].unique().tolist() == pytest.approx(
        [0.01 if init == "official" else 1.0]
    )

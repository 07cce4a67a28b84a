"""Adapters beside layers: outputs, gradients, merges and pictures are those of diffusers with peft."""

import copy
import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sanas import reference
from torch import Tensor

from sana_cli.adapters import Change, Dense, LowRank, adapted_layers, attach, layers_of, merged
from sana_cli.config.keys import Architecture, SampleConfig
from sana_cli.model import build
from sana_cli.sampling.sampler import Noise, Recipe, sample_images
from sana_cli.weights.adapters import read_adapter, shapes_of, write_adapter
from sana_cli.weights.card import ADAPTER_WEIGHTS

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv_inverted", "conv_point")
EMBEDDERS = ("linear_1", "linear_2", "linear", "proj", "proj_out")
KINDS = (*ATTENTION, *CONVOLUTIONS, *EMBEDDERS)


def small(number: int) -> Architecture:
    """One of eight small SANAs."""
    bits = [bool(number >> bit & 1) for bit in range(3)]
    return Architecture(
        in_channels=4, patch_size=2 if bits[0] else 1, sample_size=8, num_layers=1 + number % 3,
        num_attention_heads=3, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=12,
        caption_channels=16, qk_norm="rms_norm_across_heads" if bits[1] else None, attention_bias=bits[2],
        guidance_embeds=number in (3, 6),
    )  # fmt: skip


@cache
def models(number: int) -> tuple[Any, Any]:
    """Our model and diffusers' with the same weights, for `copy.deepcopy`."""
    theirs = reference(small(number)).requires_grad_(False)
    ours = build(small(number), seed=None)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.requires_grad_(False).eval(), theirs


def both(number: int) -> tuple[Any, Any]:
    ours, theirs = models(number)
    return copy.deepcopy(ours), copy.deepcopy(theirs)


def randomized(theirs: Any, seed: int, size: float = 0.1) -> None:
    """Random numbers in all of peft's parameters that begin at zero or at the weights' norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in theirs.named_parameters():
        with torch.no_grad():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))


def changes_in(theirs: Any, adapter: str = "default") -> dict[str, Change]:
    """peft's adapter as our changes; the tensors are its own."""
    found: dict[str, Change] = {}
    for name, module in theirs.named_modules():
        if adapter in getattr(module, "lora_A", {}):
            has = adapter in module.lora_magnitude_vector
            found[name] = LowRank(
                module.lora_A[adapter].weight.detach().flatten(1).clone(),
                module.lora_B[adapter].weight.detach().flatten(1).clone(),
                module.scaling[adapter],
                module.lora_magnitude_vector[adapter].weight.detach().flatten().clone() if has else None,
            )
    return found


def lora(draw: random.Random, targets: list[str], **fields: Any) -> Any:
    given = {
        "r": draw.choice([1, 2, 4, 7]),
        "lora_alpha": draw.choice([1, 3.5, 8]),
        "use_rslora": draw.random() < 0.3,
        "use_dora": draw.random() < 0.4,
        "init_lora_weights": "gaussian",
    }
    return peft.LoraConfig(target_modules=targets, **given | fields)


def inputs(config: Architecture, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, config.in_channels, 3 * config.patch_size, (2 + seed % 3) * config.patch_size)
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, config.caption_channels, generator=generator),
        "timestep": torch.tensor([3.0, 700.0]),
        "guidance": torch.tensor([0.1, 0.45]) if config.guidance_embeds else None,
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]) if seed % 4 else None,
    }


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - expected).abs().max().detach() / expected.abs().max().detach())


@dataclass
class _Largest:
    output: float = 0.0
    gradient: float = 0.0


@pytest.mark.parametrize("number", range(8))
def test_outputs_and_gradients_are_those_of_peft(number: int) -> None:
    """112 drawn adapters: rank, alpha, rsLoRA, DoRA, layers, masks, shapes of latents."""
    largest, steep = _Largest(), 0
    for seed in range(14):
        draw = random.Random(100 * number + seed)
        ours, theirs = both(number)
        theirs.add_adapter(lora(draw, draw.sample(KINDS, draw.randint(1, len(KINDS)))))
        randomized(theirs, seed)
        changes = changes_in(theirs)
        attach(ours, changes)
        given = inputs(ours.config, seed)
        found, expected = ours(**given), theirs(**given).sample
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        pairs = gradients(ours, theirs)
        assert len(pairs) >= 2 * len(changes)
        most = max(float(theirs.abs().max()) for _, theirs in pairs)
        assert most > 0
        if most > 1000:  # a denominator of linear attention is all but 0: gradients are ill-conditioned
            steep += 1
            continue
        largest.output = max(largest.output, apart(found, expected))
        for own, their in pairs:
            largest.gradient = max(largest.gradient, float((own - their).abs().max()) / most)
    print(f"model {number}: outputs {largest.output:.1e}, gradients {largest.gradient:.1e}, {steep} skipped")
    assert steep <= 2
    assert largest.output < 1e-6
    assert largest.gradient < 1e-5


def gradients(ours: Any, theirs: Any) -> list[tuple[Any, Any]]:
    """Gradients of each adapter's tensor, ours and peft's."""
    found = []
    for name, layer in adapted_layers(ours).items():
        module = theirs.get_submodule(name)
        for own, their in (
            (layer.adapters[0].lora_A, module.lora_A["default"].weight),
            (layer.adapters[0].lora_B, module.lora_B["default"].weight),
            *(
                [(layer.adapters[0].lora_magnitude_vector, module.lora_magnitude_vector["default"].weight)]
                if len(module.lora_magnitude_vector)
                else []
            ),
        ):
            found.append((own.grad, their.grad.reshape(own.shape)))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_several_adapters_at_once_are_those_of_set_adapters(seed: int) -> None:
    draw = random.Random(seed)
    ours, theirs = both(seed % 8)
    strengths = [draw.choice([-1.3, 0.5, 1.0, 1.7]) for _ in range(3)]
    for index in range(3):
        theirs.add_adapter(lora(draw, draw.sample(KINDS, 5)), adapter_name=f"a{index}")
    randomized(theirs, seed)
    for index, strength in enumerate(strengths):
        attach(ours, {name: own.scaled(strength) for name, own in changes_in(theirs, f"a{index}").items()})
    theirs.set_adapters([f"a{index}" for index in range(3)], strengths)
    given = inputs(ours.config, seed)
    with torch.no_grad():
        assert apart(ours(**given), theirs(**given).sample) < 2e-6


@pytest.mark.parametrize("dora", [False, True])
def test_a_merge_is_what_the_branches_give_and_what_peft_merges(dora: bool) -> None:
    for number in range(4):
        draw = random.Random(number)
        ours, theirs = both(number)
        for index in range(2):
            theirs.add_adapter(
                lora(draw, list(KINDS), use_dora=dora and index == 0), adapter_name=f"a{index}"
            )
        randomized(theirs, number)
        sets = [changes_in(theirs, f"a{index}") for index in range(2)]
        theirs.set_adapters(["a0", "a1"])
        given = inputs(ours.config, number)
        whole = copy.deepcopy(ours)
        for name, layer in layers_of(whole).items():
            changes = [own[name] for own in sets if name in own]
            layer.weight = torch.nn.Parameter(merged(layer.weight.flatten(1), changes).view_as(layer.weight))
        for own in sets:
            attach(ours, own)
        with torch.no_grad():
            expected = ours(**given)
            assert apart(whole(**given), expected) < 2e-6
            theirs.fuse_lora()
            assert apart(whole(**given), theirs(**given).sample) < 2e-6
            for name, layer in layers_of(whole).items():
                fused = theirs.get_submodule(name)
                fused = fused.get_base_layer() if hasattr(fused, "get_base_layer") else fused
                assert apart(layer.weight, fused.weight) < 1e-6


def test_a_dense_change_is_its_matrix() -> None:
    ours, _ = both(1)
    changes: dict[str, Change] = {
        name: Dense(0.1 * torch.randn(layer.weight.flatten(1).shape), 0.7)
        for name, layer in layers_of(ours).items()
    }
    whole = copy.deepcopy(ours)
    for name, layer in layers_of(whole).items():
        layer.weight = torch.nn.Parameter(
            merged(layer.weight.flatten(1), [changes[name]]).view_as(layer.weight)
        )
    attach(ours, changes)
    given = inputs(ours.config, 1)
    with torch.no_grad():
        assert apart(ours(**given), whole(**given)) < 1e-6


# --- pictures ---------------------------------------------------------------------------------------------------------

STEPS, GUIDANCE, SHAPE = 5, 4.5, (4, 6, 4)


def pipeline_of(theirs: Any) -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    pipeline = diffusers.SanaPipeline(None, None, vae=None, transformer=theirs, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def captions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(5, 16, generator=generator), torch.randn(3, 16, generator=generator)


def their_picture(pipeline: Any) -> Tensor:
    caption, null = captions()
    latents = Noise([3], SHAPE)()
    factor = pipeline.vae_scale_factor
    return pipeline(
        prompt=None, prompt_embeds=caption[None], prompt_attention_mask=torch.ones(1, 5),
        negative_prompt=None, negative_prompt_embeds=torch.nn.functional.pad(null, (0, 0, 0, 2))[None],
        negative_prompt_attention_mask=torch.tensor([[1.0, 1, 1, 0, 0]]),
        height=SHAPE[1] * factor, width=SHAPE[2] * factor, latents=latents,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, use_resolution_binning=False, output_type="latent",
    )[0]  # fmt: skip


def our_picture(ours: Any) -> Tensor:
    caption, null = captions()
    settings = SampleConfig(solver="dpm++", steps=STEPS, guidance_scale=GUIDANCE, flow_shift=3.0)
    *_, last = sample_images(ours, [caption], [null], [3], Recipe(settings, SHAPE, "flow_prediction", "fp32"))
    return last.images


def drawn_changes(model: Any, seed: int, dora: bool = False, mixed: bool = False) -> dict[str, Change]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Change] = {}
    for index, (name, layer) in enumerate(layers_of(model).items()):
        weight = layer.weight.detach().flatten(1)
        rank = 2 + index % 3 if mixed else 3
        norms = weight.norm(dim=1) * (1 + 0.2 * torch.randn(len(weight), generator=generator))
        found[name] = LowRank(
            torch.randn(rank, weight.shape[1], generator=generator) / rank,
            0.2 * torch.randn(len(weight), rank, generator=generator),
            0.7,
            norms if dora else None,
        )
    return found


def without_metadata(path: Path) -> Path:
    from safetensors.torch import load_file, save_file

    bare = path.with_name("bare.safetensors")
    save_file(load_file(path), bare)
    return bare


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_our_file_in_diffusers_draws_our_picture(dora: bool, mixed: bool, tmp_path: Path) -> None:
    ours, theirs = both(4)
    plain = our_picture(ours)
    changes = drawn_changes(ours, 1, dora, mixed)
    write_adapter(tmp_path / ADAPTER_WEIGHTS, changes, shapes_of(ours), {"made_by": "sana"})
    attach(ours, changes)
    expected = our_picture(ours)
    assert float((expected - plain).abs().max()) > 0.1
    for file in (tmp_path / ADAPTER_WEIGHTS, without_metadata(tmp_path / ADAPTER_WEIGHTS)):
        pipeline = pipeline_of(copy.deepcopy(theirs))
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        difference = float((their_picture(pipeline) - expected).abs().max())
        print(
            f"dora {dora}, mixed {mixed}, {file.name}: {difference:.1e} of {float(expected.abs().max()):.1f}"
        )
        assert difference < 1 / 255 / 20


@pytest.mark.parametrize("kind", ["plain", "dora", "rslora", "mixed", "dora rslora"])
def test_their_file_in_ours_draws_their_picture(kind: str, tmp_path: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    ours, theirs = both(2)
    patterns: dict[str, Any] = {"rank_pattern": {"to_k": 2, "attn1.to_q": 5, "transformer_blocks.0.ff.conv_point": 1},
                                "alpha_pattern": {"to_v": 9, "to_k": 1}}  # fmt: skip
    config = lora(
        random.Random(1), list(KINDS), r=4, lora_alpha=7, use_dora="dora" in kind, use_rslora="rslora" in kind,
        **patterns if kind == "mixed" else {},
    )  # fmt: skip
    theirs.add_adapter(config)
    randomized(theirs, 1)
    state = get_peft_model_state_dict(theirs)
    metadata = theirs.peft_config["default"].to_dict()
    diffusers.SanaPipeline.save_lora_weights(tmp_path, state, transformer_lora_adapter_metadata=metadata)
    stored = read_adapter(tmp_path, shapes_of(ours))
    assert stored.form == ("diffusers (DoRA)" if "dora" in kind else "diffusers")
    attach(ours, stored.layers)
    difference = float((our_picture(ours) - their_picture(pipeline_of(theirs))).abs().max())
    print(f"{kind}: {difference:.1e}")
    assert difference < 1 / 255 / 20


def test_two_files_with_strengths_are_those_of_set_adapters_and_of_a_fused_model(tmp_path: Path) -> None:
    ours, theirs = both(4)
    strengths = (0.6, -0.4)
    pipeline = pipeline_of(theirs)
    for index, strength in enumerate(strengths):
        folder = tmp_path / f"a{index}"
        folder.mkdir()
        changes = drawn_changes(ours, index, dora=index == 0, mixed=True)
        write_adapter(folder / ADAPTER_WEIGHTS, changes, shapes_of(ours))
        pipeline.load_lora_weights(folder, adapter_name=folder.name)
        layers = read_adapter(folder, shapes_of(ours)).layers
        attach(ours, {name: own.scaled(strength) for name, own in layers.items()})
    pipeline.set_adapters(["a0", "a1"], list(strengths))
    expected = our_picture(ours)
    assert float((their_picture(pipeline) - expected).abs().max()) < 1 / 255 / 20
    pipeline.fuse_lora(adapter_names=["a0", "a1"])
    pipeline.unload_lora_weights()
    assert float((their_picture(pipeline) - expected).abs().max()) < 1 / 255 / 20


def test_bf16_files_are_rounded_once(tmp_path: Path) -> None:
    ours, _ = both(0)
    changes = drawn_changes(ours, 1)
    write_adapter(tmp_path / "a.safetensors", changes, shapes_of(ours), dtype=torch.bfloat16)
    for name, own in read_adapter(tmp_path / "a.safetensors").layers.items():
        assert isinstance(own, LowRank)
        assert math.isclose(own.scale, 1)
        assert own.lora_A.dtype == torch.float32
        assert apart(own.delta(), changes[name].delta()) < 2**-6

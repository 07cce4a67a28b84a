"""Official files: recognised by their content, with the same output as diffusers."""

from pathlib import Path

import pytest
import torch
from helpers.sanas import PUBLISHED, extras, hollow, official, published, reference, same
from safetensors.torch import save_file

from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.config.instructions import OFFICIAL
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.sampling.pipeline import DC_AE, open_pipeline
from sana_cli.weights import checkpoint, configs
from sana_cli.weights.reader import identify, read_weights
from sana_cli.weights.stored import check_tensors


@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_recognised(name: str, with_extras: bool, tmp_path: Path) -> None:
    """At full size, from a .pth as NVlabs/Sana saves it."""
    config = published(name)
    model = build(config, seed=None)
    assert checkpoint.parameter_count(model.parameters()) == PUBLISHED[name][-1]
    state = hollow(official(model.state_dict(), config.guidance_embeds)) | (
        extras(name) if with_extras else {}
    )
    path = tmp_path / "called-anything.bin"
    torch.save({"epoch": 1, "state_dict": state}, path)
    found = read_weights(path)
    check_tensors(found.tensors, model.state_dict(), path, "the published model")
    assert found.model == config
    assert (found.origin, configs.family(found.model)) == ("official", name)
    report = inspect(InspectOptions(str(path)))
    assert report.facts["family"] == name
    assert report.facts["parameters"] == PUBLISHED[name][-1]
    assert report.facts["autoencoder"] == DC_AE
    assert report.facts["encoder"] == "Efficient-Large-Model/gemma-2-2b-it"
    assert ("also holds" in report.facts) == with_extras


@pytest.mark.parametrize(
    "kept", [(), ("pos_embed",), ("logvar_linear.weight", "logvar_linear.bias"), ("y_embedder.y_embedding",)]
)
def test_each_extra_may_be_there_or_not(kept: tuple[str, ...]) -> None:
    """diffusers' script removes them in one `try`, and fails if only some exist."""
    config = published("Sana 0.6B")
    state = official(build(config, seed=None).state_dict(), sprint=False)
    state |= {name: tensor for name, tensor in extras("Sana 0.6B").items() if name in kept}
    found = identify(state, Path("x.pth"))
    assert found.model == config
    assert set(found.left_out) == set(kept)


@pytest.mark.parametrize(
    ("side", "scale", "shift"), [(16, None, 3.0), (32, None, 3.0), (64, 1.0, 3.0), (128, 2.0, 6.0)]
)
def test_resolution_is_read_off_the_positions(
    side: int, scale: float | None, shift: float, tmp_path: Path
) -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    name = "Sana 1.6B"
    state = hollow(official(build(published(name), seed=None).state_dict(), sprint=False)) | extras(
        name, side
    )
    if scale is not None:
        table = get_2d_sincos_pos_embed(
            2240, side, base_size=side, interpolation_scale=scale, output_type="pt"
        )
        state["pos_embed"] = table[None].to(torch.bfloat16)
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    pipeline = open_pipeline(tmp_path / "x.pth")
    assert pipeline.model == published(name, sample_size=side, interpolation_scale=scale)
    if side == 32:  # the official 0.6B has another shift at this size
        small = official(build(published("Sana 0.6B"), seed=None).state_dict(), sprint=False) | extras(
            "Sana 0.6B", side
        )
        torch.save({"state_dict": hollow(small)}, tmp_path / "y.pth")
        assert open_pipeline(tmp_path / "y.pth").sample.flow_shift == 4.0
    assert (pipeline.sample.solver, pipeline.sample.flow_shift, pipeline.sample.guidance_scale) == (
        "dpm++",
        shift,
        4.5,
    )
    assert pipeline.text is not None
    assert pipeline.text.instruction == OFFICIAL


def test_other_positions_are_refused() -> None:
    state = hollow(official(build(published("Sana 1.6B"), seed=None).state_dict(), sprint=False))
    state["pos_embed"] = torch.randn(1, 16, 2240)
    with pytest.raises(SanaError, match="pos_embed is neither zeros nor sine-cosine positions"):
        identify(state, Path("x.pth"))


@pytest.mark.parametrize("name", ["Sana 0.6B", "Sana-Sprint 0.6B"])
def test_official_files_give_diffusers_numbers(name: str, tmp_path: Path) -> None:
    config = published(name, num_layers=1)
    theirs = reference(config)
    state = official(theirs.state_dict(), config.guidance_embeds) | extras(name)
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / "a.pth")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "b.safetensors")
    for file in ("a.pth", "b.safetensors"):
        ours = checkpoint.load_transformer(tmp_path / file)
        assert ours.config == config
        error = same(ours, theirs, config.guidance_embeds)
        print(f"{name}, one layer, {file}: largest error {error:.1e}")
        assert error < 1e-5
    if (
        not config.guidance_embeds
    ):  # the names agree with diffusers' converter, which knows only the first models
        from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers

        converted = convert_sana_transformer_to_diffusers(
            {key: tensor for key, tensor in state.items() if not key.startswith("logvar")}
        )
        found = identify(state, tmp_path / "a.pth").tensors
        assert found.keys() == converted.keys()
        assert all(torch.equal(found[key], converted[key]) for key in converted)


def test_wrong_tensors_are_listed(tmp_path: Path) -> None:
    state = hollow(official(build(published("Sana 0.6B"), seed=None).state_dict(), sprint=False))
    del state["blocks.3.attn.proj.weight"]
    state["blocks.4.mlp.depth_conv.conv.bias"] = torch.zeros(7)
    state["blocks.0.lora_A"] = torch.zeros(2)
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(SanaError) as caught:
        checkpoint.load_transformer(tmp_path / "x.pth")
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'x.pth'} does not fit the SANA that its shapes describe:",
        "  missing: transformer_blocks.3.attn1.to_out.0.weight (1152, 1152)",
        "  unexpected: transformer_blocks.0.lora_A (2,)",
        "  transformer_blocks.4.ff.conv_depth.bias is (7,), not (5760,)",
    ]

"""Files of other trainers and packers: the SANA inside is found."""

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sampled
from helpers.sanas import (
    AVERAGE,
    CONFIG,
    OURS,
    PIXELS,
    RAW,
    filled,
    prefixed,
    random_states,
    reference,
    refused,
    trainer_file,
    value,
)
from safetensors.torch import save_file
from torch import Tensor

from sana_cli.choices import Weights
from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.errors import SanaError
from sana_cli.weights import checkpoint, configs, pickles
from sana_cli.weights.reader import read_weights


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
@pytest.mark.parametrize("numpy_core", [b"numpy._core", b"numpy.core"])
def test_nvlabs_training_checkpoints_are_read(old: bool, numpy_core: bytes, tmp_path: Path) -> None:
    """From numpy 1 and 2. No numpy function is called, or allowed in later pickles."""
    path, allowed = (
        trainer_file(tmp_path / "epoch_1_step_10.pth", old),
        torch.serialization.get_safe_globals(),
    )
    if old:
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core", b"c" + numpy_core))
    else:
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "other", "w") as into:
            for name in source.namelist():
                into.writestr(name, source.read(name).replace(b"cnumpy._core", b"c" + numpy_core))
        path = (tmp_path / "other").rename(path)
    assert b"c" + numpy_core + b".multiarray\n_reconstruct" in path.read_bytes()
    found = read_weights(path)
    assert found.model.model_copy(update={"sample_size": 8}) == CONFIG
    assert (found.origin, value(found), found.choice) == ("official", 1.0, None)
    report = inspect(InspectOptions(str(path)))
    assert report.facts["parameters"] == sum(tensor.numel() for tensor in OURS.values())
    assert report.facts["also holds"] == "optimizer, scheduler, rng_state"
    _, keys, *_ = pickles.read_pickle(path)["rng_state"]["numpy"]
    assert not isinstance(keys, np.ndarray)
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
def test_the_average_is_taken_and_the_raw_weights_are_offered(old: bool, tmp_path: Path) -> None:
    path = trainer_file(tmp_path / "x.pth", old, state_dict_ema=AVERAGE)
    assert (
        inspect(InspectOptions(str(path))).facts["weights"]
        == "averaged (state_dict_ema); raw (state_dict) with --weights raw"
    )
    choices: list[tuple[Weights, float]] = [("ema", 2.0), ("raw", 1.0)]
    for which, number in choices:
        assert value(read_weights(path, which)) == number
        assert float(checkpoint.load_transformer(path, which).proj_out.bias.detach()[0]) == number
    assert value(read_weights(path)) == 2.0


@pytest.mark.parametrize("nothing", [None, {}, []])
def test_an_average_that_is_not_there_is_said(nothing: Any, tmp_path: Path) -> None:
    path = trainer_file(tmp_path / "x.pth", state_dict_ema=nothing)
    assert inspect(InspectOptions(str(path))).facts["weights"] == "raw (state_dict); state_dict_ema is empty"
    assert [value(read_weights(path, which)) for which in ("ema", "raw")] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("ema", "named"),
    [
        (
            {"decay": 0.9999, "shadow_params": list(AVERAGE.values())},
            "ema.shadow_params",
        ),  # diffusers' EMAModel
        ({"a.weight": torch.zeros(2)}, "ema"),
        (list(AVERAGE.values()), "ema"),
    ],
)
def test_an_average_without_names_is_said(ema: Any, named: str, tmp_path: Path) -> None:
    torch.save({"model": RAW, "ema": ema}, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")
    assert value(found) == 1.0
    assert found.choice == f"raw (model); {named} is not read: its tensors are not named as a SANA's"


EMA_PYTORCH = {
    "initted": torch.tensor(True),
    "step": torch.tensor(3),
    **prefixed("online_model.module.", RAW),
}
EMA_PYTORCH |= prefixed("ema_model.module.", AVERAGE)
LIT_EMA = {"model_ema.diffusion_model" + name.replace(".", ""): tensor for name, tensor in AVERAGE.items()}
BOTH: dict[str, tuple[Any, str, str]] = {  # content, names of the averaged and of the raw weights
    "DiT": ({"model": RAW, "ema": AVERAGE, "opt": {}, "args": argparse.Namespace(a=1)}, "ema", "model"),
    "DDP": (
        {"state_dict": prefixed("module.", RAW), "ema": prefixed("module.", AVERAGE)},
        "ema.module",
        "state_dict.module",
    ),
    "tutorial": ({"model_state_dict": RAW, "ema_state_dict": AVERAGE}, "ema_state_dict", "model_state_dict"),
    "BasicSR": ({"params": RAW, "params_ema": AVERAGE}, "params_ema", "params"),
    "rates": ({"model": RAW, "ema_0.9999": AVERAGE}, "ema_0.9999", "model"),
    "SWA": (
        {"model": RAW, "swa_model": {"n_averaged": torch.tensor(3)} | prefixed("module.", AVERAGE)},
        "swa_model.module",
        "model",
    ),
    "Lightning": (
        {
            "state_dict": prefixed("model.", RAW) | prefixed("ema_model.", AVERAGE),
            "pytorch-lightning_version": "2.5",
        },
        "state_dict.ema_model",
        "state_dict.model",
    ),
    "a callback": (
        {
            "state_dict": prefixed("net.", RAW),
            "callbacks": {"EMA": {"ema_state_dict": prefixed("net.", AVERAGE)}},
        },
        "callbacks.EMA.ema_state_dict.net",
        "state_dict.net",
    ),
    "ema_pytorch": ({"model": RAW, "ema": EMA_PYTORCH}, "ema.ema_model.module", "model"),
    "ema_pytorch alone": (EMA_PYTORCH, "ema_model.module", "online_model.module"),
    "LitEma": (
        {
            "state_dict": prefixed("model.diffusion_model.", RAW)
            | LIT_EMA
            | {"model_ema.decay": torch.tensor(0.9)}
        },
        "state_dict.model_ema",
        "state_dict.model.diffusion_model",
    ),
}


@pytest.mark.parametrize("trainer", BOTH)
def test_trainers_that_keep_both(trainer: str, tmp_path: Path) -> None:
    content, averaged, raw = BOTH[trainer]
    torch.save(content, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")
    assert value(found) == 2.0
    assert found.choice == f"averaged ({averaged}); raw ({raw}) with --weights raw"
    assert value(read_weights(tmp_path / "x.pth", "raw")) == 1.0


def test_other_averages_are_none_of_weights(tmp_path: Path) -> None:
    path = trainer_file(
        tmp_path / "x.pth",
        ema_decay=0.9999,
        average_loss={"train": 0.1},
        loss_averages=[0.1],
        schema={"a": 1},
    )
    assert read_weights(path).choice is None


def test_a_safetensors_file_may_hold_both(tmp_path: Path) -> None:
    small = reference(PIXELS).state_dict()
    (tmp_path / "config.json").write_text(json.dumps(configs.diffusers_config(PIXELS)))
    save_file(
        prefixed("model.", small) | prefixed("ema.", {n: t + 1 for n, t in small.items()}),
        tmp_path / "x.safetensors",
    )
    choices: list[tuple[Weights, int]] = [("ema", 1), ("raw", 0)]
    for which, added in choices:
        assert torch.equal(
            checkpoint.load_transformer(tmp_path / "x.safetensors", which).proj_out.bias,
            small["proj_out.bias"] + added,
        )


ALONE: dict[str, Any] = {
    "DeepSpeed": {"module": RAW, "ds_version": "0.15", "ds_config": {"a": 1}},
    "nested": {"model": {"state_dict": RAW}},
    "compiled and FSDP": {
        "model": {
            name.replace("blocks.0.",
            "blocks.0._orig_mod._checkpoint_wrapped_module.") if "blocks.0" in name else f"_fsdp_wrapped_module._orig_mod.{name}": t
            for name, t in RAW.items()
        }
    },
    "PixArt's": prefixed("base_model.", RAW),
    "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in RAW.items()},
    "with a critic": {"generator": RAW, "discriminator": AVERAGE},
    "one under two names": dict.fromkeys(("state_dict", "model"), RAW),
}  # fmt: skip


@pytest.mark.parametrize("trainer", ALONE)
def test_trainers_that_keep_one(trainer: str, tmp_path: Path) -> None:
    torch.save(ALONE[trainer], tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")
    assert (value(found), found.choice) == (1.0, None)
    assert checkpoint.load_transformer(tmp_path / "x.pth").proj_out.weight.is_leaf
    with pytest.raises(
        SanaError, match=r"x\.pth has no raw weights beside averaged ones\nleave out `weights` raw"
    ):
        checkpoint.load_transformer(tmp_path / "x.pth", "raw")


def test_an_average_alone_is_read_and_not_called_raw(tmp_path: Path) -> None:
    torch.save({"ema": AVERAGE}, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")
    assert (value(found), found.choice) == (2.0, "averaged (ema)")
    with pytest.raises(SanaError, match="has no raw weights"):
        read_weights(tmp_path / "x.pth", "raw")
    reference(PIXELS).save_pretrained(tmp_path / "folder")
    with pytest.raises(
        SanaError, match=r"has no raw weights \(training/raw\.safetensors\)\nleave out `weights` raw"
    ):
        checkpoint.load_transformer(tmp_path / "folder", "raw")


def test_what_cannot_be_told_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": RAW, "ema_0.99": AVERAGE, "ema_0.9999": filled(3)}, path)
    refused(path, "holds several SANAs", "ema_0.99, ema_0.9999", "save the one that you want alone")
    assert value(read_weights(path, "raw")) == 1.0
    for content, named in (
        (
            prefixed("exp_avg.", RAW) | prefixed("exp_avg_sq.", RAW),
            "exp_avg, exp_avg_sq",
        ),  # an optimizer's state, by parameter name
        ({"teacher": RAW}, "teacher"),
    ):
        torch.save(content, path)
        refused(path, f"holds a SANA's tensors under {named} only", "save them alone")
    torch.save({"rng_state": random_states(), "epoch": 1}, path)
    with pytest.raises(SanaError, match="holds no SANA: .*; it has rng_state, epoch"):
        read_weights(path)
    torch.save({"module": {name: torch.zeros(0) for name in RAW}, "ds_version": "1"}, path)
    refused(path, "all its tensors are empty", "zero_to_fp32.py")


def test_sampling_draws_with_the_weights_that_are_asked_for(tmp_path: Path) -> None:
    raw = {name: tensor.clone() for name, tensor in reference(PIXELS).state_dict().items()}
    average = {name: 0.5 * tensor for name, tensor in raw.items()}
    (tmp_path / "config.json").write_text(json.dumps(configs.diffusers_config(PIXELS)))
    for name, content in (
        ("both", {"model": raw, "ema": average, "args": argparse.Namespace()}),
        ("a", average),
        ("r", raw),
    ):
        torch.save(content, tmp_path / f"{name}.pth")

    def drawn(name: str, weights: str = "ema") -> Tensor:
        place = tmp_path / f"{name}.pth"
        return sampled(place, "4", encoder="tiny", weights=weights, steps=2, out=tmp_path / "o.png").pixels

    assert torch.equal(drawn("both"), drawn("a"))
    assert torch.equal(drawn("both", "raw"), drawn("r"))
    assert not torch.equal(drawn("a"), drawn("r"))


def test_the_sana_of_an_all_in_one_file_is_read(tmp_path: Path) -> None:
    rest = {
        "vae.decoder.a": torch.zeros(1),
        "text_encoders.gemma.a": torch.zeros(1),
        "text_encoders.gemma.b": torch.zeros(1),
    }
    rest["text_encoders.gemma.c"] = torch.zeros(1).to(torch.float8_e4m3fn)
    small = reference(PIXELS).state_dict()
    (tmp_path / "config.json").write_text(json.dumps(configs.diffusers_config(PIXELS)))
    save_file(prefixed("model.diffusion_model.", small) | rest, tmp_path / "x.safetensors")
    assert torch.equal(
        checkpoint.load_transformer(tmp_path / "x.safetensors").proj_out.bias, small["proj_out.bias"]
    )
    facts = inspect(InspectOptions(str(tmp_path / "x.safetensors"))).facts
    assert facts["all-in-one"] == "left out: text_encoders (3 tensors), vae (1 tensor)"
    torch.save(
        {"transformer": RAW, "vae": {"a": torch.zeros(1)}, "text_encoder": {"b": torch.zeros(1)}},
        tmp_path / "x.pth",
    )
    found = read_weights(tmp_path / "x.pth")
    assert (value(found), found.other_parts) == (1.0, ("vae (1 tensor)", "text_encoder (1 tensor)"))

"""What other people's trainers and packers save: the SANA in it is found, or the file is called what it is."""

import argparse
import collections
import datetime
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from test_formats import PIXELS, Payload, official, reference
from torch import Tensor

from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.commands.sample import SampleOptions, sample
from sana_cli.config.keys import ModelConfig
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.weights import checkpoint, configs, pickles
from sana_cli.weights.reader import read_weights
from sana_cli.weights.stored import Weights

# of a published width, which its tensors tell, and as small as that can be
CONFIG = ModelConfig(
    in_channels=4, patch_size=1, sample_size=8, num_layers=1, num_attention_heads=36, attention_head_dim=32,
    num_cross_attention_heads=16, cross_attention_head_dim=72, caption_channels=8,
)  # fmt: skip
SHAPES = official(build(CONFIG, seed=None).state_dict(), sprint=False)
OURS = build(CONFIG, seed=None).state_dict()


def filled(value: float, like: Mapping[str, Tensor] = SHAPES) -> dict[str, Tensor]:
    """One number in every place, which takes no room: it tells one set of weights from another."""
    return {name: torch.tensor(value, dtype=torch.bfloat16).expand(tensor.shape) for name, tensor in like.items()}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


RAW, AVERAGE = filled(1), filled(2)


def random_states() -> dict[str, Any]:
    """As NVlabs/Sana's `diffusion/utils/checkpoint.py` keeps them."""
    return {
        "torch": torch.get_rng_state(),
        "torch_cuda": [torch.get_rng_state()],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "generator": torch.Generator(device="cpu").manual_seed(42).get_state(),
    }


def optimizer_states() -> dict[str, Any]:
    """Of AdamW, of bitsandbytes' AdamW8bit, and of NVlabs/Sana's CAME8bit, which quantises in chunks."""
    bytes_ = torch.zeros(4, dtype=torch.uint8)
    parameter = torch.nn.Parameter(torch.ones(2))
    adamw = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    adamw.step()
    state = {
        0: {"step": 1, "state1": bytes_, "qmap1": torch.zeros(256), "absmax1": torch.zeros(1)},
        1: {"exp_avg": [{"data": bytes_, "scale": torch.tensor(1.0), "min": torch.tensor(0.0)}], "RMS": torch.tensor(0.1)},
        2: {"exp_avg_sq_row": torch.zeros(2), "exp_avg_res_col": torch.zeros(2), "lr": np.float64(1e-4)},
    }
    return {"state": state, "param_groups": [{"betas": (0.9, 0.999, 0.9999), "params": [0, 1, 2]}], "adamw": adamw.state_dict()}


def trainer_file(path: Path, old: bool = False, **more: Any) -> Path:
    """A file of `save_checkpoint_ddp`."""
    content = {
        "state_dict": RAW, "optimizer": optimizer_states(), "scheduler": {"base_lrs": [1e-4], "last_epoch": np.int64(3)},
        "epoch": 1, "step": 10, "rng_state": random_states(),
    }  # fmt: skip
    torch.save(content | more, path, _use_new_zipfile_serialization=not old)
    return path


def value(weights: Weights) -> float:
    """The number that a set was filled with."""
    numbers = {float(tensor.flatten()[0]) for tensor in weights.tensors.values()}
    assert len(numbers) == 1
    return numbers.pop()


def refused(path: Path, *parts: str) -> str:
    """The one message for a file or folder, from wherever it is met; it has these parts, and says what to do."""
    told = set()
    for act in (lambda: checkpoint.load_transformer(path), lambda: inspect(InspectOptions(str(path)))):
        with pytest.raises(SanaError) as caught:
            act()
        told.add(str(caught.value))
    assert len(told) == 1, told
    message = told.pop()
    assert all(part in message for part in (str(path), *parts)), message
    assert len(message.splitlines()) > 1, message
    return message


# --- training checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
@pytest.mark.parametrize("numpy_core", [b"numpy._core", b"numpy.core"])
def test_nvlabs_training_checkpoints_are_read(old: bool, numpy_core: bytes, tmp_path: Path) -> None:
    """Of either numpy; and none of numpy's functions is called, nor allowed to others afterwards."""
    path, allowed = trainer_file(tmp_path / "epoch_1_step_10.pth", old), torch.serialization.get_safe_globals()
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
    assert inspect(InspectOptions(str(path))).facts["weights"] == "averaged (state_dict_ema); raw (state_dict) with --weights raw"
    for which, number in (("ema", 2.0), ("raw", 1.0)):
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
        ({"decay": 0.9999, "shadow_params": list(AVERAGE.values())}, "ema.shadow_params"),  # diffusers' EMAModel
        ({"a.weight": torch.zeros(2)}, "ema"),
        (list(AVERAGE.values()), "ema"),
    ],
)
def test_an_average_without_names_is_said(ema: Any, named: str, tmp_path: Path) -> None:
    torch.save({"model": RAW, "ema": ema}, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")
    assert value(found) == 1.0
    assert found.choice == f"raw (model); {named} is not read: its tensors are not named as a SANA's"


EMA_PYTORCH = {"initted": torch.tensor(True), "step": torch.tensor(3), **prefixed("online_model.module.", RAW)}
EMA_PYTORCH |= prefixed("ema_model.module.", AVERAGE)
LIT_EMA = {"model_ema.diffusion_model" + name.replace(".", ""): tensor for name, tensor in AVERAGE.items()}
BOTH: dict[str, tuple[Any, str, str]] = {  # content, what the average and the raw weights are called
    "DiT": ({"model": RAW, "ema": AVERAGE, "opt": {}, "args": argparse.Namespace(a=1)}, "ema", "model"),
    "DDP": ({"state_dict": prefixed("module.", RAW), "ema": prefixed("module.", AVERAGE)}, "ema.module", "state_dict.module"),
    "tutorial": ({"model_state_dict": RAW, "ema_state_dict": AVERAGE}, "ema_state_dict", "model_state_dict"),
    "BasicSR": ({"params": RAW, "params_ema": AVERAGE}, "params_ema", "params"),
    "rates": ({"model": RAW, "ema_0.9999": AVERAGE}, "ema_0.9999", "model"),
    "SWA": (
        {"model": RAW, "swa_model": {"n_averaged": torch.tensor(3)} | prefixed("module.", AVERAGE)},
        "swa_model.module",
        "model",
    ),
    "Lightning": (
        {"state_dict": prefixed("model.", RAW) | prefixed("ema_model.", AVERAGE), "pytorch-lightning_version": "2.5"},
        "state_dict.ema_model",
        "state_dict.model",
    ),
    "a callback": (
        {"state_dict": prefixed("net.", RAW), "callbacks": {"EMA": {"ema_state_dict": prefixed("net.", AVERAGE)}}},
        "callbacks.EMA.ema_state_dict.net",
        "state_dict.net",
    ),
    "ema_pytorch": ({"model": RAW, "ema": EMA_PYTORCH}, "ema.ema_model.module", "model"),
    "ema_pytorch alone": (EMA_PYTORCH, "ema_model.module", "online_model.module"),
    "LitEma": (
        {"state_dict": prefixed("model.diffusion_model.", RAW) | LIT_EMA | {"model_ema.decay": torch.tensor(0.9)}},
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
    path = trainer_file(tmp_path / "x.pth", ema_decay=0.9999, average_loss={"train": 0.1}, loss_averages=[0.1], schema={"a": 1})
    assert read_weights(path).choice is None


def test_a_safetensors_file_may_hold_both(tmp_path: Path) -> None:
    small = reference(PIXELS).state_dict()
    (tmp_path / "config.json").write_text(json.dumps(configs.diffusers_config(PIXELS)))
    save_file(prefixed("model.", small) | prefixed("ema.", {n: t + 1 for n, t in small.items()}), tmp_path / "x.safetensors")
    for which, added in (("ema", 1), ("raw", 0)):
        assert torch.equal(
            checkpoint.load_transformer(tmp_path / "x.safetensors", which).proj_out.bias, small["proj_out.bias"] + added
        )


ALONE: dict[str, Any] = {
    "DeepSpeed": {"module": RAW, "ds_version": "0.15", "ds_config": {"a": 1}},
    "nested": {"model": {"state_dict": RAW}},
    "compiled and FSDP": {
        "model": {
            name.replace("blocks.0.", "blocks.0._orig_mod._checkpoint_wrapped_module.") if "blocks.0" in name else f"_fsdp_wrapped_module._orig_mod.{name}": t
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
    with pytest.raises(SanaError, match=r"x\.pth has no raw weights beside averaged ones\nleave out --weights raw"):
        checkpoint.load_transformer(tmp_path / "x.pth", "raw")


def test_an_average_alone_is_read_and_not_called_raw(tmp_path: Path) -> None:
    torch.save({"ema": AVERAGE}, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")
    assert (value(found), found.choice) == (2.0, "averaged (ema)")
    with pytest.raises(SanaError, match="has no raw weights"):
        read_weights(tmp_path / "x.pth", "raw")
    reference(PIXELS).save_pretrained(tmp_path / "folder")
    with pytest.raises(SanaError, match=r"has no raw weights \(training/raw\.safetensors\)\nleave out --weights raw"):
        checkpoint.load_transformer(tmp_path / "folder", "raw")


def test_what_cannot_be_told_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": RAW, "ema_0.99": AVERAGE, "ema_0.9999": filled(3)}, path)
    refused(path, "holds several SANAs", "ema_0.99, ema_0.9999", "save the one that you want alone")
    assert value(read_weights(path, "raw")) == 1.0
    for content, named in (
        (prefixed("exp_avg.", RAW) | prefixed("exp_avg_sq.", RAW), "exp_avg, exp_avg_sq"),  # an optimizer's state by name
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
    for name, content in (("both", {"model": raw, "ema": average, "args": argparse.Namespace()}), ("a", average), ("r", raw)):
        torch.save(content, tmp_path / f"{name}.pth")

    def drawn(name: str, weights: str = "ema") -> Tensor:
        options = SampleOptions(
            ("4",), tmp_path / f"{name}.pth", encoder="tiny", device="cpu", weights=weights, steps=2, out=tmp_path / "o.png"
        )
        *_, last = sample(options)
        return last.pixels

    assert torch.equal(drawn("both"), drawn("a"))
    assert torch.equal(drawn("both", "raw"), drawn("r"))
    assert not torch.equal(drawn("a"), drawn("r"))


# --- what may stand beside weights ------------------------------------------------------------------------------------


def test_settings_paths_and_times_beside_weights_are_passed_over(tmp_path: Path) -> None:
    beside = [
        argparse.Namespace(lr=1.0, out=pathlib.Path("x")), pathlib.PurePosixPath("a/b"), datetime.datetime(2025, 1, 1),
        datetime.timedelta(1), datetime.UTC, collections.defaultdict(list, {"loss": [1.0]}), collections.deque([1], maxlen=3),
        collections.OrderedDict(a=1), collections.Counter("aa"), np.float32(1), np.bool_(True), np.arange(3), np.array(["a"]),
        np.array([1, "a"], dtype=object), np.dtype("f4"), np.float32, np.random.RandomState(0), np.random.default_rng(0),
        random.Random(0), torch.Generator(), torch.__version__, torch.float16, torch.device("cpu"), torch.Size([1]), range(3),
        frozenset([1]), slice(1), b"\xff", b"", bytearray(b"a"), 2**70, None, complex(1, 2), float, ...,
    ]  # fmt: skip
    for old in (False, True):
        torch.save({"state_dict": RAW, "args": beside}, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
        assert value(read_weights(tmp_path / "x.pth")) == 1.0


def pickled(path: Path, name: str) -> Path:
    """A checkpoint of PyTorch's old form with {"x": name()} in it, whose state is then set; written by hand."""
    module, _, function = name.rpartition(".")
    call = b"\x80\x02}X\x01\x00\x00\x00xc" + f"{module}\n{function}\n".encode() + b")R}bs."
    start = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + call + pickle.dumps([], 2))
    return path


def test_each_stand_in_stands_in(tmp_path: Path) -> None:
    """Nothing of the package that a name belongs to comes of it: an object that keeps nothing, or an empty dictionary."""
    for stand_in, name in pickles._STAND_INS:
        if stand_in is pickles._AsList:
            continue
        made = pickles.read_pickle(pickled(tmp_path / "x.pth", name))["x"]
        assert type(made) is (pickles._Unread if stand_in is pickles._Unread else collections.OrderedDict), name
        assert not getattr(made, "__dict__", {}), name


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__",
        "builtins.open", "importlib.import_module", "functools.partial", "operator.attrgetter", "runpy.run_path", "torch.load",
        "torch.hub.load", "torch.nn.Linear", "numpy.load", "numpy.fromfile", "numpy.ctypeslib.load_library", "pathlib.os.system",
        "shutil.rmtree", "webbrowser.open", "copyreg.__newobj__", "types.FunctionType", "types.CodeType", "collections.namedtuple",
        "random.SystemRandom", "datetime.sys", "numpy.core.multiarray.fromfile", "numpy.ndarray.tofile", "argparse.FileType",
    ],
)  # fmt: skip
def test_all_other_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SanaError, match=rf"is refused: .* holds {name.removeprefix('builtins.')}.*none of it was run"):
        read_weights(pickled(tmp_path / "x.pth", name))


def test_a_pickle_called_safetensors_is_a_pickle(tmp_path: Path) -> None:
    """PyTorch goes by the name of a path."""
    path = trainer_file(tmp_path / "x.safetensors", state_dict_ema=AVERAGE)
    assert value(read_weights(path)) == 2.0
    refused(trainer_file(path, more=Payload(tmp_path / "it-ran")), "is refused: beside weights it holds posix.system")
    assert not (tmp_path / "it-ran").exists()


def test_a_payload_among_random_states_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    states = random_states() | {"more": collections.defaultdict(list, {"a": [Payload(proof)]})}
    for old in (False, True):
        path = trainer_file(tmp_path / "x.pth", old, state_dict_ema=AVERAGE, rng_state=states)
        refused(path, "is refused: beside weights it holds posix.system", "none of it was run")
    array = np.empty(1, dtype=object)
    array[0] = Payload(proof)
    refused(trainer_file(tmp_path / "x.pth", rng_state=array), "is refused: beside weights it holds posix.system")
    assert not proof.exists()


class Ordered:
    """Pickled as an ordered dictionary with attributes that stand in front of its methods."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        attributes = dict.fromkeys(("items", "get", "keys", "values", "__iter__", "__len__"), "not a method")
        return collections.OrderedDict, (), attributes, None, iter(self.content.items())


def test_attributes_that_a_file_sets_are_not_used(tmp_path: Path) -> None:
    torch.save(Ordered({"state_dict": Ordered(RAW), "epoch": 1}), tmp_path / "x.pth")
    assert torch.load(tmp_path / "x.pth", weights_only=True).items == "not a method"
    assert value(read_weights(tmp_path / "x.pth")) == 1.0


def test_a_dictionary_that_holds_itself_ends(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"x": torch.zeros(1)}
    inner["self"] = inner
    torch.save({"model": {str(i): inner for i in range(300)}, "all": [inner] * 300}, tmp_path / "x.pth")
    with pytest.raises(SanaError, match="holds no SANA"):
        read_weights(tmp_path / "x.pth")


# --- all-in-one files -------------------------------------------------------------------------------------------------


def test_the_sana_of_an_all_in_one_file_is_read(tmp_path: Path) -> None:
    rest = {"vae.decoder.a": torch.zeros(1), "text_encoders.gemma.a": torch.zeros(1), "text_encoders.gemma.b": torch.zeros(1)}
    rest["text_encoders.gemma.c"] = torch.zeros(1).to(torch.float8_e4m3fn)
    small = reference(PIXELS).state_dict()
    (tmp_path / "config.json").write_text(json.dumps(configs.diffusers_config(PIXELS)))
    save_file(prefixed("model.diffusion_model.", small) | rest, tmp_path / "x.safetensors")
    assert torch.equal(checkpoint.load_transformer(tmp_path / "x.safetensors").proj_out.bias, small["proj_out.bias"])
    facts = inspect(InspectOptions(str(tmp_path / "x.safetensors"))).facts
    assert facts["all-in-one"] == "left out: text_encoders (3 tensors), vae (1 tensor)"
    torch.save({"transformer": RAW, "vae": {"a": torch.zeros(1)}, "text_encoder": {"b": torch.zeros(1)}}, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")
    assert (value(found), found.other_parts) == (1.0, ("vae (1 tensor)", "text_encoder (1 tensor)"))


def named(*names: str, prefix: str = "") -> bytes:
    """A safetensors file of small tensors with these names."""
    return save({prefix + name: torch.zeros(1) for name in names})


def image_of(name: str, *shape: int, others: tuple[str, ...]) -> bytes:
    return save({name: torch.zeros(shape)} | {other: torch.zeros(1) for other in others})


SDXL = ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.output_blocks.0.0.in_layers.0.weight")
OTHER_MODELS: dict[str, tuple[bytes, str]] = {
    "FLUX": (named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "is FLUX or a relative of it, not a SANA"),
    "FLUX of diffusers": (named("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"), "is FLUX"),
    "SD3": (
        image_of("x_embedder.proj.weight", 1536, 16, 2, 2, others=("joint_blocks.0.context_block.attn.qkv.weight",)),
        "is Stable Diffusion 3, not a SANA",
    ),
    "PixArt": (
        image_of("x_embedder.proj.weight", 1152, 4, 2, 2, others=("blocks.0.cross_attn.q_linear.weight", "blocks.0.mlp.fc1.weight")),
        "is PixArt, not a SANA",
    ),
    "DiT": (
        image_of(
            "x_embedder.proj.weight", 1152, 4, 2, 2,
            others=("blocks.0.adaLN_modulation.1.weight", "y_embedder.embedding_table.weight"),
        ),
        "is DiT or SiT, not a SANA",
    ),
    "U-Net": (named("down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"), "is a U-Net"),
    "SDXL": (
        named(*SDXL, "conditioner.embedders.0.a", "first_stage_model.decoder.conv_in.weight"),
        "is an all-in-one file of a U-Net",
    ),
    "all-in-one SD3": (
        image_of(
            "model.diffusion_model.x_embedder.proj.weight", 1536, 16, 2, 2,
            others=("model.diffusion_model.joint_blocks.0.context_block.a", "text_encoders.a", "first_stage_model.b"),
        ),
        "is an all-in-one file of Stable Diffusion 3",
    ),
    "all-in-one": (named("model.diffusion_model.a", "vae.b"), "is an all-in-one file of another model"),
    "VAE": (named("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"), "is an autoencoder"),
    "DC-AE": (named("decoder.project_in.main.conv.weight", "decoder.stages.0.op_list.0.main.conv.weight"), "is an autoencoder"),
    "Gemma": (named("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"), "is a language model"),
    "T5": (named("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "is a text encoder (T5)"),
    "CLIP": (named("text_model.encoder.layers.0.self_attn.q_proj.weight"), "is a text encoder (CLIP)"),
    "videos": (
        image_of("x_embedder.proj.weight", 2, 16, 1, 2, 2, others=("blocks.0.mlp.inverted_conv.conv.weight",)),
        "is a model of videos",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_other_models_are_called_what_they_are(kind: str, tmp_path: Path) -> None:
    content, message = OTHER_MODELS[kind]
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path / "model.safetensors", message)


def test_another_vision_model_is_no_sana(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    path.write_bytes(image_of("patch_embed.proj.weight", 768, 3, 16, 16, others=("blocks.0.attn.qkv.weight",)))
    with pytest.raises(SanaError, match=r"holds no SANA: its tensors are called blocks\.0"):
        read_weights(path)


# --- adapters and quantised weights -----------------------------------------------------------------------------------

BLOCK = "transformer_blocks.0.attn1.to_q"
FLAT = BLOCK.replace(".", "_")
ADAPTERS = {
    "diffusers": (f"transformer.{BLOCK}.lora_A.weight", "transformer.transformer_blocks.0.ff.conv_inverted.lora_B.weight"),
    "diffusers of 2023": (f"transformer.{BLOCK}.lora.down.weight", f"transformer.{BLOCK}.lora.up.weight"),
    "attention processors": (f"{BLOCK}.processor.to_q_lora.down.weight",),
    "peft": (f"base_model.model.{BLOCK}.lora_A.weight", f"base_model.model.{BLOCK}.lora_B.weight"),
    "kohya": (f"lora_unet_{FLAT}.lora_down.weight", f"lora_unet_{FLAT}.alpha"),
    "kohya's transformer": (f"lora_transformer_{FLAT}.lora_up.weight", f"lora_transformer_{FLAT}.alpha"),
    "full differences": (f"lycoris_{FLAT}.diff",),
    "LoKr": (f"lycoris_{FLAT}.lokr_w1", f"lycoris_{FLAT}.alpha"),
    "LoHa": (f"lora_unet_{FLAT}.hada_w1_a",),
    "DoRA": (f"transformer.{BLOCK}.lora_A.weight", f"transformer.{BLOCK}.lora_magnitude_vector"),
    "ComfyUI": (f"diffusion_model.{BLOCK}.lora_down.weight", f"diffusion_model.{BLOCK}.dora_scale"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("zipped", [False, True])
def test_an_adapter_is_no_model(kind: str, zipped: bool, tmp_path: Path) -> None:
    path, tensors = tmp_path / "adapter", {name: torch.zeros(2, 2) for name in ADAPTERS[kind]}
    torch.save(tensors, path) if zipped else save_file(tensors, path)
    refused(
        path,
        "is a LoRA",
        f"({kind})" if kind in ("LoKr", "LoHa", "DoRA") else "",
        "changes to a model",
        "merge it into its model",
    )


def test_a_model_with_an_adapter_that_is_not_merged(tmp_path: Path) -> None:
    state = {f"base_model.model.{name.replace('attn.qkv.', 'attn.qkv.base_layer.')}": tensor for name, tensor in RAW.items()}
    torch.save(state | {"base_model.model.blocks.0.attn.qkv.lora_A.default.weight": torch.zeros(2, 2)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "holds a model with a LoRA that is not merged", "merge_and_unload")


def packed(dtype: torch.dtype, *names: str) -> dict[str, Tensor]:
    """A SANA one of whose weights is of this type, with these names beside it."""
    odd = {"blocks.0.attn.qkv.weight": torch.zeros(8, 1, dtype=torch.uint8).to(dtype)}
    return filled(1) | odd | {f"blocks.0.attn.qkv.{name}": torch.zeros(1) for name in names}


PACKED = {
    "bitsandbytes, 4 bits": packed(torch.uint8, "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
    "bitsandbytes, 8 bits": packed(torch.int8, "SCB"),
    "SVDQuant": {f"{BLOCK}.{name}": torch.zeros(1) for name in ("qweight", "wscales", "lora_down", "lora_up", "smooth")},
    "GPTQ or AWQ": {f"{BLOCK}.{name}": torch.zeros(1) for name in ("qweight", "qzeros", "scales")},
    "fp8 with scales": packed(torch.float8_e4m3fn, "scale_weight"),
    "float8_e4m3fn": packed(torch.float8_e4m3fn),
    "float8_e5m2": packed(torch.float8_e5m2),
    "int8": packed(torch.int8),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("zipped", [False, True])
def test_quantised_weights_are_refused(kind: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if zipped:
        torch.save(PACKED[kind], path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in PACKED[kind].items()}, path)
    refused(path, kind, "quantised", "get the same model in bf16, fp16 or fp32")


def test_types_that_pytorch_has_not_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    refused(tmp_path / "x.safetensors", "is quantised: it has tensors of F6_E2M3")


# --- other formats ----------------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 3210000000\n" % (b"0" * 64)
MODEL = save({name: tensor.contiguous() for name, tensor in reference(PIXELS).state_dict().items()})


def bytes_of(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zip_of(*names: str) -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in names:
                archive.writestr(name, "x")

    return bytes_of(write)


def tar_of(name: str) -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo(name))

    return bytes_of(write)


ZIPPED = bytes_of(lambda buffer: torch.save(RAW, buffer))
UNZIPPED = bytes_of(lambda buffer: torch.save(RAW, buffer, _use_new_zipfile_serialization=False))
FORMATS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "LFS pointer": (POINTER, ("is a Git LFS pointer, not the file itself (3,210,000,000 bytes)", "git lfs pull")),
    "GGUF": (b"GGUF\x03\0\0\0{" + bytes(50), ("is GGUF, quantised weights for llama.cpp and ComfyUI", "get the safetensors")),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(50), ("is ONNX",)),
    "Flax": (b"\x82\xa6params\x81\xa6kernel\xc0", ("is MessagePack, as Flax saves",)),
    "Flax, many": (b"\xde\x00\x20\xa6params\x81\xa6kernel\xc0", ("is MessagePack, as Flax saves",)),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), ("is HDF5",)),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3" + bytes(50), ("is TensorFlow's",)),
    "TensorFlow": (b"\x08\x01\x12\x9a\x03" + bytes(50), ("is TensorFlow's",)),
    "OpenVINO": (b'<?xml version="1.0"?>\n<net name="Model0" version="11">', ("is OpenVINO's",)),
    "TorchScript": (zip_of("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"), ("is TorchScript", "state_dict()")),
    "torch.export": (zip_of("m/archive_format", "m/models/model.json"), ("is a program of torch.export", "state_dict()")),
    "numpy's archive": (zip_of("a.npy", "b.npy"), ("is numpy's (npz)",)),
    "numpy's array": (bytes_of(lambda buffer: np.save(buffer, np.zeros(2))), ("is an array of numpy's",)),
    "zip": (zip_of("model.safetensors", "README.md"), ("is a zip archive (model.safetensors, README.md)", "unpack it")),
    "tar": (tar_of("model.pth"), ("is a tar archive", "unpack it")),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), ("is compressed (gzip)", "unpack it")),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), ("is compressed (zstd)", "unpack it")),
    "web page": (b"\xef\xbb\xbf\n<!DOCTYPE HTML>\n<html>", ("is a web page (HTML)", "/resolve/")),
    "a server's error": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", ("is the error message of a server",)),
    "list of shards": (
        b'{\n "metadata": {},\n "weight_map": {"a": "b"}}',
        ("is the list of a model's shards", "name the folder"),
    ),
    "config": (b'{\n "_class_name": "SanaTransformer2DModel"}', ("describes a model", "name its folder")),
    "empty": (b"", ("is empty (0 bytes)", "download or copy it again")),
    "zeros": (bytes(10_000), ("begins with zeros", "download or copy it again")),
    "text": (
        b"Entry not found",
        ("neither safetensors nor a checkpoint of PyTorch's: it is text that begins 'Entry not found'",),
    ),
    "a refusal": (b'{"error":{"message":"gated"}}', ('it is text that begins \'{"error"',)),
    "few bytes": (b"\x00\x01\x02", ("has 3 bytes, too few",)),
    "half": (MODEL[: len(MODEL) // 2], (f"it should have {len(MODEL):,} bytes or more, and has {len(MODEL) // 2:,}",)),
    "half a header": (MODEL[:100], ("is damaged or missing its end", "download or copy it again")),
    "half a zip": (ZIPPED[: len(ZIPPED) // 2], ("is damaged or cut short", "download or copy it again")),
    "half an old one": (UNZIPPED[: len(UNZIPPED) // 2], ("is damaged or cut short", "download or copy it again")),
    "noise": (bytes(range(9, 250)), ("neither safetensors nor a checkpoint of PyTorch's",)),
    "a tensor": (bytes_of(lambda buffer: torch.save(torch.zeros(2), buffer)), ("holds no dictionary of weights",)),
    "a later pickle": (
        bytes_of(lambda buffer: torch.save(RAW, buffer, pickle_protocol=4)),
        ("its pickle has parts that are not read", "pickle_protocol=2"),
    ),
}
SHOWN_BY_CONTENT = set(FORMATS) - {
    "empty",
    "zeros",
    "text",
    "a refusal",
    "few bytes",
    "half",
    "half a header",
    "half an old one",
    "noise",
}


@pytest.mark.parametrize("kind", FORMATS)
def test_other_formats_are_called_what_they_are(kind: str, tmp_path: Path) -> None:
    """By a suffix of weights always, and by any suffix or none where the beginning tells."""
    content, parts = FORMATS[kind]
    for name in ("x.safetensors", "x.pth", "x.gguf", *(("x", "x.yaml", "x.json", "x.onnx") if kind in SHOWN_BY_CONTENT else ())):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, *parts)


def test_a_config_is_still_a_config(tmp_path: Path) -> None:
    """Though its ninth character is that of a safetensors header."""
    (tmp_path / "mine.yaml").write_text("sample: {steps: 3}\n")
    assert inspect(InspectOptions(str(tmp_path / "mine.yaml"))).kind == "config"


def test_a_download_of_aria2_that_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(MODEL)
    (tmp_path / "x.safetensors.aria2").write_bytes(b"\0\1")
    refused(tmp_path / "x.safetensors", "its download was not finished")


def test_a_link_to_nothing_and_a_pipe_are_said(tmp_path: Path) -> None:
    (tmp_path / "latest.pth").symlink_to("/nowhere/epoch_1.pth")
    refused(tmp_path / "latest.pth", "is a link to /nowhere/epoch_1.pth, which is not there")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(SanaError, match="is not a file on a disk"):
        inspect(InspectOptions(str(tmp_path / "pipe.pth")))


# --- folders ----------------------------------------------------------------------------------------------------------


def folder_of(place: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


FOLDERS: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    "LoRA of diffusers": ({"pytorch_lora_weights.safetensors": b"x"}, ("is a LoRA", "merge it into its model")),
    "LoRA of peft": ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, ("is a LoRA",)),
    "FSDP": ({".metadata": b"x", "__0_0.distcp": b"x"}, ("holds the pieces of a checkpoint", "dcp_to_torch")),
    "FSDP of accelerate": (
        {"pytorch_model_fsdp_0/__0_0.distcp": b"x"},
        ("pytorch_model_fsdp_0 holds the pieces", "dcp_to_torch"),
    ),
    "DeepSpeed": ({"zero_to_fp32.py": b"x", "global_step5/mp_rank_00_model_states.pt": b"x"}, ("DeepSpeed", "zero_to_fp32.py")),
    "DeepSpeed's files": ({"zero_pp_rank_0_mp_rank_00_model_states.pt": b"x"}, ("DeepSpeed", "zero_to_fp32.py")),
    "SDXL": (
        {"model_index.json": b'{"_class_name": "StableDiffusionXLPipeline"}', "unet/config.json": b"{}"},
        ("is a StableDiffusionXLPipeline, not a SanaPipeline",),
    ),
    "half a pipeline": (
        {"model_index.json": b'{"_class_name": "SanaPipeline"}'},
        ("is a SanaPipeline whose transformer/ is missing",),
    ),
    "LFS index": ({"model_index.json": POINTER}, ("model_index.json is a Git LFS pointer", "git lfs pull")),
    "LFS weights": ({"a.pth": POINTER, "b.pth": POINTER}, ("a.pth is a Git LFS pointer", "git lfs pull")),
    "TensorFlow": ({"saved_model.pb": b"\x08\x01\x12"}, ("is TensorFlow's",)),
    "NVlabs/Sana on the hub": ({"checkpoints/Sana_600M.pth": ZIPPED}, ("name one of them", "checkpoints/Sana_600M.pth")),
    "NVlabs/Sana under FSDP": (
        {"metadata.pth": ZIPPED, "model/pytorch_model_fsdp.bin": ZIPPED, "model/optimizer.bin": ZIPPED},
        ("name one of them", "model/pytorch_model_fsdp.bin"),
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_other_folders_are_called_what_they_are(kind: str, tmp_path: Path) -> None:
    content, parts = FOLDERS[kind]
    message = refused(folder_of(tmp_path / "x", content), *parts)
    assert "optimizer.bin" not in message
    assert "metadata.pth" not in message


def saved(place: Path, **options: Any) -> Path:
    """A diffusers pipeline's folder with a small transformer."""
    reference(PIXELS).save_pretrained(place / "transformer", **options)
    return place


@pytest.mark.parametrize(
    "name",
    ["config.json", configs.WEIGHTS, f"{configs.WEIGHTS}.index.json", "diffusion_pytorch_model-00002-of-00009.safetensors"],
)
def test_a_pointer_inside_a_folder_is_named(name: str, tmp_path: Path) -> None:
    saved(tmp_path, **({"max_shard_size": "20KB"} if "0000" in name or "index" in name else {}))
    assert (tmp_path / "transformer" / name).is_file()
    (tmp_path / "transformer" / name).write_bytes(POINTER)
    refused(tmp_path, f"{name} is a Git LFS pointer, not the file itself", "git lfs pull")


def test_other_things_in_a_transformers_folder(tmp_path: Path) -> None:
    whole = saved(tmp_path / "x")
    config = json.loads((whole / "transformer" / "config.json").read_text())
    (whole / "transformer" / configs.WEIGHTS).rename(tmp_path / "kept")
    (whole / "transformer" / "sana.gguf").write_bytes(b"GGUF" + bytes(20))
    refused(whole, f"has no {configs.WEIGHTS}", "sana.gguf is GGUF")
    (whole / "transformer" / "sana.gguf").unlink()
    shutil.copy(tmp_path / "kept", whole / "transformer" / configs.WEIGHTS)
    for change, message in (
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "its weights are quantised"),
        ({"_class_name": "PixArtTransformer2DModel"}, "is a PixArtTransformer2DModel, not a SanaTransformer2DModel"),
    ):
        (whole / "transformer" / "config.json").write_text(json.dumps(config | change))
        refused(whole, message)
    gemma = folder_of(tmp_path / "gemma", {"config.json": b'{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}'})
    refused(gemma, "is a Gemma2ForCausalLM, not a SanaTransformer2DModel")


def test_an_average_in_a_folder_beside_is_said(tmp_path: Path) -> None:
    place = saved(tmp_path)
    assert "weights" not in inspect(InspectOptions(str(place))).facts
    shutil.copytree(place / "transformer", place / "transformer_ema")
    assert "transformer_ema/ beside it" in inspect(InspectOptions(str(place))).facts["weights"]
    assert inspect(InspectOptions(str(place / "transformer_ema"))).kind == "transformer"


def test_a_dataset_is_not_told_to_be_weights(tmp_path: Path) -> None:
    """Its shards are safetensors as well."""
    place = folder_of(tmp_path / "data", {"index.json": b"{}", "images-00000.safetensors": MODEL})
    with pytest.raises(SanaError, match="it has neither checkpoints/ nor transformer/"):
        checkpoint.load_transformer(place)

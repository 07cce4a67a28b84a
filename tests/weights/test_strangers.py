"""Files and folders without a SANA: the message says what they are."""

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sanas import (
    PIXELS,
    RAW,
    filled,
    reference,
    refused,
)
from safetensors.torch import save, save_file
from torch import Tensor

from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.errors import SanaError
from sana_cli.weights import checkpoint, configs
from sana_cli.weights.reader import read_weights

# --- all-in-one files ---------------------------------------------------------------------------------------


def named(*names: str, prefix: str = "") -> bytes:
    """Write a safetensors file of small tensors with these names."""
    return save({prefix + name: torch.zeros(1) for name in names})


def image_of(name: str, *shape: int, others: tuple[str, ...]) -> bytes:
    return save({name: torch.zeros(shape)} | {other: torch.zeros(1) for other in others})


SDXL = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.output_blocks.0.0.in_layers.0.weight",
)
OTHER_MODELS: dict[str, tuple[bytes, str]] = {
    "FLUX": (named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
    "is FLUX or a relative of it, not a SANA"),
    "FLUX of diffusers": (named("transformer_blocks.0.attn.to_q.weight",
    "single_transformer_blocks.0.attn.to_q.weight"), "is FLUX"),
    "SD3": (
        image_of("x_embedder.proj.weight", 1536, 16, 2, 2,
        others=("joint_blocks.0.context_block.attn.qkv.weight",)),
        "is Stable Diffusion 3, not a SANA",
    ),
    "PixArt": (
        image_of("x_embedder.proj.weight", 1152, 4, 2, 2, others=("blocks.0.cross_attn.q_linear.weight",
        "blocks.0.mlp.fc1.weight")),
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
            others=("model.diffusion_model.joint_blocks.0.context_block.a", "text_encoders.a",
            "first_stage_model.b"),
        ),
        "is an all-in-one file of Stable Diffusion 3",
    ),
    "all-in-one": (named("model.diffusion_model.a", "vae.b"), "is an all-in-one file of another model"),
    "VAE": (named("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"),
    "is an autoencoder"),
    "DC-AE": (named("decoder.project_in.main.conv.weight", "decoder.stages.0.op_list.0.main.conv.weight"),
    "is an autoencoder"),
    "Gemma": (named("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
    "is a language model"),
    "T5": (named("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"),
    "is a text encoder (T5)"),
    "CLIP": (named("text_model.encoder.layers.0.self_attn.q_proj.weight"), "is a text encoder (CLIP)"),
    "videos": (
        image_of("x_embedder.proj.weight", 2, 16, 1, 2, 2, others=("blocks.0.mlp.inverted_conv.conv.weight",
        )),
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
    path.write_bytes(
        image_of("patch_embed.proj.weight", 768, 3, 16, 16, others=("blocks.0.attn.qkv.weight",))
    )
    with pytest.raises(SanaError, match=r"holds no SANA: its tensors are called blocks\.0"):
        read_weights(path)


# --- adapters and quantised weights -------------------------------------------------------------------------


BLOCK = "transformer_blocks.0.attn1.to_q"
FLAT = BLOCK.replace(".", "_")
ADAPTERS = {
    "diffusers": (
        f"transformer.{BLOCK}.lora_A.weight",
        "transformer.transformer_blocks.0.ff.conv_inverted.lora_B.weight",
    ),
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


def no_model(path: Path, *parts: str) -> None:
    """An adapter given as a model: `sana inspect` describes it, and nothing else takes it."""
    with pytest.raises(SanaError) as caught:
        checkpoint.load_transformer(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("zipped", [False, True])
def test_an_adapter_is_no_model(kind: str, zipped: bool, tmp_path: Path) -> None:
    path, tensors = tmp_path / "adapter", {name: torch.zeros(2, 2) for name in ADAPTERS[kind]}
    torch.save(tensors, path) if zipped else save_file(tensors, path)
    no_model(
        path,
        "is a LoRA",
        f"({kind})" if kind in ("LoKr", "LoHa", "DoRA") else "",
        "changes to a model",
        f"sana sample --checkpoint BASE --adapter {path}",
    )


def test_a_model_with_an_adapter_that_is_not_merged(tmp_path: Path) -> None:
    state = {
        f"base_model.model.{name.replace('attn.qkv.', 'attn.qkv.base_layer.')}": tensor
        for name, tensor in RAW.items()
    }
    torch.save(
        state | {"base_model.model.blocks.0.attn.qkv.lora_A.default.weight": torch.zeros(2, 2)},
        tmp_path / "x.pth",
    )
    refused(tmp_path / "x.pth", "holds a model with a LoRA that is not merged", "merge_and_unload")


def packed(dtype: torch.dtype, *names: str) -> dict[str, Tensor]:
    """A SANA in which one weight has this type, with these extra names."""
    odd = {"blocks.0.attn.qkv.weight": torch.zeros(8, 1, dtype=torch.uint8).to(dtype)}
    return filled(1) | odd | {f"blocks.0.attn.qkv.{name}": torch.zeros(1) for name in names}


PACKED = {
    "bitsandbytes, 4 bits": packed(
        torch.uint8, "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"
    ),
    "bitsandbytes, 8 bits": packed(torch.int8, "SCB"),
    "SVDQuant": {
        f"{BLOCK}.{name}": torch.zeros(1) for name in ("qweight", "wscales", "lora_down", "lora_up", "smooth")
    },
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


# --- other formats ------------------------------------------------------------------------------------------


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
    "LFS pointer": (
        POINTER,
        ("is a Git LFS pointer, not the file itself (3,210,000,000 bytes)", "git lfs pull"),
    ),
    "GGUF": (
        b"GGUF\x03\0\0\0{" + bytes(50),
        ("is GGUF, quantised weights for llama.cpp and ComfyUI", "get the safetensors"),
    ),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(50), ("is ONNX",)),
    "Flax": (b"\x82\xa6params\x81\xa6kernel\xc0", ("is MessagePack, as Flax saves",)),
    "Flax, many": (b"\xde\x00\x20\xa6params\x81\xa6kernel\xc0", ("is MessagePack, as Flax saves",)),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), ("is HDF5",)),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3" + bytes(50), ("is TensorFlow's",)),
    "TensorFlow": (b"\x08\x01\x12\x9a\x03" + bytes(50), ("is TensorFlow's",)),
    "OpenVINO": (b'<?xml version="1.0"?>\n<net name="Model0" version="11">', ("is OpenVINO's",)),
    "TorchScript": (
        zip_of("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"),
        ("is TorchScript", "state_dict()"),
    ),
    "torch.export": (
        zip_of("m/archive_format", "m/models/model.json"),
        ("is a program of torch.export", "state_dict()"),
    ),
    "numpy's archive": (zip_of("a.npy", "b.npy"), ("is numpy's (npz)",)),
    "numpy's array": (bytes_of(lambda buffer: np.save(buffer, np.zeros(2))), ("is an array of numpy's",)),
    "zip": (
        zip_of("model.safetensors", "README.md"),
        ("is a zip archive (model.safetensors, README.md)", "unpack it"),
    ),
    "tar": (tar_of("model.pth"), ("is a tar archive", "unpack it")),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), ("is compressed (gzip)", "unpack it")),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), ("is compressed (zstd)", "unpack it")),
    "web page": (b"\xef\xbb\xbf\n<!DOCTYPE HTML>\n<html>", ("is a web page (HTML)", "/resolve/")),
    "a server's error": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        ("is the error message of a server",),
    ),
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
    "half": (
        MODEL[: len(MODEL) // 2],
        (f"it should have {len(MODEL):,} bytes or more, and has {len(MODEL) // 2:,}",),
    ),
    "half a header": (MODEL[:100], ("is damaged or missing its end", "download or copy it again")),
    "half a zip": (ZIPPED[: len(ZIPPED) // 2], ("is damaged or cut short", "download or copy it again")),
    "half an old one": (
        UNZIPPED[: len(UNZIPPED) // 2],
        ("is damaged or cut short", "download or copy it again"),
    ),
    "noise": (bytes(range(9, 250)), ("neither safetensors nor a checkpoint of PyTorch's",)),
    "a tensor": (
        bytes_of(lambda buffer: torch.save(torch.zeros(2), buffer)),
        ("holds no dictionary of weights",),
    ),
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
    """By a suffix of weights, otherwise by the first bytes."""
    content, parts = FORMATS[kind]
    for name in (
        "x.safetensors",
        "x.pth",
        "x.gguf",
        *(("x", "x.yaml", "x.json", "x.onnx") if kind in SHOWN_BY_CONTENT else ()),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, *parts)


def test_a_config_is_still_a_config(tmp_path: Path) -> None:
    """Although its ninth character is that of a safetensors header."""
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


# --- folders ------------------------------------------------------------------------------------------------


def folder_of(place: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


FOLDERS: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    "FSDP": ({".metadata": b"x", "__0_0.distcp": b"x"}, ("holds the pieces of a checkpoint", "dcp_to_torch")),
    "FSDP of accelerate": (
        {"pytorch_model_fsdp_0/__0_0.distcp": b"x"},
        ("pytorch_model_fsdp_0 holds the pieces", "dcp_to_torch"),
    ),
    "DeepSpeed": (
        {"zero_to_fp32.py": b"x", "global_step5/mp_rank_00_model_states.pt": b"x"},
        ("DeepSpeed", "zero_to_fp32.py"),
    ),
    "DeepSpeed's files": (
        {"zero_pp_rank_0_mp_rank_00_model_states.pt": b"x"},
        ("DeepSpeed", "zero_to_fp32.py"),
    ),
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
    "NVlabs/Sana on the hub": (
        {"checkpoints/Sana_600M.pth": ZIPPED},
        ("name one of them", "checkpoints/Sana_600M.pth"),
    ),
    "NVlabs/Sana under FSDP": (
        {"metadata.pth": ZIPPED, "model/pytorch_model_fsdp.bin": ZIPPED, "model/optimizer.bin": ZIPPED},
        ("name one of them", "model/pytorch_model_fsdp.bin"),
    ),
}


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_a_folder_of_an_adapter_is_no_model(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", {name: b"x"})
    no_model(folder, "is a LoRA", f"sana sample --checkpoint BASE --adapter {folder}")


@pytest.mark.parametrize("kind", FOLDERS)
def test_other_folders_are_called_what_they_are(kind: str, tmp_path: Path) -> None:
    content, parts = FOLDERS[kind]
    message = refused(folder_of(tmp_path / "x", content), *parts)
    assert "optimizer.bin" not in message
    assert "metadata.pth" not in message


def saved(place: Path, **options: Any) -> Path:
    """The folder of a diffusers pipeline with a small transformer."""
    reference(PIXELS).save_pretrained(place / "transformer", **options)
    return place


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        configs.WEIGHTS,
        f"{configs.WEIGHTS}.index.json",
        "diffusion_pytorch_model-00002-of-00009.safetensors",
    ],
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
        (
            {"_class_name": "PixArtTransformer2DModel"},
            "is a PixArtTransformer2DModel, not a SanaTransformer2DModel",
        ),
    ):
        (whole / "transformer" / "config.json").write_text(json.dumps(config | change))
        refused(whole, message)
    gemma = folder_of(
        tmp_path / "gemma",
        {"config.json": b'{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}'},
    )
    refused(gemma, "is a Gemma2ForCausalLM, not a SanaTransformer2DModel")


def test_an_average_in_a_folder_beside_is_said(tmp_path: Path) -> None:
    place = saved(tmp_path)
    assert "weights" not in inspect(InspectOptions(str(place))).facts
    shutil.copytree(place / "transformer", place / "transformer_ema")
    assert "transformer_ema/ beside it" in inspect(InspectOptions(str(place))).facts["weights"]
    assert inspect(InspectOptions(str(place / "transformer_ema"))).kind == "transformer"


def test_a_dataset_is_not_told_to_be_weights(tmp_path: Path) -> None:
    """Its shards are safetensors files too."""
    place = folder_of(tmp_path / "data", {"index.json": b"{}", "images-00000.safetensors": MODEL})
    with pytest.raises(SanaError, match="it has neither checkpoints/ nor transformer/"):
        checkpoint.load_transformer(place)

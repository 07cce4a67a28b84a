"""Say what a file, a folder or a set of tensors is instead of a SANA, and what to do about it.

Functions return the lines of a message, or None if there is nothing to say. This module reads
the beginnings of files and the names in them, never weights. It does not know what a SANA looks
like: `inside.py` does.
"""

import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sana_cli.errors import SanaError, one_line
from sana_cli.runtime import files

UNMERGED = ".base_layer."  # in peft's names of weights under an adapter
PARTS = (  # whole models that are packed with a transformer
    "vae", "first_stage_model", "autoencoder", "text_encoder", "text_encoder_2", "text_encoder_3",
    "text_encoders", "cond_stage_model", "conditioner",
)  # fmt: skip
PLAIN_COPY = "get the same model in bf16, fp16 or fp32"

SUFFIXES = (  # of files that hold weights of any kind
    ".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".gguf", ".onnx", ".msgpack",
    ".h5", ".hdf5", ".keras", ".pb", ".tflite", ".npz",
)  # fmt: skip
_BEGINNING = 4096  # bytes that are read
# the first bytes that torch.save wrote before it wrote zip files
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_AGAIN = "download or copy it again"
_SAFETENSORS = "get its weights as safetensors or as a .pth"
SANAS = "sana reads Sana, Sana 1.5 and Sana-Sprint, in diffusers' format or NVlabs/Sana's"
_UNPACK = "unpack it, and name the file of weights in it"
_FIRST_BYTES = (  # first bytes, what the file is, what to do
    (b"GGUF", "GGUF, quantised weights for llama.cpp and ComfyUI, which are not read", "get the safetensors"),
    (b"\x89HDF\r\n\x1a\n", "HDF5, as Keras and TensorFlow save weights, which is not read", _SAFETENSORS),
    (b"\x93NUMPY", "an array of numpy's, not weights by name", _SAFETENSORS),
    (b"\x1f\x8b", "compressed (gzip)", _UNPACK),
    (b"BZh", "compressed (bzip2)", _UNPACK),
    (b"\xfd7zXZ\0", "compressed (xz)", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7z)", _UNPACK),
    (b"Rar!\x1a\x07", "an archive (rar)", _UNPACK),
)


SHOWN = 100  # characters of a name in a message


def some(names: Sequence[str]) -> str:
    """The first four of a file's names, for a message."""
    return one_line(", ".join(name[:SHOWN] for name in names[:4])) + (", ..." if len(names) > 4 else "")


def read_beginning(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        SanaError: it cannot be read, or is a pipe or a device.
    """
    if path.exists() and not path.is_file():
        raise SanaError(f"{path} is not a file on a disk", "name a file or a folder")
    try:
        with path.open("rb") as file:
            return file.read(_BEGINNING)
    except OSError as error:
        raise SanaError(*(broken_link(path) or (f"{path} cannot be read: {error.strerror}",))) from error


def broken_link(path: Path) -> tuple[str, str] | None:
    """The message for a link to nothing, such as a trainer's `latest.pth` after a move."""
    if not path.is_symlink() or path.exists():
        return None
    return (
        f"{path} is a link to {path.readlink()}, which is not there",
        "name the file or folder that it should lead to",
    )


def other_file(path: Path) -> tuple[str, ...] | None:
    """The message for a file of a format that is not read: what it is, and what to do.

    None: the file is missing, weights of PyTorch or safetensors, or unknown text.
    """
    try:
        beginning = read_beginning(path)
    except SanaError:
        return None
    if pointer := lfs_pointer(path, beginning):
        return pointer
    if path.with_name(path.name + ".aria2").exists():  # unfinished: of full size, with holes of zeros
        return (
            f"{path} is not whole: {path.name}.aria2 beside it says that its download was not finished",
            _AGAIN,
        )
    for first, what, todo in _FIRST_BYTES:
        if beginning.startswith(first):
            return f"{path} is {what}", todo
    if page := _page(path, beginning.lstrip(b"\xef\xbb\xbf \t\r\n")):
        return page
    if beginning[257:262] == b"ustar":
        return f"{path} is a tar archive", _UNPACK
    if beginning[:1] == b"\x08" and beginning[2:3] in (b"\x12", b":", b"B") and 3 <= beginning[1] <= 32:
        return f"{path} is ONNX, a program with its weights, which is not read", _SAFETENSORS
    if _MESSAGE_PACK.match(beginning):
        return f"{path} is MessagePack, as Flax saves weights, which is not read", _SAFETENSORS
    tensorflow = re.search(r"\.data-\d{5}-of-\d{5}$|\.ckpt[^/]*\.index$|\.pb$", path.name)
    if tensorflow or beginning[4:8] == b"TFL3" or beginning[:3] == b"\x08\x01\x12":
        return f"{path} is TensorFlow's, which is not read", _SAFETENSORS
    if beginning.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _archive(path)
    if path.suffix == ".bin" and path.with_suffix(".xml").is_file() and beginning[:1] not in (b"\x80", b"P"):
        return f"{path} is OpenVINO's, which is not read", _SAFETENSORS
    return None


# a dictionary (of few items, or of a 16- or 32-bit number of them) whose first key is a word
_MESSAGE_PACK = re.compile(
    rb"(?:[\x81-\x8f]|[\xde\xdf]..(?:..)?)(?:[\xa1-\xbf]|\xd9.)[A-Za-z_]{2}", re.DOTALL
)


def lfs_pointer(path: Path, beginning: bytes) -> tuple[str, str] | None:
    """The message for a Git LFS pointer."""
    if not files.is_lfs_pointer(beginning):
        return None
    size = re.search(rb"^size (\d{1,18})\s*$", beginning, re.MULTILINE)
    of_size = f" ({int(size[1]):,} bytes)" if size else ""
    return f"{path} is a Git LFS pointer, not the file itself{of_size}", "fetch it with: git lfs pull"


def _page(path: Path, text: bytes) -> tuple[str, str] | None:
    """The message for markup or JSON, by its first bytes."""
    if text[:15].lower().startswith((b"<!doctype html", b"<html")):
        return (
            f"{path} is a web page (HTML), not weights",
            "download the file itself: on Hugging Face, the link with /resolve/ in it",
        )
    if text.startswith(b"<?xml") and b"<net " in text:
        return f"{path} is OpenVINO's, which is not read", _SAFETENSORS
    if text.startswith(b"<?xml") and b"<Error>" in text:
        return f"{path} is the error message of a server, not weights", _AGAIN
    if text.startswith(b"{") and b'"weight_map"' in text:
        return f"{path} is the list of a model's shards", f"name the folder that they lie in: {path.parent}"
    if text.startswith(b"{") and b'"_class_name"' in text:
        return (
            f"{path} describes a model or a pipeline and holds no weights",
            f"name its folder: {path.parent}",
        )
    return None


def _archive(path: Path) -> tuple[str, str] | None:
    """The message for a zip file that is no PyTorch checkpoint. None: it is one, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # damaged: `pickles.py` has a better message
        return None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        program = "TorchScript"
    elif inner & {"archive_format", "models/model.json", "serialized_exported_program.json"}:
        program = "a program of torch.export"
    elif "data.pkl" in inner:
        return None
    elif names and all(name.endswith(".npy") for name in names):
        return f"{path} is numpy's (npz), which is not read", _SAFETENSORS
    else:
        return f"{path} is a zip archive ({some(names) or 'empty'})", _UNPACK
    return (
        f"{path} is {program}: code with its weights, which is not run",
        "save its weights alone where it was made: torch.save(model.state_dict(), FILE)",
    )


def no_weights(path: Path, beginning: bytes) -> tuple[str, str] | None:
    """The message for a file that should be weights, but is empty, unfinished or text."""
    if not beginning:
        return f"{path} is empty (0 bytes)", _AGAIN
    if not any(beginning):
        return f"{path} begins with zeros, as a download or a copy does that was not finished", _AGAIN
    text = beginning.decode("utf-8", errors="replace")
    if re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text) or text.count("\ufffd") > 1:
        few = len(beginning) < 9
        return (f"{path} has {len(beginning)} bytes, too few for weights", _AGAIN) if few else None
    shown = one_line(text.strip().partition("\n")[0].strip()[:60])
    return (
        f"{path} is neither safetensors nor a checkpoint of PyTorch's: it is text that begins '{shown}'",
        "name the file of weights, or download it again",
    )


def other_folder(folder: Path) -> tuple[str, ...] | None:
    """The message for a folder without a transformer or a config.json, if its kind is known."""
    try:
        folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        paths = [path for inner in folders[:100] for path in sorted(inner.iterdir())]
    except OSError:
        return None
    if pieces := _pieces(folder, paths):
        return pieces
    if _first(paths, r"saved_model\.pb"):
        return f"{folder} is TensorFlow's, which is not read", _SAFETENSORS
    if (folder / "model_index.json").is_file():
        try:
            kind = str(read_json(folder / "model_index.json").get("_class_name"))
        except SanaError as error:
            return tuple(str(error).splitlines())
        if kind.startswith("Sana"):
            return f"{folder} is a {one_line(kind)} whose transformer/ is missing", "get that folder as well"
        return f"{folder} is a {one_line(kind)}, not a SanaPipeline", SANAS
    if (folder / "index.json").exists():  # a dataset of ours
        return None
    candidates = [path for path in paths if _WEIGHTS.fullmatch(path.name)]
    messages = [other_file(path) for path in candidates]
    if weights := [str(path) for path, message in zip(candidates, messages, strict=True) if message is None]:
        return (
            f"{folder} has no config.json and no transformer/ in it, but files of weights",
            f"name one of them: {', '.join(weights[:3])}{', ...' if len(weights) > 3 else ''}",
        )
    return messages[0] if messages else None


_WEIGHTS = re.compile(
    r"(?!\.|optimizer|scheduler|random_state|rng|scaler|training_args|metadata)"
    r".*\.(safetensors|sft|pth|pt|ckpt|bin|gguf)"
)


def _first(paths: Iterable[Path], pattern: str) -> Path | None:
    return next((path for path in paths if re.fullmatch(pattern, path.name)), None)


def _pieces(folder: Path, paths: Sequence[Path]) -> tuple[str, ...] | None:
    """The message for an adapter, or for a checkpoint in pieces of several processes."""
    adapters = r"adapter_config\.json|(adapter_model|pytorch_lora_weights)\.(safetensors|bin)"
    deepspeed = r"zero_to_fp32\.py|(zero_pp_rank_\d+_)?mp_rank_\d+_.*states\.pt|global_step\d+"
    if adapter := _first(paths, adapters):
        return _adapter("LoRA", adapter.parent)
    if piece := _first(paths, r".*\.distcp"):
        pieces = piece.parent
        return (
            f"{pieces} holds the pieces of a checkpoint (.distcp, of FSDP or torch.distributed), "
            "not whole weights",
            f"join them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {pieces} WHOLE.pth",
        )
    if piece := _first(paths, deepspeed):
        return (
            f"{folder} is a checkpoint of DeepSpeed's, whose weights lie in pieces",
            "join them with the zero_to_fp32.py that DeepSpeed put beside them: "
            f"python zero_to_fp32.py {piece.parent} WHOLE",
            "where the optimizer alone is in pieces (ZeRO-1 and 2), name its mp_rank_00_model_states.pt",
        )
    return None


def _adapter(kind: str, path: Path) -> tuple[str, str]:
    """The message for an adapter given as a model."""
    return (
        f"{path} is a {kind}: changes to a model, without the model",
        "give its base as the checkpoint and it as an adapter: "
        f"sana sample --checkpoint BASE --adapter {path}",
    )


# Names are searched as one text, a name a line. A text with all parts of a row is of its kind.
_PACKED = (
    ("bitsandbytes, 4 bits", (".quant_state.bitsandbytes__",)),
    ("bitsandbytes, 4 bits", (".absmax\n", ".quant_map\n")),
    ("bitsandbytes, 8 bits", (".SCB\n",)),
    ("SVDQuant, for Nunchaku", (".qweight\n", ".wscales\n")),
    ("GPTQ or AWQ", (".qweight\n", ".qzeros\n")),
    ("packed integers", (".qweight\n",)),
    ("fp8 with scales", (".scale_weight\n",)),
    ("fp8 with scales", ("\nscaled_fp8\n",)),
    ("fp8 with scales", (".weight_scale\n",)),
    ("fp8 with scales", (".weight_scale_inv\n",)),
    ("ComfyUI's mixed precision", (".comfy_quant\n",)),
    ("quanto", (".weight._data\n", ".weight._scale\n")),
    ("HQQ", (".W_q\n",)),
)
_ADAPTERS = (  # what it is, part of a name
    ("LoRA (LoKr)", ".lokr_w"),
    ("LoRA (LoHa)", ".hada_w"),
    ("LoRA (OFT)", ".oft_"),
    ("LoRA (DoRA)", ".lora_magnitude_vector"),
    ("LoRA (DoRA)", ".dora_scale\n"),
    ("LoRA", ".lora_A."),  # peft, diffusers
    ("LoRA", ".lora_B."),
    ("LoRA", ".lora_down."),  # kohya
    ("LoRA", ".lora_up."),
    ("LoRA", "\nlora_unet_"),
    ("LoRA", "\nlora_transformer_"),
    ("LoRA", "\nlycoris_"),
    ("LoRA", ".lora.down."),  # diffusers of 2023
    ("LoRA", ".lora.up."),
    ("LoRA", "_lora.down."),
    ("LoRA", ".lora_linear_layer."),
)
_MODELS = (  # transformers first: a file may hold their encoders too
    ("FLUX or a relative of it", ("double_blocks.0.img_attn.",)),
    ("Qwen-Image", ("transformer_blocks.0.img_mod.",)),
    ("Stable Diffusion 3", ("joint_blocks.0.context_block.",)),
    ("FLUX or a relative of it", ("single_transformer_blocks.0.",)),
    ("Stable Diffusion 3", ("transformer_blocks.0.attn.add_q_proj.", "pos_embed.proj.")),
    ("Lumina or Z-Image", ("noise_refiner.0.", "context_refiner.0.")),
    ("Wan or another model of videos", ("blocks.0.self_attn.q.", "patch_embedding.")),
    ("PixArt", ("blocks.0.cross_attn.q_linear.", "blocks.0.mlp.fc1.")),
    ("PixArt", ("adaln_single.linear.", "pos_embed.proj.")),
    ("DiT or SiT", ("blocks.0.adaLN_modulation.1.", "y_embedder.embedding_table.")),
    ("a ControlNet", ("controlnet_cond_embedding.",)),
    ("a ControlNet", ("controlnet_blocks.0.",)),
    ("a U-Net, as of Stable Diffusion 1, 2 and XL", ("input_blocks.0.0.", "output_blocks.0.0.")),
    ("a U-Net, as of Stable Diffusion 1, 2 and XL", ("down_blocks.0.resnets.0.", "time_embedding.linear_1.")),
)
_HELPERS = (  # what it is, the setting that takes one, parts of its names
    ("an autoencoder (DC-AE)", "autoencoder", ("decoder.stages.0.", "decoder.project_in.")),
    ("an autoencoder (VAE or DC-AE)", "autoencoder", ("decoder.conv_in.", "decoder.conv_out.")),
    ("a text encoder (T5)", "encoder", ("encoder.block.0.layer.0.SelfAttention.",)),
    ("a text encoder (CLIP)", "encoder", ("text_model.encoder.layers.0.",)),
    ("a language model", "encoder", ("embed_tokens.", "layers.0.self_attn.q_proj.")),
)


def adapter_kind(names: str) -> str | None:
    """What kind of adapter has tensors of these names, a line each; None: no known one."""
    return next((kind for kind, mark in _ADAPTERS if mark in names), None)


def refuse_packed(names: Iterable[str], path: Path) -> None:
    """Refuse quantised weights, by the names of their tensors.

    Raises:
        SanaError: names the kind.
    """
    text = "\n".join(("", *names, ""))
    for kind, marks in _PACKED:
        if all(mark in text for mark in marks):
            raise SanaError(f"{path} is quantised ({kind}), which is not read", PLAIN_COPY)


def refuse_other_model(names: Iterable[str], path: Path) -> None:
    """Refuse known adapters, other transformers, and models that a transformer needs.

    Raises:
        SanaError: says what it is.
    """
    text = "\n".join(("", *names, ""))
    if UNMERGED in text:
        raise SanaError(
            f"{path} holds a model with a LoRA that is not merged into it",
            "merge it where it was made, with peft's merge_and_unload, and save it again",
        )
    if kind := adapter_kind(text):
        raise SanaError(*_adapter(kind, path))
    packed = "diffusion_model." in text and any(f"\n{part}." in text for part in PARTS)
    of = "an all-in-one file of " if packed else ""
    for kind, marks in _MODELS:
        if all(mark in text for mark in marks):
            raise SanaError(f"{path} is {of}{kind}, not a SANA", SANAS)
    if packed:
        raise SanaError(f"{path} is an all-in-one file of another model, not of a SANA", SANAS)
    for kind, setting, marks in _HELPERS:
        if all(mark in text for mark in marks):
            raise SanaError(
                f"{path} is {kind}, without a transformer",
                f"name a transformer, and give this one's folder in its library's format with `{setting}`",
            )


def read_json(path: Path) -> dict[str, Any]:
    """`files.read_json`, with its own message for a Git LFS pointer.

    Raises:
        SanaError: it is a pointer, or cannot be read.
    """
    if path.is_file() and (other := lfs_pointer(path, read_beginning(path))):
        raise SanaError(*other)
    return files.read_json(path)

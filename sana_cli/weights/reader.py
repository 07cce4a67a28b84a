"""Read a transformer's weights from any file or folder, in diffusers' form and with its config.

    diffusers    a folder with config.json (weights whole, sharded or a variant such as fp16),
                 or one of its files
    official     NVlabs/Sana .pth or .safetensors: Sana, Sana 1.5, Sana-Sprint
    lesson       the lesson's diffusion-N.pt

Trainers save more beside the weights: an average, an optimizer, random state, other models.
`inside.py` finds the SANA among these, `official.py` and `lesson.py` convert its names, and
`stored.py` has the result. For a file without a SANA, `strangers.py` says what it is instead.

Keys, shapes and recorded settings decide what a file is, never its name. This module knows
neither runs (`checkpoint.py`) nor encoders and autoencoders (`sampling/pipeline.py`).
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sana_cli.choices import Weights
from sana_cli.errors import SanaError, one_line
from sana_cli.model import build
from sana_cli.runtime import files
from sana_cli.weights import pickles, strangers
from sana_cli.weights.configs import ORIGIN, WEIGHTS, model_config, read_model_config
from sana_cli.weights.inside import (
    FEED_FORWARD,
    FIRST_LAYERS,
    choose_set,
    is_usual,
    look_into,
    no_raw_error,
    no_sana_error,
    not_a_sana,
    shown,
    tensor_names,
)
from sana_cli.weights.lesson import convert_lesson, is_lesson
from sana_cli.weights.official import convert_official
from sana_cli.weights.stored import StoredWeights, check_tensors, infer_config, plain_tensors


def read_weights(path: Path, which: Weights = "ema") -> StoredWeights:
    """Read the transformer in a diffusers folder (that with config.json) or in a single file.

    A pickled file (.pth, .pt, .bin) is opened only if `path` names it, and only for tensors and
    plain values.

    Args:
        path: the folder or the file.
        which: "ema" for the averaged weights, if a file has both kinds; "raw" for the others.
            A file with one set of weights has no raw ones.

    Raises:
        SanaError: nothing is there, it is damaged, it is no SANA, or its config asks for
            something that is not implemented. Or tensors are missing, unexpected or of another
            shape; the message names them.
    """
    if path.is_dir():
        if which == "raw":
            raise no_raw_error(path)
        if not (path / "config.json").exists() and (other := strangers.other_folder(path)):
            raise SanaError(*other)
        (model, predicted), tensors = read_model_config(path), plain_tensors(_read_folder(path), path)
        config = str(path / "config.json")
        is_official = files.read_json(path / "config.json").get(ORIGIN) == "official"
        origin = "official" if is_official else "diffusers"
        found = StoredWeights(origin, path, model, tensors, config, prediction_type=predicted)
    else:
        found = _read_file(path, which)
    check_tensors(found.tensors, build(found.model, seed=None).state_dict(), path, found.compared_to)
    return found


def identify(
    tensors: Mapping[str, Tensor], path: Path, recorded: Mapping[str, Any] | None = None
) -> StoredWeights:
    """Identify one set of tensors, and give it in diffusers' names with its config.

    Args:
        tensors: on any device. On `meta` too, if only names and shapes matter.
        path: the file that they come from.
        recorded: the model config that the file itself records, if it does.

    Raises:
        SanaError: they are no SANA's, or their shapes leave a size open; says what was found.
    """
    for first in FIRST_LAYERS:
        if first in tensors and tensors[first].ndim == 5:
            raise SanaError(
                f"{path} is a model of videos, such as SANA-Video, not a SANA of images", strangers.SANAS
            )
    if "x_embedder.proj.weight" in tensors:
        return convert_official(tensors, path)
    if not any(name.startswith("transformer_blocks.") for name in tensors):
        raise SanaError(not_a_sana(tensors, path))
    if recorded is not None:
        model, predicted = model_config(recorded, path)
        source = "the model that it records"
        return StoredWeights("diffusers", path, model, tensors, source, prediction_type=predicted)
    beside = path.parent / "config.json"
    try:
        content = files.read_json(beside)
    except SanaError:  # there is none, or it is something else
        content = {}
    if content.get("_class_name") == "SanaTransformer2DModel":
        model, predicted = model_config(content, beside)
        return StoredWeights("diffusers", path, model, tensors, str(beside), prediction_type=predicted)
    model = infer_config(tensors, path)
    return StoredWeights("diffusers", path, model, tensors, "the SANA that its shapes describe")


# --- files ------------------------------------------------------------------------------------


def _read_file(path: Path, which: Weights) -> StoredWeights:
    """Read the SANA in a file, alone or among whatever a trainer or a packer put beside it."""
    beginning = strangers.read_beginning(path)
    if other := strangers.other_file(path) or strangers.no_weights(path, beginning):
        raise SanaError(*other)
    recorded = None
    if files.is_safetensors(path):
        content: dict[Any, Any] = {**read_safetensors(path)}
        recorded = _recorded_config(path)
    else:
        content = pickles.read_pickle(path)
        if is_lesson(content):
            if which == "raw":
                raise no_raw_error(path)
            return convert_lesson(content, path)
    inside = look_into(content)
    usual = [keys for keys in inside.sets if is_usual(keys)]
    if not usual:
        raise no_sana_error(content, inside, path)
    chosen, choice = choose_set(usual, inside.unread_average(usual), which, path)
    named = inside.sets[chosen]
    like_sana = any(name.endswith(FEED_FORWARD) for name in named)
    if not like_sana or any(strangers.UNMERGED in name for name in named):
        strangers.refuse_other_model(tensor_names(content), path)
    tensors = plain_tensors(named, path)
    if not any(tensor.numel() for tensor in tensors.values()):
        raise SanaError(
            f"{path}: all its tensors are empty, as where DeepSpeed (ZeRO-3) "
            "keeps the weights in other files",
            "join them with the zero_to_fp32.py that lies beside it: python zero_to_fp32.py . WHOLE",
        )
    found = identify(tensors, path, recorded)
    rest = {part: _counted(part, count) for part, count in inside.rest.items()}
    left_out = (
        *found.left_out,
        *(text for part, text in rest.items() if part not in strangers.PARTS),
        *(shown(keys) for keys in inside.sets if keys not in usual),
        *(shown((key,)) for key in inside.others),
    )
    models = tuple(text for part, text in rest.items() if part in strangers.PARTS)
    return replace(found, choice=choice, other_parts=models, left_out=left_out)


def _counted(part: str, tensors: int) -> str:
    return f"{one_line(part[: strangers.SHOWN])} ({tensors:,} tensor{'s' if tensors > 1 else ''})"


def _recorded_config(path: Path) -> dict[str, Any] | None:
    """The model config in the metadata of a safetensors file, as ours have it."""
    try:
        recorded = json.loads(files.read_metadata(path)["model"])
    except (KeyError, ValueError, RecursionError):
        return None
    return recorded if isinstance(recorded, dict) else None


_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, after checking its beginning and its header.

    Raises:
        SanaError: it is something else, cut short, quantised, missing or damaged.
    """
    if path.is_file():
        beginning = strangers.read_beginning(path)
        if other := strangers.other_file(path) or strangers.no_weights(path, beginning):
            raise SanaError(*other)
        if beginning[8:9] == b"{":
            _check_header(path, int.from_bytes(beginning[:8], "little"))
    return files.read_tensors(path)


def _check_header(path: Path, length: int) -> None:
    """Refuse a file that is shorter than its header says, or has types that PyTorch lacks.

    Raises:
        SanaError: it is cut short or quantised. An unreadable header is left to the library.
    """
    size, end = path.stat().st_size, 8 + length  # bytes
    dtypes: set[str] = set()
    if end <= size and length <= _LONGEST_HEADER:
        unreadable = (OSError, ValueError, RecursionError, TypeError, LookupError, AttributeError)
        with suppress(*unreadable), path.open("rb") as file:
            header = json.loads(file.read(end)[8:])
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            dtypes = {str(entry["dtype"]) for entry in entries}
            end += max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    if end > size:
        raise SanaError(
            f"{path} is damaged or missing its end: it should have {end:,} bytes or more, and has {size:,}",
            "download or copy it again",
        )
    if packed := next((dtype for dtype in sorted(dtypes) if dtype.startswith("F6_")), None):
        raise SanaError(
            f"{path} is quantised: it has tensors of {one_line(packed)}, which are not read",
            strangers.PLAIN_COPY,
        )


# --- folders ----------------------------------------------------------------------------------


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """Read a diffusers folder: a file or shards, plain or, without plain ones, of a variant."""
    for name in (WEIGHTS, f"{WEIGHTS}.index.json", *_variants(folder)):
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return read_safetensors(path)
        shards = strangers.read_json(path).get("weight_map")
        names = list(dict.fromkeys(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not names or any(
            Path(shard).name != shard or not shard.endswith(".safetensors") for shard in names
        ):
            raise SanaError(f"{path} does not list the shards beside it")
        return {key: tensor for shard in names for key, tensor in read_safetensors(folder / shard).items()}
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise SanaError(
            f"{folder} has pickled weights only ({pickled[0]}), which are not opened unasked",
            f"name that file: {folder / pickled[0]}",
        )
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".json"):
        if other := strangers.other_file(path):
            raise SanaError(f"{folder} has no {WEIGHTS}", *other)
    raise SanaError(f"{folder} has no {WEIGHTS}, whole, sharded or of a variant")


def _variants(folder: Path) -> list[str]:
    """Names of weights files and shard lists that carry a variant, the most precise first."""
    stem, suffix = WEIGHTS.rsplit(".", 1)
    patterns = (f"{stem}.*.{suffix}", f"{WEIGHTS}.index.*.json")
    names = [path.name for pattern in patterns for path in folder.glob(pattern)]
    rank = {"fp32": 0, "bf16": 1, "fp16": 2}
    return sorted(
        (name for name in names if "-of-" not in name),
        key=lambda name: (rank.get(name.split(".")[-2], 3), name),
    )

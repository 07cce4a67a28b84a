"""Everyone's transformer files, read into one form: diffusers' names and shapes, and a model config.

    diffusers    a folder with config.json (weights whole, sharded or of a variant such as fp16), or one of its files
    official     NVlabs/Sana .pth or .safetensors: Sana, Sana 1.5, Sana-Sprint
    lesson       the lesson's diffusion-N.pt

Trainers wrap these in more: an average of the weights, an optimizer, random state, other models. The SANA in it is found.
What a file is, its size and its settings are read off its keys, its shapes and what it records, never off its name. A file
that is something else is called what it is. This module knows neither runs (`checkpoint.py`) nor encoders and autoencoders
(`pipeline.py`).
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sana_cli.errors import SanaError, one_line
from sana_cli.model import build
from sana_cli.runtime import files
from sana_cli.weights import pickles, strangers
from sana_cli.weights.configs import WEIGHTS, model_config, read_model_config
from sana_cli.weights.inside import (
    FEED_FORWARD,
    FIRST_LAYERS,
    all_names,
    called,
    choose,
    is_usual,
    look_into,
    no_raw,
    no_sana,
    not_a_sana,
)
from sana_cli.weights.lesson import LESSON_PREFIX, lesson
from sana_cli.weights.official import official
from sana_cli.weights.stored import StoredWeights, check_tensors, infer, plain_tensors


def read_weights(path: Path, which: str = "ema") -> StoredWeights:
    """The transformer in a diffusers folder (the one with config.json) or in a single file of any kind.

    A pickled file (.pth, .pt, .bin) is opened only because `path` names it, and only for tensors and plain values.

    Args:
        path: the folder or the file.
        which: "ema" for the averaged weights, where a file has some beside the raw ones; "raw" for those. A file with one set
            has no raw weights.

    Raises:
        SanaError: nothing is there, it is damaged, no SANA, its config asks for what is not implemented, or tensors are
            missing, unexpected or of another shape; names them.
    """
    if path.is_dir():
        if which == "raw":
            raise no_raw(path)
        if not (path / "config.json").exists() and (other := strangers.other_folder(path)):
            raise SanaError(*other)
        model, tensors = read_model_config(path), plain_tensors(_read_folder(path), path)
        found = StoredWeights("diffusers", path, model, tensors, str(path / "config.json"))
    else:
        found = _read_file(path, which)
    check_tensors(found.tensors, build(found.model, seed=None), path, found.compared_to)
    return found


def _read_file(path: Path, which: str) -> StoredWeights:
    """The SANA in a file, alone or among what else a trainer or a packer put beside it."""
    beginning = strangers.read_beginning(path)
    if other := strangers.other_file(path) or strangers.no_weights(path, beginning):
        raise SanaError(*other)
    recorded = None
    if files.is_safetensors(path):
        content: dict[Any, Any] = {**_read_safetensors(path)}
        recorded = _recorded_model(path)
    else:
        content = pickles.read_pickle(path)
        state = content.get("model_state_dict")
        if isinstance(state, dict) and any(str(name).startswith(LESSON_PREFIX) for name in state):
            if which == "raw":
                raise no_raw(path)
            return lesson(content, path)
    inside = look_into(content)
    places = [place for place in inside.sets if is_usual(place)]
    if not places:
        raise no_sana(content, inside, path)
    chosen, choice = choose(places, inside.unread_averages(places), which, path)
    named = inside.sets[chosen]
    if not any(name.endswith(FEED_FORWARD) for name in named) or any(strangers.UNMERGED in name for name in named):
        strangers.refuse_other_model(all_names(content), path)
    tensors = plain_tensors(named, path)
    if not any(tensor.numel() for tensor in tensors.values()):
        raise SanaError(
            f"{path}: all its tensors are empty, as where DeepSpeed (ZeRO-3) keeps the weights in other files",
            "join them with the zero_to_fp32.py that lies beside it: python zero_to_fp32.py . WHOLE",
        )
    found = identify(tensors, path, recorded)
    models = tuple(_counted(part, count) for part, count in inside.rest.items() if part in strangers.PARTS)
    more = [_counted(part, count) for part, count in inside.rest.items() if part not in strangers.PARTS]
    more += [called(place) for place in inside.sets if place not in places] + [called((key,)) for key in inside.others]
    return replace(found, choice=choice, other_parts=models, left_out=(*found.left_out, *more))


def _counted(part: str, tensors: int) -> str:
    return f"{one_line(part[: strangers.SHOWN])} ({tensors:,} tensor{'s' if tensors > 1 else ''})"


def _recorded_model(path: Path) -> dict[str, Any] | None:
    """The model config that a safetensors file carries in its metadata, as ours do."""
    try:
        recorded = json.loads(files.read_metadata(path)["model"])
    except (KeyError, ValueError, RecursionError):
        return None
    return recorded if isinstance(recorded, dict) else None


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder: one file or shards, plain or, where there is no plain one, of a variant."""
    for name in (WEIGHTS, f"{WEIGHTS}.index.json", *_variants(folder)):
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return _read_safetensors(path)
        shards = strangers.read_json(path).get("weight_map")
        names = list(dict.fromkeys(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not names or any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in names):
            raise SanaError(f"{path} does not list the shards beside it")
        return {key: tensor for shard in names for key, tensor in _read_safetensors(folder / shard).items()}
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
    """Weights files, or lists of shards, whose names carry a variant; the most precise first."""
    stem, suffix = WEIGHTS.rsplit(".", 1)
    names = [path.name for pattern in (f"{stem}.*.{suffix}", f"{WEIGHTS}.index.*.json") for path in folder.glob(pattern)]
    rank = {"fp32": 0, "bf16": 1, "fp16": 2}
    return sorted((name for name in names if "-of-" not in name), key=lambda name: (rank.get(name.split(".")[-2], 3), name))


_LONGEST_HEADER = 100_000_000  # bytes that the library reads of a safetensors header


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """`files.read_tensors` of a file that is whole and of types that PyTorch has.

    Raises:
        SanaError: it is something else, cut short, quantised, missing or damaged.
    """
    beginning = strangers.read_beginning(path) if path.is_file() else b""
    if path.is_file() and (other := strangers.other_file(path) or strangers.no_weights(path, beginning)):
        raise SanaError(*other)
    if beginning[8:9] == b"{":
        length, size = int.from_bytes(beginning[:8], "little"), path.stat().st_size
        end, dtypes = 8 + length, set()
        if end <= size and length <= _LONGEST_HEADER:
            with suppress(OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError), path.open("rb") as file:
                header = json.loads(file.read(end)[8:])
                entries = [entry for name, entry in header.items() if name != "__metadata__"]
                dtypes = {str(entry["dtype"]) for entry in entries}
                end += max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        if end > size:
            raise SanaError(
                f"{path} is damaged or missing its end: it should have {end:,} bytes or more, and has {size:,}",
                "download or copy it again",
            )
        if packed := next((dtype for dtype in sorted(dtypes) if dtype.startswith("F6_")), None):  # which PyTorch has not
            raise SanaError(
                f"{path} is quantised: it has tensors of {one_line(packed)}, which are not read", strangers.PLAIN_COPY
            )
    return files.read_tensors(path)


def identify(tensors: Mapping[str, Tensor], path: Path, recorded: Mapping[str, Any] | None = None) -> StoredWeights:
    """Say what a bare dictionary of tensors is, and give it in diffusers' names with the config its shapes imply.

    Args:
        tensors: of any device, `meta` too, where only names and shapes matter.
        path: where they came from.
        recorded: the model config that the file itself records, if it does.

    Raises:
        SanaError: these are no SANA's, or a size cannot be told from them; says what was found.
    """
    for first in FIRST_LAYERS:
        if first in tensors and tensors[first].ndim == 5:
            raise SanaError(f"{path} is a model of videos, such as SANA-Video, not a SANA of images", strangers.SANAS)
    if "x_embedder.proj.weight" in tensors:
        return official(tensors, path)
    if not any(name.startswith("transformer_blocks.") for name in tensors):
        raise SanaError(not_a_sana(tensors, path))
    if recorded is not None:
        return StoredWeights("diffusers", path, model_config(recorded, path), tensors, "the model that it records")
    beside = path.parent / "config.json"
    try:
        content = files.read_json(beside)
    except SanaError:  # none, or that of something else
        content = {}
    if content.get("_class_name") == "SanaTransformer2DModel":
        return StoredWeights("diffusers", path, model_config(content, beside), tensors, str(beside))
    return StoredWeights("diffusers", path, infer(tensors, path), tensors, "the SANA that its shapes describe")

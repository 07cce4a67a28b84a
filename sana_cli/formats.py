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
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sana_cli import files, pickles, strangers
from sana_cli.config import ModelConfig, SampleConfig
from sana_cli.errors import SanaError, listed, one_line
from sana_cli.model import TIMESTEP_CHANNELS, SanaTransformer, build, positions

WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_VERSION = "0.42.1"  # the version whose format is written
PUBLISHED_PREDICTION = "flow_prediction"  # of every published model
LATENT_CHANNELS = 32  # of the DC-AE that the published models were trained on


@dataclass(frozen=True)
class Weights:
    """A transformer's weights, wherever they came from."""

    origin: str  # diffusers, official or lesson
    path: Path
    model: ModelConfig
    tensors: Mapping[str, Tensor]  # by diffusers' names; memory-mapped where the file allows
    compared_to: str  # what says which tensors there must be
    left_out: tuple[str, ...] = ()  # tensors of the file that are no part of the transformer
    null_caption: Tensor | None = None  # (tokens, D), where the file has its own
    choice: str | None = None  # which of the file's sets of weights this is, where it speaks of several
    other_parts: tuple[str, ...] = ()  # of a file that holds whole models beside the transformer: each with its tensors' number

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The precisions that the tensors are stored in."""
        return tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}))


# --- diffusers' configs -----------------------------------------------------------------------------------------------


def diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """`transformer/config.json` of a resolved model config: every field of diffusers' `SanaTransformer2DModel`.

    What a transformer predicts is none of them; it stands there only where it is not what all others predict.
    """
    derived = {
        "out_channels": config.in_channels,
        "cross_attention_dim": config.inner_dim,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    header = {"_class_name": "SanaTransformer2DModel", "_diffusers_version": DIFFUSERS_VERSION}
    fields = config.model_dump(mode="json")
    if config.prediction_type == PUBLISHED_PREDICTION:
        del fields["prediction_type"]
    return header | fields | derived


def model_config(content: Mapping[str, Any], where: Path) -> ModelConfig:
    """The model config in a diffusers `config.json`.

    Raises:
        SanaError: another class, a field with an impossible value, or one that asks for what is not implemented.
    """
    kinds = content.get("architectures")  # where transformers puts its class
    kind = content.get("_class_name") or (kinds[0] if isinstance(kinds, list) and kinds else content.get("model_type"))
    if kind not in (None, "SanaTransformer2DModel"):
        raise SanaError(f"{where}: is a {kind}, not a SanaTransformer2DModel", strangers.SANAS)
    if content.get("quantization_config"):
        raise SanaError(f"{where}: its weights are quantised, which are not read", strangers.PLAIN_COPY)
    given = {key: value for key, value in content.items() if not key.startswith("_")}
    defaults = {  # diffusers' own, for what a config leaves out
        "in_channels": 32, "num_attention_heads": 70, "num_layers": 20, "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112, "caption_channels": 2304, "sample_size": 32, "patch_size": 1,
    }  # fmt: skip
    known = {key: given[key] for key in ModelConfig.model_fields if given.get(key) is not None}
    config = _validated(defaults | known, where)
    supported = {"prediction_type": config.prediction_type} | diffusers_config(config)
    for key, value in given.items():
        expected = supported.get(key)
        if value != expected and value is not None:
            raise SanaError(f"{where}: {key} = {value!r} is not supported; this sana has {key} = {expected!r}")
    return config


def read_model_config(folder: Path) -> ModelConfig:
    """`model_config` of the `config.json` in a transformer's folder.

    Where diffusers has written it, the scheduler beside it says what the transformer predicts.
    """
    path, scheduler = folder / "config.json", folder.absolute().parent / "scheduler" / "scheduler_config.json"
    content = strangers.read_json(path)
    if folder.absolute().name == "transformer" and "prediction_type" not in content and scheduler.is_file():
        with suppress(SanaError):  # a damaged one is told of where its solver is asked for
            if files.read_json(scheduler).get("prediction_type") == "sample":
                content = {**content, "prediction_type": "sample"}
    return model_config(content, path)


def _validated(fields: Mapping[str, Any], where: Path) -> ModelConfig:
    try:
        config = ModelConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise SanaError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for problem in config.problems():
        raise SanaError(f"{where}: {problem}")
    return config


def scheduler_config(sample: SampleConfig, prediction_type: str = PUBLISHED_PREDICTION) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`: the diffusers scheduler that is our solver.

    For a transformer that predicts samples it is DPM-Solver++ always: diffusers has no other solver that can be told so.
    """
    common = {"_diffusers_version": DIFFUSERS_VERSION, "num_train_timesteps": 1000}
    if prediction_type == "sample":
        sample = sample.model_copy(update={"solver": "dpm++"})
    if sample.solver == "euler":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **common, "shift": sample.flow_shift}
    if sample.solver == "heun":
        return {"_class_name": "FlowMatchHeunDiscreteScheduler", **common, "shift": sample.flow_shift}
    if sample.solver == "scm":
        return {"_class_name": "SCMScheduler", **common, "prediction_type": "trigflow", "sigma_data": 0.5}
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        **common,
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "flow_shift": sample.flow_shift,
        "prediction_type": prediction_type,
        "solver_order": 2,
        "solver_type": "midpoint",
        "use_flow_sigmas": True,
    }


# what a scheduler config may leave out, in diffusers' defaults, where they are not what we do
_SCHEDULER_DEFAULTS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {"flow_shift": 1.0, "prediction_type": "epsilon", "use_flow_sigmas": False},
    "FlowMatchEulerDiscreteScheduler": {"shift": 1.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 1.0},
    "SCMScheduler": {},
}
_OTHER_LEVELS = (  # settings that change the noise levels or the step, all off by default
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_dynamic_shifting",
    "invert_sigmas", "shift_terminal", "stochastic_sampling", "thresholding",
)  # fmt: skip


def solver_of(content: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """`solver` and `flow_shift` of a diffusers scheduler config: the reverse of `scheduler_config`.

    Raises:
        SanaError: a scheduler, or a setting of one, that is no solver of ours; names it.
    """
    name = content.get("_class_name")
    solvers = {"DPMSolverMultistepScheduler": "dpm++", "FlowMatchEulerDiscreteScheduler": "euler"}
    solvers |= {"FlowMatchHeunDiscreteScheduler": "heun", "SCMScheduler": "scm"}
    if not isinstance(name, str) or name not in solvers:
        raise SanaError(
            f"{where}: the scheduler {name} is not supported", f"choose another: --solver {' or '.join(solvers.values())}"
        )
    given = _SCHEDULER_DEFAULTS[name] | {key: value for key, value in content.items() if not key.startswith("_")}
    shift = given.get("flow_shift", given.get("shift", 1.0))
    try:
        sample = SampleConfig.model_validate({"solver": solvers[name], "flow_shift": shift})
    except ValidationError as error:
        raise SanaError(f"{where}: shift {shift!r} is not a positive number") from error
    predicted = "sample" if given.get("prediction_type") == "sample" else PUBLISHED_PREDICTION
    for key, expected in (scheduler_config(sample, predicted) | dict.fromkeys(_OTHER_LEVELS, False)).items():
        value = given.get(key, expected)
        if not key.startswith("_") and value != expected and not (expected is False and not value):
            raise SanaError(f"{where}: {key} = {value!r} is not supported; this sana has {expected!r}")
    return {"solver": sample.solver, "flow_shift": sample.flow_shift}


# --- families ---------------------------------------------------------------------------------------------------------

_PUBLISHED = {  # (layers, width, norm of queries and keys, guidance embedded)
    (28, 1152, False, False): "Sana 0.6B",
    (20, 2240, False, False): "Sana 1.6B",
    (20, 2240, True, False): "Sana 1.5 1.6B",
    (60, 2240, True, False): "Sana 1.5 4.8B",
    (28, 1152, True, True): "Sana-Sprint 0.6B",
    (20, 2240, True, True): "Sana-Sprint 1.6B",
}


def family(model: ModelConfig) -> str | None:
    """Which published model has this architecture, if any: `Sana 1.5 4.8B`."""
    if model.in_channels != LATENT_CHANNELS or model.patch_size != 1:
        return None
    return _PUBLISHED.get((model.num_layers, model.inner_dim, model.qk_norm is not None, model.guidance_embeds))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_weights(path: Path, which: str = "ema") -> Weights:
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
            raise _no_raw(path)
        if not (path / "config.json").exists() and (other := strangers.other_folder(path)):
            raise SanaError(*other)
        model, tensors = read_model_config(path), _plain_tensors(_read_folder(path), path)
        found = Weights("diffusers", path, model, tensors, str(path / "config.json"))
    else:
        found = _read_file(path, which)
    check_tensors(found.tensors, build(found.model, seed=None), path, found.compared_to)
    return found


def _no_raw(path: Path) -> SanaError:
    return SanaError(f"{path} has no raw weights beside averaged ones", "leave out --weights raw")


def _read_file(path: Path, which: str) -> Weights:
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
        if isinstance(state, dict) and any(str(name).startswith(_LESSON_PREFIX) for name in state):
            if which == "raw":
                raise _no_raw(path)
            return _lesson(content, path)
    inside = _look_into(content)
    places = [place for place in inside.sets if _is_usual(place)]
    if not places:
        raise _no_sana(content, inside, path)
    chosen, choice = _choose(places, inside.unread_averages(places), which, path)
    named = inside.sets[chosen]
    if not any(name.endswith(_FEED_FORWARD) for name in named) or any(strangers.UNMERGED in name for name in named):
        strangers.refuse_other_model(_all_names(content), path)
    tensors = _plain_tensors(named, path)
    if not any(tensor.numel() for tensor in tensors.values()):
        raise SanaError(
            f"{path}: all its tensors are empty, as where DeepSpeed (ZeRO-3) keeps the weights in other files",
            "join them with the zero_to_fp32.py that lies beside it: python zero_to_fp32.py . WHOLE",
        )
    found = identify(tensors, path, recorded)
    models = tuple(_counted(part, count) for part, count in inside.rest.items() if part in strangers.PARTS)
    more = [_counted(part, count) for part, count in inside.rest.items() if part not in strangers.PARTS]
    more += [_called(place) for place in inside.sets if place not in places] + [_called((key,)) for key in inside.others]
    return replace(found, choice=choice, other_parts=models, left_out=(*found.left_out, *more))


def _counted(part: str, tensors: int) -> str:
    return f"{one_line(part[: strangers.SHOWN])} ({tensors:,} tensor{'s' if tensors > 1 else ''})"


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _plain_tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a dictionary, found to be dense arrays of floating-point numbers; other values are passed over."""
    tensors = {str(name): tensor.detach() for name, tensor in pickles.items(content) if isinstance(tensor, Tensor)}
    strangers.refuse_packed(tensors, path)
    for name, tensor in tensors.items():
        dense = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
        if not dense or tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            quantised = re.match(r"float8|float4|q?u?int\d", kind)
            raise SanaError(
                f"{path}: {name} is a tensor of {kind}{'' if dense else ', not dense'}; "
                "weights are float32, bfloat16, float16 or float64",
                *([f"it is quantised, which is not read; {strangers.PLAIN_COPY}"] if quantised else []),
            )
    return tensors


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


# --- which of its weights ---------------------------------------------------------------------------------------------

_FIRST_LAYERS = ("x_embedder.proj.weight", "patch_embed.proj.weight")  # official, diffusers
_FEED_FORWARD = ("mlp.inverted_conv.conv.weight", "ff.conv_inverted.weight")  # which no other transformer has
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # PyTorch's own
_USUAL = {  # under which trainers put the weights of the model that they train
    "state_dict", "model_state_dict", "model", "module", "net", "network", "transformer", "diffusion_model", "base_model", "dit",
    "denoiser", "unet", "sana", "student", "generator", "online_model", "params", "weights",
}  # fmt: skip
_CALLBACKS = "callbacks"  # of Lightning, one of which may keep an average
_AVERAGED = re.compile(r"(?:^|[._-])(?:ema|swa|averaged?|shadow)\d*(?:[._-]|$)", re.IGNORECASE)
_ONLINE = "online_model"  # of ema_pytorch: the raw weights inside what it calls ema
_LIT_EMA = "model_ema."  # of latent-diffusion's LitEma, whose names have no dots


@dataclass(frozen=True)
class _Inside:
    """What a dictionary of tensors and dictionaries holds."""

    sets: dict[tuple[str, ...], dict[str, Tensor]]  # what may be a SANA, by the keys and prefixes that lead to it
    rest: Counter[str]  # tensors that are in none of them, by part
    others: list[str]  # keys of dictionaries with none of them
    empty: list[str]  # keys of averages that are None or empty
    nameless: list[str]  # keys of averages whose tensors are not named as a SANA's

    def unread_averages(self, read: Sequence[tuple[str, ...]]) -> str | None:
        """Why the average that this speaks of is not read; None where it is, or where there is none."""
        if any(_is_average(place) for place in read):
            return None
        if self.empty:
            return f"{_called((self.empty[0],))} is empty"
        names = [*self.nameless, *(".".join(place) for place in self.sets), *self.rest]
        unread = next((name for name in names if _AVERAGED.search(name) and name != "n_averaged"), None)
        return None if unread is None else f"{_called((unread,))} is not read: its tensors are not named as a SANA's"


def _look_into(content: Mapping[Any, Any]) -> _Inside:
    """Find what may be a SANA in a dictionary, under any keys and prefixes, at most four deep."""
    inside, seen = _Inside({}, Counter(), [], [], []), {id(content)}

    def look(content: Mapping[Any, Any], place: tuple[str, ...]) -> bool:
        """Whether there is one."""
        found = _split(content, place, inside)
        for key, value in pickles.items(content):
            name = str(key)
            averaged = _AVERAGED.search(name) is not None
            if isinstance(value, dict) and value:
                if id(value) in seen or len(place) > 3:  # one object under two keys is one set
                    continue
                seen.add(id(value))
                if look(value, (*place, name)):
                    found = True
                    continue
                if averaged and _all_names(value):
                    inside.nameless.append(".".join((*place, name)))
                if name in strangers.PARTS:
                    inside.rest[name] += len(_all_names(value))
                elif not place:
                    inside.others.append(name)
            elif averaged and (value is None or (isinstance(value, dict | list | tuple) and not value)):
                inside.empty.append(".".join((*place, name)))
            elif averaged and isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
                inside.nameless.append(".".join((*place, name)))
        return found

    look(content, ())
    return inside


def _split(content: Mapping[Any, Any], place: tuple[str, ...], inside: _Inside) -> bool:
    """Sort the tensors of one dictionary by their prefixes into sets and the rest; whether there was a set."""
    named = {str(name): tensor for name, tensor in pickles.items(content) if isinstance(tensor, Tensor)}
    bare = {_WRAPPERS.sub("", name): tensor for name, tensor in named.items()}
    tensors = bare if len(bare) == len(named) else named  # where both are there, they stay apart
    sets: dict[str, dict[str, Tensor]] = {
        name.removesuffix(first): {} for name in tensors for first in _FIRST_LAYERS if f".{name}".endswith(f".{first}")
    }
    rest: Counter[str] = Counter()
    for name, tensor in tensors.items():
        prefix = next((p for p in _ancestors(name) if p in sets), None) if sets else None
        if prefix is not None:
            sets[prefix][name.removeprefix(prefix)] = tensor
        elif tensor.ndim:  # single numbers count steps
            rest[name.partition(".")[0]] += 1
    if average := next(filter(None, (_lit_ema(tensors, prefix, raw) for prefix, raw in sets.items())), None):
        sets[_LIT_EMA] = average
        del rest[_LIT_EMA.rstrip(".")]
    for prefix, found in sets.items():
        inside.sets[(*place, *prefix.split(".")[:-1])] = found
    if sets or not place:
        inside.rest.update(rest)
    return bool(sets)


def _ancestors(name: str) -> Iterator[str]:
    """The prefixes of a dotted name, the longest first; the last is empty."""
    while name:
        name = name.rstrip(".").rpartition(".")[0]
        name += "." if name else ""
        yield name


def _lit_ema(tensors: Mapping[str, Tensor], prefix: str, raw: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The average that latent-diffusion keeps of `raw`, with the raw buffers; None where it is not there or not whole."""
    found = {}
    for name, tensor in raw.items():
        flat = _LIT_EMA + f"{prefix}{name}".removeprefix("model.").replace(".", "")
        average = tensors.get(flat, tensor if name in _NOT_THE_TRANSFORMER else None)
        if average is None:
            return None
        found[name] = average
    return found


def _is_average(place: tuple[str, ...]) -> bool:
    return _ONLINE not in place and any(map(_AVERAGED.search, place))


def _is_usual(place: tuple[str, ...]) -> bool:
    """Whether a trainer's model or its average is to be expected here, and not an optimizer's state or another model."""
    if place[:1] == (_CALLBACKS,):
        return _is_average(place)
    return all(part in _USUAL or _AVERAGED.search(part) for part in place)


def _choose(places: Sequence[tuple[str, ...]], unread: str | None, which: str, path: Path) -> tuple[tuple[str, ...], str | None]:
    """Which set of weights is meant, and in words which it is, where the file speaks of an average.

    Raises:
        SanaError: there is none of that kind, or there are several.
    """
    averaged = [place for place in places if _is_average(place)]
    raw = [place for place in places if not _is_average(place)]
    raw = [place for place in raw if _ONLINE not in place] or raw
    if which == "raw" and not (raw and (averaged or unread)):
        raise _no_raw(path)
    wanted = averaged if averaged and which != "raw" else raw
    if len(wanted) > 1:
        names = ", ".join(map(_called, wanted))
        raise SanaError(
            f"{path} holds several SANAs, and which is meant cannot be told: {names}",
            "save the one that you want alone: torch.save({'state_dict': ...}, FILE)",
        )
    if averaged and wanted is averaged:
        others = f"; raw ({', '.join(map(_called, raw))}) with --weights raw" if raw else ""
        return wanted[0], f"averaged ({_called(wanted[0])}){others}"
    if averaged or unread:
        return wanted[0], f"raw ({_called(wanted[0])})" + (f"; {unread}" if unread else "")
    return wanted[0], None


def _called(place: tuple[str, ...]) -> str:
    return one_line(".".join(place)[: strangers.SHOWN]) or "those without a prefix"


def _no_sana(content: Mapping[Any, Any], inside: _Inside, path: Path) -> SanaError:
    """What to say of a dictionary without a SANA in any usual place."""
    names = _all_names(content)
    strangers.refuse_packed(names, path)
    strangers.refuse_other_model(names, path)
    if inside.sets:
        return SanaError(
            f"{path} holds a SANA's tensors under {', '.join(map(_called, inside.sets))} only, "
            "which may be an optimizer's or another's",
            "if they are the weights, save them alone: torch.save({'state_dict': ...}, FILE)",
        )
    keys = [str(key) for key, value in pickles.items(content) if not isinstance(value, Tensor)]
    return SanaError(_not_a_sana(names, path) + (f"; it has {strangers.some(keys)}" if keys else ""))


def _not_a_sana(names: Iterable[str], path: Path) -> str:
    return f"{path} holds no SANA: its tensors are called {strangers.some(list(names)) or 'none'}"


def _all_names(content: Mapping[Any, Any]) -> list[str]:
    """The names of all tensors in a dictionary and in those inside it, without the keys that lead there."""
    names, queue, seen = [], [content], {id(content)}
    for inner in queue:
        for name, value in pickles.items(inner):
            if isinstance(value, Tensor):
                names.append(str(name))
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                queue.append(value)
    return names


def identify(tensors: Mapping[str, Tensor], path: Path, recorded: Mapping[str, Any] | None = None) -> Weights:
    """Say what a bare dictionary of tensors is, and give it in diffusers' names with the config its shapes imply.

    Args:
        tensors: of any device, `meta` too, where only names and shapes matter.
        path: where they came from.
        recorded: the model config that the file itself records, if it does.

    Raises:
        SanaError: these are no SANA's, or a size cannot be told from them; says what was found.
    """
    for first in _FIRST_LAYERS:
        if first in tensors and tensors[first].ndim == 5:
            raise SanaError(f"{path} is a model of videos, such as SANA-Video, not a SANA of images", strangers.SANAS)
    if "x_embedder.proj.weight" in tensors:
        return _official(tensors, path)
    if not any(name.startswith("transformer_blocks.") for name in tensors):
        raise SanaError(_not_a_sana(tensors, path))
    if recorded is not None:
        return Weights("diffusers", path, model_config(recorded, path), tensors, "the model that it records")
    beside = path.parent / "config.json"
    try:
        content = files.read_json(beside)
    except SanaError:  # none, or that of something else
        content = {}
    if content.get("_class_name") == "SanaTransformer2DModel":
        return Weights("diffusers", path, model_config(content, beside), tensors, str(beside))
    return Weights("diffusers", path, _infer(tensors, path), tensors, "the SANA that its shapes describe")


# --- what shapes tell -------------------------------------------------------------------------------------------------

_SELF_HEAD_DIM = 32  # of every published model
_CROSS_HEADS = {1152: 16, 2240: 20}


def _infer(tensors: Mapping[str, Tensor], path: Path, **known: Any) -> ModelConfig:
    """The config that names and shapes imply, in diffusers' naming. `known` is what they do not tell."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in tensors:
            raise SanaError(f"{path} does not look like a whole SANA:", f"  missing: {name}")
        found = tuple(tensors[name].shape)
        if len(found) != dimensions or 0 in found:
            raise SanaError(f"{path}: {name} is {found}, where {dimensions} dimensions are expected")
        return found

    def has(part: str) -> bool:
        return any(part in name for name in tensors)

    patch = shape("patch_embed.proj.weight", 4)  # (width, channels, patch, patch)
    width = patch[0]
    if "num_attention_heads" not in known:
        heads = _CROSS_HEADS.get(width)
        if heads is None:
            raise SanaError(
                f"{path}: how many attention heads its width of {width} is split into cannot be told from shapes",
                f"known are the published widths {' and '.join(map(str, _CROSS_HEADS))}; for others, put diffusers' config.json beside it",
            )
        known |= {"num_attention_heads": width // _SELF_HEAD_DIM, "attention_head_dim": _SELF_HEAD_DIM}
        known |= {"num_cross_attention_heads": heads, "cross_attention_head_dim": width // heads}
    hidden = shape("transformer_blocks.0.ff.conv_point.weight", 4)[1]
    ratio = 2.5 if int(2.5 * width) == hidden else hidden / width
    known = {"sample_size": 32} | known
    blocks = {int(number[1]) for name in tensors if (number := re.match(r"transformer_blocks\.(\d{1,6})\.", name))}
    return _validated(
        {
            "in_channels": patch[1],
            "patch_size": patch[2],
            "num_layers": len(blocks),
            "caption_channels": shape("caption_projection.linear_1.weight", 2)[1],
            "mlp_ratio": ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf),
            "attention_bias": has("attn1.to_q.bias"),
            "qk_norm": "rms_norm_across_heads" if has("attn1.norm_q.") else None,
            "guidance_embeds": has("time_embed.guidance_embedder."),
            **known,
        },
        path,
    )


# --- official files ---------------------------------------------------------------------------------------------------

_OFFICIAL = {  # module by module, as diffusers' conversion script has them
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "final_layer.linear": "proj_out",
}
_OFFICIAL_BLOCK = {
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}
_OFFICIAL_FUSED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
_NOT_THE_TRANSFORMER = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")


def _official(tensors: Mapping[str, Tensor], path: Path) -> Weights:
    """NVlabs/Sana's names to diffusers' (diffusers `scripts/convert_sana_to_diffusers.py`)."""
    time = "time_embed" if any(name.startswith("cfg_embedder.") for name in tensors) else "time_embed.emb"
    modules = _OFFICIAL | {f"t_embedder.mlp.{n}": f"{time}.timestep_embedder.linear_{n // 2 + 1}" for n in (0, 2)}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _NOT_THE_TRANSFORMER:
            continue
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)(?:\.(.+))?", module)
        place, part = (f"transformer_blocks.{block[1]}", block[2] or "") if block else ("", "")
        if part in _OFFICIAL_FUSED:
            parts = _OFFICIAL_FUSED[part]
            if tensor.ndim == 0 or tensor.shape[0] % len(parts):
                raise SanaError(f"{path}: {name} is {tuple(tensor.shape)}, which does not split into {len(parts)}")
            renamed |= {f"{place}.{to}.{leaf}": chunk for to, chunk in zip(parts, tensor.chunk(len(parts)), strict=True)}
        elif block:
            renamed[".".join(filter(None, (place, _OFFICIAL_BLOCK.get(part, part), leaf)))] = tensor
        elif name == "final_layer.scale_shift_table":
            renamed["scale_shift_table"] = tensor
        else:
            renamed[f"{modules[module]}.{leaf}" if module in modules else name] = tensor
    known: dict[str, Any] = {}
    if "pos_embed" in tensors:
        known = _read_positions(tensors["pos_embed"], renamed["patch_embed.proj.weight"].shape[-1:], path)
    left_out = tuple(name for name in _NOT_THE_TRANSFORMER if name in tensors)
    return Weights("official", path, _infer(renamed, path, **known), renamed, "the SANA that its shapes describe", left_out)


def _read_positions(buffer: Tensor, patch: tuple[int, ...], path: Path) -> dict[str, Any]:
    """`sample_size` and `interpolation_scale` from the official `pos_embed` (1, N, D): zeros where there are no positions.

    Its second token lies one column on, at the angle 1 / interpolation_scale, whose sine and cosine it holds.
    """
    side = math.isqrt(buffer.shape[1]) if buffer.ndim == 3 else 0
    if side == 0 or side * side != buffer.shape[1] or buffer.shape[2] % 4:
        raise SanaError(f"{path}: pos_embed is {tuple(buffer.shape)}, not (1, side * side, width)")
    known: dict[str, Any] = {"sample_size": side * math.prod(patch)}
    if buffer.is_meta or not buffer.any():
        return known
    table, dim = buffer[0].float(), buffer.shape[2]
    angle = math.atan2(float(table[1, 0]), float(table[1, dim // 4])) if side > 1 else 1.0
    for digits in range(4):  # files in bf16 know the angle to three digits, and the scale is a round number
        scale = round(1 / angle, digits) if angle > 0 else 0.0
        if scale > 0 and torch.allclose(table, positions(side, side, side, scale, dim), atol=0.01):
            return known | {"interpolation_scale": scale}
    raise SanaError(f"{path}: pos_embed is neither zeros nor sine-cosine positions, which is all that SANA has")


# --- the lesson -------------------------------------------------------------------------------------------------------

_LESSON_PREFIX = "_score_network."
_LESSON_NULL = "_unconditional_context.y_embedding"


def _lesson(content: Mapping[str, Any], path: Path) -> Weights:
    """The lesson's network as ours: it predicts data - noise at time 1 - sigma, told as it is rather than times 1000.

    The sign goes into the last layer. The time goes into the first layer of its embedding: with frequencies f,
    cos((1 - s) f) = cos f cos(s f) + sin f sin(s f) and sin((1 - s) f) = sin f cos(s f) - cos f sin(s f), so that its
    columns are rotated; `timestep_scale` 0.001 undoes the 1000.
    """
    state = _plain_tensors(content["model_state_dict"], path)
    tensors = {
        name.removeprefix(_LESSON_PREFIX).replace(".cross_attn.", ".attn2."): tensor
        for name, tensor in state.items()
        if name.startswith(_LESSON_PREFIX)
    }
    try:
        params = content["config"]["diffusion"]["score_network"]["params"]
        names = ("num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim")
        known = {name: params[name] for name in names} | {"sample_size": params.get("input_spatial_size", 32)}
    except (KeyError, TypeError, AttributeError) as error:
        raise SanaError(
            f"{path} has a model_state_dict, but not the lesson's config beside it",
            "its number of attention heads stands in config.diffusion.score_network.params",
        ) from error
    config, compared_to = _infer(tensors, path, **known, timestep_scale=0.001), "the model in its config"
    check_tensors(tensors, build(config, seed=None), path, compared_to)
    half, first = TIMESTEP_CHANNELS // 2, "time_embed.emb.timestep_embedder.linear_1.weight"
    frequency = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float64))
    cosine, sine = tensors[first].double().split(half, dim=1)  # (D, 128) each
    turned = cosine * frequency.cos() + sine * frequency.sin(), cosine * frequency.sin() - sine * frequency.cos()
    tensors[first] = torch.cat(turned, dim=1).to(tensors[first].dtype)
    for name in ("proj_out.weight", "proj_out.bias"):
        tensors[name] = -tensors[name]
    left_out = tuple(name for name in state if not name.startswith(_LESSON_PREFIX))
    null = state.get(_LESSON_NULL)
    if null is None or null.ndim != 2 or null.shape[1] != config.caption_channels or len(null) == 0:
        null = None
    return Weights("lesson", path, config, tensors, compared_to, left_out, null)


# --- fitting ----------------------------------------------------------------------------------------------------------


def check_tensors(found: Mapping[str, Tensor], model: SanaTransformer, where: Path, compared_to: str) -> None:
    """Refuse weights that are not exactly the model's.

    Raises:
        SanaError: listing what is missing, unexpected or of another shape.
    """
    problems = list(_misfits(found, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}))
    if problems:
        raise SanaError(f"{where} does not fit {compared_to}:", *listed(problems))


def _misfits(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    yield from (f"missing: {name} {shape}" for name, shape in expected.items() if name not in found)
    yield from (f"unexpected: {name} {tuple(tensor.shape)}" for name, tensor in found.items() if name not in expected)
    for name, shape in expected.items():
        if name in found and tuple(found[name].shape) != shape:
            yield f"{name} is {tuple(found[name].shape)}, not {shape}"

"""Adapter files: read those that people have, write those that diffusers reads.

    diffusers    pytorch_lora_weights.safetensors: LoRA, rank-stabilised LoRA, DoRA; a folder with one
    peft         adapter_model.safetensors with its adapter_config.json; a folder with them
    kohya        lora_unet_... or lora_transformer_..., lora_down and lora_up, with alpha
    LyCORIS      lycoris_...: LoCon, LoKr, LoHa, full differences

with our names of layers or those of NVlabs/Sana. Nothing in a file is ignored: what cannot be applied exactly is
an error. `adapter_names.py` knows their names, `sana_cli/adapters.py` applies them. It knows no runs.

Shapes: r rank, o i numbers that a layer's matrix gives and takes; a convolution's i is channels times kernel.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana_cli.adapters import Change, Dense, LowRank, adapter_scale, layers_of
from sana_cli.errors import SanaError, listed, one_line
from sana_cli.runtime import files
from sana_cli.weights import strangers
from sana_cli.weights.adapter_names import Named, is_of_text_encoder, odd_patterns, parse, pattern_of
from sana_cli.weights.card import ADAPTER_WEIGHTS
from sana_cli.weights.reader import read_safetensors
from sana_cli.weights.stored import plain_tensors

_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DIFFUSERS_CONFIG = "lora_adapter_metadata"  # its key in a file's metadata
_READ = "sana reads LoRA, DoRA, LoKr and LoHa of a SANA, in the forms of diffusers, peft, kohya and LyCORIS"
_HUGE = 1e9  # more than any rank or alpha
_AGAIN = "download or copy it again, or ask whoever made it for one that diffusers or peft has saved"
_LARGEST = 2**28  # numbers in a matrix; those of the published models have 30 million at most

Shapes = Mapping[str, tuple[int, ...]]  # of the layers' weights, by name: (o, i), or (o, C, kernel, kernel)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as read from a file, in our names."""

    path: Path
    form: str  # in words, such as diffusers
    layers: Mapping[str, Change]  # float32, by the layer's name
    metadata: Mapping[str, str]  # the file's own
    notes: tuple[str, ...] = ()  # what a user should know of how it was read

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of its low-rank changes, each once, in order."""
        return tuple(sorted({own.rank for own in self.layers.values() if isinstance(own, LowRank)}))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that an adapter can change, by the layer's name. The model may be on meta."""
    return {name: tuple(layer.weight.shape) for name, layer in layers_of(model).items()}


def is_adapter_file(path: Path) -> bool:
    """Whether a file or folder is an adapter's, by the names of the files or tensors."""
    if path.is_dir():
        return any((path / name).is_file() for name in (ADAPTER_WEIGHTS, _PEFT_WEIGHTS))
    if not path.is_file() or not files.is_safetensors(path):
        return False
    with suppress(SanaError):  # a damaged one is reported when it is read
        names = "\n".join(("", *files.read_tensors(path), ""))
        return strangers.UNMERGED not in names and strangers.adapter_kind(names) is not None
    return False


# --- writing ----------------------------------------------------------------------------------


def write_adapter(
    path: Path,
    changes: Mapping[str, Change],
    shapes: Shapes,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write and sync an adapter as diffusers' `SanaPipeline.load_lora_weights` reads it.

    Scales are folded into B, so that alpha equals the rank. Then loaders that ignore alpha, as all
    did before 2025-06, agree with those that read it.

    Args:
        path: the file, by custom `ADAPTER_WEIGHTS` in a folder.
        changes: low-rank ones, by the layer's name. All or none have a magnitude.
        shapes: of the layers' weights, as `shapes_of` gives them.
        metadata: what else the file records.
        dtype: what the tensors are stored in.

    Raises:
        SanaError: a change is dense, or some have a magnitude and others have none.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    dense = [name for name, change in changes.items() if not isinstance(change, LowRank)]
    if dense:
        raise SanaError(
            f"{path}: diffusers reads low-rank changes alone, and these are not:", *listed(dense),
            "merge the adapter into its model in place of that",
        )  # fmt: skip
    dora = [name for name, change in changes.items() if change.magnitude is not None]
    if dora and len(dora) != len(changes):
        plain = [name for name in changes if name not in set(dora)]
        raise SanaError(
            f"{path}: diffusers reads DoRA of all layers or none, and these lack it:", *listed(plain)
        )
    for name, change in changes.items():
        assert isinstance(change, LowRank)
        ranks[name], key, shape = change.rank, f"transformer.{name}", shapes[name]
        down, up = change.lora_A.float(), change.lora_B.float() * change.scale
        norms = None if change.magnitude is None else change.magnitude.float()
        if len(shape) == 4:
            down, up = down.reshape(-1, *shape[1:]), up[:, :, None, None]
            norms = None if norms is None else norms.reshape(1, -1, 1, 1)
        tensors |= {f"{key}.lora_A.weight": down.to(dtype), f"{key}.lora_B.weight": up.to(dtype)}
        if norms is not None:
            tensors[f"{key}.lora_magnitude_vector"] = norms.to(dtype)
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config = {
        "r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others,
        "target_modules": list(changes), "use_dora": bool(dora),
    }  # fmt: skip
    text = json.dumps(
        {f"transformer.{key}": value for key, value in config.items()}, indent=2, sort_keys=True
    )
    files.write_tensors(path, tensors, {**(metadata or {}), "format": "pt", _DIFFUSERS_CONFIG: text})


# --- reading ----------------------------------------------------------------------------------


def read_adapter(path: Path, shapes: Shapes | None = None) -> StoredAdapter:
    """Read an adapter of any form, exactly or not at all.

    Args:
        path: a safetensors file, or a folder with `pytorch_lora_weights.safetensors` or with peft's
            `adapter_model.safetensors`.
        shapes: of the layers' weights that it must fit. None: any SANA's.

    Raises:
        SanaError: nothing is there, it is damaged, pickled or no adapter; a part of it is unknown,
            missing, quantised, not finite, a text encoder's or of another shape than the model's
            layer; its config asks for something that is not implemented. Names each.
    """
    file = _adapter_file(path)
    tensors, metadata = _read_file(file)
    groups, problems, forms = _grouped(tensors, shapes)
    config = _read_config(file, metadata, file.name == _PEFT_WEIGHTS or "peft" in forms)
    if not groups:
        raise _no_adapter(file, tensors, problems)
    changes: dict[str, Change] = {}
    for group in groups.values():
        try:
            for name, change in _changes_of(group, config, shapes):
                if name in changes:
                    raise _Misfit(f"{group.key}: another tensor changes {name} too")
                changes[name] = change
        except _Misfit as misfit:
            problems.append(str(misfit))
    if problems:
        model = "a SANA" if shapes is None else "the model"
        raise SanaError(
            f"{file} does not fit {model}, or cannot be applied exactly:", *listed(problems), _READ
        )
    notes = () if config is not None or "peft" not in forms else (_NO_CONFIG,)
    kinds = dict.fromkeys(_KINDS[mark] for part in _parts(groups) for mark in _KINDS if part.startswith(mark))
    form = ", ".join(forms) + (f" ({', '.join(kinds)})" if kinds else "")
    return StoredAdapter(file, form, changes, metadata, notes)


_KINDS = {"magnitude": "DoRA", "dora": "DoRA", "lokr": "LoKr", "hada": "LoHa", "diff": "full differences"}
_NO_CONFIG = f"it has no {_PEFT_CONFIG} beside it: alpha is taken to be the rank"


class _Misfit(Exception):  # noqa: N818 (a line of a message)
    """What is wrong with one layer's change."""


@dataclass
class _Group:
    """The tensors of one module of a file."""

    named: Named
    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # each part's name in the file

    @property
    def key(self) -> str:
        """The name of a tensor, to point to the module in a message."""
        return next(iter(self.keys.values()))


def _parts(groups: Mapping[str, _Group]) -> Iterator[str]:
    return (part for group in groups.values() for part in group.parts)


def _adapter_file(path: Path) -> Path:
    """The file at a path, or in the folder there.

    Raises:
        SanaError: there is none, or a folder has several.
    """
    if not path.is_dir():
        return path
    known = [path / name for name in (ADAPTER_WEIGHTS, _PEFT_WEIGHTS) if (path / name).exists()]
    if len(known) == 1:
        return known[0]
    others = known or sorted(file for file in path.iterdir() if file.suffix == ".safetensors")
    if others:
        names = ", ".join(one_line(str(file)) for file in others[:3])
        raise SanaError(
            f"{path} has {'two adapters' if known else f'no {ADAPTER_WEIGHTS}'}",
            f"name one of its files: {names}{', ...' if len(others) > 3 else ''}",
        )
    pickled = sorted(file for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise _pickled(pickled[0])
    raise SanaError(f"{path} has no {ADAPTER_WEIGHTS}, and no {_PEFT_WEIGHTS} of peft's", _READ)


def _pickled(path: Path) -> SanaError:
    return SanaError(
        f"{path} is a pickle; adapters are read from safetensors alone",
        "convert it: import torch, safetensors.torch as s; "
        f's.save_file(torch.load("{one_line(path.name)}", weights_only=True), "adapter.safetensors")',
    )


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file.

    Raises:
        SanaError: it is missing, damaged, something else, quantised or not finite.
    """
    beginning = strangers.read_beginning(path)
    if other := strangers.other_file(path) or strangers.no_weights(path, beginning):
        raise SanaError(*other)
    if not files.is_safetensors(path) and beginning.startswith((b"PK", b"\x80")):
        raise _pickled(path)
    found = read_safetensors(path)
    alphas = {name: tensor for name, tensor in found.items() if name.endswith(".alpha")}
    tensors = plain_tensors({name: tensor for name, tensor in found.items() if name not in alphas}, path)
    alphas = {name: alpha if alpha.is_complex() else alpha.float() for name, alpha in alphas.items()}
    tensors = {name: tensor.float() for name, tensor in tensors.items()} | alphas
    if odd := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise SanaError(
            f"{path} has NaN or infinity:", *listed([one_line(name) for name in odd]),
            "its training has failed: use a file from before",
        )  # fmt: skip
    return tensors, files.read_metadata(path)


def _grouped(
    tensors: Mapping[str, Tensor], shapes: Shapes | None
) -> tuple[dict[str, _Group], list[str], list[str]]:
    """Tensors by module; what is wrong with names; the forms that they have."""
    groups: dict[str, _Group] = {}
    problems: list[str] = []
    forms: dict[str, None] = {}
    for key, tensor in tensors.items():
        shown = one_line(key[: strangers.SHOWN])
        named = parse(key, shapes)
        if named is None:
            of_text = is_of_text_encoder(key)
            why = "a text encoder's, which sana does not adapt" if of_text else "no part of a SANA's adapter"
            problems.append(f"{shown}: {why}")
            continue
        forms[named.form] = None
        group = groups.setdefault(named.module, _Group(named))
        if named.part in group.parts:
            problems.append(f"{shown}: {one_line(group.keys[named.part])} is the same part of the same layer")
        group.parts[named.part], group.keys[named.part] = tensor, shown
    return groups, problems, list(forms)


def _no_adapter(path: Path, tensors: Mapping[str, Tensor], problems: Sequence[str]) -> SanaError:
    """The error for a file in which nothing is a SANA's adapter."""
    if not tensors:
        return SanaError(f"{path} holds no tensors", "name another file, or download it again")
    if any(mark in name for name in tensors for mark in (".lora", "lokr_", "hada_", ".diff", "_lora")):
        return SanaError(f"{path} is an adapter, but not of a SANA's transformer:", *listed(problems), _READ)
    return SanaError(f"{path} is no adapter: its tensors are called {strangers.some(list(tensors))}", _READ)


# --- the config of an adapter -----------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """What peft's LoraConfig says of scales."""

    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]  # by peft's patterns of names
    alphas: Mapping[str, float]
    rank_stabilized: bool
    dora: bool | None  # None: not said

    def scale(self, module: str, rank: int) -> float:
        """The scale of a module's B A.

        Raises:
            _Misfit: it has another rank than this says.
        """
        own = pattern_of(self.ranks, module)
        expected = self.rank if own is None else self.ranks[own]
        if rank != expected:
            raise _Misfit(f"{module}: its rank is {rank}, and {expected} in {self.where}")
        own = pattern_of(self.alphas, module)
        alpha = self.alpha if own is None else self.alphas[own]
        return adapter_scale(rank, alpha, self.rank_stabilized)


_NO_MATTER = {  # fields of peft's LoraConfig that change nothing in a trained adapter
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern",
    "megatron_core", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
}  # fmt: skip
_EXPECTED: dict[str, tuple[Any, ...]] = {  # others are refused, if they say anything
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # others move the model's own weights
}


def _read_config(path: Path, metadata: Mapping[str, str], of_peft: bool) -> _Config | None:
    """The config in a file's metadata (diffusers) or, of peft's names, beside it, if there is one.

    Raises:
        SanaError: it cannot be read, or asks for something that is not implemented.
    """
    if _DIFFUSERS_CONFIG in metadata:
        where = f"{path}: {_DIFFUSERS_CONFIG} in its metadata"
        try:
            content = json.loads(metadata[_DIFFUSERS_CONFIG])
        except (ValueError, RecursionError) as error:
            raise SanaError(f"{where} cannot be read as JSON", _AGAIN) from error
        if not isinstance(content, dict):
            raise SanaError(f"{where} is no JSON object", _AGAIN)
        own = {key: value for key, value in content.items() if key.startswith("transformer.")}
        if odd := [one_line(key[: strangers.SHOWN]) for key in content if key not in own]:
            raise SanaError(f"{where} is of more than a transformer:", *listed(odd), _READ)
        return _config({key.removeprefix("transformer."): value for key, value in own.items()}, where)
    beside = path.with_name(_PEFT_CONFIG)
    if of_peft and beside.exists():
        return _config(strangers.read_json(beside), str(beside))
    return None


def _config(content: Mapping[str, Any], where: str) -> _Config:
    """Check peft's LoraConfig.

    Raises:
        SanaError: names a field that is not supported, or of a wrong type.
    """
    for key, value in content.items():
        if key not in _NO_MATTER and value and value not in _EXPECTED.get(key, ()):
            raise SanaError(f"{where}: {one_line(key[:100])} = {_short(value)} is not supported", _READ)

    def number(value: object, name: str, kind: type = float) -> Any:
        fine = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if not fine or abs(value) > _HUGE or value != value or (kind is int and value < 1):  # type: ignore[arg-type, operator]
            what = "rank" if kind is int else "number"
            raise SanaError(f"{where}: {name} = {_short(value)} is no {what}", _AGAIN)
        return value

    def pattern(name: str, kind: type) -> dict[str, Any]:
        found = content.get(name) or {}
        if not isinstance(found, dict):
            raise SanaError(f"{where}: {name} = {_short(found)} is no JSON object", _AGAIN)
        if odd := list(odd_patterns(found)):
            raise SanaError(
                f"{where}: {name} has {_short(odd[0])}, which is no name but a regular expression", _READ
            )
        return {key: number(value, f"{name}[{_short(key)}]", kind) for key, value in found.items()}

    flags = {name: content.get(name, False) for name in ("use_rslora", "use_dora")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise SanaError(f"{where}: {name} = {_short(flag)} is neither true nor false", _AGAIN)
    if "r" not in content or "lora_alpha" not in content:
        raise SanaError(f"{where} lacks {'r' if 'r' not in content else 'lora_alpha'}", _AGAIN)
    return _Config(
        where,
        number(content["r"], "r", int),
        number(content["lora_alpha"], "lora_alpha"),
        pattern("rank_pattern", int),
        pattern("alpha_pattern", float),
        flags["use_rslora"],
        flags["use_dora"] if "use_dora" in content else None,
    )


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 300 else "a huge number"
    return one_line(text[:60]) + ("..." if len(text) > 60 else "")


# --- one layer's change -----------------------------------------------------------------------


def _changes_of(group: _Group, config: _Config | None, shapes: Shapes | None) -> Iterator[tuple[str, Change]]:
    """The changes that a module's tensors make to our layers.

    Raises:
        _Misfit: parts are missing, of another shape, or not exactly expressible.
    """
    named = group.named
    _check_layers(group, shapes)
    alpha = group.parts.pop("alpha", None)
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
        raise _Misfit(f"{group.keys['alpha']} is {tuple(alpha.shape)}, not one number")
    low_rank = "A" in group.parts or "B" in group.parts
    change = _low_rank(group, config) if low_rank else _dense(group)
    dim, magnitude = change.dim, change.magnitude
    scale = 1.0
    if alpha is not None and dim is not None:
        scale = float(alpha) / dim
    if config is not None:
        if not low_rank:
            raise _Misfit(f"{group.key}: a LoKr or LoHa with a config of peft's is not read")
        said = config.scale(named.module, dim or 0)
        if alpha is not None and not math.isclose(said, scale, rel_tol=1e-5):
            raise _Misfit(f"{group.keys['alpha']} says a scale of {scale:g}, and {config.where} {said:g}")
        scale = said
    out = change.shape[0]
    pieces = len(named.layers)
    if out % pieces:
        raise _Misfit(f"{group.key}: {out} rows do not split into {pieces} layers")
    expected = None if shapes is None else sum(shapes[name][0] for name in named.layers)
    for name in named.layers if shapes is not None else ():
        if expected != out or change.shape[1] != math.prod(shapes[name][1:]):  # type: ignore[index]
            own = (expected, math.prod(shapes[name][1:]))  # type: ignore[index]
            raise _Misfit(f"{group.key}: a change of {change.shape}, where the model has {own}")
    first, second = change.make()
    for index, name in enumerate(named.layers):
        rows = slice(index * out // pieces, (index + 1) * out // pieces)
        norms = None if magnitude is None else magnitude[rows]
        made = Dense(second[rows], scale) if first is None else LowRank(first, second[rows], scale, norms)
        yield name, made


@dataclass(frozen=True)
class _Found:
    """A module's change before its scale and its cut."""

    shape: tuple[int, int]  # (o, i)
    dim: int | None  # what alpha is divided by; None: alpha has no effect
    make: Callable[[], tuple[Tensor | None, Tensor]]  # A (r, i) and B (o, r), or None and a matrix (o, i)
    magnitude: Tensor | None = None  # (o,)


def _check_layers(group: _Group, shapes: Shapes | None) -> None:
    for name in group.named.layers:
        if name.endswith(".conv_depth"):
            raise _Misfit(f"{group.key}: sana does not adapt the depthwise convolution")
        if shapes is None:
            continue
        if name not in shapes:
            raise _Misfit(f"{group.key}: the model has no layer {name}")
        kernel = shapes[name][1:] if len(shapes[name]) == 4 else (*shapes[name][1:], 1, 1)
        for part in ("A", "diff"):  # of four dimensions, they have the kernel's
            own = tuple(group.parts[part].shape[1:]) if part in group.parts else ()
            if len(own) == 3 and own != kernel:
                raise _Misfit(f"{group.keys[part]} has kernels of {own}, where the model's are {kernel}")


def _matrix(group: _Group, part: str) -> Tensor:
    """A part as a matrix: of more dimensions, all after the first are one."""
    tensor = group.parts[part]
    if tensor.ndim not in (2, 4) or 0 in tensor.shape:
        raise _Misfit(f"{group.keys[part]} is {tuple(tensor.shape)}, which is no matrix")
    return tensor.flatten(1)


def _complete(group: _Group, names: Mapping[str, str], optional: Sequence[str] = ()) -> None:
    """Refuse a module that lacks one of these parts, or has others."""
    for part, name in names.items():
        if part not in group.parts:
            raise _Misfit(f"{group.key}: the layer's {name} is missing")
    for part, key in group.keys.items():
        if part not in names and part not in optional and part != "alpha":
            raise _Misfit(f"{key}: does not belong with {group.key}")


def _low_rank(group: _Group, config: _Config | None) -> _Found:
    _complete(group, {"A": "lora_A (lora_down)", "B": "lora_B (lora_up)"}, ("magnitude", "dora_scale"))
    down, up = _matrix(group, "A"), _matrix(group, "B")
    if group.parts["B"].shape[2:].numel() != 1 or up.shape[1] != down.shape[0]:
        shapes = tuple(tuple(group.parts[part].shape) for part in ("A", "B"))
        raise _Misfit(f"{group.key}: {shapes[0]} and {shapes[1]} make no product")
    out, rank, into = up.shape[0], down.shape[0], down.shape[1]
    magnitude = _magnitude(group, (out, into))
    if config is not None and config.dora is not None and config.dora != (magnitude is not None):
        has = "no lora_magnitude_vector" if config.dora else "a lora_magnitude_vector"
        raise _Misfit(f"{group.key}: has {has}, and {config.where} has use_dora = {config.dora}")
    return _Found((out, into), rank, lambda: (down, up), magnitude)


def _magnitude(group: _Group, shape: tuple[int, int]) -> Tensor | None:
    """Norms (o,) of a DoRA: diffusers' and peft's vector, or LyCORIS' scale of rows."""
    out, into = shape
    if "magnitude" in group.parts and "dora_scale" in group.parts:
        raise _Misfit(f"{group.keys['dora_scale']}: {group.keys['magnitude']} says the same")
    if "magnitude" in group.parts:
        tensor = group.parts["magnitude"]
        if tuple(tensor.shape) not in ((out,), (1, out, 1, 1)):
            raise _Misfit(f"{group.keys['magnitude']} is {tuple(tensor.shape)}, not ({out},)")
        return tensor.flatten()
    if "dora_scale" in group.parts:
        tensor = group.parts["dora_scale"]
        if tensor.ndim not in (2, 4) or tensor.shape[0] != out or tensor.numel() != out:
            columns = tensor.ndim > 1 and tensor.shape[0] == 1 and tensor.numel() in (into, tensor.shape[1])
            why = "norms of columns, which are not read" if columns else f"not ({out}, 1)"
            raise _Misfit(f"{group.keys['dora_scale']} is {tuple(tensor.shape)}: {why}")
        return tensor.flatten()
    return None


def _dense(group: _Group) -> _Found:
    kinds = {part.partition("_")[0] for part in group.parts}
    if not group.parts:
        raise _Misfit(f"{group.key}: the layer has no other part")
    if kinds == {"lokr"}:
        found = _lokr(group)
    elif kinds == {"hada"}:
        found = _loha(group)
    elif kinds == {"diff"}:
        whole = _matrix(group, "diff")
        found = _Found((whole.shape[0], whole.shape[1]), None, lambda: (None, whole))
        if "alpha" in group.keys:
            raise _Misfit(f"{group.keys['alpha']}: has no meaning for {group.keys['diff']}")
    elif odd := [part for part in group.parts if part in ("magnitude", "dora_scale")]:
        raise _Misfit(f"{group.keys[odd[0]]}: only a low-rank change can have it")
    else:
        raise _Misfit(f"{group.key}: the layer has parts of two kinds, {' and '.join(sorted(kinds))}")
    if math.prod(found.shape) > _LARGEST:
        raise _Misfit(f"{group.key}: a change of {found.shape}, larger than any SANA's layer")
    return found


def _factor(group: _Group, name: str) -> tuple[tuple[int, int], int | None, Callable[[], Tensor]]:
    """A factor's shape, the rank of its own factors, and the factor."""
    if name in group.parts:
        whole = _matrix(group, name)
        if f"{name}_a" in group.parts or f"{name}_b" in group.parts:
            raise _Misfit(f"{group.keys[name]}: is there both whole and in factors")
        return (whole.shape[0], whole.shape[1]), None, lambda: whole
    for half in (f"{name}_a", f"{name}_b"):
        if half not in group.parts:
            raise _Misfit(f"{group.key}: the layer's {half} is missing")
    left, right = _matrix(group, f"{name}_a"), _matrix(group, f"{name}_b")
    if left.shape[1] != right.shape[0]:
        shapes = tuple(tuple(group.parts[f"{name}_{half}"].shape) for half in "ab")
        raise _Misfit(f"{group.keys[f'{name}_a']}: {shapes[0]} and {shapes[1]} make no product")
    return (left.shape[0], right.shape[1]), left.shape[1], lambda: left @ right


def _lokr(group: _Group) -> _Found:
    """kron(w1, w2): alpha counts where a factor is itself factored (LyCORIS `lokr.py`)."""
    (rows, columns), one, first = _factor(group, "lokr_w1")
    (more_rows, more_columns), two, second = _factor(group, "lokr_w2")
    if one is not None and two is not None and one != two:
        raise _Misfit(f"{group.key}: its factors are of two ranks, {one} and {two}")
    shape = rows * more_rows, columns * more_columns
    return _Found(shape, one if two is None else two, lambda: (None, torch.kron(first(), second())))


def _loha(group: _Group) -> _Found:
    """(w1_a w1_b) * (w2_a w2_b), entry by entry (LyCORIS `loha.py`)."""
    shape, one, first = _factor(group, "hada_w1")
    other, two, second = _factor(group, "hada_w2")
    if shape != other or one is None or one != two:
        raise _Misfit(f"{group.key}: its factors {shape} and {other}, of ranks {one} and {two}, do not match")
    return _Found(shape, one, lambda: (None, first() * second()))

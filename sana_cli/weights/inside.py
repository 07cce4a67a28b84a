"""Find the SANA in what a trainer saved: a dictionary of tensors and dictionaries.

It may hold several sets of tensors. Each is named by its key path: the dictionary keys and the
name prefixes that lead to it. This module goes by names. It knows no config and opens no file.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sana_cli.choices import Weights
from sana_cli.errors import SanaError, one_line
from sana_cli.weights import pickles, strangers
from sana_cli.weights.official import NOT_THE_TRANSFORMER

KeyPath = tuple[str, ...]

FIRST_LAYERS = ("x_embedder.proj.weight", "patch_embed.proj.weight")  # official, diffusers
FEED_FORWARD = ("mlp.inverted_conv.conv.weight", "ff.conv_inverted.weight")  # in no other transformer
_WRAPPERS = re.compile(  # PyTorch's own
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_USUAL = {  # keys under which trainers save the model that they train
    "state_dict", "model_state_dict", "model", "module", "net", "network", "transformer", "diffusion_model",
    "base_model", "dit", "denoiser", "unet", "sana", "student", "generator", "online_model", "params",
    "weights",
}  # fmt: skip
_CALLBACKS = "callbacks"  # of Lightning, one of which may keep an average
_AVERAGED = re.compile(r"(?:^|[._-])(?:ema|swa|averaged?|shadow)\d*(?:[._-]|$)", re.IGNORECASE)
_ONLINE = "online_model"  # of ema_pytorch: the raw weights, inside its EMA object
_LIT_EMA = "model_ema."  # of latent-diffusion's LitEma, which removes the dots from names
_DEEPEST = 4  # dictionaries inside one another


@dataclass(frozen=True)
class Inside:
    """What a dictionary of tensors and dictionaries holds."""

    sets: dict[KeyPath, dict[str, Tensor]]  # what may be a SANA
    rest: Counter[str]  # number of tensors in none of these, by part
    others: list[str]  # keys of dictionaries without a set
    empty: list[str]  # keys of averages that are None or empty
    nameless: list[str]  # keys of averages whose tensors are not named as a SANA's

    def unread_average(self, read: Sequence[KeyPath]) -> str | None:
        """Why the file's average is not read. None: it is read, or there is none."""
        if any(_is_average(keys) for keys in read):
            return None
        if self.empty:
            return f"{shown((self.empty[0],))} is empty"
        names = [*self.nameless, *(".".join(keys) for keys in self.sets), *self.rest]
        unread = next((name for name in names if _AVERAGED.search(name) and name != "n_averaged"), None)
        return unread and f"{shown((unread,))} is not read: its tensors are not named as a SANA's"


def look_into(content: Mapping[Any, Any]) -> Inside:
    """Find every set that may be a SANA, under any keys and prefixes, at most four deep."""
    inside = Inside({}, Counter(), [], [], [])
    _search(content, (), inside, {id(content)})
    return inside


def _search(content: Mapping[Any, Any], keys: KeyPath, inside: Inside, seen: set[int]) -> bool:
    """Sort a dictionary and those in it into `inside`. Returns whether there is a set."""
    found = _split(content, keys, inside)
    for key, value in pickles.items(content):
        name = str(key)
        path, averaged = (*keys, name), _AVERAGED.search(name) is not None
        if isinstance(value, dict) and value:
            if id(value) in seen or len(path) > _DEEPEST:  # one object under two keys is one set
                continue
            seen.add(id(value))
            if _search(value, path, inside, seen):
                found = True
                continue
            if averaged and tensor_names(value):
                inside.nameless.append(".".join(path))
            if name in strangers.PARTS:
                inside.rest[name] += len(tensor_names(value))
            elif not keys:
                inside.others.append(name)
        elif averaged and (value is None or (isinstance(value, dict | list | tuple) and not value)):
            inside.empty.append(".".join(path))
        elif averaged and isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            inside.nameless.append(".".join(path))
    return found


def _split(content: Mapping[Any, Any], keys: KeyPath, inside: Inside) -> bool:
    """Sort one dictionary's tensors by prefix into `inside`. Returns whether there is a set."""
    named = {str(name): tensor for name, tensor in pickles.items(content) if isinstance(tensor, Tensor)}
    bare = {_WRAPPERS.sub("", name): tensor for name, tensor in named.items()}
    tensors = bare if len(bare) == len(named) else named  # two that would get one name keep theirs
    firsts = [(name, first) for name in tensors for first in FIRST_LAYERS if f".{name}".endswith(f".{first}")]
    sets: dict[str, dict[str, Tensor]] = {name.removesuffix(first): {} for name, first in firsts}  # by prefix
    rest: Counter[str] = Counter()
    for name, tensor in tensors.items():
        prefix = next((p for p in _prefixes(name) if p in sets), None) if sets else None
        if prefix is not None:
            sets[prefix][name.removeprefix(prefix)] = tensor
        elif tensor.ndim:  # single numbers count steps
            rest[name.partition(".")[0]] += 1
    if average := next(filter(None, (_lit_ema(tensors, prefix, raw) for prefix, raw in sets.items())), None):
        sets[_LIT_EMA] = average
        del rest[_LIT_EMA.rstrip(".")]
    for prefix, found in sets.items():
        inside.sets[(*keys, *prefix.split(".")[:-1])] = found
    if sets or not keys:
        inside.rest.update(rest)
    return bool(sets)


def _prefixes(name: str) -> Iterator[str]:
    """The prefixes of a dotted name, the longest first; the last is empty."""
    while name:
        name = name.rstrip(".").rpartition(".")[0]
        name += "." if name else ""
        yield name


def _lit_ema(
    tensors: Mapping[str, Tensor], prefix: str, raw: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """latent-diffusion's average of `raw`, with its buffers. None: missing or not whole."""
    found = {}
    for name, tensor in raw.items():
        flat = _LIT_EMA + f"{prefix}{name}".removeprefix("model.").replace(".", "")
        average = tensors.get(flat, tensor if name in NOT_THE_TRANSFORMER else None)
        if average is None:
            return None
        found[name] = average
    return found


def _is_average(keys: KeyPath) -> bool:
    return _ONLINE not in keys and any(map(_AVERAGED.search, keys))


def is_usual(keys: KeyPath) -> bool:
    """Whether trainers save their model or its average under these keys."""
    if keys[:1] == (_CALLBACKS,):
        return _is_average(keys)
    return all(key in _USUAL or _AVERAGED.search(key) for key in keys)


def choose_set(
    sets: Sequence[KeyPath], unread: str | None, which: Weights, path: Path
) -> tuple[KeyPath, str | None]:
    """Choose one of a file's sets of weights.

    Args:
        sets: their key paths.
        unread: why the file's average is not read, if it has one.
        which: "ema" or "raw".
        path: the file, for messages.

    Returns:
        Its key path, and in words which set it is, if the file names an average.

    Raises:
        SanaError: there is none of that kind, or there are several.
    """
    averaged = [keys for keys in sets if _is_average(keys)]
    raw = [keys for keys in sets if not _is_average(keys)]
    raw = [keys for keys in raw if _ONLINE not in keys] or raw
    if which == "raw" and not (raw and (averaged or unread)):
        raise no_raw_error(path)
    wanted = averaged if averaged and which != "raw" else raw
    if len(wanted) > 1:
        raise SanaError(
            f"{path} holds several SANAs, and which is meant cannot be told: {', '.join(map(shown, wanted))}",
            "save the one that you want alone: torch.save({'state_dict': ...}, FILE)",
        )
    chosen = wanted[0]
    if wanted is averaged:
        others = f"; raw ({', '.join(map(shown, raw))}) with --weights raw" if raw else ""
        return chosen, f"averaged ({shown(chosen)}){others}"
    if averaged or unread:
        return chosen, f"raw ({shown(chosen)})" + (f"; {unread}" if unread else "")
    return chosen, None


def shown(keys: KeyPath) -> str:
    """A key path as messages show it."""
    return one_line(".".join(keys)[: strangers.SHOWN]) or "those without a prefix"


def tensor_names(content: Mapping[Any, Any]) -> list[str]:
    """The names of all tensors in a dictionary and in those inside it, without outer keys."""
    names, queue, seen = [], [content], {id(content)}
    for inner in queue:
        for name, value in pickles.items(inner):
            if isinstance(value, Tensor):
                names.append(str(name))
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                queue.append(value)
    return names


# --- messages ---------------------------------------------------------------------------------


def no_raw_error(path: Path) -> SanaError:
    """The error for raw weights of a file or folder that has one set of weights."""
    return SanaError(f"{path} has no raw weights beside averaged ones", "leave out `weights` raw")


def no_sana_error(content: Mapping[Any, Any], inside: Inside, path: Path) -> SanaError:
    """The error for a dictionary without a SANA under usual keys.

    Raises:
        SanaError: it holds quantised weights or another model.
    """
    names = tensor_names(content)
    strangers.refuse_packed(names, path)
    strangers.refuse_other_model(names, path)
    if inside.sets:
        return SanaError(
            f"{path} holds a SANA's tensors under {', '.join(map(shown, inside.sets))} only, "
            "which may be an optimizer's or another's",
            "if they are the weights, save them alone: torch.save({'state_dict': ...}, FILE)",
        )
    keys = [str(key) for key, value in pickles.items(content) if not isinstance(value, Tensor)]
    return SanaError(not_a_sana(names, path) + (f"; it has {strangers.some(keys)}" if keys else ""))


def not_a_sana(names: Iterable[str], path: Path) -> str:
    """The first line of the error for tensors of another model."""
    return f"{path} holds no SANA: its tensors are called {strangers.some(list(names)) or 'none'}"

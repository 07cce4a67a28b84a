"""Which of a file's tensors are the SANA: trainers put more beside it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sana_cli.errors import SanaError, one_line
from sana_cli.weights import pickles, strangers
from sana_cli.weights.official import NOT_THE_TRANSFORMER


def no_raw(path: Path) -> SanaError:
    """The answer to `--weights raw` where there is one set of weights."""
    return SanaError(f"{path} has no raw weights beside averaged ones", "leave out --weights raw")


FIRST_LAYERS = ("x_embedder.proj.weight", "patch_embed.proj.weight")  # official, diffusers
FEED_FORWARD = ("mlp.inverted_conv.conv.weight", "ff.conv_inverted.weight")  # which no other transformer has
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
            return f"{called((self.empty[0],))} is empty"
        names = [*self.nameless, *(".".join(place) for place in self.sets), *self.rest]
        unread = next((name for name in names if _AVERAGED.search(name) and name != "n_averaged"), None)
        return None if unread is None else f"{called((unread,))} is not read: its tensors are not named as a SANA's"


def look_into(content: Mapping[Any, Any]) -> _Inside:
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
                if averaged and all_names(value):
                    inside.nameless.append(".".join((*place, name)))
                if name in strangers.PARTS:
                    inside.rest[name] += len(all_names(value))
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
        name.removesuffix(first): {} for name in tensors for first in FIRST_LAYERS if f".{name}".endswith(f".{first}")
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
        average = tensors.get(flat, tensor if name in NOT_THE_TRANSFORMER else None)
        if average is None:
            return None
        found[name] = average
    return found


def _is_average(place: tuple[str, ...]) -> bool:
    return _ONLINE not in place and any(map(_AVERAGED.search, place))


def is_usual(place: tuple[str, ...]) -> bool:
    """Whether a trainer's model or its average is to be expected here, and not an optimizer's state or another model."""
    if place[:1] == (_CALLBACKS,):
        return _is_average(place)
    return all(part in _USUAL or _AVERAGED.search(part) for part in place)


def choose(places: Sequence[tuple[str, ...]], unread: str | None, which: str, path: Path) -> tuple[tuple[str, ...], str | None]:
    """Which set of weights is meant, and in words which it is, where the file speaks of an average.

    Raises:
        SanaError: there is none of that kind, or there are several.
    """
    averaged = [place for place in places if _is_average(place)]
    raw = [place for place in places if not _is_average(place)]
    raw = [place for place in raw if _ONLINE not in place] or raw
    if which == "raw" and not (raw and (averaged or unread)):
        raise no_raw(path)
    wanted = averaged if averaged and which != "raw" else raw
    if len(wanted) > 1:
        names = ", ".join(map(called, wanted))
        raise SanaError(
            f"{path} holds several SANAs, and which is meant cannot be told: {names}",
            "save the one that you want alone: torch.save({'state_dict': ...}, FILE)",
        )
    if averaged and wanted is averaged:
        others = f"; raw ({', '.join(map(called, raw))}) with --weights raw" if raw else ""
        return wanted[0], f"averaged ({called(wanted[0])}){others}"
    if averaged or unread:
        return wanted[0], f"raw ({called(wanted[0])})" + (f"; {unread}" if unread else "")
    return wanted[0], None


def called(place: tuple[str, ...]) -> str:
    """What a message calls a set of weights, by the keys that lead to it."""
    return one_line(".".join(place)[: strangers.SHOWN]) or "those without a prefix"


def no_sana(content: Mapping[Any, Any], inside: _Inside, path: Path) -> SanaError:
    """What to say of a dictionary without a SANA in any usual place."""
    names = all_names(content)
    strangers.refuse_packed(names, path)
    strangers.refuse_other_model(names, path)
    if inside.sets:
        return SanaError(
            f"{path} holds a SANA's tensors under {', '.join(map(called, inside.sets))} only, "
            "which may be an optimizer's or another's",
            "if they are the weights, save them alone: torch.save({'state_dict': ...}, FILE)",
        )
    keys = [str(key) for key, value in pickles.items(content) if not isinstance(value, Tensor)]
    return SanaError(not_a_sana(names, path) + (f"; it has {strangers.some(keys)}" if keys else ""))


def not_a_sana(names: Iterable[str], path: Path) -> str:
    """The first line about tensors that are another model's."""
    return f"{path} holds no SANA: its tensors are called {strangers.some(list(names)) or 'none'}"


def all_names(content: Mapping[Any, Any]) -> list[str]:
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

"""Models by Hugging Face id or local path: cache first, then the network, and one message for all that can go wrong.

It knows neither transformers nor diffusers: it is given the function that loads.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sana_cli.errors import SanaError, listed

T = TypeVar("T")


def model_name(source: str) -> str:
    """How a model is called in files: an absolute path by its last part only, anything else as it is."""
    return Path(source).name if Path(source).is_absolute() else source


def hash_weights(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all weights: the same model in other files hashes the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def local_folder(source: str, key: str) -> Path | None:
    """The folder that `source` is, or None where it is a Hugging Face id. `key` is what a message calls it.

    Raises:
        SanaError: it is written as a path, and there is no such folder.
    """
    local = Path(source).expanduser()
    if not (local.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1):
        return None
    if not local.is_dir():
        raise SanaError(f"{key}: no folder {source}", "give a folder with config.json and weights, or a Hugging Face id")
    return local


def load(
    key: str,
    source: str,
    loader: Callable[[bool], T],
    is_local: bool = False,
    what: str = "model",
    revision_key: str = "revision",
    advice: Sequence[str] = (),
) -> T:
    """`loader(local_files_only)`, at first without the network, then with it where that can help.

    Args:
        key: the setting that names the model, for messages.
        source: id or path, for messages.
        loader: loads it; told whether to stay off the network.
        is_local: whether `source` is a folder here.
        what: what kind of model it should be, for messages.
        revision_key: the setting that names its revision, for messages.
        advice: other ways out, one a line.

    Raises:
        SanaError: it cannot be had (gated, missing, offline, no such model), with the ways out.
    """
    with _quiet():
        try:
            return loader(True)  # what is cached needs no network
        except SanaError:
            raise
        except Exception as error:
            if is_local or (cause(error, "LocalEntryNotFoundError", "OfflineModeIsEnabled") is None and not _not_cached(error)):
                raise _explain(error, key, source, is_local, what, revision_key, advice) from error
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        try:
            return loader(offline)
        except SanaError:
            raise
        except Exception as error:
            raise _explain(error, key, source, is_local, what, revision_key, advice) from error


def check_whole(key: str, source: str, info: Mapping[str, Any], unused: Sequence[str] = ()) -> None:
    """Refuse a model whose files lack weights, which its library would fill with random numbers.

    Args:
        key: the setting that names the model.
        source: id or path.
        info: what `from_pretrained(..., output_loading_info=True)` gave beside the model.
        unused: parts whose weights may be missing.

    Raises:
        SanaError: listing what is missing or of another shape.
    """
    missing = sorted(name for name in info.get("missing_keys", ()) if not any(part in name for part in unused))
    wrong = [f"missing: {name}" for name in missing]
    wrong += [f"of another shape: {entry[0] if isinstance(entry, tuple) else entry}" for entry in info.get("mismatched_keys", ())]
    if wrong:
        raise SanaError(f"{key}: the files of {source} lack weights:", *listed(wrong))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The hub logs each retry, and transformers its weight mapping; one message of ours follows instead."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def cause(error: BaseException | None, *names: str) -> BaseException | None:
    """The first error of the chain whose class, or a base of it, has one of these names."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if any(base.__name__ in names for base in type(error).__mro__):
            return error
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _explain(
    error: Exception, key: str, source: str, is_local: bool, what: str, revision_key: str, advice: Sequence[str]
) -> SanaError:
    """One message with the ways out for whatever transformers, diffusers and the hub raised."""
    if is_local:
        return SanaError(
            f"{key}: {source} is not a {what} that can be loaded: {_first_line(error)}",
            "it needs config.json, safetensors weights and, for text, tokenizer files, as `save_pretrained` writes them",
        )
    gated = cause(error, "GatedRepoError")
    status = getattr(getattr(gated or cause(error, "HfHubHTTPError"), "response", None), "status_code", None)
    if gated is not None:
        login = (
            "your token is valid but has no access yet: open the page, accept the licence, and try again"
            if status == 403
            else "accept the licence there, then `hf auth login`, or set HF_TOKEN"
        )
        return SanaError(f"{key}: {source} is gated: https://huggingface.co/{source}", login, *advice)
    if cause(error, "RevisionNotFoundError") is not None:
        return SanaError(f"{revision_key}: {source} has no such branch, tag or commit", f"see https://huggingface.co/{source}")
    if cause(error, "RepositoryNotFoundError", "HFValidationError") is not None or status == 404:
        return SanaError(
            f"{key}: there is no {source} on Hugging Face, or it is private (`hf auth login` or HF_TOKEN), nor a folder here",
            *advice,
        )
    if cause(
        error, "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"
    ) is not None or _not_cached(error):
        return SanaError(
            f"{key}: {source} is not in the local cache, and Hugging Face cannot be reached",
            "connect once (unset HF_HUB_OFFLINE), or give the path of a folder that has the model",
            *advice,
        )
    return SanaError(f"{key}: {source} could not be loaded: {type(error).__name__}: {_first_line(error)}", *advice)


def _not_cached(error: Exception) -> bool:
    """diffusers says only in words that a model is not in the cache."""
    return isinstance(error, OSError) and ("cached" in str(error) or "couldn't connect" in str(error))

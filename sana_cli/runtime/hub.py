"""Load models by Hugging Face id or local path: first from the cache, then from the network.

Every failure becomes one message. It knows neither transformers nor diffusers: the caller
passes the function that loads.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sana_cli.errors import SanaError, first_line, listed

T = TypeVar("T")


def model_name(source: str) -> str:
    """The name of a model in our files: `source`, or the last part of an absolute path."""
    return Path(source).name if Path(source).is_absolute() else source


def hash_weights(model: nn.Module) -> str:
    """`hash_tensors` of all weights of a model."""
    return hash_tensors(model.state_dict())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes of tensors, however the files are split."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def local_folder(source: str, key: str) -> Path | None:
    """The folder that `source` names; None for a Hugging Face id. `key` is for messages.

    Raises:
        SanaError: it looks like a path, but the folder does not exist.
    """
    local = Path(source).expanduser()
    if not (local.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1):
        return None
    if not local.is_dir():
        todo = "give a folder with config.json and weights, or a Hugging Face id"
        raise SanaError(f"{key}: no folder {source}", todo)
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
    """Call `loader(local_files_only)`: without the network, then with it if that can help.

    Args:
        key: the setting that names the model, for messages.
        source: id or path, for messages.
        loader: loads the model; its argument forbids the network.
        is_local: whether `source` is a local folder.
        what: the kind of model, for messages.
        revision_key: the setting that names its revision, for messages.
        advice: alternatives, one per line.

    Raises:
        SanaError: it cannot be loaded (gated, missing, offline, unknown), with what to do.
    """
    with _quiet():
        try:
            return loader(True)  # a cached model needs no network
        except SanaError:
            raise
        except Exception as error:
            if is_local:
                raise _cannot_load(error, key, source, what) from error
            missing = cause(error, "LocalEntryNotFoundError", "OfflineModeIsEnabled") or _not_cached(error)
            if not missing:
                raise _cannot_fetch(error, key, source, revision_key, advice) from error
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        try:
            return loader(offline)
        except SanaError:
            raise
        except Exception as error:
            raise _cannot_fetch(error, key, source, revision_key, advice) from error


def check_complete(key: str, source: str, info: Mapping[str, Any], unused: Sequence[str] = ()) -> None:
    """Refuse a model whose files lack weights: the library would initialise these at random.

    Args:
        key: the setting that names the model.
        source: id or path.
        info: the loading info of `from_pretrained(..., output_loading_info=True)`.
        unused: parts whose weights may be missing.

    Raises:
        SanaError: listing the weights that are missing or of another shape.
    """
    missing = sorted(info.get("missing_keys", ()))
    wrong = [f"missing: {name}" for name in missing if not any(part in name for part in unused)]
    for entry in info.get("mismatched_keys", ()):
        wrong.append(f"of another shape: {entry[0] if isinstance(entry, tuple) else entry}")
    if wrong:
        raise SanaError(f"{key}: the files of {source} lack weights:", *listed(wrong))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' logs of retries and weights: one message of ours follows."""
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
    """The first error in the chain with one of these class names, bases included."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if any(base.__name__ in names for base in type(error).__mro__):
            return error
        error = error.__cause__ or error.__context__
    return None


def _cannot_load(error: Exception, key: str, source: str, what: str) -> SanaError:
    """Return the error for a local folder."""
    return SanaError(
        f"{key}: {source} is not a {what} that can be loaded: {first_line(error)}",
        "it needs config.json, safetensors weights and, for text, tokenizer files,"
        " as `save_pretrained` writes them",
    )


def _cannot_fetch(
    error: Exception, key: str, source: str, revision_key: str, advice: Sequence[str]
) -> SanaError:
    """Return the error for a Hugging Face id, whichever library raised `error`."""
    page = f"https://huggingface.co/{source}"
    gated = cause(error, "GatedRepoError")
    status = getattr(getattr(gated or cause(error, "HfHubHTTPError"), "response", None), "status_code", None)
    if gated is not None:
        login = "accept the licence there, then `hf auth login`, or set HF_TOKEN"
        if status == 403:
            login = (
                "your token is valid but has no access yet: open the page, accept the licence, and try again"
            )
        return SanaError(f"{key}: {source} is gated: {page}", login, *advice)
    if cause(error, "RevisionNotFoundError") is not None:
        return SanaError(f"{revision_key}: {source} has no such branch, tag or commit", f"see {page}")
    if cause(error, "RepositoryNotFoundError", "HFValidationError") is not None or status == 404:
        return SanaError(
            f"{key}: there is no {source} on Hugging Face,"
            " or it is private (`hf auth login` or HF_TOKEN), and no such folder is here",
            *advice,
        )
    unreachable = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError")
    if cause(error, *unreachable) is not None or _not_cached(error):
        return SanaError(
            f"{key}: {source} is not in the local cache, and Hugging Face cannot be reached",
            "connect once (unset HF_HUB_OFFLINE), or give the path of a folder that has the model",
            *advice,
        )
    reason = f"{type(error).__name__}: {first_line(error)}"
    return SanaError(f"{key}: {source} could not be loaded: {reason}", *advice)


def _not_cached(error: Exception) -> bool:
    """Whether diffusers reports, in its text only, that a model is not in the cache."""
    return isinstance(error, OSError) and ("cached" in str(error) or "couldn't connect" in str(error))

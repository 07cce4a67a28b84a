"""The files of a dataset directory: their names, and where a dataset lies until it is whole."""

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from sana_cli.errors import SanaError

FORMAT_VERSION = 1
INDEX = "index.json"
SKIPPED = "skipped.jsonl"
PLAN = "plan.json"
# what the lesson stores: one array of 300 x 2304 float32 for each image, padding included
LESSON_BYTES_PER_IMAGE = 300 * 2304 * 4


def partial_dir(directory: Path) -> Path:
    """Where a dataset lies until it is whole."""
    whole = directory if directory.name else directory.absolute()  # "." has no name of its own
    return whole.with_name(whole.name + ".partial")


def held_out_dir(directory: Path, split: str) -> Path:
    """Where the held-out part of a dataset lies: a dataset of its own, beside it."""
    whole = directory if directory.name else directory.absolute()
    return whole.with_name(f"{whole.name}-{split}")


def is_dataset(directory: Path) -> bool:
    """Whether a finished dataset lies here."""
    return (directory / INDEX).is_file()


_OURS = re.compile(r"index\.json|skipped\.jsonl|plan\.json|(captions|images|window)-\d+(-\d+)?\.(safetensors|json)|\.tmp\w+")


def check_only_ours(directory: Path) -> None:
    """Refuse to replace a folder that holds anything but a dataset's files, or a dataset's in the making.

    Raises:
        SanaError: it does; names it.
    """
    if directory.exists() and not directory.is_dir():
        raise SanaError(f"{directory} is a file", "give another place with --out or --set data.dir=DIR", exit_code=2)
    strange = sorted(path.name for path in directory.iterdir() if not _OURS.fullmatch(path.name)) if directory.exists() else []
    if strange:
        raise SanaError(
            f"{directory} holds {strange[0]}, which is no part of a dataset of sana's, so it is not touched",
            "give another place with --out or --set data.dir=DIR",
            exit_code=2,
        )


def pack_texts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """UTF-8 bytes end to end, and (n + 1,) offsets into them."""
    encoded = [text.encode("utf-8", errors="surrogatepass") for text in texts]
    offsets = torch.tensor([0, *accumulate(map(len, encoded))], dtype=torch.int64)
    return torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)[: int(offsets[-1])], offsets


def unpack_texts(joined: Tensor, offsets: Tensor) -> list[str]:
    """The reverse of `pack_texts`."""
    raw, ends = joined.numpy().tobytes(), offsets.tolist()
    return [text(raw[a:b]) for a, b in pairwise(ends)]


def text(raw: bytes) -> str:
    """UTF-8 bytes as text."""
    try:
        return raw.decode("utf-8", errors="surrogatepass")
    except UnicodeDecodeError:  # damaged, which `verify` finds
        return raw.decode("utf-8", errors="backslashreplace")

"""The files of a dataset directory, and where a dataset lies until it is whole.

    index.json                  written last, has its own hash: counts, fingerprints, shards with hashes
    captions-00000.safetensors  states (tokens, D) bf16 end to end without padding, offsets (n + 1,), texts
    images-00000.safetensors    images (n, C, H, W) uint8 or latents (n, C, H, W) bf16, original_sizes (n, 2),
                                caption_ids (n, k), caption_weights (n, k) where given, sample ids;
                                attributes (n, a) where there are any; caption_attributes (n, k) where
                                captions leave some out
    skipped.jsonl               entries that were left out, and why

An attribute is a number: its place among the values that the index lists for its name, -1 where
an image has none. Bit a of a caption's number says that it names attribute a. Every distinct
caption is stored once. An original size is the height and width of the image before it was fitted.

The images of a file have one shape, which the index has too. A window of the source whose images
have several is several files, by rising height, then width; the second is images-00000-1. Rows are
numbered file by file, so within a window by shape, then in the order of the source.

A dataset is written into a sibling `<name>.partial/` and renamed when
whole. Fingerprints of encoders and sources are plain dictionaries here.

Shapes: n rows of a shard, k captions of an image at most, a attributes known by then, C H W of an
image, D width of a caption state.
"""

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from sana_cli.errors import SanaError

FORMAT_VERSION = 3
INDEX = "index.json"
SKIPPED = "skipped.jsonl"
PLAN = "plan.json"


def beside(directory: Path, ending: str) -> Path:
    """What lies beside a dataset: its name with `ending`."""
    whole = directory if directory.name else directory.absolute()  # "." has no name of its own
    return whole.with_name(whole.name + ending)


def partial_dir(directory: Path) -> Path:
    """The directory of a dataset that is not whole yet."""
    return beside(directory, ".partial")


def held_out_dir(directory: Path, split: str) -> Path:
    """The directory of the held-out part of a dataset: a dataset of its own, beside it."""
    return beside(directory, f"-{split}")


def is_dataset(directory: Path) -> bool:
    """Whether this is a finished dataset."""
    return (directory / INDEX).is_file()


_OURS = re.compile(
    r"index\.json|skipped\.jsonl|plan\.json|(captions|images|window)-\d+(-\d+)?\.(safetensors|json)|\.tmp\w+"
)


def check_only_ours(directory: Path) -> None:
    """Refuse to replace a folder that holds anything but the files of a dataset, finished or not.

    Raises:
        SanaError: it holds something else; names it.
    """
    if directory.exists() and not directory.is_dir():
        raise SanaError(
            f"{directory} is a file", "choose another directory with `out` or --set data.dir=DIR", exit_code=2
        )
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    strange = sorted(name for name in names if not _OURS.fullmatch(name))
    if strange:
        raise SanaError(
            f"{directory} holds {strange[0]}, which is not part of a sana dataset, so it is not touched",
            "choose another directory with `out` or --set data.dir=DIR",
            exit_code=2,
        )


def pack_texts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """UTF-8 bytes end to end, and (n + 1,) offsets into them."""
    encoded = [text.encode("utf-8", errors="surrogatepass") for text in texts]
    offsets = torch.tensor([0, *accumulate(map(len, encoded))], dtype=torch.int64)
    return torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)[
        : int(offsets[-1])
    ], offsets


def unpack_texts(joined: Tensor, offsets: Tensor) -> list[str]:
    """The reverse of `pack_texts`."""
    raw, ends = joined.numpy().tobytes(), offsets.tolist()
    return [decode(raw[a:b]) for a, b in pairwise(ends)]


def decode(raw: bytes) -> str:
    """Bytes of a shard as text."""
    try:
        return raw.decode("utf-8", errors="surrogatepass")
    except UnicodeDecodeError:  # damaged; `verify` reports it
        return raw.decode("utf-8", errors="backslashreplace")

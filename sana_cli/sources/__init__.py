"""Sources of images and captions: what there is to embed, entry by entry, in a fixed order.

    idx.py          MNIST, and files like it
    folder.py       images in folders: metadata.jsonl or .csv, name.txt beside name.png, or class-named sub-folders
    webdataset.py   tar shards, read in stream
    huggingface.py  Hugging Face datasets
    walk.py         what lies below a folder: links, hidden entries, names in another spelling
    metadata.py     rows of metadata.jsonl and .csv
    splits.py       which part of a source a split is
    strays.py       what else lies among images, and why it is not read
    images.py       from a file's bytes to pixels that fit
    containers.py   what of a file the decoders see
    depth.py        brightness and transparency of pixels of any depth
    colour.py       colour profiles

A source yields an `Entry` for each image, whose bytes nobody has decoded yet, or says why one was left out (`Skipped`).
It knows nothing of encoders, nor of how a dataset is stored.
"""

from collections.abc import Callable

from sana_cli.config.keys import DataConfig
from sana_cli.errors import SanaError
from sana_cli.sources.entry import BadImage, Entry, Skipped, Source
from sana_cli.sources.folder import Folder
from sana_cli.sources.huggingface import HuggingFace
from sana_cli.sources.idx import ASSETS, DIGIT_WORDS, MNIST, IdxFiles, read_idx
from sana_cli.sources.images import decode_image, fit_image
from sana_cli.sources.webdataset import WebDataset

__all__ = [
    "ASSETS", "DIGIT_WORDS", "MNIST", "BadImage", "Entry", "Folder", "HuggingFace", "IdxFiles", "Skipped", "Source", "WebDataset",
    "decode_image", "fit_image", "open_source", "read_idx",
]  # fmt: skip

SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "mnist": lambda data: MNIST(data.split, data.path),
    "idx": IdxFiles,
    "folder": Folder,
    "webdataset": WebDataset,
    "datasets": HuggingFace,
}


def open_source(data: DataConfig) -> Source:
    """The source that a config names.

    Raises:
        SanaError: it is not there, or not what it should be.
    """
    if data.source != "mnist" and data.path is None:
        raise SanaError(
            f"data.path: the {data.source} source needs to know where to read", "give --set data.path=PATH", exit_code=2
        )
    return SOURCES[data.source](data)

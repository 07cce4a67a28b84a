"""Sources of images and captions, read entry by entry in a fixed order.

    entry.py        what a source yields
    captions.py     captions and their weights, from a field, a row or a text file
    attributes.py   named attributes, from a row
    idx.py          MNIST and files like it
    folder.py       images in folders, with metadata, .txt files or class folders
    webdataset.py   tar shards, read as a stream
    huggingface.py  Hugging Face datasets
    critters.py     monsters in colour, drawn as they are read
    phrases.py      their captions, and the wordings that training lacks
    windows.py      any of these in fixed runs of entries, decoded ahead
    walk.py         the files below a folder: links, hidden entries, names in another spelling
    metadata.py     rows of metadata.jsonl and .csv
    splits.py       which part of a source a split is
    strays.py       other files among images, and why they are not read
    images.py       from the bytes of a file to pixels of the right size
    containers.py   which bytes of a file the decoders see
    depth.py        brightness and transparency of pixels of any bit depth
    colour.py       colour profiles

A source yields an `Entry` for each image, still encoded, or the reason it was skipped
(`Skipped`). It knows nothing of encoders, nor of how a dataset is stored.
"""

from collections.abc import Callable

from sana_cli.config.keys import BUILT_IN, DataConfig
from sana_cli.errors import SanaError
from sana_cli.sources.critters import Critters
from sana_cli.sources.entry import BadImage, Entry, Skipped, Source
from sana_cli.sources.folder import Folder
from sana_cli.sources.huggingface import HuggingFace
from sana_cli.sources.idx import ASSETS, DIGIT_WORDS, MNIST, IdxFiles, read_idx
from sana_cli.sources.images import decode_image, fit_image
from sana_cli.sources.webdataset import WebDataset

__all__ = [
    "ASSETS", "DIGIT_WORDS", "MNIST", "BadImage", "Critters", "Entry", "Folder", "HuggingFace", "IdxFiles",
    "Skipped", "Source", "WebDataset", "decode_image", "fit_image", "open_source", "read_idx",
]  # fmt: skip

SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "mnist": lambda data: MNIST(data.split, data.path),
    "idx": IdxFiles,
    "folder": Folder,
    "webdataset": WebDataset,
    "datasets": HuggingFace,
    "critters": Critters,
}


def open_source(data: DataConfig) -> Source:
    """Open the source that a config names.

    Raises:
        SanaError: it is missing, or of another kind.
    """
    if data.source not in BUILT_IN and data.path is None:
        raise SanaError(
            f"data.path: the {data.source} source needs to know where to read",
            "give --set data.path=PATH",
            exit_code=2,
        )
    return SOURCES[data.source](data)

"""Which part of a source a split is: a sub-folder of its name, or the shards that are named after it."""

import re
from collections.abc import Iterable
from pathlib import Path

from sana_cli.errors import MOST_LISTED, SanaError
from sana_cli.sources.walk import LEADS_OUT, basename, fold, parent

WORDS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "holdout")


def split_folder(root: Path, split: str) -> Path | None:
    """The sub-folder of a split's name, in the disk's spelling; None where `train` has none: then the folder itself is it.

    Raises:
        SanaError: there is no such split, or it is a link that leads out.
    """
    inner = find_folder(root, split)
    if inner is None and split != "train":
        raise no_split(root, split)
    return inner


def find_folder(root: Path, split: str) -> Path | None:
    """The sub-folder of a split's name, in the disk's spelling; None without one.

    Raises:
        SanaError: it is a link that leads out, or the folder cannot be listed.
    """
    try:
        names = {path.name for path in root.iterdir()}
    except OSError as error:
        raise SanaError(f"data.path: {root} cannot be listed: {error.strerror}", exit_code=2) from error
    named = [split] if split in names else [name for name in names if fold(name) == fold(split)]
    folders = [root / name for name in named if (root / name).is_dir()]
    if len(folders) != 1:
        return None
    if not folders[0].resolve().is_relative_to(root.resolve()):
        raise SanaError(f"data.split: {folders[0]} is {LEADS_OUT.removesuffix('the source')}{root}", exit_code=2)
    return folders[0]


def no_split(root: Path, split: str) -> SanaError:
    """The error for a split that a folder does not have."""
    there = sorted(path.name for path in root.iterdir() if path.name.lower() in WORDS and path.is_dir())
    has = f"it has {', '.join(there[:MOST_LISTED])}; " if there else ""
    return SanaError(f"data.split: {root} has no folder {split}", f"{has}leave it out for a folder without splits", exit_code=2)


def split_of(name: str, split: str) -> str | None:
    """The split that a shard belongs to by its name, in lower case: one of the usual words, or `split`; None without one.

    A folder of that name says it, or else the last such word in the file's own: `imagenet-train-0001.tar` is of `train`.
    """
    words = {*WORDS, split.lower()}
    for folder in reversed(parent(name).lower().split("/")):
        if folder in words:
            return folder
    choices = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    found = re.findall(rf"(?<![^\W\d_])(?:{choices})(?![^\W\d_])", basename(name).lower())
    return found[-1] if found else None


def only_other_splits(names: Iterable[str]) -> list[str]:
    """The top folders of all these files, if they are named as splits are; nothing if one is not, or a file lies in none."""
    tops = {name.partition("/")[0] if "/" in name else "" for name in names}
    return sorted(tops) if tops and all(top.lower() in WORDS for top in tops) else []

"""Which part of a source a split is: the sub-folder or the shards with its name."""

import re
from collections.abc import Iterable
from pathlib import Path

from sana_cli.errors import MOST_LISTED, SanaError
from sana_cli.sources.walk import LEADS_OUT, basename, fold, parent

WORDS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "holdout")


def split_folder(root: Path, split: str) -> Path | None:
    """Find the sub-folder of a split. None for `train` without a sub-folder: use `root` itself.

    Raises:
        SanaError: the split does not exist, or is a link that leads out.
    """
    inner = find_folder(root, split)
    if inner is None and split != "train":
        raise no_split(root, split)
    return inner


def find_folder(root: Path, split: str) -> Path | None:
    """Find the sub-folder with a split's name, spelt as on the disk; None without one.

    Raises:
        SanaError: it is a link that leads out, or the folder cannot be listed.
    """
    try:
        names = {path.name for path in root.iterdir()}
    except OSError as error:
        raise SanaError(f"data.path: {root} cannot be listed: {error.strerror}", exit_code=2) from error
    matches = [split] if split in names else [name for name in names if fold(name) == fold(split)]
    folders = [root / name for name in matches if (root / name).is_dir()]
    if len(folders) != 1:
        return None
    if not folders[0].resolve().is_relative_to(root.resolve()):
        raise SanaError(
            f"data.split: {folders[0]} is {LEADS_OUT.removesuffix('the source')}{root}", exit_code=2
        )
    return folders[0]


def no_split(root: Path, split: str) -> SanaError:
    """Return the error for a split that a folder does not have."""
    found = sorted(path.name for path in root.iterdir() if path.name.lower() in WORDS and path.is_dir())
    has = f"it has {', '.join(found[:MOST_LISTED])}; " if found else ""
    return SanaError(
        f"data.split: {root} has no folder {split}",
        f"{has}leave it out for a folder without splits",
        exit_code=2,
    )


def split_of(name: str, split: str) -> str | None:
    """Read the split of a shard from its name, in lower case: one of `WORDS`, `split`, or None.

    The innermost folder with such a name counts first, then the last such word of the file
    name: `imagenet-train-0001.tar` belongs to `train`.
    """
    words = {*WORDS, split.lower()}
    for folder in reversed(parent(name).lower().split("/")):
        if folder in words:
            return folder
    choices = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    found = re.findall(rf"(?<![^\W\d_])(?:{choices})(?![^\W\d_])", basename(name).lower())
    return found[-1] if found else None


def only_other_splits(names: Iterable[str]) -> list[str]:
    """List the top folders of these files if all are named as splits; else an empty list."""
    tops = {name.partition("/")[0] if "/" in name else "" for name in names}
    return sorted(tops) if tops and all(top.lower() in WORDS for top in tops) else []

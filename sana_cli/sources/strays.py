"""Files among images that are not read: the reason, from their names, and what to do.

Files that usually accompany images (README, LICENSE, `.json` of other programs) are not
reported.
"""

import re

from sana_cli.sources.images import SUFFIXES, unread_reason
from sana_cli.sources.walk import basename, stem, suffix

UNPACKED_BY = {
    ".tgz": "gunzip", ".gz": "gunzip", ".tbz2": "bunzip2", ".bz2": "bunzip2", ".txz": "unxz", ".xz": "unxz",
    ".zst": "unzstd", ".lz4": "unlz4", ".zip": "unzip", ".7z": "7z", ".rar": "unrar",
}  # fmt: skip
COLUMNS = (".parquet", ".arrow", ".feather", ".tfrecord", ".h5", ".hdf5", ".lmdb", ".mdb")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".xlsx", ".xls", ".ods")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
UNFINISHED = (".part", ".partial", ".crdownload", ".download")
CAPTION_SUFFIXES = (*TABLES, *COLUMNS, ".json", ".txt", ".yaml", ".yml", ".pkl")

_CAPTION_WORD = re.compile(r"(?<![^\W\d_])(metadata|captions?|prompts?)(?![^\W\d_])")  # a whole word
_ORDINARY = re.compile(
    r"(read_?me|licen[cs]e|copying|notice|credits|authors|change(log|s)|requirements|attribution)\b"
)


def why_unread(name: str) -> str | None:
    """Why a file that looks like pictures or data is not read; None for others."""
    kind = suffix(name)
    if reason := unread_reason(name):
        return reason
    if tool := UNPACKED_BY.get(kind):
        is_shard = ".tar" in name.lower() or kind in (".tgz", ".tbz2", ".txz")
        since = ", since shards are read in stream" if is_shard else ""
        return f"compressed: unpack it with {tool}{since}"
    if kind in COLUMNS:
        return f"{kind} is not read here: data.source=datasets reads it, or save it as metadata.jsonl"
    if kind in TABLES:
        read = "captions are read from metadata.jsonl or metadata.csv"
        return f"not read: {read}, and this is called {basename(name)}"
    if kind in VIDEOS:
        return "videos are not read"
    if kind in UNFINISHED:
        return "an unfinished download"
    if kind not in SUFFIXES and any(kind.startswith(known) for known in SUFFIXES):  # .jpg_large, .png?x=1
        return f"its suffix {kind} is not read: rename it"
    return None


def is_ordinary(name: str) -> bool:
    """Whether a text file is one that most folders have: README.txt, LICENSE.txt."""
    return _ORDINARY.match(basename(name).lower()) is not None


def is_caption_file(name: str) -> bool:
    """Whether a name suggests a list of captions: metadata.parquet, train_captions.csv."""
    plain = basename(name).lower()
    if _CAPTION_WORD.search(plain) is None:
        return False
    while suffix(plain) in UNPACKED_BY:
        plain = stem(plain)
    return suffix(plain) in CAPTION_SUFFIXES and _CAPTION_WORD.search(stem(plain)) is not None

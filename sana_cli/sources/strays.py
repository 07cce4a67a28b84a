"""Files that lie among images and are not read: what they are by their names, and what to do about them.

Companions that nobody misses, such as README, LICENSE and `.json` of other programs, are not among them.
"""

import re

from sana_cli.sources.images import SUFFIXES, unread_reason
from sana_cli.sources.walk import basename, stem, suffix

UNPACKED_BY = {
    ".tgz": "gunzip", ".gz": "gunzip", ".tbz2": "bunzip2", ".bz2": "bunzip2", ".txz": "unxz", ".xz": "unxz", ".zst": "unzstd",
    ".lz4": "unlz4", ".zip": "unzip", ".7z": "7z", ".rar": "unrar",
}  # fmt: skip
COLUMNS = (".parquet", ".arrow", ".feather", ".tfrecord", ".h5", ".hdf5", ".lmdb", ".mdb")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".xlsx", ".xls", ".ods")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
UNFINISHED = (".part", ".partial", ".crdownload", ".download")
CAPTIONS_IN = (*TABLES, *COLUMNS, ".json", ".txt", ".yaml", ".yml", ".pkl")

_OF_CAPTIONS = re.compile(r"(?<![^\W\d_])(metadata|captions?|prompts?)(?![^\W\d_])")  # a whole word of the name
_ORDINARY = re.compile(r"(read_?me|licen[cs]e|copying|notice|credits|authors|change(log|s)|requirements|attribution)\b")


def why_unread(name: str) -> str | None:
    """Why a file is not read that looks like pictures or data; None for others."""
    kind = suffix(name)
    if reason := unread_reason(name):
        return reason
    if tool := UNPACKED_BY.get(kind):
        shards = ", since shards are read in stream" if ".tar" in name.lower() or kind in (".tgz", ".tbz2", ".txz") else ""
        return f"compressed: unpack it with {tool}{shards}"
    if kind in COLUMNS:
        return f"{kind} is not read here: data.source=datasets reads it, or save it as metadata.jsonl"
    if kind in TABLES:
        return f"not read: captions are read from metadata.jsonl or metadata.csv, and this is called {basename(name)}"
    if kind in VIDEOS:
        return "videos are not read"
    if kind in UNFINISHED:
        return "an unfinished download"
    if kind not in SUFFIXES and any(kind.startswith(known) for known in SUFFIXES):  # .jpg_large, .jpeg~, .png?x=1
        return f"its suffix {kind} is not read: rename it"
    return None


def is_ordinary(name: str) -> bool:
    """Whether a text file is one of those that lie in every folder: README.txt, LICENSE.txt."""
    return _ORDINARY.match(basename(name).lower()) is not None


def of_captions(name: str) -> bool:
    """Whether a file is called as lists of captions are: metadata.parquet, captions.json, train_captions.csv."""
    plain = basename(name).lower()
    if _OF_CAPTIONS.search(plain) is None:
        return False
    while suffix(plain) in UNPACKED_BY:
        plain = stem(plain)
    return suffix(plain) in CAPTIONS_IN and _OF_CAPTIONS.search(stem(plain)) is not None

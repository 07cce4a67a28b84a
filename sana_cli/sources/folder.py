"""Images in a folder, with captions in one of three ways, found out by looking.

    metadata.jsonl or metadata.csv   `file_name`, and captions in the field `data.caption_field` (a string or a list)
    name.png with name.txt           a caption a line
    sub-folders                      named after a class, which goes into `data.caption_template`

The first two are what Hugging Face's imagefolder and most trainers read. With `data.split`, a sub-folder of that name is
the source. Metadata may lie in sub-folders, and above a split's folder; where there is any, nothing else gives captions.
What looks like images or captions and is not read comes last, each file with its reason.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sana_cli.config.keys import DataConfig
from sana_cli.errors import SanaError, listed
from sana_cli.sources import metadata, strays
from sana_cli.sources.entry import (
    MAX_CAPTION_BYTES,
    BadImage,
    Entry,
    Skipped,
    caption_lines,
    captions_of,
    captions_of_row,
    hash_files,
    need_folder,
)
from sana_cli.sources.images import SUFFIXES
from sana_cli.sources.splits import WORDS, only_other_splits, split_folder
from sana_cli.sources.walk import CIRCLE, NOWHERE, Tree, basename, is_hidden, parent, stem, suffix

MOST_PEEKED = 20  # files of other programs that are looked into for captions
MOST_ROWS_ABOVE = 100  # rows of metadata above the source that are looked at
CAPTION_KEYS = ("caption", "captions", "text", "prompt", "tags")  # what trainers call captions in .json beside an image


class Folder:
    """A folder of captioned images, in the order of its metadata, or of their names."""

    def __init__(self, data: DataConfig) -> None:
        root = need_folder(data.path)
        inner = split_folder(root, data.split)
        self.data, self.root = data, inner or root
        self.tree = Tree(self.root, root, SUFFIXES)
        self.images = [name for name in self.tree.files if suffix(name) in SUFFIXES]
        if inner is None and (there := only_other_splits(self.images)):
            raise SanaError(
                f"data.split: {root} has no folder {data.split}, but {', '.join(there)}",
                f"choose one, for example --set data.split={there[0]}",
                exit_code=2,
            )
        beside = (path.name for path in root.iterdir()) if inner else iter(())
        self.above = {name for name in beside if not is_hidden(name)}  # what lies beside the split's folder
        self.metadata = metadata.find(self.tree, data.caption_field, root if inner else None)
        self.texts = {} if self.metadata else self._texts()  # by image, the .txt beside it
        tops = sorted({name.partition("/")[0] for name in self.images if "/" in name})
        self.classes = {name: number for number, name in enumerate(tops)}
        self._count: int | None = None
        self._check()

    # --- what must not be taken for something else --------------------------------------------------------------------

    def _check(self) -> None:
        """Refuse a folder whose captions are not read, so that other words do not take their place.

        Raises:
            SanaError: naming the file that seems to hold them.
        """
        if self.metadata:
            if all(one.above for one in self.metadata) and all(isinstance(row, str) for _, _, row in self._rows()):
                path = self.metadata[0].path
                raise SanaError(
                    f"{path} names no image of {self.root.name}/",
                    f"its file names are relative to its own folder: {self.root.name}/NAME",
                    exit_code=2,
                )
            return
        if not self.images:
            unread = listed([f"{left.name}: {left.reason}" for left in self._left(())])
            raise SanaError(
                f"data.path: {self.root} has neither metadata.jsonl, metadata.csv nor images ({' '.join(SUFFIXES)})",
                *unread,
                metadata.example(self.data.caption_field),
                exit_code=2,
            )
        for path, todo in itertools.chain(self._tables(), () if self.texts else self._sidecars()):
            instead = "captions would be the names of folders" if self.classes else "there would be no captions"
            instead = "captions would come from .txt" if self.texts else instead
            raise SanaError(
                f"data.path: {path} seems to hold captions, and is not read: {instead}",
                f"{todo}; or move it elsewhere",
                exit_code=2,
            )
        if not self.texts:
            self._check_above()

    def _tables(self) -> Iterator[tuple[Path, str]]:
        """Files that are called as lists of captions are, and what to do about each."""
        example = f"write metadata.jsonl instead; {metadata.example(self.data.caption_field)}"
        for folder, names in ((self.root.parent, sorted(self.above)), (self.root, self.tree.files)):
            for name in filter(strays.of_captions, names):
                general = suffix(name) in (".json", ".txt", ".yaml", ".yml")  # may tell of all images in one
                if not self.texts or (basename(name).lower().startswith("metadata.") and not general):
                    yield folder / name, example

    def _sidecars(self) -> Iterator[tuple[Path, str]]:
        """Files that seem to be the captions of single images, and what to do about each."""
        images = {**{stem(name): name for name in self.images}, **{name: name for name in self.images}}
        elsewhere = {stem(basename(name)): name for name in self.images}
        peeked = 0
        for name in self.tree.files:
            kind, of = suffix(name), stem(name)
            if kind not in (".txt", ".caption", ".json"):
                continue
            image = images.get(of)
            if image is not None and kind != ".json":
                yield self.root / name, f"rename it {basename(stem(image))}.txt, as all of its kind"
            elif image is not None and peeked < MOST_PEEKED:
                peeked += 1
                if _holds_caption(self.root / name, (self.data.caption_field, *CAPTION_KEYS)):
                    yield self.root / name, f"write its caption to {basename(stem(image))}.txt beside the image"
            elif kind == ".txt" and basename(of) in elsewhere:
                yield self.root / name, f"put it beside its image, {elsewhere[basename(of)]}"

    def _check_above(self) -> None:
        """Refuse a folder whose images metadata above it names, which is not read."""
        folder = Path(os.path.abspath(self.root))  # noqa: PTH100 (a link stays the link that was given)
        try:
            beside = [path for path in folder.parent.iterdir() if metadata.is_metadata(path.name) and path.is_file()]
            for path in beside:
                for _, row in itertools.islice(metadata.Metadata(path, path.name).rows(), MOST_ROWS_ABOVE):
                    name = metadata.of_split(row["file_name"], folder.name, ()) if isinstance(row, dict) else None
                    if name and name in self.tree.files:
                        split = f" --set data.split={folder.name}" if folder.name.lower() in WORDS else ""
                        raise SanaError(
                            f"data.path: {path} names images of {self.root}, and is not read from there",
                            f"give its own folder: --set data.path={folder.parent}{split}",
                            exit_code=2,
                        )
        except (OSError, ValueError):  # no file for us, then
            return

    # --- entries ------------------------------------------------------------------------------------------------------

    def count(self) -> int | None:
        """Rows of the metadata, or images; and the files that are not read."""
        if self._count is None:
            if self.metadata:
                named = [name for name, _ in self._named()]
                self._count = len(named) + len(self._left(frozenset(named)))
            else:
                self._count = len(self.images) + len(self._left(frozenset(self.images)))
        return self._count

    def __iter__(self) -> Iterator[Entry | Skipped]:
        taken = set[str]()
        yield from self._of_rows(taken) if self.metadata else self._of_images(taken)
        yield from self._left(taken)

    def _of_images(self, taken: set[str]) -> Iterator[Entry | Skipped]:
        """Images with the captions that lie with them; the names of all go into `taken`."""
        for name in self.images:
            taken.add(name)
            try:
                yield self._entry(name)
            except BadImage as error:
                yield Skipped(name, str(error))

    def _of_rows(self, taken: set[str]) -> Iterator[Entry | Skipped]:
        """What the rows of the metadata name, which goes into `taken`."""
        kept = set[str]()
        for name, row in self._named():
            taken.add(name)
            try:
                if isinstance(row, str):
                    raise BadImage(row)
                if name in kept:
                    raise BadImage("named twice; the first is kept")
                captions, weights = captions_of_row(row, self.data.caption_field)
            except BadImage as error:
                yield Skipped(name, str(error))
            else:
                kept.add(name)
                yield Entry(name, self.root / name, captions, weights=weights)

    def _rows(self) -> Iterator[tuple[str, str, dict[str, Any] | str]]:
        """(folder, file name in it, row) for each row of the metadata that is not another split's.

        Of a row that cannot be used, (folder, where it is, why).
        """
        for one in self.metadata:
            for place, row in one.rows():
                name: str | None = place
                if isinstance(row, dict):
                    name = row["file_name"]
                    if one.above:
                        name = metadata.of_split(row["file_name"], self.root.name, self.above)
                if name is not None:
                    yield one.folder, name, row

    def _named(self) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """(file, row) for each row, by the file's name on the disk, or (what was named, why it cannot be used)."""
        for folder, name, row in self._rows():
            if isinstance(row, str):
                yield name, row
                continue
            try:
                yield self.tree.find(name, folder), row
            except BadImage as error:
                yield f"{folder}/{name}" if folder and not name.startswith("/") else name, str(error)

    def _entry(self, name: str) -> Entry:
        path = self.root / name
        if self.texts:
            return Entry(name, path, captions_of(self._lines(name))[0])
        if "/" not in name:
            raise BadImage("no caption: no metadata, no .txt beside it, and no class-named folder around it")
        label = name.partition("/")[0]
        caption = self.data.caption_template.replace("{}", label.replace("_", " "))
        return Entry(name, path, (caption,), self.classes[label])

    def _texts(self) -> dict[str, str]:
        """The .txt of each image that has one: of exactly its name, or else of nearly its name and of no other image."""
        files, left_out = self.tree.files, self.tree.left_out
        if not any(suffix(name) == ".txt" for name in itertools.chain(files, left_out)):
            return {}
        found, stems = {}, set(map(stem, self.images))
        for image in self.images:
            own = stem(image) + ".txt"
            alike = [own] if own in files or own in left_out else self.tree.alike(own)
            alike = [name for name in alike if stem(name) == stem(image) or stem(name) not in stems]
            if len(alike) == 1:
                found[image] = alike[0]
        return found

    def _lines(self, image: str) -> list[str]:
        """The captions beside an image."""
        text = self.texts.get(image)
        if text is None:
            others = (stem(image) + ".caption", stem(image) + ".json", image + ".txt", image + ".json")
            unread = next((other for other in others if other in self.tree.files), None)
            raise BadImage(f"no caption: {basename(unread)} is not read" if unread else "no caption")
        if reason := self.tree.left_out.get(text):
            raise BadImage(f"its captions: {reason}")
        path = self.root / text
        try:
            if path.stat().st_size > MAX_CAPTION_BYTES:
                raise BadImage(f"its captions are over {MAX_CAPTION_BYTES:,} bytes")
            return caption_lines(path.read_bytes())
        except OSError as error:
            raise BadImage(f"its captions cannot be read: {error.strerror}") from error

    # --- what is there, and is not read -------------------------------------------------------------------------------

    def _left(self, taken: Collection[str]) -> list[Skipped]:
        """What is not among `taken` and looks like images or captions, in order of the names."""
        used = {*self.texts.values(), *(one.name for one in self.metadata)}
        beside = {stem(name) for name in self.images} | set(self.images)
        found = {name: self._why(name, beside) for name in self.tree.files if name not in taken and name not in used}
        for name, reason in self.tree.left_out.items():
            if name not in taken and name not in used and not (self.metadata and reason in (NOWHERE, CIRCLE)):
                found[name] = reason
        for name in filter(metadata.is_metadata, self.above):
            if f"../{name}" not in used:
                found[f"../{name}"] = self._why(f"../{name}", beside)
        return [Skipped(name, reason) for name, reason in sorted(found.items()) if reason is not None]

    def _why(self, name: str, beside: Collection[str]) -> str | None:
        """Why a file is not read; None where nobody would miss it. `beside` has the images, with and without suffixes."""
        kind = suffix(name)
        if metadata.is_metadata(name):
            read = [basename(one.name) for one in self.metadata if parent(one.name) == parent(name)]
            return f"{read[0]} beside it is read" if read else None
        if kind in SUFFIXES:
            return self._why_unnamed(name)
        if kind == ".tar":
            return "not read: data.source=webdataset reads .tar"
        if reason := strays.why_unread(name):
            return reason
        if strays.of_captions(name):
            return "not read: captions are read from metadata.jsonl, metadata.csv, or .txt of an image's name"
        if self.metadata or strays.is_ordinary(name):
            return None
        if self.texts:
            return "no image" if kind == ".txt" else None
        told = (kind == ".txt" and self.images) or (kind in (".json", ".caption") and stem(name) in beside)
        return f"{kind} is not read here: captions are the names of folders" if told else None

    def _why_unnamed(self, name: str) -> str:
        """Of an image that no row names: the nearest metadata that could have."""
        folder, own = name, {one.folder: one.name for one in self.metadata}
        while folder:
            folder = parent(folder)
            if folder in own:
                return f"{own[folder]} does not name it"
        return "no metadata names it"

    def fingerprint(self) -> dict[str, Any]:
        """The hash of all names, captions and image files: what changes if one is added, replaced or recaptioned.

        What is not read anyway does not count: a .zip that is put there later makes no other dataset.
        """
        digest, images = hashlib.sha256(), list[Path]()
        for entry in self._of_rows(set()) if self.metadata else self._of_images(set()):
            if isinstance(entry, Skipped):
                digest.update(json.dumps([entry.name, entry.reason]).encode())
                continue
            assert isinstance(entry.image, Path)
            images.append(entry.image)
            digest.update(json.dumps([entry.id, entry.captions, entry.weights]).encode())
        for content in hash_files(images):
            digest.update(content.encode())
        return {"source": "folder", "split": self.data.split, "sha256": digest.hexdigest()}


def _holds_caption(path: Path, keys: Collection[str]) -> bool:
    """Whether a .json beside an image has captions in it, as trainers write them."""
    try:
        if path.stat().st_size > MAX_CAPTION_BYTES:
            return False
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and any(isinstance(record.get(key), str | list) and record[key] for key in keys)

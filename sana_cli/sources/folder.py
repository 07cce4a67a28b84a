"""Images in a folder, with captions in one of three forms, detected in this order.

    metadata.jsonl or metadata.csv  `file_name`, and a caption or a list in `data.caption_field`
    name.png with name.txt          one caption per line
    sub-folders                     named after a class, which fills `data.caption_template`

Hugging Face's imagefolder and most trainers read the first two forms. If a sub-folder has the
name of `data.split`, it is the source. Metadata may lie in sub-folders, and above the folder of
a split. With metadata, captions come from nowhere else. Files that look like images or captions
but are not read come last, each with its reason.
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
from sana_cli.sources.captions import MAX_CAPTION_BYTES, captions_of_row, captions_of_text
from sana_cli.sources.entry import LABEL, BadImage, Entry, Skipped, hash_files, need_folder
from sana_cli.sources.images import SUFFIXES
from sana_cli.sources.splits import WORDS, only_other_splits, split_folder
from sana_cli.sources.walk import CIRCLE, NOWHERE, Tree, basename, is_hidden, parent, stem, suffix

MAX_PEEKED = 20  # .json files beside images that are searched for captions
MAX_ROWS_ABOVE = 100  # rows that are checked in metadata above the source
CAPTION_KEYS = ("caption", "captions", "text", "prompt", "tags")  # of .json files that trainers write


class Folder:
    """A folder of captioned images, in the order of its metadata or of the file names."""

    def __init__(self, data: DataConfig) -> None:
        root = need_folder(data.path)
        inner = split_folder(root, data.split)
        self.data, self.root = data, inner or root
        self.tree = Tree(self.root, root, SUFFIXES)
        self.images = [name for name in self.tree.files if suffix(name) in SUFFIXES]
        if inner is None and (splits := only_other_splits(self.images)):
            raise SanaError(
                f"data.split: {root} has no folder {data.split}, but {', '.join(splits)}",
                f"choose one, for example --set data.split={splits[0]}",
                exit_code=2,
            )
        beside = (path.name for path in root.iterdir()) if inner else iter(())
        self.above = {name for name in beside if not is_hidden(name)}  # what lies beside the split's folder
        self.metadata = metadata.find(self.tree, data, root if inner else None)
        self.texts = {} if self.metadata else self._texts()  # image -> its .txt
        self.classes = sorted({name.partition("/")[0] for name in self.images if "/" in name})
        self._count: int | None = None
        self._check()

    # --- checks -------------------------------------------------------------------------------

    def _check(self) -> None:
        """Refuse a folder with captions that are not read, rather than use other words instead.

        Raises:
            SanaError: naming the file that seems to hold them.
        """
        if self.metadata:
            self._check_names()
            return
        if not self.images:
            raise SanaError(
                f"data.path: {self.root} has neither metadata.jsonl, metadata.csv nor images"
                f" ({' '.join(SUFFIXES)})",
                *listed(list(map(str, self._left_out(())))),
                metadata.example(self.data.caption_field),
                exit_code=2,
            )
        for path, todo in itertools.chain(self._tables(), () if self.texts else self._sidecars()):
            then = "captions would be the names of folders" if self.classes else "there would be no captions"
            then = "captions would come from .txt" if self.texts else then
            raise SanaError(
                f"data.path: {path} seems to hold captions, but is not read: {then}",
                f"{todo}; or move it elsewhere",
                exit_code=2,
            )
        if not self.texts:
            self._check_above()

    def _check_names(self) -> None:
        """Refuse metadata above the split's folder that names nothing in it."""
        rows = (row for _, _, row in self._rows())
        if all(one.above for one in self.metadata) and all(isinstance(row, str) for row in rows):
            raise SanaError(
                f"{self.metadata[0].path} names no image of {self.root.name}/",
                f"its file names are relative to its own folder: {self.root.name}/NAME",
                exit_code=2,
            )

    def _tables(self) -> Iterator[tuple[Path, str]]:
        """Files that are named like lists of captions, and what to do about each."""
        example = f"write metadata.jsonl instead; {metadata.example(self.data.caption_field)}"
        for folder, names in ((self.root.parent, sorted(self.above)), (self.root, self.tree.files)):
            for name in filter(strays.is_caption_file, names):
                # the others may describe the whole set
                is_table = suffix(name) not in (".json", ".txt", ".yaml", ".yml")
                if not self.texts or (basename(name).lower().startswith("metadata.") and is_table):
                    yield folder / name, example

    def _sidecars(self) -> Iterator[tuple[Path, str]]:
        """Files that seem to caption single images, and what to do about each."""
        found = [name for name in self.tree.files if suffix(name) in (".txt", ".caption", ".json")]
        if not found:
            return
        images = {**{stem(name): name for name in self.images}, **{name: name for name in self.images}}
        elsewhere = {stem(basename(name)): name for name in self.images}
        peeked = 0
        for name in found:
            path, kind, of = self.root / name, suffix(name), stem(name)
            image = images.get(of)
            if image is not None and kind != ".json":
                yield path, f"rename it {basename(stem(image))}.txt, as all of its kind"
            elif image is not None and peeked < MAX_PEEKED:
                peeked += 1
                if _holds_caption(path, (self.data.caption_field, *CAPTION_KEYS)):
                    yield path, f"write its caption to {basename(stem(image))}.txt beside the image"
            elif kind == ".txt" and basename(of) in elsewhere:
                yield path, f"put it beside its image, {elsewhere[basename(of)]}"

    def _check_above(self) -> None:
        """Refuse a folder whose images are named by metadata above it, which is not read."""
        folder = Path(os.path.abspath(self.root))  # noqa: PTH100 (resolve() would follow the user's link)
        try:
            beside = [path for path in folder.parent.iterdir() if metadata.is_metadata(path.name)]
            for path in filter(Path.is_file, beside):
                for _, row in itertools.islice(metadata.Metadata(path, path.name).rows(), MAX_ROWS_ABOVE):
                    if isinstance(row, str):
                        continue
                    name = metadata.within_split(row["file_name"], folder.name, ())
                    if name and name in self.tree.files:
                        split = f" --set data.split={folder.name}" if folder.name.lower() in WORDS else ""
                        raise SanaError(
                            f"data.path: {path} names images of {self.root}, but is not read from there",
                            f"give its own folder: --set data.path={folder.parent}{split}",
                            exit_code=2,
                        )
        except (OSError, ValueError):  # not a file that we could read
            return

    # --- entries ------------------------------------------------------------------------------

    def count(self) -> int | None:
        """Count the rows of the metadata, or the images, and the files that are not read."""
        if self._count is None:
            names = [name for name, _ in self._named()] if self.metadata else self.images
            self._count = len(names) + len(self._left_out(frozenset(names)))
        return self._count

    def __iter__(self) -> Iterator[Entry | Skipped]:
        taken = set[str]()
        yield from self._of_rows(taken) if self.metadata else self._of_images(taken)
        yield from self._left_out(taken)

    def _of_images(self, taken: set[str]) -> Iterator[Entry | Skipped]:
        """Images with captions beside or around them. Add all names to `taken`."""
        for name in self.images:
            taken.add(name)
            try:
                yield self._entry(name)
            except BadImage as error:
                yield Skipped(name, str(error))

    def _of_rows(self, taken: set[str]) -> Iterator[Entry | Skipped]:
        """Images that the metadata names. Add all names to `taken`."""
        kept = set[str]()
        for name, row in self._named():
            taken.add(name)
            try:
                if isinstance(row, str):
                    raise BadImage(row)
                if name in kept:
                    raise BadImage("named twice; the first is kept")
                found = captions_of_row(row, self.data)
            except BadImage as error:
                yield Skipped(name, str(error))
            else:
                kept.add(name)
                yield Entry(name, self.root / name, **found._asdict())

    def _rows(self) -> Iterator[tuple[str, str, dict[str, Any] | str]]:
        """(folder, file name in it, row) for each metadata row, except rows of other splits.

        For an unusable row: (folder, file and line, reason).
        """
        for one in self.metadata:
            for position, row in one.rows():
                name: str | None = position
                if isinstance(row, dict):
                    name = row["file_name"]
                    if one.above:
                        name = metadata.within_split(row["file_name"], self.root.name, self.above)
                if name is not None:
                    yield one.folder, name, row

    def _named(self) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """(file as spelt on the disk, row) for each row; (given name, reason) if unusable."""
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
            return Entry(name, path, self._captions(name))
        if "/" not in name:
            raise BadImage("no caption: no metadata, no .txt beside it, and no class-named folder around it")
        label = name.partition("/")[0]
        caption = self.data.caption_template.replace("{}", label.replace("_", " "))
        shown = label.encode("utf-8", "backslashreplace").decode()  # a name may be other bytes
        return Entry(name, path, (caption,), {LABEL: shown})

    def _texts(self) -> dict[str, str]:
        """Map images to .txt files of the same name, or of nearly the same if unambiguous."""
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

    def _captions(self, image: str) -> tuple[str, ...]:
        """Read the .txt beside an image."""
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
            return captions_of_text(path.read_bytes())
        except OSError as error:
            raise BadImage(f"its captions cannot be read: {error.strerror}") from error

    # --- files that are not read --------------------------------------------------------------

    def _left_out(self, taken: Collection[str]) -> list[Skipped]:
        """Files that look like images or captions and are not in `taken`, sorted by name."""
        used = {*taken, *self.texts.values(), *(one.name for one in self.metadata)}
        unused = [name for name in self.tree.files if name not in used]
        with_sidecars = {stem(name) for name in self.images} | set(self.images) if unused else set[str]()
        found = {name: self._why(name, with_sidecars) for name in unused}
        for name, reason in self.tree.left_out.items():
            if name not in used and not (self.metadata and reason in (NOWHERE, CIRCLE)):
                found[name] = reason
        for name in filter(metadata.is_metadata, self.above):
            if f"../{name}" not in used:
                found[f"../{name}"] = self._why(f"../{name}", with_sidecars)
        return [Skipped(name, reason) for name, reason in sorted(found.items()) if reason is not None]

    def _why(self, name: str, with_sidecars: Collection[str]) -> str | None:
        """Why a file is not read; None for a file that should not be reported.

        `with_sidecars` has the names of the images, with and without suffixes.
        """
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
        if strays.is_caption_file(name):
            return "not read: captions are read from metadata.jsonl, metadata.csv, or .txt of an image's name"
        if self.metadata or strays.is_ordinary(name):
            return None
        if self.texts:
            return "no image" if kind == ".txt" else None
        is_sidecar = kind in (".json", ".caption") and stem(name) in with_sidecars
        if is_sidecar or (kind == ".txt" and self.images):
            return f"{kind} is not read here: captions are the names of folders"
        return None

    def _why_unnamed(self, name: str) -> str:
        """Why an image without a row is not read: the nearest metadata does not name it."""
        folder, own = name, {one.folder: one.name for one in self.metadata}
        while folder:
            folder = parent(folder)
            if folder in own:
                return f"{own[folder]} does not name it"
        return "no metadata names it"

    def fingerprint(self) -> dict[str, Any]:
        """Hash all names, captions and image files, so that any addition or edit changes it.

        Files that are not read do not count: adding a .zip does not make it another dataset.
        """
        digest, images = hashlib.sha256(), list[str]()
        for entry in self._of_rows(set()) if self.metadata else self._of_images(set()):
            if isinstance(entry, Skipped):
                digest.update(json.dumps([entry.name, entry.reason]).encode())
                continue
            images.append(entry.id)
            digest.update(json.dumps([entry.id, entry.captions, entry.weights, *_shown(entry)]).encode())
        for content in hash_files(self.root / name for name in images):
            digest.update(content.encode())
        return {"source": "folder", "split": self.data.split, "sha256": digest.hexdigest()}


def _shown(entry: Entry) -> tuple[Any, Any]:
    """What an entry shows and what its captions name, in an order of their own, as JSON."""
    says = None if entry.says is None else [sorted(names) for names in entry.says]
    return sorted(entry.attributes.items()), says


def _holds_caption(path: Path, keys: Collection[str]) -> bool:
    """Whether a .json beside an image has captions under one of `keys`."""
    try:
        if path.stat().st_size > MAX_CAPTION_BYTES:
            return False
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    values = [record.get(key) for key in keys] if isinstance(record, dict) else []
    return any(isinstance(value, str | list) and value for value in values)

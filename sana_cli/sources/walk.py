"""What lies below a folder: each sub-folder listed once, links followed that stay inside, hidden entries passed over.

It knows nothing of images and captions.
"""

import difflib
import errno
import heapq
import os
import re
import unicodedata
from collections.abc import Collection
from pathlib import Path

from sana_cli.errors import SanaError
from sana_cli.sources.entry import BadImage

# Left by macOS, Windows, NAS boxes and file systems; so are all names that begin with a dot.
SYSTEM = frozenset({
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot", "__macosx", "lost+found", "$recycle.bin",
    "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini",
})  # fmt: skip
LEADS_OUT = "a link that leads out of the source"
NOWHERE = "a link that leads nowhere"
CIRCLE = "a link in a circle"
HINTS = 100  # names for which a file of nearly that name is looked for; beyond that many, all names are wrong in one way
MOST_COMPARED = 500  # names that one of them is compared with
ALIKE = 0.75  # how near a name is, from 0 to 1 (difflib's ratio)


def is_hidden(name: str) -> bool:
    """Whether programs and systems, not people, make entries of that name: `.git`, `._1.jpg`, `@eaDir`, `Thumbs.db`."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM


def fold(name: str) -> str:
    """The name as a file system that ignores letter case and Unicode's forms sees it."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def suffix(name: str) -> str:
    """The last suffix in lower case: ".png" of "a/1.PNG"."""
    last = basename(name)
    dot = last.rfind(".")
    return last[dot:].lower() if dot > 0 else ""


def stem(name: str) -> str:
    """The name without its last suffix, folders kept: "a/1" of "a/1.png"."""
    return name[: len(name) - len(suffix(name))]


def basename(name: str) -> str:
    """The last part of a name."""
    return name.rpartition("/")[2]


def parent(name: str) -> str:
    """The folder of a name; "" at the top."""
    return name.rpartition("/")[0]


class Tree:
    """The files below a folder, by their names relative to it, spelt as on the disk, with "/" between the parts.

    Folders and files that are links are read where they lead to something inside `boundary`, and no folder is read twice.
    `hinted` has the suffixes of files that are named when others are not found.

    Raises:
        SanaError: the folder cannot be listed.
    """

    def __init__(self, root: Path, boundary: Path, hinted: Collection[str] = ()) -> None:
        self.root, self._boundary, self._hinted = root, boundary.resolve(), hinted
        self.folders: set[str] = set()
        self.left_out: dict[str, str] = {}  # links, folders and special files that are not read, and why
        self._read: dict[str, str] = {}  # real paths of the folders, and the names they are read by
        self._aliases: dict[str, str] = {}  # links to folders that are read by other names, and those
        self._links: list[tuple[str, str]] = []  # a heap: names, and the real paths of the folders that they lie in
        found: list[str] = []
        self._list("", str(root.resolve()), found)
        while self._links:  # only now, so that a folder is read by its own name rather than by a link's
            self._follow(*heapq.heappop(self._links), found)
        self.files = dict.fromkeys(sorted(found))
        self._folded: dict[str, list[str]] = {}
        self._by_key: dict[str, list[str]] = {}  # by the digits of the name, and by its last part
        self._hints: dict[str, str | None] = {}

    def _list(self, name: str, real: str, found: list[str]) -> None:
        """All of a folder, without its links."""
        stack = [(name, real)]
        while stack:
            name, real = stack.pop()
            if real in self._read:
                self.left_out[name] = f"leads to {self._read[real] or 'the source'}, which is read"
                self._aliases[name] = self._read[real]
                continue
            self._read[real] = name
            self.folders.add(name)
            try:
                with os.scandir(real) as entries:
                    for entry in entries:
                        if is_hidden(entry.name):
                            continue
                        full = f"{name}/{entry.name}" if name else entry.name
                        if entry.is_symlink():
                            heapq.heappush(self._links, (full, real))
                        elif entry.is_dir(follow_symlinks=False):
                            stack.append((full, entry.path))
                        elif entry.is_file(follow_symlinks=False):
                            found.append(full)
                        else:
                            self.left_out[full] = "not a regular file"
            except OSError as error:
                if not name:
                    raise SanaError(f"data.path: {self.root} cannot be listed: {error.strerror}", exit_code=2) from error
                self.left_out[name] = f"cannot be listed: {error.strerror}"

    def _follow(self, name: str, folder: str, found: list[str]) -> None:
        """What a link leads to."""
        try:
            target = Path(folder, basename(name)).resolve(strict=True)
            if not target.is_relative_to(self._boundary):
                self.left_out[name] = LEADS_OUT
            elif target.is_file():
                found.append(name)
            elif not target.is_dir():
                self.left_out[name] = "not a regular file"
            elif Path(folder).is_relative_to(target):
                self.left_out[name] = CIRCLE
            else:
                self._list(name, str(target), found)
        except (FileNotFoundError, NotADirectoryError):
            self.left_out[name] = NOWHERE
        except RuntimeError:  # so said before Python 3.13
            self.left_out[name] = CIRCLE
        except OSError as error:
            self.left_out[name] = CIRCLE if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"

    def find(self, name: str, folder: str = "") -> str:
        """The file that somebody called `name`, seen from `folder`: by the disk's spelling, relative to the tree.

        Letter case, Unicode's forms, backslashes, `./` and `//` may differ, where exactly one file is meant. Hidden files are
        found by their exact names alone: who writes such a name down wants the file.

        Raises:
            BadImage: the name leads out, or no file or several are meant; says why.
        """
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts or "\x00" in name:
            raise BadImage("not a file name")
        if name.startswith(("/", "\\")) or ".." in parts:
            raise BadImage("its name leads out of the source")
        full = "/".join((folder, *parts) if folder else parts)
        if full in self.files:
            return full
        if full in self.folders:
            raise BadImage("not a regular file")
        places = full.split("/")
        for length in range(1, len(places) + 1):
            place = "/".join(places[:length])
            if place in self._aliases and length < len(places):
                return self.find("/".join(places[length:]), self._aliases[place])
            if place in self.left_out:
                raise BadImage(self.left_out[place])
        if re.match(r"[A-Za-z]:[\\/]", name):
            raise BadImage("its name leads out of the source")
        if "\\" in name:  # as Windows parts names
            return self.find(name.replace("\\", "/"), folder)
        if any(map(is_hidden, parts)):
            return self._hidden(full)
        alike = self.alike(full)
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise BadImage(f"no such file, and several are spelt nearly so: {', '.join(alike[:3])}")
        nearest = self._nearest(full)
        raise BadImage(f"no such file; is it {nearest}?" if nearest else "no such file")

    def alike(self, name: str) -> list[str]:
        """The files whose names differ from `name` in letter case and Unicode's forms at most; the same in case go first."""
        if not self._folded:
            for file in self.files:
                self._folded.setdefault(fold(file), []).append(file)
        found = self._folded.get(fold(name), [])
        composed = unicodedata.normalize("NFC", name)
        return [file for file in found if unicodedata.normalize("NFC", file) == composed] or found

    def _hidden(self, full: str) -> str:
        """A file that was not listed, if it is one."""
        path = self.root / full
        try:
            if not path.resolve().is_relative_to(self._boundary):
                raise BadImage(LEADS_OUT)
            if not path.is_file():
                raise BadImage("not a regular file" if path.exists() else "no such file")
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        except (ValueError, RuntimeError) as error:  # names that no file system takes; links in a circle
            raise BadImage("not a file name" if isinstance(error, ValueError) else CIRCLE) from error
        return full

    def _nearest(self, full: str) -> str | None:
        """A file of nearly that name. Its digits are the same: "0007.png" is no misspelt "0008.png"."""
        if full not in self._hints and len(self._hints) < HINTS:
            if not self._by_key:
                for file in self.files:
                    if suffix(file) in self._hinted:
                        self._by_key.setdefault(_digits(file), []).append(file)
                        self._by_key.setdefault("/" + fold(basename(file)), []).append(file)
            same = self._by_key.get(_digits(full), [])
            deeper = [
                file for file in self._by_key.get("/" + fold(basename(full)), []) if _is_end(full, file) or _is_end(file, full)
            ]
            near = [file for file in same if fold(stem(file)) == fold(stem(full))] or deeper
            if not near:
                folded = {fold(file): file for file in same[:MOST_COMPARED] if _is_near(parent(file), parent(full))}
                near = [folded[match] for match in difflib.get_close_matches(fold(full), folded, 1, ALIKE)]
            self._hints[full] = near[0] if near else None
        return self._hints.get(full)


def _digits(name: str) -> str:
    return "".join(filter(str.isdigit, name))


def _is_end(name: str, longer: str) -> bool:
    return fold(longer).endswith("/" + fold(name))


def _is_near(folder: str, other: str) -> bool:
    return fold(folder) == fold(other) or difflib.SequenceMatcher(None, fold(folder), fold(other)).ratio() >= ALIKE

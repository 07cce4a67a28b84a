"""The files below a folder. Each folder is listed once. Links that stay inside are followed.

Hidden entries are ignored. This module knows nothing of images and captions.
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

# Written by macOS, Windows, NAS devices and file systems, as are names that begin with a dot.
SYSTEM = frozenset({
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot", "__macosx",
    "lost+found", "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini",
})  # fmt: skip
LEADS_OUT = "a link that leads out of the source"
NOWHERE = "a link that leads nowhere"
CIRCLE = "a link in a circle"
MAX_HINTS = 100  # missing names that get a suggestion; if more are missing, they share a cause
MAX_COMPARED = 500  # file names compared with each of them
MIN_SIMILARITY = 0.75  # difflib's ratio, 0 to 1


def is_hidden(name: str) -> bool:
    """Whether a program made this entry, not a person: `.git`, `._1.jpg`, `Thumbs.db`."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM


def fold(name: str) -> str:
    """Normalise letter case and Unicode form, as some file systems do."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def suffix(name: str) -> str:
    """The last suffix in lower case: "a/1.PNG" -> ".png"."""
    last = basename(name)
    dot = last.rfind(".")
    return last[dot:].lower() if dot > 0 else ""


def stem(name: str) -> str:
    """The name without its last suffix, with its folders: "a/1.png" -> "a/1"."""
    return name[: len(name) - len(suffix(name))]


def basename(name: str) -> str:
    """The last part of a name."""
    return name.rpartition("/")[2]


def parent(name: str) -> str:
    """The folder of a name; "" for the top."""
    return name.rpartition("/")[0]


class Tree:
    """The files below a folder, by relative name, spelt as on the disk, with "/" as separator.

    Links are followed if they lead inside `boundary`. No folder is read twice. Only files with
    a suffix in `hinted` are suggested for a missing name.

    Raises:
        SanaError: the folder cannot be listed.
    """

    def __init__(self, root: Path, boundary: Path, hinted: Collection[str] = ()) -> None:
        self.root, self._boundary, self._hinted = root, boundary.resolve(), hinted
        self.folders: set[str] = set()
        self.left_out: dict[str, str] = {}  # links, folders and special files: name -> reason
        self._read: dict[str, str] = {}  # real path of a folder -> its name
        self._aliases: dict[str, str] = {}  # link to a folder -> the name it was read by
        self._links: list[tuple[str, str]] = []  # a heap: (name, real path of its folder)
        found: list[str] = []
        self._list("", str(root.resolve()), found)
        while self._links:  # last, so that a folder is read by its own name, not by a link's
            self._follow(*heapq.heappop(self._links), found)
        self.files = dict.fromkeys(sorted(found))
        self._folded: dict[str, list[str]] = {}
        self._by_key: dict[str, list[str]] = {}  # by the name's digits, and by "/" + its last part
        self._hints: dict[str, str | None] = {}

    def _list(self, name: str, real: str, found: list[str]) -> None:
        """Add the files below a folder to `found`, and its links to the heap."""
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
                    raise SanaError(
                        f"data.path: {self.root} cannot be listed: {error.strerror}", exit_code=2
                    ) from error
                self.left_out[name] = f"cannot be listed: {error.strerror}"

    def _follow(self, name: str, folder: str, found: list[str]) -> None:
        """Read the target of a link."""
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
        except RuntimeError:  # a loop, before Python 3.13
            self.left_out[name] = CIRCLE
        except OSError as error:
            is_loop = error.errno == errno.ELOOP
            self.left_out[name] = CIRCLE if is_loop else f"cannot be read: {error.strerror}"

    def find(self, name: str, folder: str = "") -> str:
        """Find the file that `name`, relative to `folder`, means. Return its name in `files`.

        Letter case, Unicode form, backslashes, `./` and `//` may differ if exactly one file
        matches. A hidden file is found by its exact name only: the user asked for it.

        Raises:
            BadImage: the name leads out, or matches no file or several; says why.
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
        levels = full.split("/")
        for depth in range(1, len(levels) + 1):
            prefix = "/".join(levels[:depth])
            if prefix in self._aliases and depth < len(levels):
                return self.find("/".join(levels[depth:]), self._aliases[prefix])
            if prefix in self.left_out:
                raise BadImage(self.left_out[prefix])
        if re.match(r"[A-Za-z]:[\\/]", name):
            raise BadImage("its name leads out of the source")
        if "\\" in name:  # the Windows separator
            return self.find(name.replace("\\", "/"), folder)
        return self._hidden(full) if any(map(is_hidden, parts)) else self._only_alike(full)

    def _only_alike(self, full: str) -> str:
        """The one file that is spelt nearly so."""
        alike = self.alike(full)
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise BadImage(f"no such file, and several are spelt nearly so: {', '.join(alike[:3])}")
        nearest = self._nearest(full)
        raise BadImage(f"no such file; is it {nearest}?" if nearest else "no such file")

    def alike(self, name: str) -> list[str]:
        """The files that differ from `name` only in letter case and Unicode form.

        If some have the same letter case, only these.
        """
        if not self._folded:
            for file in self.files:
                self._folded.setdefault(fold(file), []).append(file)
        found = self._folded.get(fold(name), [])
        composed = unicodedata.normalize("NFC", name)
        return [file for file in found if unicodedata.normalize("NFC", file) == composed] or found

    def _hidden(self, full: str) -> str:
        """Check a hidden file, which was not listed."""
        path = self.root / full
        try:
            if not path.resolve().is_relative_to(self._boundary):
                raise BadImage(LEADS_OUT)
            if not path.is_file():
                raise BadImage("not a regular file" if path.exists() else "no such file")
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        except (ValueError, RuntimeError) as error:  # an impossible name; a loop of links
            raise BadImage("not a file name" if isinstance(error, ValueError) else CIRCLE) from error
        return full

    def _nearest(self, full: str) -> str | None:
        """A file with a similar name and equal digits: "0007.png" is no misspelt "0008.png"."""
        if full not in self._hints and len(self._hints) < MAX_HINTS:
            if not self._by_key:
                for file in self.files:
                    if suffix(file) in self._hinted:
                        self._by_key.setdefault(_digits(file), []).append(file)
                        self._by_key.setdefault("/" + fold(basename(file)), []).append(file)
            same_digits = self._by_key.get(_digits(full), [])
            same_end = self._by_key.get("/" + fold(basename(full)), [])
            near = [file for file in same_digits if fold(stem(file)) == fold(stem(full))]
            near = near or [file for file in same_end if _ends_with(file, full) or _ends_with(full, file)]
            if not near:
                compared = same_digits[:MAX_COMPARED]
                folded = {fold(file): file for file in compared if _is_near(parent(file), parent(full))}
                matches = difflib.get_close_matches(fold(full), folded, 1, MIN_SIMILARITY)
                near = [folded[match] for match in matches]
            self._hints[full] = near[0] if near else None
        return self._hints.get(full)


def _digits(name: str) -> str:
    return "".join(filter(str.isdigit, name))


def _ends_with(longer: str, name: str) -> bool:
    return fold(longer).endswith("/" + fold(name))


def _is_near(folder: str, other: str) -> bool:
    folder, other = fold(folder), fold(other)
    return folder == other or difflib.SequenceMatcher(None, folder, other).ratio() >= MIN_SIMILARITY

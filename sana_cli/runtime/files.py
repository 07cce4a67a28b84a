"""Files that are whole or not there: synced writes, JSON that knows its own hash, folders that appear at once.

It knows nothing of what the files hold.
"""

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sana_cli.errors import SanaError, one_line
from sana_cli.units import as_json

# Windows has none: there nothing keeps a second process from the same directory
fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None

_UNSEALED = '"sha256": ""'


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Push a file's or a folder's bytes to the disk, so that a rename after it cannot overtake them."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write and sync a new text file."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def json_text(content: Mapping[str, Any]) -> str:
    """Readable JSON."""
    return as_json(content, indent=2) + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write and sync readable JSON."""
    write_text(path, json_text(content))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write and sync a safetensors file."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()  # the umask says its mode; the library writes through a private temporary file
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        safetensors.torch.save_file(whole, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    with suppress(OSError):  # a file system that knows no modes
        path.chmod(mode)
    sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped.

    Raises:
        SanaError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, TypeError, ValueError, OverflowError) as error:
        raise SanaError(f"{path} is damaged or missing: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself.

    Raises:
        SanaError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError, TypeError, ValueError, OverflowError) as error:
        raise SanaError(f"{path} is damaged or missing: {error}") from error


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header, and that header.

    Raises:
        SanaError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise SanaError(f"{path} cannot be read: {error.strerror}") from error


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file's first bytes are those of a Git LFS pointer: the note that stands for a file until `git lfs pull`."""
    return beginning.startswith(LFS_POINTER)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SanaError: it is missing or not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SanaError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SanaError(f"{path} holds no JSON object")
    return content


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON whose last field `sha256` is the hash of the file's own text with that field empty."""
    text = json_text({**content, "sha256": ""})
    digest = hashlib.sha256(text.encode()).hexdigest()
    head, _, tail = text.rpartition(_UNSEALED)
    write_text(path, f'{head}"sha256": "{digest}"{tail}')


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `write_sealed_json` wrote.

    Raises:
        SanaError: the file is damaged.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
        digest = content["sha256"]
        head, found, tail = text.rpartition(f'"sha256": "{digest}"')
        whole = found and hashlib.sha256(f"{head}{_UNSEALED}{tail}".encode()).hexdigest() == digest
    except (ValueError, KeyError, TypeError, RecursionError):
        whole, content = False, {}
    if not whole:
        raise SanaError(f"{path} is damaged: its content does not match its own sha256")
    return dict(content)


def check_size(path: Path, expected: int) -> None:
    """Refuse a file that is missing or has not `expected` bytes.

    Raises:
        SanaError: naming the file.
    """
    if not path.is_file():
        raise SanaError(f"{path} is missing")
    found = path.stat().st_size
    if found != expected:
        raise SanaError(f"{path} is damaged: expected {expected:,} bytes, found {found:,}")


def check_hash(path: Path, expected: str) -> None:
    """Refuse a file whose bytes are not those that were written.

    Raises:
        SanaError: naming the file.
    """
    if sha256_file(path) != expected:
        raise SanaError(f"{path} is damaged: its bytes do not match the sha256 on record")


_DESCRIPTORS = re.compile(r"/dev/(fd/.*|stdin|stdout|stderr)|/proc/[^/]+/fd/.*")
_OURS = re.compile(r"/dev/fd/(\d+)|/proc/(?:self|\d+)/fd/(\d+)")
_NAMED = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


def descriptor_of(target: Path) -> int | None:
    """The number of the descriptor of this process that a path means, such as 1 for /dev/stdout; None for other paths."""
    whole = os.path.abspath(target)  # noqa: PTH100 (which follows no link)
    found = _OURS.fullmatch(whole.replace(f"/proc/{os.getpid()}/", "/proc/self/"))
    if whole.startswith("/proc/") and not whole.startswith(("/proc/self/", f"/proc/{os.getpid()}/")):
        return None
    return _NAMED.get(whole) if found is None else int(found[1] or found[2])


def regular_file(target: Path) -> Path | None:
    """The regular file, there or not yet, that a path means through all links; None if it is a device, a pipe or a descriptor.

    Raises:
        OSError: it is a folder, or links lead in a circle.
    """
    try:
        kind = target.stat().st_mode
    except FileNotFoundError:  # or a link to what is not there yet
        return Path(os.path.realpath(target))
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(kind) or _DESCRIPTORS.fullmatch(os.path.abspath(target)):  # noqa: PTH100 (which follows no link)
        return None
    return Path(os.path.realpath(target))


def _open_special(target: Path) -> IO[bytes]:
    """A pipe, a device or a descriptor, to write into. A descriptor is written where it stands: opened anew it would begin again."""
    number = descriptor_of(target)
    if number is None:
        return target.open("wb")
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    return os.fdopen(os.dup(number), "wb")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write a file at, which becomes `target` once it is whole; until then what was there stays.

    A link is followed, and the file that it leads to is replaced. A device or a pipe is never replaced: it is written into, once
    all is there. A killed process loses nothing by that. What has to outlive a power cut is written by a writer that syncs.
    """
    real = regular_file(target)
    if real is None:
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder) / target.name
            yield partial
            with partial.open("rb") as whole, _open_special(target) as into:
                shutil.copyfileobj(whole, into)
        return
    real.parent.mkdir(parents=True, exist_ok=True)
    partial = real.with_name(real.name + ".partial")
    try:
        yield partial
        if real.exists():
            with suppress(OSError):  # a file system without modes
                shutil.copymode(real, partial)
        partial.replace(real)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path, partial: Path) -> Iterator[Path]:
    """An empty folder at `partial` to write into, which becomes `target` at the end, or is removed on an error.

    `partial` must be on the file system of `target`. A killed process leaves it behind, for the next one to replace. A
    `target` that is there already is put aside only now that the new one is whole, and then deleted.
    """
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        put_in_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def put_in_place(partial: Path, target: Path) -> None:
    """A whole folder becomes `target`, on the same file system; one that was there is deleted once it is replaced."""
    aside = partial.with_name(partial.name + ".replaced")
    if target.exists() and aside.exists():  # what a killed process did not finish deleting
        shutil.rmtree(aside)
    for folder in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
        sync(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the only process that writes a directory. The system ends the claim with the process, however that ends.

    The lock lies beside the directory, `.NAME.lock`, since the directory itself may be replaced; it says who holds it.

    Raises:
        SanaError: another process has it; says which.
    """
    path = _lock_of(directory)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+", buffering=0)
        except OSError as error:
            raise storage_error(error, f"writing {directory}") from error
        with file:
            _claim(file, directory)
            if not _lies_at(path, file):
                continue  # the one before has just removed it
            with suppress(OSError):  # a full disk: nobody will read it, and the claim holds
                file.truncate(0)
                file.write(f"process {os.getpid()}\n".encode())
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return


def check_unlocked(directory: Path) -> None:
    """Refuse a directory that another process writes, without a trace.

    Raises:
        SanaError: one does; says which.
    """
    with suppress(OSError), _lock_of(directory).open("rb") as file:  # no lock, or no folder for one: then nobody writes there
        _claim(file, directory, shared=True)


def _lock_of(directory: Path) -> Path:
    whole = directory.resolve()
    return whole.with_name(f".{whole.name}.lock")


def _lies_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _claim(file: IO[bytes], directory: Path, shared: bool = False) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = one_line(file.read(100).decode(errors="replace").strip()) or "another process"
        raise SanaError(
            f"{directory} is being written by {holder}", "wait until it is done, or end it; or choose another directory"
        ) from None
    except OSError:  # a network file system without locks
        pass


def storage_error(error: OSError, doing: str) -> SanaError:
    """One message for a full disk, a read-only folder and their kin."""
    where = error.filename or ""
    if error.errno == errno.ENOSPC:
        return SanaError(f"the disk is full: {doing}", "free some space and run the command again; what was whole still is")
    return SanaError(f"{doing}: {error.strerror or error}" + (f": {where}" if where else ""))

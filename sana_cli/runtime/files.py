"""Atomic and synced writes of files and folders, JSON with its own hash, and locks.

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

# not on Windows, where nothing stops two processes from writing one directory
fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None

_EMPTY_HASH = '"sha256": ""'


def sha256_file(path: Path) -> str:
    """Hash the bytes of a file: hex digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a later rename cannot overtake it."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
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
    """Format readable JSON."""
    return as_json(content, indent=2) + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write and sync readable JSON."""
    write_text(path, json_text(content))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write and sync a safetensors file."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()  # takes its mode from the umask; the library replaces it by a private temporary file
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        safetensors.torch.save_file(whole, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    with suppress(OSError):  # a file system without modes
        path.chmod(mode)
    sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, memory-mapped.

    Raises:
        SanaError: it is missing or damaged, or the system maps no more files.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (
        OSError,
        RuntimeError,
        MemoryError,
        SafetensorError,
        TypeError,
        ValueError,
        OverflowError,
    ) as error:
        # ENOMEM: safetensors makes a MemoryError of it, and torch a RuntimeError
        if isinstance(error, MemoryError) or "Cannot allocate memory" in str(error):
            raise SanaError(
                f"{path} cannot be mapped into memory: {one_line(str(error))}",
                "free memory, or let a process map more files: sudo sysctl vm.max_map_count=1000000",
            ) from error
        raise SanaError(f"{path} is damaged or missing: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Raises:
        SanaError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError, TypeError, ValueError, OverflowError) as error:
        raise SanaError(f"{path} is damaged or missing: {error}") from error


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors: the length of a JSON header, then the header.

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
    """Whether a file's first bytes are a Git LFS pointer, its stand-in until `git lfs pull`."""
    return beginning.startswith(LFS_POINTER)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

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
    """Write JSON whose last field `sha256` hashes its own text with that field empty."""
    text = json_text({**content, "sha256": ""})
    digest = hashlib.sha256(text.encode()).hexdigest()
    head, _, tail = text.rpartition(_EMPTY_HASH)
    write_text(path, f'{head}"sha256": "{digest}"{tail}')


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote.

    Raises:
        SanaError: the file is damaged.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
        digest = content["sha256"]
        head, found, tail = text.rpartition(f'"sha256": "{digest}"')
        whole = found and hashlib.sha256(f"{head}{_EMPTY_HASH}{tail}".encode()).hexdigest() == digest
    except (ValueError, KeyError, TypeError, RecursionError):
        whole, content = False, {}
    if not whole:
        raise SanaError(f"{path} is damaged: its content does not match its own sha256")
    return dict(content)


def check_size(path: Path, expected: int) -> None:
    """Refuse a file that is missing or does not have `expected` bytes.

    Raises:
        SanaError: naming the file.
    """
    if not path.is_file():
        raise SanaError(f"{path} is missing")
    found = path.stat().st_size
    if found != expected:
        raise SanaError(f"{path} is damaged: expected {expected:,} bytes, found {found:,}")


def check_hash(path: Path, expected: str) -> None:
    """Refuse a file whose bytes have changed since they were written.

    Raises:
        SanaError: naming the file.
    """
    if sha256_file(path) != expected:
        raise SanaError(f"{path} is damaged: its bytes do not match the sha256 on record")


_ANY_DESCRIPTOR = re.compile(r"/dev/(fd/.*|stdin|stdout|stderr)|/proc/[^/]+/fd/.*")
_OWN_DESCRIPTOR = re.compile(r"/dev/fd/(\d+)|/proc/(?:self|\d+)/fd/(\d+)")
_STANDARD_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


def descriptor_of(target: Path) -> int | None:
    """Our descriptor that a path means, such as 1 for /dev/stdout; None for other paths."""
    path = os.path.abspath(target)  # noqa: PTH100 (resolve() would follow links)
    found = _OWN_DESCRIPTOR.fullmatch(path.replace(f"/proc/{os.getpid()}/", "/proc/self/"))
    if path.startswith("/proc/") and not path.startswith(("/proc/self/", f"/proc/{os.getpid()}/")):
        return None
    return _STANDARD_STREAMS.get(path) if found is None else int(found[1] or found[2])


def regular_file(target: Path) -> Path | None:
    """Follow links to a regular file, existing or not; None for a device, pipe or descriptor.

    Raises:
        OSError: it is a folder, or links lead in a circle.
    """
    try:
        kind = target.stat().st_mode
    except FileNotFoundError:  # or a link to a file that does not exist yet
        return Path(os.path.realpath(target))
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    path = os.path.abspath(target)  # noqa: PTH100 (resolve() would follow links)
    if not stat.S_ISREG(kind) or _ANY_DESCRIPTOR.fullmatch(path):
        return None
    return Path(os.path.realpath(target))


def _open_special(target: Path) -> IO[bytes]:
    """Open a pipe, a device or a descriptor for writing.

    A descriptor is duplicated, which keeps its position: opening it again would start at 0.
    """
    number = descriptor_of(target)
    if number is None:
        return target.open("wb")
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    return os.fdopen(os.dup(number), "wb")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Write a file at the yielded path; it replaces `target` at the end of the block.

    A link is followed, and its target is replaced. A device or a pipe is not replaced but
    written at the end. A killed process leaves the old file intact. To survive a power cut, the
    caller must sync.
    """
    real = regular_file(target)
    if real is None:
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder) / target.name
            yield partial
            with partial.open("rb") as source, _open_special(target) as sink:
                shutil.copyfileobj(source, sink)
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
    """Write into the empty folder `partial`, which replaces `target` at the end of the block.

    Both must be on one file system. On an error, `partial` is removed. A killed process leaves
    it behind, and the next one removes it. An existing `target` is deleted only at the end.
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
    """Sync a folder and rename it to `target`, on one file system; delete an old `target`."""
    aside = partial.with_name(partial.name + ".replaced")
    if target.exists() and aside.exists():  # left by a killed process
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
    """Lock a directory for writing. The system releases the lock when the process ends.

    The lock file is `.NAME.lock` beside the directory, which may itself be replaced. It names
    the process that holds it.

    Raises:
        SanaError: another process holds the lock; says which.
    """
    path = _lock_path(directory)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+", buffering=0)
        except OSError as error:
            raise storage_error(error, f"writing {directory}") from error
        with file:
            _lock(file, directory)
            if not _is_at(path, file):
                continue  # the previous holder has just removed it
            with suppress(OSError):  # a full disk: the lock holds without the text
                file.truncate(0)
                file.write(f"process {os.getpid()}\n".encode())
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return


def check_unlocked(directory: Path) -> None:
    """Refuse a directory that another process is writing. Create no lock file.

    Raises:
        SanaError: another process holds the lock; says which.
    """
    with suppress(OSError), _lock_path(directory).open("rb") as file:  # no lock file: nobody writes
        _lock(file, directory, shared=True)


def _lock_path(directory: Path) -> Path:
    path = directory.resolve()
    return path.with_name(f".{path.name}.lock")


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], directory: Path, shared: bool = False) -> None:
    """Lock an open lock file of `directory`, or refuse."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = one_line(file.read(100).decode(errors="replace").strip()) or "another process"
        raise SanaError(
            f"{directory} is being written by {holder}",
            "wait until it is done, or end it; or choose another directory",
        ) from None
    except OSError:  # a network file system without locks
        pass


def storage_error(error: OSError, doing: str) -> SanaError:
    """Return the error for a full disk, a read-only folder and the like."""
    if error.errno == errno.ENOSPC:
        todo = "free some space and run the command again; finished work is kept"
        return SanaError(f"the disk is full: {doing}", todo)
    return SanaError(
        f"{doing}: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    )

"""A folder that appears whole or not at all: what bundles and engines are written with."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

import msgspec

from runtimes.errors import BundleError

_BLOCK = 1 << 20
PARTIAL = ".partial-"  # of a folder being written: .NAME.partial-…-PID beside the target


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


def sha256_of(path: Path) -> str:
    """sha256 of a file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class HashedFile:
    """A file being written, its sha256 and size kept on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self._digest.update(data)
        self.size += len(data) if isinstance(data, bytes) else data.nbytes

    def pad_to(self, alignment: int) -> None:
        self.write(bytes(-self.size % alignment))

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self.size, self._digest.hexdigest())


_Self = TypeVar("_Self", bound="FolderWriter")


class FolderWriter:
    """Writes a folder that appears whole or not at all.

    Files have no name until commit (O_TMPFILE), so a killed writer leaves nothing behind; where the file system cannot do
    that, they stand in a folder .NAME.partial-…-PID beside the target, which the next writer of it removes.

    kind: what the folder is, for messages ("bundle"); marker: the file that shows that a folder is one: written last, and the only
    non-empty folder that force replaces has it. Raises BundleError where the target exists (unless force) or the disk is full.
    """

    kind = "folder"
    marker = ""

    def __init__(self, target: str | Path, *, force: bool = False, needed_bytes: int = 0) -> None:
        self.target = Path(os.path.abspath(target))
        self._files: dict[str, HashedFile] = {}
        self._stage: Path | None = None
        try:
            self._remove_leftovers()
            self._check_target(force)
            self.target.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.target.parent).free
        except OSError as error:
            raise BundleError(f"{self.target}: cannot be written there: {error}; choose another folder") from error
        if free < needed_bytes:
            raise BundleError(
                f"{self.target}: the {self.kind} needs {needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there; "
                "free some space or choose another folder"
            )

    def _check_target(self, force: bool) -> None:
        if not os.path.lexists(self.target):
            return
        if not force:
            raise BundleError(
                f"{self.target}: exists already; choose another folder or pass --force to replace the {self.kind}"
            )
        replaceable = self.target.is_dir() and not self.target.is_symlink()
        if not replaceable or (any(self.target.iterdir()) and not (self.target / self.marker).is_file()):
            raise BundleError(
                f"{self.target}: exists and is no {self.kind}; --force replaces {self.kind}s and empty folders only"
            )

    def _remove_leftovers(self) -> None:
        if not self.target.parent.is_dir():
            return
        mine = f".{self.target.name}{PARTIAL}"
        for leftover in [path for path in self.target.parent.iterdir() if path.name.startswith(mine)]:
            kind, _, pid = leftover.name.removeprefix(mine).rpartition("-")
            if not pid.isdecimal() or (int(pid) != os.getpid() and _alive(int(pid))):
                continue
            if kind == "old" and not self.target.exists():
                leftover.rename(self.target)  # killed between moving the old bundle aside and naming the new one
            else:
                shutil.rmtree(leftover, ignore_errors=True)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hashed in self._files.values():
            with contextlib.suppress(OSError):  # a full disk fails again at the last flush
                hashed.file.close()
        if self._stage is not None:
            shutil.rmtree(self._stage, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BundleError(
                f"{self.target}: the disk is full ({error.strerror}); nothing was left behind, free some space and try again"
            ) from error

    def create(self, name: str) -> HashedFile:
        """A new file of the folder, to be written in sequence."""
        self._files[name] = HashedFile(self._open(name))
        return self._files[name]

    def _open(self, name: str) -> BinaryIO:
        if hasattr(os, "O_TMPFILE"):
            try:
                handle = os.open(self.target.parent, os.O_TMPFILE | os.O_RDWR, 0o644)
                return os.fdopen(handle, "w+b", buffering=_BLOCK)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                    raise
        path = self._staged(name)
        return path.open("w+b", buffering=_BLOCK)

    def _staged(self, name: str) -> Path:
        """Where a file stands before the bundle has its name; the folder is made when first needed."""
        if self._stage is None:
            unique = f"{secrets.token_hex(4)}-{os.getpid()}"
            self._stage = self.target.with_name(f".{self.target.name}{PARTIAL}{unique}")
            self._stage.mkdir()
        path = self._stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _put_in_place(self, marker: bytes) -> None:
        """Writes the marker, names the files and puts the folder in its place."""
        self.create(self.marker).write(marker)
        for name, hashed in self._files.items():
            hashed.file.flush()
            os.fsync(hashed.file.fileno())
            path = self._staged(name)
            if not path.exists():
                _give_name(hashed.file.fileno(), path)
        with _moved_aside(self.target):
            self._staged(self.marker).parent.rename(self.target)


def _give_name(handle: int, path: Path) -> None:
    """Links an unnamed file into a folder. Python follows the /proc link only where a folder descriptor is given, too."""
    folder = os.open(path.parent, os.O_DIRECTORY)
    try:
        os.link(f"/proc/self/fd/{handle}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _moved_aside(target: Path) -> Iterator[None]:
    """Makes room for a new folder; the old one goes once the new one stands, and comes back where that fails."""
    if not target.exists():
        yield
        return
    old = target.with_name(f".{target.name}{PARTIAL}old-{os.getpid()}")
    target.rename(old)
    try:
        yield
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True

"""The bundle: a folder with a manifest, graphs, weights and tokenizer. Its schema, its checks, its atomic writing.

A bundle is data from elsewhere: before anything in it is used, its manifest is checked against the schema, and every file
it names must lie inside the folder, be no link, and have the size and sha256 that the manifest says.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, Literal

import msgspec

from runtimes.errors import BundleError

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 64 * 2**20  # bytes; a manifest is a few KB
_BLOCK = 1 << 20
_PARTIAL = ".partial-"  # of a bundle being written: .NAME.partial-…-PID beside the target


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the weights came from: kind "pt", "safetensors" or "random"; the file's name, sha256 and training step."""

    kind: str
    name: str
    sha256: str | None = None
    step: int | None = None


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ONNX graph and what a runner must know to feed it.

    file: the ONNX file; weights: its external data. dtype: what it computes in. cache_dtype: of past_kv and new_kv; an int8 cache
    has past_scale and new_scale beside them. weight_dtype: of the matrices in the file. loops: a fixed loop count, or None where
    n_loops is an input. max_loops: deepest n_loops. Cache slots: prelude_slots, then loop_slots a loop, then coda_slots, each row
    cache_width numbers.
    """

    file: str
    weights: tuple[str, ...]
    dtype: Literal["float32", "float16", "bfloat16"]
    cache_dtype: Literal["float32", "float16", "bfloat16", "int8"]
    weight_dtype: str
    loops: int | None
    max_loops: int
    default_loops: int
    prelude_slots: int
    loop_slots: int
    coda_slots: int
    cache_width: int
    vocab_size: int
    max_seq_len: int

    def slots(self, n_loops: int) -> int:
        """Cache slots of a sequence that runs n_loops loops."""
        return self.prelude_slots + n_loops * self.loop_slots + self.coda_slots


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of `verify`: the largest absolute error of an output at a loop count (over a cache that rounds, the median token's),
    and what is allowed."""

    name: str
    loops: int
    max_abs_error: float
    tolerance: float
    ok: bool


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `verify` measured: against which model, on how many tokens."""

    oracle: str
    tokens: int
    checks: tuple[Check, ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """manifest.json. model: the model description (mythos_export.config.ModelConfig) as plain JSON. graphs: best first."""

    format: Literal["mythos-bundle"]
    format_version: int
    producer: str
    model: dict[str, Any]
    graphs: tuple[Graph, ...]
    files: dict[str, FileEntry]
    source: Source
    tokenizer: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: dict[str, Any] | None = None
    parity: Parity | None = None


def sha256_of(path: Path) -> str:
    """sha256 of a file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def open_bundle(path: str | Path) -> tuple[Path, Manifest]:
    """Checks a bundle and returns its folder and manifest. Raises BundleError, naming the file and the fix."""
    folder = Path(path)
    manifest_path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; expected a bundle made by `mythos-export export`")
    if not manifest_path.is_file() or manifest_path.is_symlink():
        raise BundleError(f"{folder}: not a bundle, it holds no {MANIFEST}; make one with `mythos-export export`")
    manifest = _read_manifest(manifest_path)
    for name, entry in manifest.files.items():
        try:
            _check_file(folder, name, entry)
        except (OSError, ValueError) as error:  # a name no file system takes, a folder without permission
            raise BundleError(f"{folder}: cannot read {name[:80]!r}, which the manifest lists: {error}") from error
    listed = {name for graph in manifest.graphs for name in (graph.file, *graph.weights)}
    if manifest.tokenizer is not None:
        listed.add(manifest.tokenizer)
    unlisted = sorted(listed - set(manifest.files))
    if unlisted or not manifest.graphs:
        raise BundleError(
            f"{manifest_path}: names {', '.join(unlisted) or 'no graph'} without a checksum; export again"
        )
    return folder, manifest


def _read_manifest(path: Path) -> Manifest:
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise BundleError(f"{path}: {path.stat().st_size} bytes, more than a manifest can have; the bundle is damaged")
    data = path.read_bytes()
    try:
        head = msgspec.json.decode(data)
        if not isinstance(head, dict) or head.get("format") != "mythos-bundle":
            raise BundleError(f'{path}: "format" is not "mythos-bundle"; this is not a bundle of mythos-export')
        version = head.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{path}: format version {version}, this release reads {FORMAT_VERSION}; "
                "export the checkpoint again, or install the mythos-export that made the bundle"
            )
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(f"{path}: damaged manifest: {error}; export the checkpoint again") from error


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or "\\" in name or not relative.parts or ".." in relative.parts:
        raise BundleError(
            f'{folder / MANIFEST}: names "{name}", which leaves the bundle\'s folder; do not use this bundle'
        )
    path = folder
    for part in relative.parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{path}: is a link; a bundle holds plain files only, copy the file in its place")
    if not path.is_file():
        raise BundleError(f"{path}: missing, though the manifest lists it; copy the whole bundle again")
    size = path.stat().st_size
    if size != entry.size:
        raise BundleError(f"{path}: {size} bytes, the manifest says {entry.size}; copy the whole bundle again")
    digest = sha256_of(path)
    if digest != entry.sha256:
        raise BundleError(
            f"{path}: sha256 {digest[:16]}… does not match the manifest's {entry.sha256[:16]}…: the file was changed or damaged; "
            "copy the bundle again or export the checkpoint again"
        )


def rewrite_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces manifest.json of an existing bundle in one step."""
    partial = folder / f".{MANIFEST}{_PARTIAL}{os.getpid()}"
    try:
        partial.write_bytes(_encode(manifest))
        partial.replace(folder / MANIFEST)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BundleError(f"{folder / MANIFEST}: cannot be written: {error}; the old one stands") from error


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


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


class BundleWriter:
    """Writes a bundle that appears whole or not at all.

    Files have no name until commit (O_TMPFILE), so a killed export leaves nothing behind; where the file system cannot do
    that, they stand in a folder .NAME.partial-…-PID beside the target, which the next export to it removes. Raises BundleError
    where the target exists (unless force, and then only a bundle or an empty folder is replaced) or the disk is full.
    """

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
                f"{self.target}: the bundle needs {needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there; "
                "free some space or choose another folder"
            )

    def _check_target(self, force: bool) -> None:
        if not os.path.lexists(self.target):
            return
        if not force:
            raise BundleError(
                f"{self.target}: exists already; choose another folder or pass --force to replace the bundle"
            )
        replaceable = self.target.is_dir() and not self.target.is_symlink()
        if not replaceable or (any(self.target.iterdir()) and not (self.target / MANIFEST).is_file()):
            raise BundleError(
                f"{self.target}: exists and is not a bundle; --force replaces bundles and empty folders only"
            )

    def _remove_leftovers(self) -> None:
        if not self.target.parent.is_dir():
            return
        mine = f".{self.target.name}{_PARTIAL}"
        for leftover in [path for path in self.target.parent.iterdir() if path.name.startswith(mine)]:
            kind, _, pid = leftover.name.removeprefix(mine).rpartition("-")
            if not pid.isdecimal() or (int(pid) != os.getpid() and _alive(int(pid))):
                continue
            if kind == "old" and not self.target.exists():
                leftover.rename(self.target)  # killed between moving the old bundle aside and naming the new one
            else:
                shutil.rmtree(leftover, ignore_errors=True)

    def __enter__(self) -> BundleWriter:
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
                f"{self.target}: the disk is full ({error.strerror}); nothing was left behind, free some space and export again"
            ) from error

    def create(self, name: str) -> HashedFile:
        """A new file of the bundle, to be written in sequence."""
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
            self._stage = self.target.with_name(f".{self.target.name}{_PARTIAL}{unique}")
            self._stage.mkdir()
        path = self._stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, manifest: Manifest) -> Manifest:
        """Names the files, writes the manifest with their checksums, and puts the bundle in its place."""
        manifest = msgspec.structs.replace(manifest, files={name: file.entry for name, file in self._files.items()})
        self.create(MANIFEST).write(_encode(manifest))
        for name, hashed in self._files.items():
            hashed.file.flush()
            os.fsync(hashed.file.fileno())
            path = self._staged(name)
            if not path.exists():
                _give_name(hashed.file.fileno(), path)
        with _moved_aside(self.target):
            self._staged(MANIFEST).parent.rename(self.target)
        return manifest


def _give_name(handle: int, path: Path) -> None:
    """Links an unnamed file into a folder. Python follows the /proc link only where a folder descriptor is given, too."""
    folder = os.open(path.parent, os.O_DIRECTORY)
    try:
        os.link(f"/proc/self/fd/{handle}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _moved_aside(target: Path) -> Iterator[None]:
    """Makes room for a new bundle; the old one goes once the new one stands, and comes back where that fails."""
    if not target.exists():
        yield
        return
    old = target.with_name(f".{target.name}{_PARTIAL}old-{os.getpid()}")
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

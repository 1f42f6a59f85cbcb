"""The bundle: a folder with a manifest, graphs, weights and tokenizer. Its schema, its checks, its atomic writing.

A bundle is data from elsewhere: before anything in it is used, its manifest is checked against the schema, and every file
it names must lie inside the folder, be no link, and have the size and sha256 that the manifest says.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from runtimes.errors import BundleError
from runtimes.folder_writer import PARTIAL, FileEntry, FolderWriter, sha256_of

FORMAT_VERSION = 6
_READABLE = (4, 5, FORMAT_VERSION)  # 4 knows no window, 5 no cuda_file
MANIFEST = "manifest.json"
GENERATION_CONFIG = "generation_config.json"  # of the checkpoint, where it had one
_MANIFEST_LIMIT = 64 * 2**20  # bytes; a manifest is a few KB


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
    cache_width numbers. window: positions that are seen by the layer that sees most, itself included, and rows that each slot needs
    at most: that of position p stands at p mod capacity; 0 where a layer sees all. cuda_file: the ONNX file for onnxruntime's CUDA
    provider, if any, over the same weights and with the same inputs and outputs: it computes in float32, reads the matrices as they
    are stored, and needs our operators there.
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
    window: Annotated[int, msgspec.Meta(ge=0)] = 0
    cuda_file: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of the bundle that is this graph's."""
        return (self.file, *self.weights, *([self.cuda_file] if self.cuda_file else []))

    def slots(self, n_loops: int) -> int:
        """Cache slots of a sequence that runs n_loops loops."""
        return self.prelude_slots + n_loops * self.loop_slots + self.coda_slots

    def weight_bytes(self, files: dict[str, FileEntry]) -> int:
        """Memory that the weights take as this graph computes with them: 16-bit ones twice their file where they are widened."""
        widened = self.dtype == "float32" and self.weight_dtype in ("float16", "bfloat16")
        return (2 if widened else 1) * sum(files[name].size for name in self.weights)


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
    listed = {name for graph in manifest.graphs for name in graph.files}
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
        if version not in _READABLE:
            raise BundleError(
                f"{path}: format version {version}, this release reads {_READABLE[0]} to {_READABLE[-1]}; "
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
    partial = folder / f".{MANIFEST}{PARTIAL}{os.getpid()}"
    try:
        partial.write_bytes(_encode(manifest))
        partial.replace(folder / MANIFEST)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BundleError(f"{folder / MANIFEST}: cannot be written: {error}; the old one stands") from error


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


class BundleWriter(FolderWriter):
    """Writes a bundle that appears whole or not at all; see FolderWriter. force replaces bundles and empty folders."""

    kind, marker = "bundle", MANIFEST

    def commit(self, manifest: Manifest) -> Manifest:
        """Names the files, writes the manifest with their checksums, and puts the bundle in its place."""
        manifest = msgspec.structs.replace(manifest, files={name: file.entry for name, file in self._files.items()})
        self._put_in_place(_encode(manifest))
        return manifest

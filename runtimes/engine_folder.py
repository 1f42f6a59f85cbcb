"""Engines of a bundle as files: reading, checks, summaries, atomic writing."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec

from runtimes import tensorrt_api
from runtimes.bundle import Manifest
from runtimes.engines import FORMAT_VERSION, Engine, Plan, contradiction
from runtimes.errors import BundleError
from runtimes.folder_writer import FolderWriter

FOLDER = "engines"  # of a bundle
METADATA = "engine.json"
_METADATA_LIMIT = 64 * 2**20  # bytes; engine.json is some 100 KB
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,200}")
_REBUILD = "build it again with `mythos-export build --force`"


def list_engines(folder: Path) -> list[tuple[Path, Engine | BundleError]]:
    """Engines of the bundle in a folder, by name: each with its metadata, or with why that cannot be used. Plans are not read.
    Raises BundleError where engines/ is a link."""
    home = folder / FOLDER
    if home.is_symlink():
        raise BundleError(f"{home}: is a link; engines are used from the bundle's own folder only")
    if not home.is_dir():
        return []
    paths = sorted(
        path for path in home.iterdir() if not path.name.startswith(".") and (path.is_dir() or path.is_symlink())
    )
    engines: list[tuple[Path, Engine | BundleError]] = []
    for path in paths:
        try:
            engines.append((path, read_engine(path)))
        except BundleError as error:
            engines.append((path, error))
    return engines


def engine_summaries(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Of all engines of a bundle, see engine_summary. Raises BundleError where engines/ is a link."""
    return [engine_summary(path, engine, manifest) for path, engine in list_engines(folder)]


def engine_summary(path: Path, engine: Engine | BundleError, manifest: Manifest) -> dict[str, Any]:
    """What a user wants to know of an engine: key, library, GPU, dtype, limits, size; or "problem", why it cannot be used."""
    if isinstance(engine, BundleError):
        return {"key": path.name, "problem": str(engine)}
    problem: str | None = None
    try:
        check(path, engine, manifest)
    except BundleError as error:
        problem = str(error)
    profiles = [profile for plan in engine.plans for profile in plan.profiles]
    forms = sorted({plan.form for plan in engine.plans})
    return {
        "key": path.name,
        "problem": problem,
        "backend": engine.backend,
        "version": engine.version,
        "device": engine.device,
        "compute_capabilities": list(engine.compute_capabilities),
        "dtype": engine.dtype,
        "max_batch": max(profile.batch.max for profile in profiles),
        "max_seq": max(profile.seq.max for profile in profiles),
        "max_context": engine.max_context,
        "plans": {form: sum(plan.size for plan in engine.plans if plan.form == form) for form in forms},
        "activation_bytes": max(plan.activation_bytes for plan in engine.plans),
        "build_seconds": engine.build_seconds,
    }


def read_engine(folder: Path) -> Engine:
    """engine.json of an engine's folder. Raises BundleError for one that is damaged or of another format version."""
    path = folder / METADATA
    _refuse_links(folder, METADATA)
    try:
        if path.stat().st_size > _METADATA_LIMIT:
            raise BundleError(f"{path}: {path.stat().st_size} bytes, more than {METADATA} can have; {_REBUILD}")
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error}; {_REBUILD}") from error
    try:
        head = msgspec.json.decode(data)
        if not isinstance(head, dict) or head.get("format") != "mythos-engine":
            raise BundleError(f'{path}: "format" is not "mythos-engine"; {_REBUILD}')
        if head.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"{path}: format version {head.get('format_version')}, this release reads {FORMAT_VERSION}; {_REBUILD}"
            )
        engine = msgspec.json.decode(data, type=Engine)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(f"{path}: damaged: {error}; {_REBUILD}") from error
    _check_consistent(path, engine)
    return engine


def _check_consistent(path: Path, engine: Engine) -> None:
    files = [name for plan in engine.plans for name in (plan.file, plan.layers)]
    unsafe = [name for name in files if not _PLAIN_NAME.fullmatch(name)]
    if unsafe:
        raise BundleError(f"{path}: names {unsafe[0][:80]!r}, which is no plain file name; do not use this engine")
    problem = contradiction(engine)
    if problem is not None:
        raise BundleError(f"{path}: contradicts itself: {problem}; {_REBUILD}")


def check_source(folder: Path, engine: Engine, manifest: Manifest) -> None:
    """Raises BundleError unless an engine (its folder is named in messages) was made from this very bundle, and its weights lie
    within the bundle's files."""
    graph = manifest.files.get(engine.graph_file)
    if graph is None or graph.sha256 != engine.graph_sha256:
        raise BundleError(f"{folder}: stale: {engine.graph_file} is not the graph it was built from; {_REBUILD}")
    for name, sha256 in engine.weights_sha256.items():
        if name not in manifest.files or manifest.files[name].sha256 != sha256:
            raise BundleError(f"{folder}: stale: {name} does not hold the weights it was built from; {_REBUILD}")
    for weight in engine.weights:
        inside = weight.file in engine.weights_sha256 and (
            weight.offset + weight.size <= manifest.files[weight.file].size
        )
        if not inside:
            raise BundleError(f"{folder}: weight {weight.name!r} lies outside {weight.file!r}; do not use this engine")


def read_plan(folder: Path, engine: Engine, plan: Plan) -> bytes:
    """A plan's bytes, compared with its size, sha256 and header first. Raises BundleError where they differ."""
    path = folder / plan.file
    _refuse_links(folder, plan.file)
    try:
        size = path.stat().st_size
        if size != plan.size:
            raise BundleError(f"{path}: {size} bytes, {METADATA} says {plan.size}; copy the engine again or {_REBUILD}")
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error}; copy the engine again or {_REBUILD}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != plan.sha256:
        raise BundleError(
            f"{path}: sha256 {digest[:16]}… does not match {METADATA}'s {plan.sha256[:16]}…: the file was changed or damaged; "
            f"copy the engine again or {_REBUILD}"
        )
    problem = tensorrt_api.header_problem(engine.backend, data)
    if problem is not None:
        raise BundleError(f"{path}: {problem}; {_REBUILD}")
    return data


def check(folder: Path, engine: Engine, manifest: Manifest) -> None:
    """Everything that can be checked without TensorRT: source, sizes, hashes, headers, links, layer reports. Raises BundleError."""
    check_source(folder, engine, manifest)
    for plan in engine.plans:
        read_plan(folder, engine, plan)
        _refuse_links(folder, plan.layers)
        if not (folder / plan.layers).is_file():
            raise BundleError(f"{folder / plan.layers}: missing; copy the engine again or {_REBUILD}")


def _refuse_links(folder: Path, name: str) -> None:
    for path in (folder.parent, folder, folder / name):
        if path.is_symlink():
            raise BundleError(f"{path}: is a link; an engine holds plain files only, copy the file in its place")


class EngineWriter(FolderWriter):
    """Writes engines/<key>/ of the bundle in a folder; the engine appears whole or not at all. force: replace one of that key.

    Files (plans, layer reports) come from create(name); commit(engine) ends it. Used as a context manager. Raises BundleError where
    the engine exists already, or the disk is full.
    """

    kind, marker = "engine", METADATA

    def __init__(self, folder: Path, key: str, *, force: bool = False) -> None:
        if not _PLAIN_NAME.fullmatch(key):
            raise BundleError(f"{key!r} is no name for an engine; expected letters, digits, dots and dashes")
        super().__init__(folder / FOLDER / key, force=force)

    def commit(self, engine: Engine) -> None:
        """Writes engine.json and puts the engine in its place."""
        missing = {name for plan in engine.plans for name in (plan.file, plan.layers)} - set(self._files)
        if missing:
            raise BundleError(f"{self.target}: {', '.join(sorted(missing))} was never written")
        _check_consistent(self.target / METADATA, engine)
        self._put_in_place(msgspec.json.format(msgspec.json.encode(engine), indent=2) + b"\n")

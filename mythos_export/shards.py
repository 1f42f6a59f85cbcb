"""Tensors of safetensors files, one or several with an index, read when asked for.

A file is mapped for one tensor and let go with it: what was read of a mapping that stays open counts as this process's memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtimes.errors import MythosError
from runtimes.folder_writer import sha256_of

INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_FLOAT8, _SCALES = "F8_E4M3", "_scale_inv"


class CheckpointError(MythosError, ValueError):
    """A source that cannot be read as a checkpoint; the message names the file, what was expected and the fix."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a safetensors file: shape and dtype known (dtype a word where it is none of torch's floats), values read when
    asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    path: Path
    name: str

    def read(self) -> Tensor:
        """Raises CheckpointError for a file that is no longer what it was."""
        with _opened(self.path) as file:
            return file.get_tensor(self.name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ScaledTensor:
    """A matrix [O, I] stored as float8 with a float32 factor for every block of it, [ceil(O / rows), ceil(I / columns)]; read as
    float32 (DeepSeek-V3, arXiv 2412.19437)."""

    values: LazyTensor
    scales: LazyTensor
    block: tuple[int, int]
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self) -> Tensor:
        rows, columns = self.block
        matrix, scales = self.values.read().float(), self.scales.read().float()
        for index, factors in enumerate(scales):
            part = matrix[index * rows : (index + 1) * rows]
            part *= factors.repeat_interleave(columns)[: matrix.shape[1]]
        return matrix


def with_scales(tensors: Mapping[str, Any], block: tuple[int, int]) -> dict[str, Any]:
    """The same with every float8 matrix NAME and its NAME_scale_inv as one ScaledTensor. Raises CheckpointError for a matrix
    without scales, and for scales that do not fit their matrix."""
    joined = dict(tensors)
    for name, values in tensors.items():
        scales = tensors.get(f"{name}{_SCALES}")
        if getattr(values, "dtype", None) != _FLOAT8:
            continue
        if not isinstance(values, LazyTensor) or not isinstance(scales, LazyTensor):
            raise CheckpointError(f"{name} is float8, but {name}{_SCALES} is not there; download the checkpoint again")
        expected = tuple(-(-size // of) for size, of in zip(values.shape, block, strict=False))
        if len(values.shape) != 2 or scales.shape != expected:
            raise CheckpointError(
                f"{name}{_SCALES} is {list(scales.shape)}, expected {list(expected)} for a matrix {list(values.shape)} in "
                f"blocks of {block[0]} x {block[1]}"
            )
        joined[name] = ScaledTensor(values, scales, block)
        del joined[f"{name}{_SCALES}"]
    return joined


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Of a .safetensors file, or of all files that an index (model.safetensors.index.json) names.

    Raises CheckpointError for a file that is missing or truncated, for an index that names files outside its folder, and for
    tensors that are not in the file that should hold them.
    """
    if path.suffix != ".json":
        return _open_file(path)
    try:
        where = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (msgspec.DecodeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors files: {error}") from error
    tensors: dict[str, LazyTensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(f"{path}: names {name[:80]!r}, which is no file of its own folder; do not use it")
        shard = path.with_name(name)
        if not shard.is_file():
            raise CheckpointError(f"{path}: names {name}, which is not beside it; download the missing file")
        tensors |= _open_file(shard)
    lost = sorted(set(where) - set(tensors))
    if lost:
        raise CheckpointError(
            f"{path}: {len(lost)} tensors are in no file it names, {lost[0]} first; download it again"
        )
    return tensors


def hash_of(path: Path) -> str:
    """sha256 of a file; of an index, that of its text and of its files' own."""
    if path.suffix != ".json":
        return sha256_of(path)
    files = sorted(set(msgspec.json.decode(path.read_bytes(), type=_Index).weight_map.values()))
    digests = [sha256_of(path), *(sha256_of(path.with_name(name)) for name in files)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _open_file(path: Path) -> dict[str, LazyTensor]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        return {
            name: LazyTensor(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()), path, name)
            for name, part in slices.items()
        }


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a complete safetensors file: {reason}") from error

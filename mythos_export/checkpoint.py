"""Reads a checkpoint safely: .pt of the training script, .safetensors with config.json, or random weights.

Nothing in a checkpoint is ever executed: a .pt is read by torch's weights_only loader with one config class mapped to a
plain record; every other class in its pickle is refused by name. Tensors are mapped from the file, not read into memory.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mythos_export.config import ConfigError, ModelConfig
from mythos_export.families import open_mythos
from mythos_export.families.open_mythos import Settings
from runtimes.bundle import Source
from runtimes.errors import MythosError
from runtimes.folder_writer import sha256_of

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+|(?:_fsdp_wrapped_module|_orig_mod)\.")
_FLOAT_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_LISTED = 20


class CheckpointError(MythosError, ValueError):
    """A source that cannot be read as a checkpoint; the message names the file, what was expected and the fix."""


class ConfigRecord:
    """Stands in for the reference's MythosConfig while unpickling: a record without code; its fields land in __dict__."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: what it describes, and its tensors by name, read when asked for.

    settings: the family's own config. config: ours. get: a tensor by the family's name, in its stored dtype, mapped from
    the file. source: where it came from. tokenizer: a tokenizer.json found beside it, if any.
    """

    settings: Settings
    config: ModelConfig
    get: Callable[[str], Tensor]
    source: Source
    tokenizer: Path | None = None

    def tensors(self, max_loops: int) -> dict[str, open_mythos.Pack]:
        """The Decoder's tensors, each as an iterator of pieces along its first dimension."""
        return open_mythos.pack(self.settings, self.get, max_loops)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under the family's names: what the reference package's model loads."""
        return {name: self.get(name) for name in open_mythos.tensor_shapes(self.settings)}


def load_checkpoint(source: str | Path) -> Checkpoint:
    """Opens SOURCE: a .pt file, a folder of step_*.pt (the newest), .safetensors with config.json beside it (or their folder),
    `random:VARIANT[:SEED]` or `random:config.json[:SEED]`. Raises CheckpointError or ConfigError."""
    text = str(source)
    if text.startswith("random:"):
        return _random(text)
    path = Path(source)
    if not path.exists():
        raise CheckpointError(
            f"{text}: no such file or folder; expected a .pt or .safetensors checkpoint, a folder of step_*.pt, or random:VARIANT "
            f"with VARIANT one of {', '.join(open_mythos.VARIANTS)}"
        )
    if path.is_dir():
        path = _newest(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)


def _newest(folder: Path) -> Path:
    steps = sorted(folder.glob("step_*.pt"), key=lambda path: int("0" + re.sub(r"\D", "", path.stem)))
    if steps:
        return steps[-1]
    safetensors = sorted(folder.glob("*.safetensors"))
    if len(safetensors) == 1:
        return safetensors[0]
    found = ", ".join(path.name for path in safetensors) or "neither"
    raise CheckpointError(
        f"{folder}: expected step_*.pt files or one .safetensors file with config.json; found {found}"
    )


def _read_pt(path: Path) -> Checkpoint:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a complete torch checkpoint (no zip directory at its end): truncated, or saved in torch's old "
            "format; copy it again, or save it with torch.save as the training script does"
        )
    _refuse_code(path)
    record = (ConfigRecord, open_mythos.CONFIG_CLASS)
    with _readable(path), torch.serialization.safe_globals([record]):  # type: ignore[list-item]
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "cfg" not in content:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f'{path}: not an OpenMythos training checkpoint: expected the keys "model" and "cfg", found {keys or "none"}'
        )
    cfg = content["cfg"]
    if not isinstance(cfg, (dict, ConfigRecord)) or not (isinstance(cfg, dict) or vars(cfg)):
        raise CheckpointError(
            f'{path}: its "cfg" is {type(cfg).__name__}; expected a MythosConfig or a dict of its fields'
        )
    fields: dict[str, Any] = cfg if isinstance(cfg, dict) else dict(vars(cfg))
    step = content.get("step")
    kind = Source(kind="pt", name=path.name, sha256=sha256_of(path), step=step if isinstance(step, int) else None)
    return _checkpoint(path, fields, content["model"], kind)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns whatever torch raises over a damaged file into one error: its reader raises anything, from struct to assert."""
    try:
        yield
    except UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, its pickle is not plain weights: {_first_line(error)}") from error
    except Exception as error:
        raise CheckpointError(f"{path}: not readable as a torch checkpoint: {_first_line(error)}") from error


def _refuse_code(path: Path) -> None:
    allowed = {open_mythos.CONFIG_CLASS, "copyreg._reconstructor", "builtins.object"}
    with _readable(path):
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - allowed
    if named:
        raise CheckpointError(
            f"{path}: refused, its pickle names {', '.join(sorted(named))}; loading it would run code. Expected tensors, plain "
            f"Python values and {open_mythos.CONFIG_CLASS} only"
        )


def _read_safetensors(path: Path) -> Checkpoint:
    config_path = path.with_name("config.json")
    if not config_path.is_file():
        raise CheckpointError(f"{path}: expected config.json beside it, with the fields of MythosConfig")
    fields = _read_json(config_path)
    tensors: dict[str, _Lazy] = {}
    try:
        file = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            part = file.get_slice(name)
            kind = part.get_dtype()
            tensors[name] = _Lazy(tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(kind, kind), file, name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file: {_first_line(error)}") from error
    return _checkpoint(path, fields, tensors, Source(kind="safetensors", name=path.name, sha256=sha256_of(path)))


_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class _Lazy:
    """A tensor of a safetensors file: shape and dtype known, values read when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    file: Any = field(repr=False)
    name: str

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)  # type: ignore[no-any-return]


def _checkpoint(path: Path, fields: dict[str, Any], raw: dict[str, Any], source: Source) -> Checkpoint:
    """Checks config and tensors against each other: every missing, extra or misshapen tensor in one error."""
    settings = _settings(fields, str(path))
    config = _config(settings, str(path))
    tensors: dict[str, Any] = {}
    problems: list[str] = []
    for original, tensor in raw.items():
        name = _WRAPPERS.sub("", str(original))
        if name in open_mythos.IGNORED_TENSORS:
            continue
        if name in tensors:
            problems.append(f"twice: {name}")
        tensors[name] = tensor
    expected = open_mythos.tensor_shapes(settings)
    head, embed = open_mythos.TIED
    tensors.setdefault(head, tensors.get(embed))
    problems += [f"missing: {name} {list(shape)}" for name, shape in expected.items() if tensors.get(name) is None]
    problems += [f"extra: {name}" for name in tensors if name not in expected]
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tuple(getattr(tensor, "shape", ())) != shape:
            problems.append(f"shape: {name} is {list(getattr(tensor, 'shape', ()))}, expected {list(shape)}")
        elif isinstance(tensor, Tensor) and (tensor.layout is not torch.strided or tensor.device.type != "cpu"):
            problems.append(f"kind: {name} is a {tensor.layout} tensor on {tensor.device}, expected plain numbers")
        elif tensor.dtype not in _FLOAT_DTYPES:
            problems.append(f"dtype: {name} is {tensor.dtype}, expected float32, float16 or bfloat16")
    if problems:
        more = f"\n  … and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"{path}: the tensors do not fit the config it carries ({len(problems)} differences):\n  "
            + "\n  ".join(problems[:_LISTED])
            + more
        )

    def get(name: str) -> Tensor:
        tensor = tensors[name]
        return tensor.read() if isinstance(tensor, _Lazy) else tensor

    if tensors[head] is not tensors[embed] and not torch.equal(get(head), get(embed)):
        raise CheckpointError(
            f"{path}: {head} differs from {embed}, but the model ties them; the checkpoint is inconsistent"
        )
    tokenizer = path.with_name("tokenizer.json")
    return Checkpoint(settings, config, get, source, tokenizer if tokenizer.is_file() else None)


def _random(text: str) -> Checkpoint:
    """random:VARIANT[:SEED], random:config.json[:SEED]: weights by name and seed, made when asked for, never all at once."""
    name, _, seed_text = text.removeprefix("random:").partition(":")
    if seed_text and not seed_text.isdecimal():
        raise CheckpointError(f'{text}: the seed is "{seed_text}"; expected a number of at least 0')
    if name in open_mythos.VARIANTS:
        settings = open_mythos.VARIANTS[name]
    elif name.endswith(".json") and Path(name).is_file():
        settings = _settings(_read_json(Path(name)), name)
    else:
        raise CheckpointError(
            f"{text}: no variant or config.json of that name; expected random:config.json or one of "
            + ", ".join(f"random:{variant}" for variant in open_mythos.VARIANTS)
        )
    seed, shapes = int(seed_text or 0), open_mythos.tensor_shapes(settings)
    head, embed = open_mythos.TIED

    def get(tensor_name: str) -> Tensor:
        key = embed if tensor_name == head else tensor_name
        mean, std = open_mythos.random_moments(key)
        tensor = torch.full(shapes[key], mean)
        if std:
            digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            tensor.normal_(mean, std, generator=generator)
        return tensor

    source = Source(kind="random", name=f"random:{Path(name).name}:{seed}")
    return Checkpoint(settings, _config(settings, text), get, source)


def _settings(fields: dict[str, Any], where: str) -> Settings:
    try:
        return msgspec.convert(fields, Settings)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(f"{where}: {error.__cause__}") from error
        raise CheckpointError(f"{where}: its config is not one of open-mythos 0.5: {error}") from error


def _config(settings: Settings, where: str) -> ModelConfig:
    try:
        return open_mythos.model_config(settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not a JSON object: {error}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

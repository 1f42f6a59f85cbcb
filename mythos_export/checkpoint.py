"""Reads a checkpoint safely: .pt of the training script, .safetensors with config.json, a Hugging Face folder, or random weights.

Nothing in a checkpoint is ever executed: a .pt is read by torch's weights_only loader with one config class mapped to a
plain record; every other class in its pickle is refused by name. Tensors are mapped from the file, not read into memory.
"""

from __future__ import annotations

import hashlib
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import msgspec
import torch
from torch import Tensor

from mythos_export.config import ConfigError, ModelConfig
from mythos_export.families import FAMILIES, Family, open_mythos
from mythos_export.families.family import Pack
from mythos_export.shards import INDEX, CheckpointError, hash_of, open_tensors, with_scales
from runtimes.bundle import GENERATION_CONFIG, Source
from runtimes.folder_writer import sha256_of

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+|(?:_fsdp_wrapped_module|_orig_mod)\.")
_FLOAT_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_LISTED = 20
_log = logging.getLogger("mythos_export")


class ConfigRecord:
    """Stands in for the reference's MythosConfig while unpickling: a record without code; its fields land in __dict__."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: what it describes, and its tensors by name, read when asked for.

    settings: the family's own config. config: ours. get: a tensor by the family's name, in its stored dtype, mapped from
    the file. source: where it came from. tokenizer: a tokenizer.json found beside it, if any. family: what maps settings and names
    onto ours. eos_token_ids: what ends a text, as generation_config.json or config.json says. unread: tensors that only training
    needs. generation_config: a generation_config.json found beside it, if any.
    """

    settings: Any
    config: ModelConfig
    get: Callable[[str], Tensor]
    source: Source
    tokenizer: Path | None = None
    family: Family = open_mythos.FAMILY
    eos_token_ids: tuple[int, ...] = ()
    unread: tuple[str, ...] = ()
    generation_config: Path | None = None

    def tensors(self, max_loops: int) -> dict[str, Pack]:
        """The Decoder's tensors, each as an iterator of pieces along its first dimension."""
        return self.family.pack(self.settings, self.get, max_loops)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under the family's names: what the reference package's model loads."""
        return {name: self.get(name) for name in self.family.tensor_shapes(self.settings)}


def load_checkpoint(source: str | Path) -> Checkpoint:
    """Opens SOURCE: a .pt file, a folder of step_*.pt (the newest), .safetensors with config.json beside it, or their folder with
    one file or several and an index, `random:VARIANT[:SEED]` or `random:config.json[:SEED]`. Raises CheckpointError or
    ConfigError."""
    text = str(source)
    if text.startswith("random:"):
        return _random(text)
    path = Path(source)
    if not path.exists():
        raise CheckpointError(
            f"{text}: no such file or folder; expected a .pt or .safetensors checkpoint, a folder of step_*.pt, or random:VARIANT "
            f"with VARIANT one of {', '.join(_variants())}"
        )
    if path.is_dir():
        path = _newest(path)
    return _read_safetensors(path) if path.suffix in (".safetensors", ".json") else _read_pt(path)


def _variants() -> dict[str, tuple[Family, Any]]:
    return {name: (family, settings) for family in FAMILIES for name, settings in family.variants.items()}


def _newest(folder: Path) -> Path:
    steps = sorted(folder.glob("step_*.pt"), key=lambda path: int("0" + re.sub(r"\D", "", path.stem)))
    if steps:
        return steps[-1]
    if (folder / INDEX).is_file():
        return folder / INDEX
    safetensors = sorted(folder.glob("*.safetensors"))
    if len(safetensors) == 1:
        return safetensors[0]
    found = ", ".join(path.name for path in safetensors) or "neither"
    raise CheckpointError(
        f"{folder}: expected step_*.pt files, or config.json with one .safetensors file or {INDEX}; found {found}"
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
    return _checkpoint(path, open_mythos.FAMILY, fields, content["model"], kind)


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
        raise CheckpointError(
            f"{path}: expected config.json beside it, with the fields of MythosConfig or of a Hugging Face model"
        )
    fields = _read_json(config_path)
    family = _family(fields, str(config_path))
    tensors = open_tensors(path)
    source = Source(kind="safetensors", name=path.name, sha256=hash_of(path))
    ends = _ends(path.parent, fields) if family.architectures else ()
    return _checkpoint(path, family, fields, dict(tensors), source, ends)


def _family(fields: dict[str, Any], where: str) -> Family:
    """By the architecture that config.json names first; one that names none is open-mythos's."""
    named = fields.get("architectures")
    if not named:
        return open_mythos.FAMILY
    for family in FAMILIES:
        if isinstance(named, list) and named[0] in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise CheckpointError(f"{where}: architectures is {named}; expected one of {known}, or the fields of MythosConfig")


def _ends(folder: Path, fields: dict[str, Any]) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of config.json: a number, several or none."""
    path = folder / GENERATION_CONFIG
    found = _read_json(path).get("eos_token_id") if path.is_file() else None
    found = fields.get("eos_token_id") if found is None else found
    numbers = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise CheckpointError(f"{folder}: eos_token_id is {found!r}; expected a token's number or a list of them")
    return tuple(numbers)


def _checkpoint(
    path: Path,
    family: Family,
    fields: dict[str, Any],
    raw: dict[str, Any],
    source: Source,
    eos_token_ids: tuple[int, ...] = (),
) -> Checkpoint:
    """Checks config and tensors against each other: every missing, extra or misshapen tensor in one error."""
    settings = _settings(family, fields, str(path))
    config = _config(family, settings, str(path))
    tensors: dict[str, Any] = {}
    problems: list[str] = []
    unread: list[str] = []
    block = getattr(settings, "scaled_blocks", None)
    raw = raw if block is None else with_scales(raw, block)
    for original, tensor in raw.items():
        name = _WRAPPERS.sub("", str(original))
        if family.ignored(name):
            continue
        if name in tensors:
            problems.append(f"twice: {name}")
        tensors[name] = tensor
    expected, tied = family.tensor_shapes(settings), family.tied(settings)
    for name in [name for name in tensors if name not in expected and family.leftover(settings, name)]:
        unread.append(name)
        del tensors[name]
    if tied is not None:
        tensors.setdefault(tied[0], tensors.get(tied[1]))
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

    if unread:
        _log.warning("%s: %d tensors that only training needs are not read, %s first", path, len(unread), unread[0])

    def get(name: str) -> Tensor:
        tensor = tensors[name]
        return tensor if isinstance(tensor, Tensor) else tensor.read()  # type: ignore[no-any-return]

    if tied is not None:
        head, embed = tied
        if tensors[head] is not tensors[embed] and not torch.equal(get(head), get(embed)):
            raise CheckpointError(
                f"{path}: {head} differs from {embed}, but the model ties them; the checkpoint is inconsistent"
            )
    tokenizer, generation = (_beside(path, name) for name in ("tokenizer.json", GENERATION_CONFIG))
    return Checkpoint(
        settings, config, get, source, tokenizer, family, eos_token_ids, tuple(unread), generation_config=generation
    )


def _beside(path: Path, name: str) -> Path | None:
    found = path.with_name(name)
    return found if found.is_file() else None


def _random(text: str) -> Checkpoint:
    """random:VARIANT[:SEED], random:config.json[:SEED]: weights by name and seed, made when asked for, never all at once."""
    name, _, seed_text = text.removeprefix("random:").partition(":")
    if seed_text and not seed_text.isdecimal():
        raise CheckpointError(f'{text}: the seed is "{seed_text}"; expected a number of at least 0')
    variants = _variants()
    if name in variants:
        family, settings = variants[name]
    elif name.endswith(".json") and Path(name).is_file():
        fields = _read_json(Path(name))
        family = _family(fields, name)
        settings = _settings(family, fields, name)
    else:
        raise CheckpointError(
            f"{text}: no variant or config.json of that name; expected random:config.json or one of "
            + ", ".join(f"random:{variant}" for variant in variants)
        )
    config = _config(family, settings, text)
    seed, shapes = int(seed_text or 0), family.tensor_shapes(settings)
    head, embed = family.tied(settings) or ("", "")

    def get(tensor_name: str) -> Tensor:
        key = embed if tensor_name == head else tensor_name
        mean, std = family.random_moments(key)
        tensor = torch.full(shapes[key], mean)
        if std:
            digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            tensor.normal_(mean, std, generator=generator)
        return tensor

    source = Source(kind="random", name=f"random:{Path(name).name}:{seed}")
    return Checkpoint(settings, config, get, source, family=family)


def _settings(family: Family, fields: dict[str, Any], where: str) -> Any:
    try:
        return msgspec.convert(fields, family.settings)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(f"{where}: {error.__cause__}") from error
        raise CheckpointError(f"{where}: its config is not one of {family.name}: {error}") from error


def _config(family: Family, settings: Any, where: str) -> ModelConfig:
    try:
        return family.model_config(settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not a JSON object: {error}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Statistics of a model's activations, gathered over text and kept on disk: a folder of parts, each of some modules.

A part is a safetensors file that says in its header what it is of and how many sequences it has seen. A killed run goes on from
the last one written and ends with the same bits. Folders of several processes, each over its share of the text, are read as one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from calibration.observers import Moments, Observer, Wanted, merge_moments
from runtimes.errors import InputError

CONTRIBUTION = (
    "contribution"  # a module of this name passes the weights [B, S, 1] of the tokens for the modules beside it
)
_BATCH_TOKENS = 1024
_SAVE_SECONDS = 30.0
_SEPARATOR = "|"
Progress = Callable[[str, int, int], None]


class Statistics:
    """Reads what `gather` wrote, one module at a time."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._files: dict[str, list[Path]] = {}
        self.subject: dict[str, Any] | None = None
        self.tokens: dict[str, int] = {}  # that passed the model while a module was observed
        for folder in folders:
            parts = sorted(Path(folder).glob("part-*.safetensors"))
            if not parts:
                raise InputError(f"{folder}: holds no statistics; expected a folder made by `mythos-export calibrate`")
            for part in parts:
                self._add(part)

    def _add(self, part: Path) -> None:
        head = read_header(part)
        if head is None or head["seen"] != head["sequences"]:
            raise InputError(
                f"{part}: is unfinished or damaged; run the calibration again, it goes on where it stopped"
            )
        subject = {key: value for key, value in head["subject"].items() if key != "share"}
        if self.subject is None:
            self.subject = subject
        elif subject != self.subject:
            raise InputError(
                f"{part}: was gathered of another model or with other settings than the first folder; expected the same bundle, "
                "recipe and loop count"
            )
        for name in head["modules"]:
            self._files.setdefault(name, []).append(part)
            self.tokens[name] = self.tokens.get(name, 0) + head["tokens"]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def has(self, name: str, key: str) -> bool:
        """Whether a sum of one module was kept."""
        with safe_open(self._files[name][0], framework="pt") as file:
            return f"{name}{_SEPARATOR}{key}" in file.keys()  # noqa: SIM118

    def moments(self, name: str, *keys: str) -> Moments:
        """The named sums (all: none named) of one module, over all folders."""
        parts = []
        for path in self._files[name]:
            with safe_open(path, framework="pt") as file:
                held = [key.partition(_SEPARATOR)[2] for key in file.keys() if key.startswith(name + _SEPARATOR)]  # noqa: SIM118
                needed = {*keys, *(("exponent",) if "histogram" in keys else ())} or set(held)
                parts.append({key: file.get_tensor(f"{name}{_SEPARATOR}{key}") for key in held if key in needed})
        return reduce(merge_moments, parts)


def read_header(path: Path) -> dict[str, Any] | None:
    """What a part says of itself; None where it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            head: dict[str, Any] = json.loads((file.metadata() or {})["statistics"])
            return head
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError):
        return None


def gather(
    model: nn.Module,
    ids: Tensor,
    wanted: Mapping[str, Wanted],
    folder: str | Path,
    subject: dict[str, Any],
    *,
    n_loops: int = 1,
    contribution: bool = False,
    memory: int = 2**30,
    divisors: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Runs model over ids [N, T] int64 and keeps what is wanted of its modules' inputs, by loop; returns it.

    model: any module that takes ids [B, T]; a module's calls within one forward are its loops, at most n_loops. A module may say
    which of the batch's tokens its next input stands for by an attribute `tokens` [n]; without it, all B * T. contribution: weigh
    tokens by what passes the module named "contribution" beside them, where there is one. memory: bytes of sums held at once; more
    are gathered in several passes over the text. divisors: [I], what to divide the inputs of the modules named by. subject: plain
    JSON that says what this is of; parts of the same subject in the folder are taken up again, others replaced.
    Raises InputError for inputs that are NaN or infinite, or a name that is no module.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    modules = dict(model.named_modules())
    missing = sorted(set(wanted) - set(modules))
    if missing:
        raise InputError(
            f"the model has no modules {', '.join(missing[:5])}; it has {', '.join(list(modules)[1:6])}, …"
        )
    passes = _passes(modules, wanted, n_loops, memory)
    for stale in set(target.glob("part-*")) - {target / _part(i) for i in range(len(passes))}:
        stale.unlink()  # of another plan, or half written by a killed run
    for index, names in enumerate(passes):
        observers = {
            name: Observer(name, channels(modules[name]), n_loops, wanted[name], (divisors or {}).get(name))
            for name in names
        }
        run = _Pass(model, modules, observers, target / _part(index), subject, contribution)

        def tell(done: int, before: int = index * len(ids)) -> None:
            if progress:
                progress("calibrating", before + done, len(ids) * len(passes))

        run.run(ids, tell)
    return Statistics([target])


def channels(module: nn.Module) -> int:
    """Input channels of a module; one without weights says by its attribute `channels`."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return int(module.channels)  # type: ignore[arg-type]


def _part(index: int) -> str:
    return f"part-{index:03d}.safetensors"


def _passes(
    modules: Mapping[str, nn.Module], wanted: Mapping[str, Wanted], n_loops: int, memory: int
) -> list[list[str]]:
    """The modules in groups whose sums fit into the memory; at least one a group."""
    groups: list[list[str]] = [[]]
    used = 0
    for name in wanted:
        size = wanted[name].n_bytes(channels(modules[name]), n_loops)
        if groups[-1] and used + size > memory:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


class _Pass:
    """One pass over the text for some of the modules."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        observers: dict[str, Observer],
        path: Path,
        subject: dict[str, Any],
        contribution: bool,
    ) -> None:
        self._model, self._modules, self._observers = model, modules, observers
        self._path, self._subject = path, subject
        self._weights: dict[str, Tensor] = {}  # by the name of the part of the model they hold in
        self._calls: dict[str, int] = {}
        self._contribution = contribution
        self._tokens = 0

    def run(self, ids: Tensor, tell: Callable[[int], None]) -> None:
        self._tokens = ids.numel()
        seen = self._restore(len(ids))
        batch = max(1, _BATCH_TOKENS // ids.shape[1])
        saved = time.monotonic()
        tell(seen)
        with self._hooked(), torch.no_grad():
            while seen < len(ids):
                self._calls.clear()
                self._weights.clear()
                self._model(ids[seen : seen + batch])
                seen = min(seen + batch, len(ids))
                tell(seen)
                if time.monotonic() - saved > _SAVE_SECONDS and seen < len(ids):
                    self._save(seen, len(ids))
                    saved = time.monotonic()
        self._save(len(ids), len(ids))

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = [self._modules[name].register_forward_pre_hook(self._see(name)) for name in self._observers]
        if self._contribution:
            for name, module in self._modules.items():
                if name.rpartition(".")[2] == CONTRIBUTION:
                    handles.append(module.register_forward_pre_hook(self._weigh(name.rpartition(".")[0])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        observer = self._observers[name]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            loop = self._calls.get(name, 0)
            self._calls[name] = loop + 1
            weight = next((w for part, w in self._weights.items() if name.startswith(f"{part}.")), None)
            tokens = getattr(module, "tokens", None)
            if weight is not None and tokens is not None:
                weight = weight[tokens]
            observer.see(args[0].flatten(0, -2), weight, loop)

        return hook

    def _weigh(self, part: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._weights[part] = args[0].flatten()

        return hook

    def _head(self, seen: int, sequences: int) -> dict[str, Any]:
        progress = {"seen": seen, "sequences": sequences, "tokens": self._tokens}
        return {"subject": self._subject, "modules": list(self._observers), **progress}

    def _restore(self, sequences: int) -> int:
        """Takes up what an earlier run left; returns how many sequences that had seen."""
        head = read_header(self._path) if self._path.exists() else None
        if head is None or head != self._head(head["seen"], sequences):
            return 0
        with safe_open(self._path, framework="pt") as file:
            for name, observer in self._observers.items():
                for key in observer.moments:
                    observer.moments[key] = file.get_tensor(f"{name}{_SEPARATOR}{key}").clone()
        return int(head["seen"])

    def _save(self, seen: int, sequences: int) -> None:
        tensors = {
            f"{name}{_SEPARATOR}{key}": value
            for name, observer in self._observers.items()
            for key, value in observer.moments.items()
        }
        partial = self._path.with_suffix(f".partial-{os.getpid()}")
        save_file(tensors, partial, {"statistics": json.dumps(self._head(seen, sequences))})
        partial.replace(self._path)

"""Speed of a bundle on this machine, in llama-bench's terms: pp (prefill) and tg (decode) rows, mean and deviation.

Beside tokens a second stands what a token must read (weights and cache), the bandwidth that makes, and its share of the read
bandwidth measured in the same run: decode of one sequence is reading, so the share says how far there is to go.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mythos_export import __version__, footprint
from mythos_export.bandwidth import DeviceBandwidth, ReadBandwidth
from mythos_export.config import ModelConfig
from runtimes import cuda, native_operators
from runtimes.errors import InputError
from runtimes.runner import Runner, load
from runtimes.session import check_n_loops

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One test. Rates and bytes are a token of the whole batch; bandwidth_share is the median of the repetitions' shares of the
    bandwidth probed beside each; ratio_to_reference is None without --reference."""

    test: str
    tokens_per_second: float
    std: float
    bytes_per_token: float
    gb_per_second: float
    bandwidth_share: float
    ratio_to_reference: float | None = None
    reference_tokens_per_second: float | None = None


@dataclass(frozen=True)
class Report:
    """What `mythos-export bench` prints. peak_memory_bytes: of this process, before the reference was loaded; weights_bytes and
    cache_bytes: what of it the model itself needs."""

    rows: tuple[Row, ...]
    read_bandwidth_gb_per_second: float
    peak_memory_bytes: int
    weights_bytes: int
    cache_bytes: int
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Workload:
    """prompt: tokens of the pp row; new: tokens of the tg row; 0 leaves a row out. context: tokens in the cache before those."""

    prompt: int = 512
    new: int = 128
    context: int = 0
    repetitions: int = 5
    batch: int = 1
    loops: int | None = None
    threads: int | None = None
    native: bool | None = None
    backend: str = "auto"
    engine: str | None = None
    memory_limit: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two tests."""
        return max(self.prompt, self.context + self.new + 1)

    def check_numbers(self) -> None:
        """Raises InputError for numbers that make no sense."""
        if min(self.prompt, self.new, self.context) < 0 or self.prompt + self.new == 0:
            raise InputError(
                f"-p is {self.prompt}, -n {self.new} and -d {self.context}; expected 0 or more, and -p or -n above 0"
            )
        for name, value in (("-r", self.repetitions), ("-b", self.batch)):
            if value < 1:
                raise InputError(f"{name} is {value}; expected at least 1")

    def check(self, runner: Runner) -> int:
        """Raises InputError for what the bundle cannot run; returns the loop count."""
        if self.longest > runner.graph.max_seq_len:
            raise InputError(
                f"-p {self.prompt} -n {self.new} -d {self.context} needs {self.longest} positions, the model has "
                f"{runner.graph.max_seq_len}; lower them"
            )
        return int(check_n_loops(runner.graph, self.loops, 1)[0])


def bench(
    bundle: str | Path, workload: Workload, reference: str | Path | None = None, progress: Progress | None = None
) -> Report:
    """Measures a bundle; with reference, also the checkpoint in the reference package's own model in eager float32 torch, run in
    turn with the bundle so that both see the same machine. Raises InputError or BundleError before measuring."""
    workload.check_numbers()
    runner = load(
        bundle,
        workload.backend,
        workload.threads,
        workload.native,
        engine=workload.engine,
        max_batch=workload.batch,
        max_context=workload.longest,
        memory_limit=workload.memory_limit,
    )
    loops = workload.check(runner)
    tests = [name for name, tokens in (("pp", workload.prompt), ("tg", workload.new)) if tokens]
    threads = workload.threads or os.cpu_count() or 1
    ours = {name: _runner_test(runner, name, workload, loops) for name in tests}
    for test in ours.values():
        test()  # warm-up
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    theirs = _reference_tests(reference, tests, workload, loops, threads) if reference is not None else {}
    bandwidth = ReadBandwidth(threads) if runner.engine is None else DeviceBandwidth()
    tell = progress or (lambda *_: None)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in tests}
    reference_seconds: dict[str, list[float]] = {name: [] for name in tests}
    for at, name in enumerate(tests):
        for repetition in range(workload.repetitions):
            tell("measuring", at * workload.repetitions + repetition, len(tests) * workload.repetitions)
            measured[name].append(bandwidth.beside(ours[name]))
            if theirs:
                reference_seconds[name].append(theirs[name]())
    tell("measuring", 1, 1)
    rows = [_row(runner, name, workload, loops, measured[name], reference_seconds[name]) for name in tests]
    weights = sum(runner.manifest.files[name].size for name in runner.graph.weights)
    config = ModelConfig.from_dict(runner.manifest.model)
    cache = workload.batch * footprint.cache_bytes(config, loops, workload.longest, runner.graph.cache_dtype)
    return Report(
        tuple(rows),
        statistics.median(bandwidth.probes),
        peak,
        weights,
        cache,
        {**environment(runner, threads), "loops": loops, "batch": workload.batch, "repetitions": workload.repetitions},
    )


def _runner_test(runner: Runner, name: str, workload: Workload, loops: int) -> Callable[[], float]:
    tokens = _tokens(runner.graph.vocab_size, workload)

    def prefill() -> float:
        session = runner.session(workload.batch, loops, tokens=workload.prompt)
        began = time.perf_counter()
        session.advance(tokens[:, : workload.prompt].tolist())
        seconds = time.perf_counter() - began
        session.close()
        return seconds

    def decode() -> float:
        session = runner.session(workload.batch, loops, tokens=workload.context + 1 + workload.new)
        session.advance(tokens[:, : workload.context + 1].tolist())
        steps = [column[:, None].tolist() for column in tokens[:, workload.context + 1 :].T[: workload.new]]
        # As generate does when greedy: an engine chooses on the device. On onnxruntime the choice is ours, not the model's.
        advance = session.advance if runner.engine is None else session.advance_greedy
        began = time.perf_counter()
        for step in steps:
            advance(step)
        seconds = time.perf_counter() - began
        session.close()
        return seconds

    return prefill if name == "pp" else decode


def _reference_tests(
    source: str | Path, tests: list[str], workload: Workload, loops: int, threads: int
) -> dict[str, Callable[[], float]]:
    import torch

    from mythos_export.checkpoint import load_checkpoint
    from mythos_export.reference import reference_model

    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(source)
    model = reference_model(checkpoint)
    tokens = torch.from_numpy(_tokens(checkpoint.config.vocab_size, workload))

    def prefill() -> float:
        with torch.no_grad():
            began = time.perf_counter()
            model(tokens[:, : workload.prompt], n_loops=loops, kv_cache={})
            return time.perf_counter() - began

    def decode() -> float:
        cache: dict[str, Any] = {}
        with torch.no_grad():
            model(tokens[:, : workload.context + 1], n_loops=loops, kv_cache=cache)
            began = time.perf_counter()
            for at in range(workload.context + 1, workload.context + workload.new + 1):
                model(tokens[:, at : at + 1], n_loops=loops, kv_cache=cache, start_pos=at)
            return time.perf_counter() - began

    available = {"pp": prefill, "tg": decode}
    for name in tests:
        available[name]()  # warm-up
    return {name: available[name] for name in tests}


def _tokens(vocab_size: int, workload: Workload) -> Any:
    shape = (workload.batch, max(workload.prompt, workload.context + workload.new + 1))
    return np.random.default_rng(0).integers(0, vocab_size, shape)


def _row(
    runner: Runner,
    name: str,
    workload: Workload,
    loops: int,
    measured: list[tuple[float, float]],
    reference_seconds: list[float],
) -> Row:
    each = workload.prompt if name == "pp" else workload.new
    tokens = each * workload.batch
    rates = [tokens / seconds for seconds, _ in measured]
    n_bytes = bytes_per_token(runner, name, workload, loops)
    rate = statistics.mean(rates)
    shares = [n_bytes * tokens / seconds / 1e9 / bandwidth for seconds, bandwidth in measured]
    theirs = tokens / statistics.median(reference_seconds) if reference_seconds else None
    return Row(
        test=f"{name}{each}" + (f" @ d{workload.context}" if name == "tg" and workload.context else ""),
        tokens_per_second=rate,
        std=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        bytes_per_token=n_bytes,
        gb_per_second=n_bytes * rate / 1e9,
        bandwidth_share=statistics.median(shares),
        ratio_to_reference=tokens / statistics.median(seconds for seconds, _ in measured) / theirs if theirs else None,
        reference_tokens_per_second=theirs,
    )


def bytes_per_token(runner: Runner, name: str, workload: Workload, loops: int) -> float:
    """Bytes a token must read and write: weights once a step (a prefill is one step), live cache rows, the new rows."""
    manifest, graph = runner.manifest, runner.graph
    config = ModelConfig.from_dict(manifest.model)
    storage = footprint.Storage.of("float32" if graph.dtype == "float32" else graph.weight_dtype, manifest.quantization)
    batch, row = workload.batch, footprint.cache_bytes(config, loops, 1, graph.cache_dtype)
    if name == "pp":
        weights = footprint.weight_bytes_read(config, loops, batch * workload.prompt, storage)
        return weights / (batch * workload.prompt) + row
    weights = footprint.weight_bytes_read(config, loops, batch, storage)
    mean_past = workload.context + 1 + (workload.new - 1) / 2
    return weights / batch + row * (min(mean_past, config.window or mean_past) + 1)


def environment(runner: Runner, threads: int) -> dict[str, Any]:
    """What a figure must be read with: machine, versions, model, number formats."""
    graph = runner.graph
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "backend": runner.backend,
        "operators": _operators(runner),
        "engine": runner.engine,
        "device": cuda.device().name if runner.engine is not None else None,
        "device_memory": runner.memory,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "mythos_export": __version__,
        "parameters": footprint.parameters(ModelConfig.from_dict(runner.manifest.model)),
        "weight_dtype": graph.weight_dtype,
        "compute_dtype": graph.dtype,
        "cache_dtype": graph.cache_dtype,
    }


def _operators(runner: Runner) -> str | None:
    """Instruction set of the native kernels, or "portable"; None where an engine runs."""
    if runner.engine is not None:
        return None
    return native_operators.instruction_set() if runner.native else "portable"


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""Speed of a bundle on this machine, in llama-bench's terms: pp (prefill) and tg (decode) rows, mean and deviation.

Beside tokens a second stands what a token must read (weights and cache), the bandwidth that makes, and its share of the read
bandwidth measured in the same run: decode of one sequence is reading, so the share says how far there is to go. Where there is a
meter of energy (meters.py), the tests run again under it: watts and tokens a joule.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mythos_export import footprint
from mythos_export.bandwidth import Bandwidth, DeviceBandwidth, ReadBandwidth
from mythos_export.config import LatentAttentionConfig, ModelConfig
from mythos_export.environment import environment
from mythos_export.footprint import Part
from mythos_export.free_memory import FreeMemory
from mythos_export.meters import find_meter
from mythos_export.power import Power, Stopwatch, measure
from mythos_export.profiling import Profile
from runtimes.choosing import Chooser
from runtimes.engine_folder import list_engines
from runtimes.errors import BackendError, InputError
from runtimes.runner import Runner, load
from runtimes.sampling import Sampling, SplitMix64
from runtimes.session import Session, check_n_loops

Progress = Callable[[str, int, int], None]
Test = Callable[[Stopwatch], None]


@dataclass(frozen=True)
class Row:
    """One test. Rates and bytes are a token of the whole batch; bandwidth_share is the median of the repetitions' shares of the
    bandwidth probed beside each; watts and tokens_per_joule are None where there is no meter, ratio_to_reference without
    --reference."""

    test: str
    tokens_per_second: float
    std: float
    bytes_per_token: float
    gb_per_second: float
    bandwidth_share: float
    ratio_to_reference: float | None = None
    reference_tokens_per_second: float | None = None
    watts: float | None = None
    tokens_per_joule: float | None = None


@dataclass(frozen=True)
class Report:
    """What `mythos-export bench` prints. peak_memory_bytes: of this process, before the reference was loaded; weights_bytes and
    cache_bytes: what of it the model itself needs; device_memory_bytes: what less was free on the GPU during the tests than before,
    CUDA's own part aside, None on a CPU. power: the meter's source and what else it saw, or the problem why there is none.
    profile_problem: why there are no profiles though they were asked for."""

    rows: tuple[Row, ...]
    read_bandwidth_gb_per_second: float
    peak_memory_bytes: int
    weights_bytes: int
    cache_bytes: int
    environment: dict[str, Any]
    device_memory_bytes: int | None = None
    power: dict[str, Any] = field(default_factory=dict)
    profiles: tuple[Profile, ...] = ()
    profile_problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Workload:
    """prompt: tokens of the pp row; new: tokens of the tg row; 0 leaves a row out. context: tokens in the cache before those.
    chunk: tokens of a prefill step, by default what suits the backend."""

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
    device: str | None = None
    chunk: int | None = None

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
        for name, value in (("-r", self.repetitions), ("-b", self.batch), ("--chunk", self.chunk)):
            if value is not None and value < 1:
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
    bundle: str | Path,
    workload: Workload,
    reference: str | Path | None = None,
    progress: Progress | None = None,
    profile: bool = False,
) -> Report:
    """Measures a bundle; with reference, also the checkpoint in the reference package's own model in eager float32 torch, run in
    turn with the bundle so that both see the same machine; with profile, also a step of each test, kernel by kernel, or why that
    cannot be had. Raises InputError or BundleError before measuring."""
    workload.check_numbers()
    # CUDA is not woken for a bundle that runs on the CPU.
    memory = FreeMemory(
        workload.device == "cuda" or (workload.backend != "onnxruntime" and bool(list_engines(Path(bundle))))
    )
    runner = open_runner(bundle, workload)
    loops = workload.check(runner)
    on_device = runner.device == "cuda"
    tests = [name for name, tokens in (("pp", workload.prompt), ("tg", workload.new)) if tokens]
    threads = workload.threads or os.cpu_count() or 1
    ours = {name: runner_test(runner, name, workload, loops) for name in tests}
    for test in ours.values():
        test(Stopwatch(at_end=memory.look))  # warm-up
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    theirs = _reference_tests(reference, tests, workload, loops, threads) if reference is not None else {}
    bandwidth = DeviceBandwidth() if on_device else ReadBandwidth(threads)
    timed: dict[str, Callable[[], float]] = {name: partial(_seconds, test) for name, test in ours.items()}
    measured, reference_seconds = _measure(timed, theirs, bandwidth, workload.repetitions, progress)
    powers, power = _powers(ours, on_device)
    rows = [
        _row(runner, name, workload, loops, measured[name], reference_seconds[name], powers.get(name)) for name in tests
    ]
    about = {**environment(runner, threads), "loops": loops, "batch": workload.batch}
    profiles: tuple[Profile, ...] = ()
    problem = None
    if profile:
        from mythos_export.bench_profile import profile_tests

        runner.close()
        try:
            profiles = profile_tests(bundle, workload, on_device, tests, loops, statistics.median(bandwidth.probes))
        except BackendError as error:  # what was measured is told all the same
            problem = str(error)
    config = ModelConfig.from_dict(runner.manifest.model)
    return Report(
        tuple(rows),
        statistics.median(bandwidth.probes),
        peak,
        sum(runner.manifest.files[name].size for name in runner.graph.weights),
        workload.batch * footprint.cache_bytes(config, loops, workload.longest, runner.graph.cache_dtype),
        {**about, "repetitions": workload.repetitions},
        memory.taken() if on_device else None,
        power,
        profiles,
        problem,
    )


def open_runner(bundle: str | Path, workload: Workload) -> Runner:
    """A bundle loaded as a workload wants it."""
    return load(
        bundle,
        workload.backend,
        workload.threads,
        workload.native,
        device=workload.device,
        engine=workload.engine,
        max_batch=workload.batch,
        max_context=workload.longest,
        memory_limit=workload.memory_limit,
    )


def _seconds(test: Test) -> float:
    watch = Stopwatch()
    test(watch)
    return watch.seconds


def _measure(
    ours: dict[str, Callable[[], float]],
    theirs: dict[str, Callable[[], float]],
    bandwidth: Bandwidth,
    repetitions: int,
    progress: Progress | None,
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[float]]]:
    """Seconds and bandwidth of every test and repetition, and the reference's seconds."""
    tell = progress or (lambda *_: None)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ours}
    reference_seconds: dict[str, list[float]] = {name: [] for name in ours}
    for at, name in enumerate(ours):
        for repetition in range(repetitions):
            tell("measuring", at * repetitions + repetition, len(ours) * repetitions)
            measured[name].append(bandwidth.beside(ours[name]))
            if theirs:
                reference_seconds[name].append(theirs[name]())
    tell("measuring", 1, 1)
    return measured, reference_seconds


def _powers(tests: dict[str, Test], on_device: bool) -> tuple[dict[str, Power], dict[str, Any]]:
    """What each test draws, and who measured it or why nobody did."""
    meter, problem = find_meter(on_device)
    if meter is None:
        return {}, {"problem": problem}
    try:
        powers = {name: measure(meter, test) for name, test in tests.items()}
        return powers, {"source": meter.source, **meter.about()}
    finally:
        meter.close()


def runner_test(runner: Runner, name: str, workload: Workload, loops: int, before: int = 0) -> Test:
    """The test of that name, pp or tg. before: steps of tg that are not timed."""
    tokens = _tokens(runner.graph.vocab_size, workload)

    def prefill(watch: Stopwatch) -> None:
        session = runner.session(workload.batch, loops, workload.chunk, tokens=workload.prompt)
        with watch:
            session.advance(tokens[:, : workload.prompt].tolist())
        session.close()

    def decode(watch: Stopwatch) -> None:
        session = runner.session(workload.batch, loops, workload.chunk, tokens=workload.context + 1 + workload.new)
        session.advance(tokens[:, : workload.context + 1].tolist())
        steps = [column[:, None].tolist() for column in tokens[:, workload.context + 1 :].T[: workload.new]]
        if before:
            _decode(runner, session, steps[:before])
        with watch:
            _decode(runner, session, steps[before:])
        session.close()

    return prefill if name == "pp" else decode


def _decode(runner: Runner, session: Session, steps: list[list[list[int]]]) -> None:
    """As many steps as are given, as generate does them: a GPU chooses on the device. On the CPU the choice is ours, not the
    model's, and left out."""
    rows = len(steps[0])
    if runner.device == "cpu":
        for step in steps:
            session.advance(step)
    elif runner.backend == "tensorrt":  # it finds the likeliest tokens alone
        for step in steps:
            session.advance_choosing(step, Chooser.greedy(rows))
    else:  # each step is fed what the one before it chooses: sequences that grew alike would share experts
        sampling = Sampling(temperature=0.0 if rows == 1 else 1.0)
        chooser = Chooser(sampling, [()] * rows, [SplitMix64(row) for row in range(rows)])
        step = steps[0]
        for left in range(len(steps) - 1, -1, -1):
            step = session.advance_choosing(step, chooser, more=left > 0).tokens[:, None].tolist()


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
    power: Power | None,
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
        watts=power.watts if power else None,
        tokens_per_joule=tokens / power.joules if power else None,
    )


def bytes_per_token(runner: Runner, name: str, workload: Workload, loops: int) -> float:
    """Bytes a token must read and write: weights once a step (a prefill is one step), live cache rows, the new rows."""
    tokens = workload.batch * (workload.prompt if name == "pp" else 1)
    return sum(step_bytes(runner, name, workload, loops).values()) / tokens


def step_bytes(runner: Runner, name: str, workload: Workload, loops: int) -> dict[Part, float]:
    """Bytes that a step of a test (of tg, a step in the middle) must read and write, by part of the model."""
    manifest, graph = runner.manifest, runner.graph
    config = ModelConfig.from_dict(manifest.model)
    widened = runner.device == "cpu" and graph.dtype == "float32"
    storage = footprint.Storage.of("float32" if widened else graph.weight_dtype, manifest.quantization)
    row = footprint.cache_bytes(config, loops, 1, graph.cache_dtype)
    if name == "pp":
        tokens, rows = workload.batch * workload.prompt, float(workload.prompt)
    else:
        mean_past = workload.context + 1 + (workload.new - 1) / 2
        tokens, rows = workload.batch, min(mean_past, config.window or mean_past) + 1
    is_latent = isinstance(config.layers[0].attention, LatentAttentionConfig)
    cache = Part("LatentAttention" if is_latent else "GroupedQueryAttention", "cache")
    return {**footprint.parts_read(config, loops, tokens, storage), cache: workload.batch * row * rows}

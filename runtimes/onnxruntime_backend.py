"""The onnxruntime backend: the bundle's graph on the CPU, weights mapped from disk, nothing copied in, rows copied out."""

from __future__ import annotations

import logging
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from runtimes import native_operators
from runtimes.backend import Cancelled, StepInput, StepOutput, StopSignal, prefill_chunk_beside, say_once
from runtimes.bundle import Graph, Manifest
from runtimes.errors import BackendError, BundleError
from runtimes.host_sequences import HostSequences
from runtimes.memory import MemoryBudget

_log = logging.getLogger("mythos_export")
FAILURES = tuple(
    kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)
)  # onnxruntime's exceptions share no base class of their own


class OnnxRuntimeBackend:
    """Runs the bundle's float32 graph on onnxruntime's CPU provider.

    threads: None lets onnxruntime take every core. native: use the native operators; None uses them where they are built, and
    falls back to the portable bodies, saying so once, where onnxruntime refuses the library. memory_limit: most bytes for weights
    and all caches; None: no limit. profile: begin of the name of a file for onnxruntime's profiler; None: it is off. Raises
    BackendError where native is True and they cannot be used, MemoryLimitError for weights beyond the limit.
    """

    name = "onnxruntime"
    device = "cpu"
    engine = None
    memory = None

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        threads: int | None = None,
        native: bool | None = None,
        memory_limit: int | None = None,
        profile: Path | None = None,
    ) -> None:
        self.graph = _choose(manifest)
        weights = self.graph.weight_bytes(manifest.files)
        self._budget = MemoryBudget(memory_limit, weights)
        self.prefill_chunk = prefill_chunk_beside(weights)
        wanted = native_operators.is_available() if native is None else native
        if wanted and not native_operators.is_available():
            raise BackendError(f"native operators are asked for, but {native_problem()}")
        if native is None and not wanted:
            _log.info("portable bodies run: %s", native_problem())
        self._session, self.native = _open(
            folder / self.graph.file, threads, wanted, may_fall_back=native is None, profile=profile
        )
        self._inputs, self._outputs = _names(self.graph)
        check_contract(folder, self.graph, self._session)
        self.max_context = self.graph.max_seq_len

    def start(self, batch: int, slots: int, tokens: int = 0) -> HostSequences:
        """Sequences with a cache in the host's memory, which grows as they do. Raises MemoryLimitError."""
        return HostSequences(self, batch, slots, tokens, self._budget)

    def check(self, batch: int, tokens: int) -> None:
        """Nothing is refused: the graph takes any batch, and the Runner checks the model's positions."""

    def longest_step(self, batch: int, every_position: bool) -> int | None:
        """No limit."""
        return None

    def close(self) -> None:
        """The session goes with the last reference to it."""

    @property
    def profile_start(self) -> int:
        """The profiler's zero, in nanoseconds of time.time_ns."""
        return int(self._session.get_profiling_start_time_ns())

    def end_profile(self) -> Path:
        """Ends the profiler; the file with what it saw."""
        return Path(self._session.end_profiling())

    def run(self, step: StepInput, stop: StopSignal) -> StepOutput:
        feeds = {name: getattr(step, name) for name in self._inputs}
        run_options = onnxruntime.RunOptions()
        run_options.log_severity_level = 4  # what goes wrong is raised; a cancelled step is no error to print
        stop.on_set(lambda: setattr(run_options, "terminate", True))
        try:
            return StepOutput(*self._session.run(self._outputs, feeds, run_options))
        except FAILURES as error:
            if stop.is_set:
                raise Cancelled from error
            raise BackendError(f"onnxruntime could not run a step: {error}") from error


def native_problem() -> str | None:
    """Why the native operators cannot be used here and what to do about it; None where onnxruntime takes them."""
    if not native_operators.is_available():
        return f"{native_operators.LIBRARY} is not built; {native_operators.remedy()}"
    try:
        onnxruntime.SessionOptions().register_custom_ops_library(str(native_operators.LIBRARY))
    except FAILURES as error:
        return f"onnxruntime {onnxruntime.__version__} refuses {native_operators.LIBRARY}: {error}; {native_operators.remedy()}"
    return None


def _open(
    path: Path, threads: int | None, native: bool, may_fall_back: bool, profile: Path | None
) -> tuple[onnxruntime.InferenceSession, bool]:
    """A session, and whether the native operators run in it. A file that neither way can open is the file's fault."""
    try:
        return _session(path, threads, native, profile), native
    except FAILURES as error:
        if not (native and may_fall_back):
            raise BackendError(f"{path}: onnxruntime {onnxruntime.__version__} refuses it: {error}") from error
        reason = str(error)
    portable = _open(path, threads, native=False, may_fall_back=False, profile=profile)
    say_once(f"the native operators cannot be used, portable bodies run instead: {reason}; {native_operators.remedy()}")
    return portable


def _session(path: Path, threads: int | None, native: bool, profile: Path | None) -> onnxruntime.InferenceSession:
    options = session_options(threads, native)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def session_options(threads: int | None, native: bool) -> onnxruntime.SessionOptions:
    """Options of every session here: threads, no second copy of weights, native operators where wanted."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # what goes wrong is raised
    # It takes one block for all that a step computes, and keeps all of it until the step ends.
    options.enable_mem_pattern = False
    # It grows in powers of two and keeps what the largest prefill took; no speed was seen to come of it.
    options.enable_cpu_mem_arena = False
    # Prepacked weights would be a second copy of every matrix; they stay mapped from the file instead.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if native:
        options.register_custom_ops_library(str(native_operators.LIBRARY))
    return options


def _names(graph: Graph) -> tuple[list[str], list[str]]:
    """The graph's inputs and outputs, in the order of StepInput and StepOutput."""
    absent = {"n_loops"} if graph.loops is not None else set()
    if graph.cache_dtype != "int8":
        absent |= {"past_scale", "new_scale"}
    inputs, outputs = ([name for name in kind._fields if name not in absent] for kind in (StepInput, StepOutput))
    return inputs, outputs


def check_contract(folder: Path, graph: Graph, session: onnxruntime.InferenceSession) -> None:
    """Refuses a manifest that contradicts its graph: what the Runner believes of shapes comes from the manifest."""
    inputs = {value.name: value.shape for value in session.get_inputs()}
    outputs = {value.name: value.shape for value in session.get_outputs()}
    types = {value.name: value.type for value in session.get_inputs()}
    wanted = _names(graph)
    facts = (
        ("inputs", sorted(inputs), sorted(wanted[0])),
        ("outputs", sorted(outputs), sorted(wanted[1])),
        ("past_kv", types.get("past_kv"), f"tensor({graph.cache_dtype.replace('float32', 'float')})"),
        ("cache_width", inputs.get("past_kv", [None])[-1], graph.cache_width),
        ("vocab_size", outputs.get("logits", [None])[-1], graph.vocab_size),
        ("slots", (inputs.get("past_kv") or [None])[0], None if graph.loops is None else graph.slots(graph.loops)),
    )
    for name, found, expected in facts:
        if expected is not None and found != expected:
            raise BundleError(
                f"{folder / graph.file}: its {name} is {found}, the manifest says {expected}; export again"
            )


def _choose(manifest: Manifest) -> Graph:
    """A float32 graph: onnxruntime's CPU kernels compute in float32, whatever the weights are stored in. Its cache is any but
    bfloat16, which numpy cannot hold."""
    for graph in manifest.graphs:
        if graph.dtype == "float32" and graph.cache_dtype != "bfloat16":
            if graph.weight_dtype in ("float16", "bfloat16"):
                say_once(
                    f"onnxruntime's CPU kernels do not compute in {graph.weight_dtype}: "
                    "the weights are converted to float32 at load"
                )
            return graph
    graphs = ", ".join(f"{graph.dtype} with a {graph.cache_dtype} cache" for graph in manifest.graphs)
    raise BackendError(
        f"the bundle has graphs for {graphs} only; onnxruntime's CPU provider needs one that computes in float32, with a cache "
        "that numpy can hold (it has no bfloat16): export again with this release"
    )

"""The onnxruntime backend on an NVIDIA GPU: weights, cache, appended rows, logits and the likeliest tokens stay on the device.

Shape letters: B batch, S new tokens, K positions with logits, C capacity and W width of the cache, V vocab_size.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from runtimes import cuda
from runtimes.backend import StepInput, StepOutput, StopSignal, say_once
from runtimes.bundle import Graph, Manifest
from runtimes.cuda_step_kernels import (
    Advance,
    Append,
    Choose,
    Likeliest,
    StepKernels,
    advance_call,
    append_call,
    choose_call,
    likeliest_call,
)
from runtimes.device_memory import BUCKET, CacheLayout, DeviceMemory, DeviceRequest, plan_graph_memory
from runtimes.device_sequences import DeviceSequences, run_once
from runtimes.device_step import Binding, DeviceExecutor, NewRows, Placed, Step
from runtimes.dtypes import CACHE_STORAGE
from runtimes.errors import BackendError
from runtimes.memory import MemoryBudget
from runtimes.onnxruntime_backend import check_contract
from runtimes.onnxruntime_cuda_session import Bound, CudaSession, check_installed
from runtimes.sampling import Sampling
from runtimes.step_tensors import StepShape, step_inputs_and_outputs

_log = logging.getLogger("mythos_export")
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: numpy has none
_LOGITS = 64 * 2**20  # bytes of a step's logits, on the device and pinned, where every position's are wanted
_BINDINGS = 8  # shapes and caches that are kept set up: sequences in turn, and those that come where others were


@dataclass
class SessionBinding(Binding):
    """The session's tensors, and the kernels' calls, for steps of one shape over one cache."""

    io: Any
    appends: list[Append]
    advance: Advance
    choice: dict[str, int]  # addresses that choices read and write, and the bytes of their workspace
    calls: dict[Sampling, Likeliest | Choose] = field(default_factory=dict)


class CudaExecutor(DeviceExecutor[SessionBinding]):
    """Runs steps of a graph; the new rows are added to the cache in them. Raises OutOfDeviceMemory."""

    # onnxruntime takes the memory of a shape in its first run and lays it out anew in its second.
    warm_up = 2
    appends = True

    def __init__(
        self, session: CudaSession, graph: Graph, kernels: StepKernels, stream: cuda.Stream, budget: MemoryBudget
    ) -> None:
        super().__init__(stream, CacheLayout.of_graph(graph), graph.vocab_size, np.int64, budget)
        self._session: CudaSession | None = session
        self._graph, self._kernels = graph, kernels
        self._obstacle = _obstacle(graph, session)
        self._draws = kernels.draws_from(graph.vocab_size)
        self._bindings: OrderedDict[tuple[StepShape, int, int], SessionBinding] = OrderedDict()

    def _bind(self, shape: StepShape, cache_address: int) -> SessionBinding:
        bound = self._bindings.get((shape, cache_address, self._version))
        if bound is not None:
            self._bindings.move_to_end(bound.key)
            return bound
        placed = self._place(*step_inputs_and_outputs(shape, self.vocab_size, self._integers, draws=True))
        offsets = self.layout.offsets(shape.slots, shape.batch, shape.seq)
        at, strides = (
            self._block("new cache rows", offsets[-1]),
            [shape.batch * shape.seq * row for row in self.layout.parts],
        )
        rows = [NewRows(at + offset, stride) for offset, stride in zip(offsets, strides, strict=False)]
        needed, tensors = self._kernels.choice_workspace(shape.batch, self.vocab_size), placed.tensors
        choice = {
            "logits": tensors["logits"],
            "tokens": tensors["next_token"],
            "logprobs": tensors["next_logprob"],
            "workspace": self._block("the choice of tokens", needed),
            "workspace_bytes": needed,
        }
        fed = {name: tensors[name] for name in ("past_len", "counts", "input_ids")}
        bound = SessionBinding(
            (shape, cache_address, self._version),
            placed,
            rows,
            self._io(shape, cache_address, placed, rows),
            self._appends(shape, cache_address, placed, rows),
            advance_call(shape.batch, tokens=tensors["next_token"], **fed),
            choice,
        )
        self._bindings[bound.key] = bound
        for key in [key for key in self._bindings if key[2] != self._version]:
            self._bindings.pop(key).close()
        if len(self._bindings) > _BINDINGS:
            self._bindings.popitem(last=False)[1].close()
        return bound

    def _io(self, shape: StepShape, cache_address: int, placed: Placed, rows: list[NewRows]) -> Any:
        assert self._session is not None  # open while steps run
        dtype = self._graph.cache_dtype
        cache_type = _BFLOAT16 if dtype == "bfloat16" else CACHE_STORAGE[dtype]
        offsets = self.layout.offsets(shape.slots, shape.batch, shape.capacity)
        inputs, outputs = [], []
        for name, view in placed.inputs.items():
            on_host = name in self._session.host_inputs
            address = view.ctypes.data if on_host else placed.tensors[name]
            inputs.append(Bound(name, view.dtype.type, view.shape, address, on_host))
        outputs = [
            Bound(name, tensor.dtype, tensor.shape, placed.tensors[name])
            for name, (tensor, _) in placed.outputs.items()
        ]
        parts = [("kv", cache_type, (self._graph.cache_width,)), ("scale", np.float32, ())]
        for (name, kind, width), offset, (address, _) in zip(parts, offsets, rows, strict=False):
            past, new = (shape.slots, shape.batch, shape.capacity), (shape.slots, shape.batch, shape.seq)
            inputs.append(Bound(f"past_{name}", kind, (*past, *width), cache_address + offset))
            outputs.append(Bound(f"new_{name}", kind, (*new, *width), address))
        return self._session.bind(
            [bound for bound in inputs if bound.name in self._session.inputs],
            [bound for bound in outputs if bound.name in self._session.outputs],
        )

    def _appends(self, shape: StepShape, cache_address: int, placed: Placed, rows: list[NewRows]) -> list[Append]:
        offsets = self.layout.offsets(shape.slots, shape.batch, shape.capacity)
        return [
            append_call(
                shape.slots,
                shape.batch,
                shape.seq,
                shape.capacity,
                row_bytes,
                new_rows=new.address,
                rows=cache_address + offset,
                past_len=placed.tensors["past_len"],
                counts=placed.tensors["counts"],
            )
            for new, offset, row_bytes in zip(rows, offsets, self.layout.parts, strict=False)
        ]

    def _enqueue(self, binding: SessionBinding) -> None:
        assert self._session is not None
        self._session.run(binding.io)
        for call in binding.appends:
            self._kernels.append(call, self.stream)

    def chooses(self, sampling: Sampling) -> bool:
        if sampling.is_argmax or self._draws:
            return True
        say_once(f"tokens are drawn on the host: the CUDA kernels take no vocabulary of {self.vocab_size}")
        return False

    def _choose(self, binding: SessionBinding, sampling: Sampling) -> None:
        call = binding.calls.get(sampling)
        if call is None:
            call = binding.calls[sampling] = self._choice(binding, sampling)
        if isinstance(call, Choose):
            self._kernels.choose(call, self.stream)
        else:
            self._kernels.likeliest(call, self.stream)

    def _choice(self, binding: SessionBinding, sampling: Sampling) -> Likeliest | Choose:
        batch, tensors = binding.key[0].batch, binding.placed.tensors
        if sampling.is_argmax:
            return likeliest_call(batch, self.vocab_size, **binding.choice)
        seen = {"seen": tensors["seen"]} if sampling.repetition_penalty != 1 else {}
        return choose_call(batch, self.vocab_size, sampling, random=tensors["random"], **seen, **binding.choice)

    def follow(self, step: Step) -> Step | None:
        binding, choice = step.binding, step.choice
        is_last = step.number == self._number and binding.key[2] == self._version
        on_host = self._session is None or bool(self._session.host_inputs)
        if not is_last or on_host or choice is None or choice.seen is not None:
            return None
        assert isinstance(binding, SessionBinding)
        return self._put(lambda: self._kernels.advance(binding.advance, self.stream), binding, choice, None)

    def _repeats(self, binding: SessionBinding) -> bool:
        if binding.key[0].seq > 1:
            return False
        if self._obstacle is not None:
            self._capture_no_more(self._obstacle)
        return self._obstacle is None

    def close(self) -> None:
        """Frees the session and buffers; may be called again."""
        with self.lock:
            for binding in self._bindings.values():
                binding.close()
            self._bindings.clear()
            self._session = None
            super().close()


def _obstacle(graph: Graph, session: CudaSession) -> str | None:
    """Why steps of a graph cannot be captured; None where nothing is known to be in the way."""
    if graph.loops is None:
        return "the bundle's loop count is an input, export it with --loops N for one"
    on_host = sorted({*session.host_inputs, *session.host_outputs})
    return f"the graph reads or makes {', '.join(on_host)} on the CPU" if on_host else session.obstacle


class OnnxRuntimeCudaBackend:
    """Runs the form for CUDA of a bundle's graph on onnxruntime's CUDA provider, with this project's kernels.

    threads: of nodes that run on the CPU, default one. request: memory is planned for its batch and context, default one sequence
    of few tokens: more is taken as sequences need it. Raises BackendError for what is missing, with how to get it, and
    OutOfDeviceMemory or MemoryLimitError before anything is allocated.
    """

    name = "onnxruntime"
    device = "cuda"
    prefill_chunk = 2048  # experts see enough tokens each for tiles of them
    engine = None
    native = True

    def __init__(
        self, folder: Path, manifest: Manifest, threads: int | None = None, request: DeviceRequest = DeviceRequest()
    ) -> None:
        check_installed()
        kernels = StepKernels()
        self._gpu = cuda.device()
        self.graph = _choose(folder, manifest)
        self.max_context = self.graph.max_seq_len
        weights = sum(manifest.files[name].size for name in self.graph.weights)
        budget = MemoryBudget(request.memory_limit, weights)
        context = min(request.context or BUCKET, self.max_context)
        workspace = kernels.choice_workspace(request.batch, self.graph.vocab_size)
        self.memory: DeviceMemory = plan_graph_memory(
            self.graph, weights, request.batch, context, self.prefill_chunk, workspace, cuda.free_bytes()
        )
        _log.info("%s: %s; %s are free", self._gpu.name, self.memory, cuda.megabytes(self.memory.free))
        self.memory.check(request.memory_limit, what="the bundle")
        stream = cuda.Stream()
        session = CudaSession(folder / self.graph.file, stream, threads, capture=self.graph.loops is not None)
        check_contract(folder, self.graph, session.session)
        if not session.host_inputs.isdisjoint({"past_kv", "past_scale"}):
            raise BackendError(f"{folder / self.graph.file}: reads its cache on the CPU; export again")
        self._executor = CudaExecutor(session, self.graph, kernels, stream, budget)
        self._open: weakref.WeakSet[DeviceSequences] = weakref.WeakSet()

    def check(self, batch: int, tokens: int) -> None:
        """Nothing is refused: the graph takes any batch, and the Runner checks the model's positions."""

    def longest_step(self, batch: int, every_position: bool) -> int | None:
        """As many tokens as have few logits; no limit where those of the last one are wanted."""
        return max(1, _LOGITS // (4 * batch * self.graph.vocab_size)) if every_position else None

    def start(self, batch: int, slots: int, tokens: int = 0) -> DeviceSequences:
        """New sequences, with room for so many tokens from the start. Raises OutOfDeviceMemory where it is not there."""
        self._executor.layout.check_free(slots, batch, tokens)
        sequences = DeviceSequences(self._executor, batch, slots, tokens)
        self._open.add(sequences)
        return sequences

    def run(self, step: StepInput, stop: StopSignal) -> StepOutput:
        """One step over a cache that is given, in the host's memory: for comparing. past_kv is float32 where the cache is bfloat16,
        and so is new_kv."""
        return run_once(self._executor, self.graph.cache_dtype, step, stop, exact=True)

    def close(self) -> None:
        """Frees all device memory; sequences that are left are closed. May be called again."""
        for sequences in list(self._open):
            sequences.close()
        self._executor.close()


def cuda_problem() -> str | None:
    """Why no bundle can run here with onnxruntime on CUDA, and what to do; None where they can."""
    try:
        check_installed()
        StepKernels()
        cuda.device()
    except BackendError as error:
        return str(error)
    return None


def _choose(folder: Path, manifest: Manifest) -> Graph:
    """The first graph with a form for CUDA, that form as its file."""
    for graph in manifest.graphs:
        if graph.cuda_file is not None:
            return msgspec.structs.replace(graph, file=graph.cuda_file)
    raise BackendError(
        f"{folder}: has no graph for onnxruntime on CUDA: it was made before there were any, or before they took its cache, or a "
        "dense feed-forward has matrices of two types, which they do not take; export it again with this release, or run it with "
        "--device cpu"
    )

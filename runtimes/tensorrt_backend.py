"""The TensorRT backend: an engine of the bundle on the GPU. Weights, cache and logits stay there; tokens come back.

Shape letters: B batch, S new tokens, K positions with logits, C capacity and W width of the cache.
"""

from __future__ import annotations

import logging
import weakref
from pathlib import Path

import msgspec
import numpy as np

from runtimes import cuda, cuda_kernels, tensorrt_plugins
from runtimes.backend import PREFILL_CHUNK, StepInput, StepOutput, StopSignal
from runtimes.bundle import Graph, Manifest
from runtimes.device_memory import DeviceMemory, DeviceRequest, plan_memory
from runtimes.device_sequences import DeviceSequences, run_once
from runtimes.device_weights import DeviceWeights
from runtimes.dtypes import STORAGE
from runtimes.engine_folder import check_source, read_plan
from runtimes.engines import Engine, Plan, Profile
from runtimes.errors import BundleError, InputError
from runtimes.tensorrt_api import TensorRT
from runtimes.tensorrt_step import Executor

_log = logging.getLogger("mythos_export")


class TensorRTBackend:
    """Runs a bundle's engine. folder: the bundle; engine_folder: engines/<key> in it.

    Everything is checked before TensorRT sees a byte, memory is planned before any is taken. Raises BundleError for a stale or
    damaged engine, InputError for a request beyond the engine's profiles, OutOfDeviceMemory with what is missing, BackendError for
    what TensorRT refuses, and where an engine calls CUDA kernels that are not there.
    """

    device = "cuda"
    prefill_chunk = PREFILL_CHUNK
    native = False

    def __init__(
        self,
        tensorrt: TensorRT,
        folder: Path,
        engine_folder: Path,
        engine: Engine,
        manifest: Manifest,
        request: DeviceRequest,
    ) -> None:
        check_source(engine_folder, engine, manifest)
        self.name: str = engine.backend
        self.engine = engine_folder.name
        self.graph = _graph_of(engine_folder, engine, manifest)
        self._profiles = [(plan, profile) for plan in engine.plans for profile in plan.profiles]
        self._batches = [profile.batch for _, profile in self._profiles]
        self.max_context = engine.max_context
        kernels = cuda_kernels.find() if engine.experts else None
        self.memory = self._planned(engine, request, kernels.workspace_bytes(engine) if kernels else 0)
        self._open: weakref.WeakSet[DeviceSequences] = weakref.WeakSet()
        if engine.plugins is not None:
            tensorrt_plugins.load(tensorrt)
        plans = [(plan, read_plan(engine_folder, engine, plan)) for plan in engine.plans]
        stream = cuda.Stream()
        self._weights = DeviceWeights(folder, engine.weights, stream)
        deserialized = [(plan, tensorrt.deserialize(data)) for plan, data in plans]
        self._executor = Executor(tensorrt, engine, self.graph, deserialized, kernels, self._weights, stream)

    def _planned(self, engine: Engine, request: DeviceRequest, workspace: int) -> DeviceMemory:
        context = self.max_context if request.context is None else min(request.context, self.graph.max_seq_len)
        self.check(request.batch, context)
        step = self.longest_step(request.batch, every_position=False)
        memory = plan_memory(engine, self.graph, request.batch, context, step, workspace, cuda.free_bytes())
        _log.info("%s: %s; %s are free", self.engine, memory, cuda.megabytes(memory.free))
        memory.check(request.memory_limit)
        return memory

    def check(self, batch: int, tokens: int) -> None:
        """Raises InputError, naming the limit and how to raise it, for sequences beyond the engine's profiles."""
        if not any(batch in batches for batches in self._batches):
            least, most = min(part.min for part in self._batches), max(part.max for part in self._batches)
            raise InputError(
                f"batch is {batch}; the engine {self.engine} takes {least} to {most}: run fewer at once, or build it again with "
                f"`mythos-export build --max-batch {batch}`"
            )
        if tokens > self.max_context:
            raise InputError(
                f"{tokens} tokens a sequence; the engine {self.engine} takes up to {self.max_context}: shorten them, or "
                f"build it again with `mythos-export build --max-context {tokens}`"
            )

    def longest_step(self, batch: int, every_position: bool) -> int:
        """Most new tokens of a step of so many sequences that a profile takes."""
        return max(_longest(plan, profile, batch, every_position) for plan, profile in self._profiles)

    def start(self, batch: int, slots: int, tokens: int = 0) -> DeviceSequences:
        """New sequences. Raises InputError beyond the engine's profiles, OutOfDeviceMemory where a cache of so many tokens would
        not fit."""
        self.check(batch, tokens)
        self._executor.layout.check_free(slots, batch, tokens)
        sequences = DeviceSequences(self._executor, batch, slots)
        self._open.add(sequences)
        return sequences

    def run(self, step: StepInput, stop: StopSignal) -> StepOutput:
        """One step over a cache that is given, in the host's memory: for comparing. past_kv is float32 where the cache is bfloat16,
        and so is new_kv."""
        _, batch, rows, _ = step.past_kv.shape
        self.check(batch, rows)
        n_loops = step.n_loops if self.graph.loops is None else np.full(batch, self.graph.loops)
        return run_once(self._executor, self.graph.cache_dtype, step._replace(n_loops=n_loops), stop)

    def close(self) -> None:
        """Frees all device memory; sequences that are left are closed. May be called again."""
        for sequences in list(self._open):
            sequences.close()
        self._executor.close()
        self._weights.close()


def _longest(plan: Plan, profile: Profile, batch: int, every_position: bool) -> int:
    if batch not in profile.batch:
        return 1
    most = min(profile.seq.max, profile.k.max) if every_position else profile.seq.max
    return most if plan.max_tokens is None else max(1, min(most, plan.max_tokens // batch))


def _graph_of(engine_folder: Path, engine: Engine, manifest: Manifest) -> Graph:
    for graph in manifest.graphs:
        if graph.file == engine.graph_file:
            weights = engine.dtype if graph.weight_dtype in STORAGE else graph.weight_dtype
            return msgspec.structs.replace(
                graph, dtype=engine.dtype, cache_dtype=engine.cache_dtype, weight_dtype=weights
            )
    raise BundleError(f"{engine_folder}: {engine.graph_file!r} is no graph of the bundle; do not use this engine")

"""One step of an engine on the GPU: which plans and profile, staging, CUDA graphs.

A step is one copy to the device, the engine's stages, one copy back, and one wait of the host. Decode steps whose shapes and
addresses stay the same are captured as a CUDA graph, all loops and the two copies included, and replayed.

Shape letters: B batch, S new tokens, K positions with logits, C capacity and W width of the cache, V vocab_size.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes import cuda
from runtimes.backend import Cancelled, StopSignal, say_once
from runtimes.bundle import Graph
from runtimes.cuda_kernels import CudaKernels, ExpertsPart
from runtimes.device_memory import CacheLayout
from runtimes.device_weights import DeviceWeights
from runtimes.dtypes import STORAGE
from runtimes.engines import FORMS, Engine, Plan
from runtimes.errors import BackendError, InputError
from runtimes.step_tensors import Tensor, side_by_side
from runtimes.tensorrt_api import DeserializedPlan, TensorRT
from runtimes.tensorrt_stages import REDUCED, Places, StageChain, StepShape

Arrays = dict[str, NDArray[Any]]
Then = Callable[[int, int], None]  # is told where the new rows lie, and how far apart their slots


class Staging:
    """A block of device memory and its pinned copy in host memory, which grow as needed: tensors side by side, moved as one."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.device = cuda.DeviceBuffer(cuda.ALIGNMENT, what)
        self.host = cuda.PinnedBuffer(cuda.ALIGNMENT)

    def reserve(self, size: int) -> None:
        """Makes room; what it held is lost then."""
        if size > self.device.size:
            device, host = cuda.DeviceBuffer(size, self._what), cuda.PinnedBuffer(size)
            self.close()
            self.device, self.host = device, host

    def close(self) -> None:
        self.device.close()
        self.host.close()


@dataclass
class Binding:
    """A chain set up for steps of one shape over one cache.

    key: shape, cache address and the staging's version it holds for. inputs, outputs: views of pinned memory. to_device, reduced,
    to_host: bytes to copy in, and back, for a greedy step or with logits. graphs: captured steps, by whether they are greedy.
    steps: so far.
    """

    key: tuple[StepShape, int, int]
    places: Places
    inputs: Arrays
    outputs: Arrays
    to_device: int
    reduced: int
    to_host: int
    graphs: dict[bool, cuda.Graph] = field(default_factory=dict)
    steps: int = 0

    def close(self) -> None:
        for graph in self.graphs.values():
            graph.close()


class Executor:
    """Runs steps of an engine, one at a time; any thread may call. kernels: None where the engine calls none. Raises BackendError
    or OutOfDeviceMemory where it cannot be set up."""

    def __init__(
        self,
        tensorrt: TensorRT,
        engine: Engine,
        graph: Graph,
        plans: list[tuple[Plan, DeserializedPlan]],
        kernels: CudaKernels | None,
        weights: DeviceWeights,
        stream: cuda.Stream,
    ) -> None:
        self.lock = threading.RLock()
        self.stream, self.layout = stream, CacheLayout.of(engine, graph)
        self._graph, self._integers = graph, STORAGE[engine.integers]
        self._may_capture = True
        self._plans = plans  # contexts live by them
        self._event = cuda.Event()
        self._inputs, self._outputs = Staging("a step's input"), Staging("a step's output")
        self._new_rows = cuda.DeviceBuffer(cuda.ALIGNMENT, "new cache rows")
        self._state = cuda.DeviceBuffer(cuda.ALIGNMENT, "the state between loops")
        self._staging_version = 0
        self._loop_numbers = self._numbers(graph.max_loops)
        self._activations = cuda.DeviceBuffer(max(plan.activation_bytes for _, plan in plans), "activations")
        self._workspace = cuda.DeviceBuffer(kernels.workspace_bytes(engine) if kernels else 0, "the experts' workspace")
        self._chains = []
        for form in FORMS:
            of_form = [pair for pair in plans if pair[0].form == form]
            for index in range(len(of_form[0][0].profiles) if of_form else 0):
                experts = self._experts(kernels, engine, form)
                self._chains.append(
                    StageChain(tensorrt, engine, graph, of_form, experts, index, weights, self._activations, stream)
                )
        self._bindings: dict[StageChain, Binding] = {}
        self.closed = False

    def _experts(self, kernels: CudaKernels | None, engine: Engine, form: str) -> list[ExpertsPart]:
        calls = [call for call in engine.experts if call.form == form]
        return [ExpertsPart(kernels, call, self._workspace) for call in calls] if kernels is not None else []

    def _numbers(self, count: int) -> cuda.DeviceBuffer:
        """0, 1, … where the loop reads its own number."""
        apart = cuda.ALIGNMENT // np.dtype(self._integers).itemsize
        numbers = np.zeros((count, apart), self._integers)
        numbers[:, 0] = np.arange(count)
        buffer = cuda.DeviceBuffer(numbers.nbytes, "loop numbers")
        self.stream.upload(buffer.address, numbers)
        return buffer

    def run(
        self,
        shape: StepShape,
        cache_address: int,
        values: Arrays,
        *,
        greedy: bool,
        stop: StopSignal,
        then: Then | None = None,
    ) -> Arrays:
        """Runs a step over a cache [slots, B, C, W] and returns outputs, without logits where greedy.

        values: the other inputs. then: is told the device address of the new rows (one slot after the other, each [B, S, W]) and
        how many bytes their slots are apart, while the engine may still be running, to put copies from there on the stream. Raises
        Cancelled where stop is set before (a step that runs cannot be stopped), InputError for a shape outside all profiles,
        BackendError where the step fails.
        """
        with self.lock:
            if self.closed:
                raise BackendError("the runner is closed; load the bundle again")
            if stop.is_set:
                raise Cancelled
            chain = self._choose(shape)
            binding = self._bind(chain, shape, cache_address)
            for name, view in binding.inputs.items():
                view[...] = values[name]
            try:
                self._launch(chain, binding, greedy)
                self._event.record(self.stream)
                if then is not None:
                    then(binding.places.new_rows, binding.places.row_stride)
            except BaseException:
                with contextlib.suppress(BackendError):  # what went wrong is raised already
                    self.stream.synchronize()  # the staging must not be written while copies read it
                raise
            self._event.wait()
            names = REDUCED if greedy else ("logits", "exit_loop")
            return {name: binding.outputs[name].copy() for name in names}

    def _choose(self, shape: StepShape) -> StageChain:
        for chain in self._chains:
            if chain.takes(shape):
                return chain
        sizes = shape.of_profile
        profiles = "; ".join(
            f"{chain.plan.form} {chain.profile.name}: "
            + ", ".join(f"{name} {part.min} to {part.max}" for name in sizes for part in [getattr(chain.profile, name)])
            for chain in self._chains
        )
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"a step of {asked} is outside the engine's profiles ({profiles}); build it with larger --max-batch, --max-seq or "
            "--max-context"
        )

    def _bind(self, chain: StageChain, shape: StepShape, cache_address: int) -> Binding:
        bound = self._bindings.get(chain)
        if bound is not None and bound.key == (shape, cache_address, self._staging_version):
            return bound
        self._unbind(chain)
        inputs, outputs = self._tensors(shape)
        (input_at, to_device), (output_at, to_host), (state_at, state_bytes) = map(
            side_by_side, (inputs, outputs, chain.state(shape))
        )
        row_stride = cuda.aligned(self.layout.bytes(1, shape.batch, shape.seq))
        self._reserve(to_device, to_host, shape.slots * row_stride, state_bytes)
        tensors = {name: self._inputs.device.address + at for name, at in input_at.items()}
        tensors |= {name: self._outputs.device.address + at for name, at in output_at.items()}
        places = Places(
            cache_address,
            self.layout.bytes(1, shape.batch, shape.capacity),
            self._new_rows.address,
            row_stride,
            {name: self._state.address + at for name, at in state_at.items()},
            self._loop_numbers.address,
            tensors,
        )
        chain.set_shapes(shape)
        chain.set_addresses(shape, places)
        self._bindings[chain] = Binding(
            (shape, cache_address, self._staging_version),
            places,
            {t.name: self._inputs.host.array(t.dtype, t.shape, input_at[t.name]) for t in inputs},
            {t.name: self._outputs.host.array(t.dtype, t.shape, output_at[t.name]) for t in outputs},
            to_device,
            output_at["logits"],
            to_host,
        )
        return self._bindings[chain]

    def _unbind(self, chain: StageChain) -> None:
        bound = self._bindings.pop(chain, None)
        if bound is not None:
            bound.close()

    def _reserve(self, to_device: int, to_host: int, new_rows: int, state: int) -> None:
        """Makes room for a step. What was bound to smaller staging is bound anew when it is next used."""
        before = self._inputs.device, self._outputs.device, self._new_rows, self._state
        self._inputs.reserve(to_device)
        self._outputs.reserve(to_host)
        self._new_rows = _grown(self._new_rows, new_rows, "new cache rows")
        self._state = _grown(self._state, state, "the state between loops")
        if before != (self._inputs.device, self._outputs.device, self._new_rows, self._state):
            self._staging_version += 1

    def _tensors(self, shape: StepShape) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs of a step but for the weights and the cache, the logits last."""
        batch, seq, k, integers = shape.batch, shape.seq, shape.k, self._integers
        inputs = [
            Tensor("input_ids", integers, (batch, seq)),
            Tensor("past_len", integers, (batch,)),
            Tensor("logit_positions", integers, (batch, k)),
            Tensor("n_loops", integers, (batch,)),
        ]
        outputs = [
            Tensor("next_token", integers, (batch, k)),
            Tensor("next_logprob", np.float32, (batch, k)),
            Tensor("exit_loop", integers, (batch, seq)),
            Tensor("logits", np.float32, (batch, k, self._graph.vocab_size)),
        ]
        return inputs, outputs

    def _launch(self, chain: StageChain, binding: Binding, greedy: bool) -> None:
        shape = binding.key[0]

        def work() -> None:
            self.stream.copy_to_device(self._inputs.device.address, self._inputs.host.address, binding.to_device)
            chain.enqueue(shape, binding.places, self.stream)
            size = binding.reduced if greedy else binding.to_host
            self.stream.copy_to_host(self._outputs.host.address, self._outputs.device.address, size)

        graph = binding.graphs.get(greedy)
        # Only what came twice is worth capturing, and TensorRT wants one plain step of a shape first.
        if graph is None and self._may_capture and chain.profile.name == "decode" and binding.steps:
            graph = self._captured(binding, greedy, work)
        if graph is not None:
            graph.launch()
        else:
            work()
        binding.steps += 1

    def _captured(self, binding: Binding, greedy: bool, work: Callable[[], None]) -> cuda.Graph | None:
        try:
            binding.graphs[greedy] = self.stream.capture(work)
        except BackendError as error:
            self._may_capture = False
            say_once(f"decode runs without a CUDA graph: {error}")
            return None
        return binding.graphs[greedy]

    def close(self) -> None:
        """Frees contexts and buffers; may be called again."""
        with self.lock:
            self.closed = True
            for chain in self._chains:
                self._unbind(chain)
            self._chains, self._plans = [], []
            buffers = (self._new_rows, self._state, self._loop_numbers, self._activations, self._workspace)
            for part in (self._inputs, self._outputs, *buffers, self._event):
                part.close()


def _grown(buffer: cuda.DeviceBuffer, size: int, what: str) -> cuda.DeviceBuffer:
    if size <= buffer.size:
        return buffer
    larger = cuda.DeviceBuffer(size, what)
    buffer.close()
    return larger

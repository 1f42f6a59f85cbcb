"""One step of an engine on the GPU: which plan and profile, contexts, staging, CUDA graphs.

A step is one copy to the device, the engine, one copy back, and one wait of the host. Decode steps whose shapes and addresses stay
the same are captured as a CUDA graph, the two copies included, and replayed.

Shape letters: B batch, S new tokens, K positions with logits, C capacity and W width of the cache, V vocab_size.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtimes import cuda
from runtimes.backend import Cancelled, StopSignal, say_once
from runtimes.bundle import Graph
from runtimes.device_memory import CacheLayout
from runtimes.device_weights import DeviceWeights
from runtimes.dtypes import STORAGE
from runtimes.engines import Engine, Plan, Profile
from runtimes.errors import BackendError, InputError
from runtimes.tensorrt_api import DeserializedPlan, TensorRT

Arrays = dict[str, NDArray[Any]]
REDUCED = (
    "next_token",
    "next_logprob",
    "exit_loop",
)  # outputs of a greedy step, in front of the block that is copied back


class StepShape(NamedTuple):
    """B, S, C, slots and K of a step."""

    batch: int
    seq: int
    capacity: int
    slots: int
    k: int


class Tensor(NamedTuple):
    """An input or output of the engine."""

    name: str
    dtype: Any
    shape: tuple[int, ...]


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
    """A context set up for steps of one shape over one cache.

    key: shape, cache address and the staging's version it holds for. inputs, outputs: views of pinned memory. to_device, reduced,
    to_host: bytes to copy in, and back, for a greedy step or with logits. graphs: captured steps, by whether they are greedy.
    steps: so far.
    """

    key: tuple[StepShape, int, int]
    inputs: Arrays
    outputs: Arrays
    to_device: int
    reduced: int
    to_host: int
    graphs: dict[bool, cuda.Graph] = field(default_factory=dict)
    steps: int = 0


class PlanContext:
    """An execution context for one profile of a plan; it never changes profiles."""

    def __init__(self, plan: Plan, profile: Profile, context: Any) -> None:
        self.plan, self.profile, self.context = plan, profile, context
        self.binding: Binding | None = None

    def takes(self, shape: StepShape) -> bool:
        """Whether a step of this shape is within the plan's and the profile's limits."""
        ranges = _ranges(self.profile)
        few_enough = self.plan.max_tokens is None or shape.batch * shape.seq <= self.plan.max_tokens
        return few_enough and all(size in part for size, part in zip(shape, ranges, strict=True))

    def unbind(self) -> None:
        if self.binding is not None:
            for graph in self.binding.graphs.values():
                graph.close()
            self.binding = None


class Executor:
    """Runs steps of an engine, one at a time; any thread may call. Raises BackendError or OutOfDeviceMemory where it cannot be set
    up."""

    def __init__(
        self,
        tensorrt: TensorRT,
        engine: Engine,
        graph: Graph,
        plans: list[tuple[Plan, DeserializedPlan]],
        weights: DeviceWeights,
        stream: cuda.Stream,
    ) -> None:
        self.lock = threading.RLock()
        self.stream, self.layout = stream, CacheLayout.of(engine, graph)
        self._tensorrt, self._engine, self._graph, self._weights = tensorrt, engine, graph, weights
        self._integers = STORAGE[engine.integers]
        self._may_capture = engine.cuda_graph
        self._plans = plans  # contexts live by them
        self._event = cuda.Event()
        self._inputs, self._outputs = Staging("a step's input"), Staging("a step's output")
        self._new_rows = cuda.DeviceBuffer(cuda.ALIGNMENT, "new cache rows")
        self._staging_version = 0
        activation_bytes = max(deserialized.activation_bytes for _, deserialized in plans)
        self._activations = cuda.DeviceBuffer(activation_bytes, "activations")
        few_first = sorted(plans, key=lambda pair: pair[0].form != "few_tokens")
        self.contexts = [
            self._new_context(plan, deserialized, index, profile)
            for plan, deserialized in few_first
            for index, profile in enumerate(plan.profiles)
        ]
        self.closed = False

    def _new_context(self, plan: Plan, deserialized: DeserializedPlan, index: int, profile: Profile) -> PlanContext:
        context = deserialized.new_context(self._activations.address, self._activations.size)
        self._accept(context.set_optimization_profile_async(index, self.stream.handle), f"profile {index}")
        for name, address in self._weights.addresses.items():
            self._accept(context.set_tensor_address(name, address), f"an address for {name}")
        return PlanContext(plan, profile, context)

    def _accept(self, accepted: bool, what: str) -> None:
        if not accepted:
            reason = self._tensorrt.logger.last_error or "it gives no reason"
            raise BackendError(f"{self._tensorrt.backend} {self._tensorrt.version} refuses {what}: {reason}")

    def run(
        self,
        shape: StepShape,
        cache_address: int,
        values: Arrays,
        *,
        greedy: bool,
        stop: StopSignal,
        then: Callable[[int], None] | None = None,
    ) -> Arrays:
        """Runs a step over a cache [slots, B, C, W] and returns outputs, without logits where greedy.

        values: the other inputs. then: is told the device address of new_kv [slots, B, S, W] while the engine may still be running,
        to put copies from there on the stream. Raises Cancelled where stop is set before (a step that runs cannot be stopped),
        InputError for a shape outside all profiles, BackendError where the step fails.
        """
        with self.lock:
            if self.closed:
                raise BackendError("the runner is closed; load the bundle again")
            if stop.is_set:
                raise Cancelled
            place = self._choose(shape)
            binding = self._bind(place, shape, cache_address)
            for name, view in binding.inputs.items():
                view[...] = values[name]
            try:
                self._launch(place, binding, greedy)
                self._event.record(self.stream)
                if then is not None:
                    then(self._new_rows.address)
            except BaseException:
                with contextlib.suppress(BackendError):  # what went wrong is raised already
                    self.stream.synchronize()  # the staging must not be written while copies read it
                raise
            self._event.wait()
            names = REDUCED if greedy else ("logits", "exit_loop")
            return {name: binding.outputs[name].copy() for name in names}

    def _choose(self, shape: StepShape) -> PlanContext:
        for place in self.contexts:
            if place.takes(shape):
                return place
        profiles = "; ".join(
            f"{place.plan.form} {place.profile.name}: "
            + ", ".join(
                f"{name} {part.min} to {part.max}"
                for name, part in zip(shape._fields, _ranges(place.profile), strict=True)
            )
            for place in self.contexts
        )
        asked = ", ".join(f"{name} {size}" for name, size in shape._asdict().items())
        raise InputError(
            f"a step of {asked} is outside the engine's profiles ({profiles}); build it with larger --max-batch, --max-seq or "
            "--max-context"
        )

    def _bind(self, place: PlanContext, shape: StepShape, cache_address: int) -> Binding:
        if place.binding is not None and place.binding.key == (shape, cache_address, self._staging_version):
            return place.binding
        place.unbind()
        inputs, outputs = self._tensors(shape)
        input_offsets, to_device = _side_by_side(inputs)
        output_offsets, to_host = _side_by_side(outputs)
        self._reserve(to_device, to_host, self.layout.bytes(shape.slots, shape.batch, shape.seq))
        self._set_shapes(place.context, shape, inputs)
        for tensor in inputs:
            at_host = tensor.name in self._engine.host_inputs
            base = self._inputs.host.address if at_host else self._inputs.device.address
            self._set_address(place.context, tensor.name, base + input_offsets[tensor.name])
        for tensor in outputs:
            address = self._outputs.device.address + output_offsets[tensor.name]
            self._set_address(place.context, tensor.name, address)
        self._set_address(place.context, "past_kv", cache_address)
        self._set_address(place.context, "new_kv", self._new_rows.address)
        place.binding = Binding(
            (shape, cache_address, self._staging_version),
            {t.name: self._inputs.host.array(t.dtype, t.shape, input_offsets[t.name]) for t in inputs},
            {t.name: self._outputs.host.array(t.dtype, t.shape, output_offsets[t.name]) for t in outputs},
            to_device,
            output_offsets["logits"],
            to_host,
        )
        return place.binding

    def _reserve(self, to_device: int, to_host: int, new_rows: int) -> None:
        """Makes room for a step. What was bound to smaller staging is bound anew when it is next used."""
        before = self._inputs.device, self._outputs.device, self._new_rows
        self._inputs.reserve(to_device)
        self._outputs.reserve(to_host)
        if new_rows > self._new_rows.size:
            larger = cuda.DeviceBuffer(new_rows, "new cache rows")
            self._new_rows.close()
            self._new_rows = larger
        if before != (self._inputs.device, self._outputs.device, self._new_rows):
            self._staging_version += 1

    def _tensors(self, shape: StepShape) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs but for the weights and the cache, the logits last."""
        batch, seq, k, integers = shape.batch, shape.seq, shape.k, self._integers
        inputs = [
            Tensor("input_ids", integers, (batch, seq)),
            Tensor("past_len", integers, (batch,)),
            Tensor("logit_positions", integers, (batch, k)),
        ]
        if self._graph.loops is None:
            inputs.append(Tensor("n_loops", integers, (batch,)))
        outputs = [
            Tensor("next_token", integers, (batch, k)),
            Tensor("next_logprob", np.float32, (batch, k)),
            Tensor("exit_loop", integers, (batch, seq)),
            Tensor("logits", np.float32, (batch, k, self._graph.vocab_size)),
        ]
        return inputs, outputs

    def _set_shapes(self, context: Any, shape: StepShape, inputs: list[Tensor]) -> None:
        cache = (shape.slots, shape.batch, shape.capacity, self._graph.cache_width)
        for name, sizes in [*((tensor.name, tensor.shape) for tensor in inputs), ("past_kv", cache)]:
            self._accept(context.set_input_shape(name, sizes), f"the shape {list(sizes)} of {name}")

    def _set_address(self, context: Any, name: str, address: int) -> None:
        self._accept(context.set_tensor_address(name, address), f"an address for {name}")

    def _launch(self, place: PlanContext, binding: Binding, greedy: bool) -> None:
        def work() -> None:
            self.stream.copy_to_device(self._inputs.device.address, self._inputs.host.address, binding.to_device)
            self._tensorrt.logger.last_error = ""
            self._accept(place.context.execute_async_v3(self.stream.handle), "to run a step")
            size = binding.reduced if greedy else binding.to_host
            self.stream.copy_to_host(self._outputs.host.address, self._outputs.device.address, size)

        graph = binding.graphs.get(greedy)
        # Only what came twice is worth capturing, and TensorRT wants one plain step of a shape first.
        if graph is None and self._may_capture and place.profile.name == "decode" and binding.steps:
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
            for place in self.contexts:
                place.unbind()
            self.contexts, self._plans = [], []
            for part in (self._inputs, self._outputs, self._new_rows, self._activations, self._event):
                part.close()


def _ranges(profile: Profile) -> tuple[Any, ...]:
    return profile.batch, profile.seq, profile.capacity, profile.slots, profile.k


def _side_by_side(tensors: list[Tensor]) -> tuple[dict[str, int], int]:
    """Offset of each, aligned, and the bytes of all."""
    offsets, size = {}, 0
    for tensor in tensors:
        offsets[tensor.name] = size
        size += cuda.aligned(int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize)
    return offsets, size

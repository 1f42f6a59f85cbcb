"""One step on the GPU, whatever computes it: staging, CUDA graphs, one wait of the host.

A step is one copy to the device, the model, one copy back, and one wait of the host. Decode steps whose shapes and addresses stay
the same are captured as a CUDA graph, the two copies included, and replayed.

Shape letters: B batch, S new tokens, K positions with logits, C capacity of the cache, V vocab_size.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from numpy.typing import NDArray

from runtimes import cuda
from runtimes.backend import Cancelled, StopSignal, say_once
from runtimes.device_memory import CacheLayout
from runtimes.errors import BackendError
from runtimes.memory import MemoryBudget
from runtimes.step_tensors import REDUCED, StepShape, Tensor, side_by_side

Arrays = dict[str, NDArray[Any]]


class NewRows(NamedTuple):
    """A part of a step's new cache rows, each slot's [B, S] one after the other: where, and bytes from slot to slot."""

    address: int
    slot_stride: int


Then = Callable[[list[NewRows]], None]  # is told where the new rows lie, part by part of CacheLayout.parts


class Staging:
    """A block of device memory and its pinned copy in host memory, which grow as needed: tensors side by side, moved as one."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.device = cuda.DeviceBuffer(cuda.ALIGNMENT, what)
        self.host = cuda.PinnedBuffer(cuda.ALIGNMENT)

    def reserve(self, size: int) -> bool:
        """Makes room; what it held is lost where it returns True."""
        if size <= self.device.size:
            return False
        device, host = cuda.DeviceBuffer(size, self._what), cuda.PinnedBuffer(size)
        self.close()
        self.device, self.host = device, host
        return True

    def close(self) -> None:
        self.device.close()
        self.host.close()


class Placed(NamedTuple):
    """A step's inputs and outputs in the staging. tensors: addresses on the device; inputs, outputs: views of pinned memory.
    to_device, reduced, to_host: bytes to copy in, and back, for a greedy step or with logits."""

    tensors: dict[str, int]
    inputs: Arrays
    outputs: Arrays
    to_device: int
    reduced: int
    to_host: int


@dataclass
class Binding:
    """What is set up for steps of one shape over one cache.

    key: shape, cache address and the version of the executor's memory it holds for. new_rows: by part. graphs: captured steps, by
    whether they are greedy. steps: so far, of each of those.
    """

    key: tuple[StepShape, int, int]
    placed: Placed
    new_rows: list[NewRows]
    graphs: dict[bool, cuda.Graph] = field(default_factory=dict, kw_only=True)
    steps: Counter[bool] = field(default_factory=Counter, kw_only=True)

    def close(self) -> None:
        for graph in self.graphs.values():
            graph.close()


AnyBinding = TypeVar("AnyBinding", bound=Binding)


class DeviceExecutor(ABC, Generic[AnyBinding]):
    """Runs steps, one at a time; any thread may call. budget: for the caches of all sequences.

    integers: dtype of the step's integers. warm_up: steps of a shape before one is captured. appends: whether a step adds its rows
    to the cache itself; there must be room for them before then.
    """

    warm_up: ClassVar[int]
    appends: ClassVar[bool]

    def __init__(
        self, stream: cuda.Stream, layout: CacheLayout, vocab_size: int, integers: Any, budget: MemoryBudget
    ) -> None:
        self.lock = threading.RLock()
        self.stream, self.layout, self.budget = stream, layout, budget
        self._vocab_size, self._integers = vocab_size, integers
        self._event = cuda.Event()
        self._inputs, self._outputs = Staging("a step's input"), Staging("a step's output")
        self._blocks: dict[str, cuda.DeviceBuffer] = {}
        self._version = 0  # of all addresses above
        self._may_capture = True
        self.closed = False

    @abstractmethod
    def _bind(self, shape: StepShape, cache_address: int) -> AnyBinding:
        """Sets up steps of a shape over a cache. Raises InputError for one that cannot be run."""

    @abstractmethod
    def _enqueue(self, binding: AnyBinding, greedy: bool) -> None:
        """Puts a step's computing on the stream, from the inputs to the outputs on the device; greedy: REDUCED alone are needed."""

    @abstractmethod
    def _repeats(self, binding: AnyBinding) -> bool:
        """Whether steps of this binding can be captured and are worth it."""

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
        """Runs a step over a cache (see CacheLayout) and returns outputs, without logits where greedy.

        values: the inputs but for the cache; of "counts" [B], the new tokens that are kept. then: is told where the new rows lie,
        while the model may still be running, to put copies from there on the stream. Raises Cancelled where stop is set before (a
        step that runs cannot be stopped), InputError for a shape that cannot be run, BackendError where the step fails.
        """
        with self.lock:
            if self.closed:
                raise BackendError("the runner is closed; load the bundle again")
            if stop.is_set:
                raise Cancelled
            binding = self._bind(shape, cache_address)
            for name, view in binding.placed.inputs.items():
                view[...] = values[name]
            try:
                self._launch(binding, greedy)
                self._event.record(self.stream)
                if then is not None:
                    then(binding.new_rows)
            except BaseException:
                with contextlib.suppress(BackendError):  # what went wrong is raised already
                    self.stream.synchronize()  # the staging must not be written while copies read it
                raise
            self._event.wait()
            names = REDUCED if greedy else ("logits", "exit_loop")
            return {name: binding.placed.outputs[name].copy() for name in names}

    def _place(self, inputs: list[Tensor], outputs: list[Tensor]) -> Placed:
        """Makes room for a step's tensors, the logits last. What was bound to smaller staging is bound anew at its next use."""
        (input_at, to_device), (output_at, to_host) = side_by_side(inputs), side_by_side(outputs)
        for staging, size in ((self._inputs, to_device), (self._outputs, to_host)):
            self._version += staging.reserve(size)
        tensors = {name: self._inputs.device.address + at for name, at in input_at.items()}
        tensors |= {name: self._outputs.device.address + at for name, at in output_at.items()}
        return Placed(
            tensors,
            {t.name: self._inputs.host.array(t.dtype, t.shape, input_at[t.name]) for t in inputs},
            {t.name: self._outputs.host.array(t.dtype, t.shape, output_at[t.name]) for t in outputs},
            to_device,
            output_at["logits"],
            to_host,
        )

    def _block(self, what: str, size: int) -> int:
        """Address of device memory of at least that size, the same from step to step unless it must grow."""
        block = self._blocks.get(what)
        if block is None or size > block.size:
            self._blocks[what] = cuda.DeviceBuffer(max(size, cuda.ALIGNMENT), what)
            self._version += 1
            if block is not None:
                block.close()
        return self._blocks[what].address

    def _launch(self, binding: AnyBinding, greedy: bool) -> None:
        def work() -> None:
            placed = binding.placed
            self.stream.copy_to_device(self._inputs.device.address, self._inputs.host.address, placed.to_device)
            self._enqueue(binding, greedy)
            size = placed.reduced if greedy else placed.to_host
            self.stream.copy_to_host(self._outputs.host.address, self._outputs.device.address, size)

        graph = binding.graphs.get(greedy)
        if graph is None and self._may_capture and binding.steps[greedy] >= self.warm_up and self._repeats(binding):
            graph = self._captured(binding, greedy, work)
        if graph is not None:
            graph.launch()
        else:
            work()
        binding.steps[greedy] += 1

    def _captured(self, binding: AnyBinding, greedy: bool, work: Callable[[], None]) -> cuda.Graph | None:
        try:
            binding.graphs[greedy] = self.stream.capture(work)
        except BackendError as error:
            self._capture_no_more(str(error))
            return None
        return binding.graphs[greedy]

    def _capture_no_more(self, reason: str) -> None:
        self._may_capture = False
        say_once(f"decode runs without a CUDA graph: {reason}")

    def close(self) -> None:
        """Frees buffers; may be called again."""
        with self.lock:
            self.closed = True
            for staging in (self._inputs, self._outputs):
                staging.close()
            for part in (*self._blocks.values(), self._event):
                part.close()

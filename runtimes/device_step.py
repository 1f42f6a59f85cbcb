"""One step on the GPU, whatever computes it: staging, CUDA graphs, one wait of the host.

A step is one copy to the device, the model, the choice of tokens, one copy back, and one wait of the host. The model's part of
decode steps whose shapes and addresses stay the same is captured as a CUDA graph and replayed. Where tokens are chosen on the
device, the next step can be put behind this one before the host has seen them.

Shape letters: B batch, S new tokens, K positions with logits, C capacity of the cache, V vocab_size.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtimes import cuda
from runtimes.backend import Cancelled, StopSignal, say_once
from runtimes.device_memory import CacheLayout
from runtimes.errors import BackendError
from runtimes.memory import MemoryBudget
from runtimes.sampling import Sampling
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


class Slot:
    """Pinned host memory that one step's outputs come to, and the event after that. Grows as needed."""

    def __init__(self) -> None:
        self._host, self.event = cuda.PinnedBuffer(cuda.ALIGNMENT), cuda.Event()

    def address(self, size: int) -> int:
        """Of so many bytes of it."""
        if size > self._host.size:
            self.event.wait()  # for the copy of a step that was dropped
            larger = cuda.PinnedBuffer(size)
            self._host.close()
            self._host = larger
        return self._host.address

    def read(self, tensor: Tensor, offset: int) -> NDArray[Any]:
        """A copy of a tensor in it."""
        return self._host.array(tensor.dtype, tensor.shape, offset).copy()

    def close(self) -> None:
        self._host.close()
        self.event.close()


class Choice(NamedTuple):
    """How a step's tokens are chosen on the device: sampling, of each sequence the state of its random numbers [B], and, where
    there is a repetition penalty, the tokens seen, as Chooser.seen_bits."""

    sampling: Sampling
    random: NDArray[np.uint64]
    seen: NDArray[np.uint32] | None


class Placed(NamedTuple):
    """A step's inputs and outputs in the staging. tensors: addresses on the device; first_output: the lowest of the outputs';
    inputs: views of pinned memory; outputs: each tensor with its offset from the first. to_device, to_host: bytes to copy in, and
    back with logits; unseen, reduced: the same but for the tokens seen, and for a step that chooses."""

    tensors: dict[str, int]
    first_output: int
    inputs: Arrays
    outputs: dict[str, tuple[Tensor, int]]
    to_device: int
    unseen: int
    reduced: int
    to_host: int


@dataclass
class Binding:
    """What is set up for steps of one shape over one cache.

    key: shape, cache address and the version of the executor's memory it holds for. new_rows: by part. graph: the captured model.
    steps: so far.
    """

    key: tuple[StepShape, int, int]
    placed: Placed
    new_rows: list[NewRows]
    graph: cuda.Graph | None = field(default=None, kw_only=True)
    steps: int = field(default=0, kw_only=True)

    def close(self) -> None:
        if self.graph is not None:
            self.graph.close()


AnyBinding = TypeVar("AnyBinding", bound=Binding)


class Step(NamedTuple):
    """A step on the stream. number: its place among all of the executor's. choice: None where its logits are wanted."""

    binding: Binding
    choice: Choice | None
    slot: Slot
    number: int


class DeviceExecutor(ABC, Generic[AnyBinding]):
    """Runs steps, one at a time; any thread may call. budget: for the caches of all sequences.

    integers: dtype of the step's integers. warm_up: steps of a shape before one is captured. appends: whether a step adds its rows
    to the cache itself; there must be room for them before then. A step is put on the stream by start() and waited for by finish(),
    or given up by drop().
    """

    warm_up: ClassVar[int]
    appends: ClassVar[bool]

    def __init__(
        self, stream: cuda.Stream, layout: CacheLayout, vocab_size: int, integers: Any, budget: MemoryBudget
    ) -> None:
        self.lock = threading.RLock()
        self.stream, self.layout, self.budget = stream, layout, budget
        self.vocab_size, self._integers = vocab_size, integers
        self._inputs = Staging("a step's input")
        self._slots: list[Slot] = []
        self._unused: list[Slot] = []  # by any step
        self._number = 0  # of steps so far
        self._blocks: dict[str, cuda.DeviceBuffer] = {}
        self._version = 0  # of all addresses above
        self._may_capture = True
        self.closed = False

    @abstractmethod
    def _bind(self, shape: StepShape, cache_address: int) -> AnyBinding:
        """Sets up steps of a shape over a cache. Raises InputError for one that cannot be run."""

    @abstractmethod
    def _enqueue(self, binding: AnyBinding) -> None:
        """Puts the model on the stream, from the inputs to the outputs on the device."""

    @abstractmethod
    def chooses(self, sampling: Sampling) -> bool:
        """Whether tokens can be chosen so on the device."""

    @abstractmethod
    def _choose(self, binding: AnyBinding, sampling: Sampling) -> None:
        """Puts the choice on the stream, from the logits to REDUCED; nothing where the model makes it."""

    @abstractmethod
    def _repeats(self, binding: AnyBinding) -> bool:
        """Whether steps of this binding can be captured and are worth it."""

    def start(
        self,
        shape: StepShape,
        cache_address: int,
        values: Arrays,
        choice: Choice | None,
        stop: StopSignal,
        then: Then | None = None,
    ) -> Step:
        """Puts a step over a cache (see CacheLayout) on the stream. The caller holds the lock until it has finished it.

        values: the inputs but for the cache; of "counts" [B], the new tokens that are kept. choice: one that the device can make
        (see chooses), or None for logits. then: is told where the new rows lie, while the model may still be running, to put copies
        from there on the stream. Raises Cancelled where stop is set before (a step that runs cannot be stopped), InputError for a
        shape that cannot be run, BackendError where the step fails.
        """
        if self.closed:
            raise BackendError("the runner is closed; load the bundle again")
        if stop.is_set:
            raise Cancelled
        binding = self._bind(shape, cache_address)
        placed = binding.placed
        for name, view in placed.inputs.items():
            if name in values:
                view[...] = values[name]
            elif choice is not None and (given := getattr(choice, name)) is not None:
                view[...] = given

        def feed() -> None:
            size = placed.to_device if choice is not None and choice.seen is not None else placed.unseen
            self.stream.copy_to_device(self._inputs.device.address, self._inputs.host.address, size)

        return self._put(feed, binding, choice, then)

    def follow(self, step: Step) -> Step | None:
        """Puts the step after one of a token a sequence on the stream, fed with the tokens that this one chooses; room for its rows
        must be there. Its inputs are made on the device, so None where another step was put there since, and where it cannot be
        done. It may be finished, or dropped, at any later time."""
        return None

    def _put(self, feed: Callable[[], None], binding: AnyBinding, choice: Choice | None, then: Then | None) -> Step:
        self._number += 1
        if not self._unused:
            self._slots.append(Slot())
            self._unused.append(self._slots[-1])
        slot, placed = self._unused.pop(), binding.placed
        try:
            feed()
            self._compute(binding)
            if choice is not None:
                self._choose(binding, choice.sampling)
            size = placed.reduced if choice is not None else placed.to_host
            self.stream.copy_to_host(slot.address(size), placed.first_output, size)
            slot.event.record(self.stream)
            if then is not None:
                then(binding.new_rows)
        except BaseException:
            with contextlib.suppress(BackendError):  # what went wrong is raised already
                self.stream.synchronize()  # the staging must not be written while copies read it
            self._unused.append(slot)
            raise
        return Step(binding, choice, slot, self._number)

    def finish(self, step: Step) -> Arrays:
        """Waits for a step and returns its outputs: REDUCED where it chooses, else logits and exit_loop."""
        step.slot.event.wait()
        names = REDUCED if step.choice is not None else ("logits", "exit_loop")
        outputs = {name: step.slot.read(*step.binding.placed.outputs[name]) for name in names}
        self.drop(step)
        return outputs

    def drop(self, step: Step) -> None:
        """Gives up a step's outputs; it runs to its end."""
        self._unused.append(step.slot)

    def _place(self, inputs: list[Tensor], outputs: list[Tensor]) -> Placed:
        """Makes room for a step's tensors, the logits last. What was bound to smaller staging is bound anew at its next use."""
        (input_at, to_device), (output_at, to_host) = side_by_side(inputs), side_by_side(outputs)
        self._version += self._inputs.reserve(to_device)
        first_output = self._block("a step's output", to_host)
        tensors = {name: self._inputs.device.address + at for name, at in input_at.items()}
        tensors |= {name: first_output + at for name, at in output_at.items()}
        return Placed(
            tensors,
            first_output,
            {t.name: self._inputs.host.array(t.dtype, t.shape, input_at[t.name]) for t in inputs},
            {t.name: (t, output_at[t.name]) for t in outputs},
            to_device,
            input_at.get("seen", to_device),
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

    def _compute(self, binding: AnyBinding) -> None:
        if binding.graph is None and self._may_capture and binding.steps >= self.warm_up and self._repeats(binding):
            try:
                binding.graph = self.stream.capture(lambda: self._enqueue(binding))
            except BackendError as error:
                self._capture_no_more(str(error))
        if binding.graph is not None:
            binding.graph.launch()
        else:
            self._enqueue(binding)
        binding.steps += 1

    def _capture_no_more(self, reason: str) -> None:
        self._may_capture = False
        say_once(f"decode runs without a CUDA graph: {reason}")

    def close(self) -> None:
        """Frees buffers; may be called again."""
        with self.lock:
            self.closed = True
            with contextlib.suppress(BackendError):
                self.stream.synchronize()  # a step that was dropped may still run
            owned: list[Staging | Slot | cuda.DeviceBuffer] = [self._inputs, *self._slots, *self._blocks.values()]
            for part in owned:
                part.close()

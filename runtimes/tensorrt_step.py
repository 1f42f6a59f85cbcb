"""One step of an engine on the GPU: which plans and profile, and what passes between them.

Shape letters: B batch, S new tokens, C capacity and W width of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtimes import cuda
from runtimes.bundle import Graph
from runtimes.cuda_kernels import CudaKernels, ExpertsPart
from runtimes.device_memory import CacheLayout
from runtimes.device_step import Binding, DeviceExecutor, NewRows
from runtimes.device_weights import DeviceWeights
from runtimes.dtypes import STORAGE
from runtimes.engines import FORMS, Engine, Plan
from runtimes.errors import InputError
from runtimes.memory import MemoryBudget
from runtimes.sampling import Sampling
from runtimes.step_tensors import StepShape, side_by_side, step_inputs_and_outputs
from runtimes.tensorrt_api import DeserializedPlan, TensorRT
from runtimes.tensorrt_stages import Places, StageChain


@dataclass
class ChainBinding(Binding):
    """A chain set up for steps of one shape over one cache."""

    chain: StageChain
    places: Places


class Executor(DeviceExecutor[ChainBinding]):
    """Runs steps of an engine. kernels: None where the engine calls none. Raises BackendError or OutOfDeviceMemory where it cannot
    be set up."""

    warm_up = 1  # TensorRT wants one plain step of a shape first
    appends = False

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
        layout, unlimited = CacheLayout.of_engine(engine, graph), MemoryBudget(None, 0)
        super().__init__(stream, layout, graph.vocab_size, STORAGE[engine.integers], unlimited)
        self._plans = plans  # contexts live by them
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
        self._bindings: dict[StageChain, ChainBinding] = {}

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

    def _chain_for(self, shape: StepShape) -> StageChain:
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

    def _bind(self, shape: StepShape, cache_address: int) -> ChainBinding:
        chain = self._chain_for(shape)
        bound = self._bindings.get(chain)
        if bound is not None and bound.key == (shape, cache_address, self._version):
            return bound
        self._unbind(chain)
        placed = self._place(*step_inputs_and_outputs(shape, self.vocab_size, self._integers))
        state_at, state_bytes = side_by_side(chain.state(shape))
        slot_bytes = self.layout.bytes(1, shape.batch, shape.capacity)
        row_stride = cuda.aligned(self.layout.bytes(1, shape.batch, shape.seq))
        new_rows = self._block("new cache rows", shape.slots * row_stride)
        state = self._block("the state between loops", state_bytes)
        places = Places(
            cache_address,
            slot_bytes,
            new_rows,
            row_stride,
            {name: state + at for name, at in state_at.items()},
            self._loop_numbers.address,
            placed.tensors,
        )
        chain.set_shapes(shape)
        chain.set_addresses(shape, places)
        key, rows = (shape, cache_address, self._version), [NewRows(new_rows, row_stride)]
        self._bindings[chain] = ChainBinding(key, placed, rows, chain, places)
        return self._bindings[chain]

    def _unbind(self, chain: StageChain) -> None:
        bound = self._bindings.pop(chain, None)
        if bound is not None:
            bound.close()

    def _enqueue(self, binding: ChainBinding) -> None:
        binding.chain.enqueue(binding.key[0], binding.places, self.stream)

    def chooses(self, sampling: Sampling) -> bool:
        return sampling.is_argmax

    def _choose(self, binding: ChainBinding, sampling: Sampling) -> None:
        """The last plan's work."""

    def _repeats(self, binding: ChainBinding) -> bool:
        return binding.chain.profile.name == "decode"

    def close(self) -> None:
        """Frees contexts and buffers; may be called again."""
        with self.lock:
            super().close()
            for chain in self._chains:
                self._unbind(chain)
            self._chains, self._plans = [], []
            for part in (self._loop_numbers, self._activations, self._workspace):
                part.close()

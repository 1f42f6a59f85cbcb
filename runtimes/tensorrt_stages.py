"""The execution contexts of one form and profile of an engine, with the calls of kernels between them, and how they are chained:
prelude, loop after loop, coda.

Shape letters: B batch, S new tokens, C capacity and W width of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from runtimes import cuda
from runtimes.bundle import Graph
from runtimes.cuda_kernels import ExpertsPart
from runtimes.device_weights import DeviceWeights
from runtimes.dtypes import STORAGE
from runtimes.engines import NEW_KV, NEXT, PAST_KV, STAGES, STATE, Engine, Plan, Profile
from runtimes.errors import BackendError
from runtimes.step_tensors import StepShape, Tensor, passed_tensors, state_shapes, state_tensors
from runtimes.tensorrt_api import DeserializedPlan, TensorRT

_INPUTS = ("input_ids", "past_len", "logit_positions", "n_loops")
_RESULTS = {
    "prelude": frozenset({"e"}),
    "loop": frozenset(f"{NEXT}{name}" for name in STATE),
    "coda": frozenset({"next_token", "next_logprob", "logits"}),
}
_GIVEN = {
    "prelude": frozenset({"input_ids", "past_len"}),
    "loop": frozenset({*STATE, "e", "past_len", "loop", "n_loops"}),
    "coda": frozenset({"result", "past_len", "logit_positions"}),
}


class Places(NamedTuple):
    """Where a step's tensors lie in device memory. cache: [slots, B, C, W]; slot_bytes: of a slot. new_rows: [S, W] of every row of
    the batch, a slot each row_stride bytes. state: of StageChain.state. loop_numbers: 0, 1, … each cuda.ALIGNMENT bytes further.
    tensors: of the step's inputs and outputs."""

    cache: int
    slot_bytes: int
    new_rows: int
    row_stride: int
    state: Mapping[str, int]
    loop_numbers: int
    tensors: Mapping[str, int]


class _PlanPart:
    """An execution context for one profile of a plan; it never changes profiles."""

    def __init__(self, tensorrt: TensorRT, plan: Plan, context: Any, names: frozenset[str]) -> None:
        self._tensorrt, self.record, self.context, self.names = tensorrt, plan, context, names
        self.file = plan.file
        self.caches = _numbers(names, NEW_KV)

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if name in self.names:
            self._accept(self.context.set_input_shape(name, shape), f"the shape {list(shape)} of {name}")

    def set_address(self, name: str, address: int) -> None:
        if name in self.names:
            self._accept(self.context.set_tensor_address(name, address), f"an address for {name}")

    def enqueue(self, stream: cuda.Stream) -> None:
        self._tensorrt.logger.last_error = ""
        self._accept(self.context.execute_async_v3(stream.handle), "to run a step")

    def _accept(self, accepted: bool, what: str) -> None:
        if not accepted:
            library = self._tensorrt
            raise BackendError(f"{library.backend} {library.version} refuses {what}: {library.last_error}")


def _numbers(names: frozenset[str], prefix: str) -> list[int]:
    return sorted(int(name.removeprefix(prefix)) for name in names if name.startswith(prefix))


_Part = _PlanPart | ExpertsPart


class _Stage:
    """The plans and calls of a stage, which run one after another."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts, self.name = parts, parts[0].record.stage

    def check(self, weights: DeviceWeights) -> None:
        """Raises BackendError where the plans' tensors are not those of their stage."""
        handed_on: set[str] = set()
        for part in self.parts:
            kv = {f"{prefix}{index}" for index in part.caches for prefix in (PAST_KV, NEW_KV)}
            passes = {passed.name for passed in part.record.passes}
            known = {*weights.addresses, *_GIVEN[self.name], *_RESULTS[self.name], *kv, *handed_on, *passes}
            _explain(part, part.names - known, passes - part.names)
            handed_on |= passes
        _explain(self.parts[-1], frozenset(), _RESULTS[self.name].difference(*(part.names for part in self.parts)))

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        for part in self.parts:
            part.set_shape(name, shape)

    def set_address(self, name: str, address: int) -> None:
        for part in self.parts:
            part.set_address(name, address)

    def set_caches(self, places: Places, slot: int) -> None:
        """The caches and the new rows of its layers, which are the slots from that one on."""
        for part in self.parts:
            for index in part.caches:
                part.set_address(f"{PAST_KV}{index}", places.cache + (slot + index) * places.slot_bytes)
                part.set_address(f"{NEW_KV}{index}", places.new_rows + (slot + index) * places.row_stride)

    def enqueue(self, stream: cuda.Stream) -> None:
        for part in self.parts:
            part.enqueue(stream)


def _explain(part: _Part, unknown: frozenset[str], missing: frozenset[str] | set[str]) -> None:
    if unknown or missing:
        what = f"wants {sorted(unknown)}" if unknown else f"lacks {sorted(missing)}"
        raise BackendError(f"{part.file} {what}, which engine.json does not explain; build the engine again")


class StageChain:
    """The stages of a form, each plan with a context for the profile of that index, and the weights bound. graph: the bundle's.
    experts: the form's calls, ready to be set up. activations: device memory that all contexts share. Raises BackendError for plans
    that are not what the metadata says."""

    def __init__(
        self,
        tensorrt: TensorRT,
        engine: Engine,
        graph: Graph,
        plans: list[tuple[Plan, DeserializedPlan]],
        experts: list[ExpertsPart],
        index: int,
        weights: DeviceWeights,
        activations: cuda.DeviceBuffer,
        stream: cuda.Stream,
    ) -> None:
        self.plan: Plan = plans[0][0]
        self.profile: Profile = self.plan.profiles[index]
        self._graph, self._dim, self._integers = graph, engine.dim, STORAGE[engine.integers]
        parts: list[_Part] = [*experts]
        for plan, deserialized in plans:
            context = deserialized.new_context(activations.address, activations.size, index, stream.handle)
            parts.append(_PlanPart(tensorrt, plan, context, deserialized.tensor_names))
        parts.sort(key=lambda part: part.record.part)
        self._stages = {name: _Stage([part for part in parts if part.record.stage == name]) for name in STAGES}
        self._prelude, self._loop, self._coda = self._stages.values()
        for stage in self._stages.values():
            stage.check(weights)
            for name, address in weights.addresses.items():
                stage.set_address(name, address)

    def takes(self, shape: StepShape) -> bool:
        """Whether a step of this shape is within the plans' and the profile's limits."""
        few_enough = self.plan.max_tokens is None or shape.batch * shape.seq <= self.plan.max_tokens
        return few_enough and all(size in getattr(self.profile, name) for name, size in shape.of_profile.items())

    def state(self, shape: StepShape) -> list[Tensor]:
        """What passes between parts in a step."""
        return [*state_tensors(shape.batch, shape.seq, self._dim, self._integers), *self._passed(shape)]

    def _passed(self, shape: StepShape) -> list[Tensor]:
        parts = chain.from_iterable((part.record for part in stage.parts) for stage in self._stages.values())
        return passed_tensors(parts, shape.batch, shape.seq, self._integers)

    def set_shapes(self, shape: StepShape) -> None:
        """For steps to come."""
        batch, seq = shape.batch, shape.seq
        shapes: dict[str, tuple[int, ...]] = {
            "input_ids": (batch, seq),
            "past_len": (batch,),
            "logit_positions": (batch, shape.k),
            "n_loops": (batch,),
            **state_shapes(batch, seq, self._dim),
        }
        passed = {tensor.name: tensor.shape for tensor in self._passed(shape)}
        for stage in self._stages.values():
            for name, sizes in shapes.items():
                if name in _GIVEN[stage.name]:
                    stage.set_shape(name, sizes)
            made: set[str] = set()
            for part in stage.parts:
                for name in made:
                    part.set_shape(name, passed[f"{stage.name}/{name}"])
                for index in part.caches:
                    part.set_shape(f"{PAST_KV}{index}", (batch, shape.capacity, self._graph.cache_width))
                made |= {passed.name for passed in part.record.passes}

    def set_addresses(self, shape: StepShape, places: Places) -> None:
        """Of what stays in place from loop to loop and from step to step."""
        for stage in self._stages.values():
            for name in _INPUTS:
                if name in _GIVEN[stage.name]:
                    stage.set_address(name, places.tensors[name])
            for part in stage.parts:
                for passed in part.record.passes:
                    stage.set_address(passed.name, places.state[f"{stage.name}/{passed.name}"])
        for name in ("next_token", "next_logprob", "logits"):
            self._coda.set_address(name, places.tensors[name])
        self._prelude.set_address("e", places.state["e"])
        self._loop.set_address("e", places.state["e"])
        self._coda.set_address("result", places.state[f"result.{shape.loops % 2}"])
        self._prelude.set_caches(places, 0)
        self._coda.set_caches(places, shape.slots - self._graph.coda_slots)

    def enqueue(self, shape: StepShape, places: Places, stream: cuda.Stream) -> None:
        """Puts all stages on the stream."""
        graph, zeros = self._graph, places.state["result.0"]
        stream.fill_zero(zeros, places.state["h.1"] - zeros)
        self._prelude.enqueue(stream)
        for number in range(shape.loops):
            self._loop.set_address("loop", places.loop_numbers + number * cuda.ALIGNMENT)
            for name in STATE:
                given, made = f"{name}.{number % 2}", f"{name}.{(number + 1) % 2}"
                self._loop.set_address(name, places.state["e" if name == "h" and number == 0 else given])
                last = name == "exit_loop" and number + 1 == shape.loops
                self._loop.set_address(f"{NEXT}{name}", places.tensors[name] if last else places.state[made])
            self._loop.set_caches(places, graph.prelude_slots + number * graph.loop_slots)
            self._loop.enqueue(stream)
        used = graph.prelude_slots + shape.loops * graph.loop_slots
        unused = shape.slots - graph.coda_slots - used  # loops that these sequences ran before and now leave out
        if unused:
            stream.fill_zero(places.new_rows + used * places.row_stride, unused * places.row_stride)
        self._coda.enqueue(stream)

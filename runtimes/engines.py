"""Engines of a bundle: what TensorRT made of its graph for one version and one GPU. The schema of their metadata.

They stand in engines/<key>/ beside the bundle's files and are not in its manifest: an engine belongs to a machine, the bundle does
not. engine.json names the graph and the weights an engine was made from, by sha256, and the sha256 of every plan: no byte of a plan
reaches TensorRT before it was compared (deserializing a foreign plan runs code in it).

Engines hold no float weights: each is an input of the network, which the runner binds to memory it uploads once from the bundle's
weights, shared by all plans. Quantized matrices are constants inside the plans.

A step runs plans one after another: the prelude's, the loop's as often as there are loops, the coda's. Inputs and outputs are
named as in StepInput and StepOutput, and there is an input for every Weight a stage reads. prelude: input_ids, past_len -> e
[B, S, D]. loop: STATE (h, result [B, S, D] float32, halted_mass [B, S, 1] float32, exit_loop [B, S, 1]), e, past_len, loop [] (its
number, from 0), n_loops [B] -> the next state, each named with NEXT before it. coda: result, past_len, logit_positions [B, k] ->
logits, next_token [B, k] (the largest logit's id, the lowest among equals), next_logprob [B, k] float32 (its natural logarithm).
Each attention layer of a stage, counted from 0, reads a cache past_kv.N [B, C, W] and returns new_kv.N [B, S, W]. All C rows are
read under a mask: rows at or past past_len change nothing, but must be finite numbers. Where a stage is several plans, its parts,
each has those of these inputs and outputs that it needs, and hands tensors PASSED on to parts after it.

Experts that no plan computes are calls of the CUDA kernels, which take their place among the parts (see ExpertsCall).

Shape letters: B batch, S new tokens, T tokens (B × S), D dim, C capacity of the cache, W its width, k logit positions, K top_k,
E routed and s shared experts, F expert_dim.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

FORMAT_VERSION = 4
# What a loop is given and hands on: the state, the result so far, halting probability so far, loops run while not halted.
STATE = ("h", "result", "halted_mass", "exit_loop")
STAGES = ("prelude", "loop", "coda")  # in the order they run
FORMS = ("few_tokens", "many_tokens")  # see Plan
NEXT = "next_"  # before each of STATE, as a loop returns it
PAST_KV, NEW_KV = "past_kv.", "new_kv."  # before the number, within a stage, of an attention layer
PASSED = "passed."  # before the number, within a stage, of a tensor that parts hand on
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}

Dtype = Literal["float32", "float16", "bfloat16"]
Positive = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a dimension may be, and the value a profile is tuned for."""

    min: Positive
    opt: Positive
    max: Positive

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An optimization profile: "decode" (one new token) or "prefill". Ranges of the dimensions B (batch), S (seq), C (capacity) and
    k."""

    name: Literal["decode", "prefill"]
    batch: Range
    seq: Range
    capacity: Range
    k: Range

    @property
    def tokens(self) -> Range:
        """Of batch × seq."""
        return Range(*(getattr(self.batch, end) * getattr(self.seq, end) for end in ("min", "opt", "max")))


class Weight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A float weight: input `name` of the plans (the ONNX graph's initializer of that name), its bytes at offset of the bundle's
    file, of dtype `stored` there and of `dtype` in the engine."""

    name: str
    file: str
    offset: NotNegative
    size: NotNegative
    stored: Dtype
    dtype: Dtype
    shape: tuple[NotNegative, ...]

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return self.size // _SIZES[self.stored]

    @property
    def device_bytes(self) -> int:
        """Its size in the engine's dtype."""
        return self.elements * _SIZES[self.dtype]


class Passed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor that a plan hands on to later ones of its stage. integer: of the engine's integers, else float32. shape: numbers,
    and the dimensions batch, seq and tokens (batch × seq)."""

    name: str
    integer: bool
    shape: tuple[Positive | Literal["batch", "seq", "tokens"], ...]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One serialized engine file.

    stage, part: what of a step it computes, and which piece of that, from 0 in the order they run. passes: what it hands on. form:
    "few_tokens" gathers the chosen experts of each token, "many_tokens" computes all experts (unless the CUDA kernels do); a model
    without experts has only the latter. max_tokens: most new tokens (batch × seq) of a step it is meant for; None where only its
    profiles limit it. profiles: in the engine's order. Those three are the same in all plans of a form. layers: file of the layer
    report. activation_bytes: device memory of one execution context.
    """

    file: str
    stage: Literal["prelude", "loop", "coda"]
    part: NotNegative
    passes: tuple[Passed, ...]
    form: Literal["few_tokens", "many_tokens"]
    max_tokens: Positive | None
    profiles: tuple[Profile, ...]
    size: Positive
    sha256: str
    layers: str
    activation_bytes: NotNegative


class ExpertsCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a stage that is no plan: the experts of a mixture, which the CUDA kernels compute (runtimes.cuda_kernels).

    stage, part, form: as of a Plan. normed, chosen, weight: tensors that earlier parts hand on, [T, D] float32, [T, K] int32 and
    [T, K] float32; mixed: the one this call hands on, [T, D] float32. gate_up_routed [E, 2F, D], down_routed [E, D, F],
    gate_up_shared [s, 2F, D], down_shared [s, D, F]: names of the weights, the last two None without shared experts. dtype: of
    those. dim, expert_dim, top_k, routed, shared: D, F, K, E, s.
    """

    stage: Literal["prelude", "loop", "coda"]
    part: NotNegative
    form: Literal["few_tokens", "many_tokens"]
    normed: str
    chosen: str
    weight: str
    mixed: str
    gate_up_routed: str
    down_routed: str
    gate_up_shared: str | None
    down_shared: str | None
    dtype: Dtype
    dim: Positive
    expert_dim: Positive
    top_k: Positive
    routed: Positive
    shared: NotNegative

    @property
    def given(self) -> tuple[Passed, ...]:
        """What earlier parts hand on to it."""
        return (
            Passed(self.normed, False, ("tokens", self.dim)),
            Passed(self.chosen, True, ("tokens", self.top_k)),
            Passed(self.weight, False, ("tokens", self.top_k)),
        )

    @property
    def passes(self) -> tuple[Passed, ...]:
        """What it hands on."""
        return (Passed(self.mixed, False, ("tokens", self.dim)),)

    @property
    def stacks(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights it reads."""
        stacks = [
            (self.gate_up_routed, (self.routed, 2 * self.expert_dim, self.dim)),
            (self.down_routed, (self.routed, self.dim, self.expert_dim)),
            (self.gate_up_shared, (self.shared, 2 * self.expert_dim, self.dim)),
            (self.down_shared, (self.shared, self.dim, self.expert_dim)),
        ]
        return [(name, shape) for name, shape in stacks if name is not None]


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """engine.json: plans of one bundle for one TensorRT version and GPU, and calls of the CUDA kernels between them.

    backend, version: the library ("tensorrt" or "tensorrt-rtx") and its version (major.minor.patch). device: the GPU's name, ""
    where it was built without one. compute_capabilities: like "9.0". graph_file, graph_sha256, weights_sha256: what of the bundle
    it was made from. dtype: of the experts' products, and of all others unless their weights say otherwise; cache_dtype: of past_kv
    and new_kv. integers: dtype of all integer inputs and outputs. max_context: most tokens of a sequence. dim: D. build_seconds:
    wall clock. plugins: the library that TensorRT must have loaded to read the plans (runtimes.tensorrt_plugins); None: none.
    """

    format: Literal["mythos-engine"]
    format_version: int
    producer: str
    backend: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    device: str
    compute_capabilities: tuple[str, ...]
    graph_file: str
    graph_sha256: str
    weights_sha256: dict[str, str]
    dtype: Dtype
    cache_dtype: Dtype
    integers: Literal["int32", "int64"]
    max_context: Positive
    dim: Positive
    weights: tuple[Weight, ...]
    plans: tuple[Plan, ...]
    experts: tuple[ExpertsCall, ...]
    build_seconds: float
    plugins: Literal["mythos_plugins"] | None = None

    def of_form(self, form: str) -> list[Plan | ExpertsCall]:
        """Plans and calls of a form, in the order they run."""
        every: tuple[Plan | ExpertsCall, ...] = (*self.plans, *self.experts)
        parts = [part for part in every if part.form == form]
        return sorted(parts, key=lambda part: (STAGES.index(part.stage), part.part))

    def parts(self, form: str, stage: str) -> list[Plan | ExpertsCall]:
        """Plans and calls of a stage, in the order they run."""
        return [part for part in self.of_form(form) if part.stage == stage]


def engine_key(backend: str, version: str, compute_capabilities: tuple[str, ...], device: str, dtype: str) -> str:
    """Folder name of an engine, like "tensorrt-8.6.1-sm90-NVIDIA-H100-80GB-HBM3-float16"."""
    architectures = [f"sm{capability.replace('.', '')}" for capability in compute_capabilities]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", device).strip("-")
    return "-".join(part for part in (backend, version, *architectures, name, dtype) if part)


def contradiction(engine: Engine) -> str | None:
    """What shows that an engine's metadata make no sense; None where nothing does."""
    ranges = [
        part
        for plan in engine.plans
        for profile in plan.profiles
        for part in (profile.batch, profile.seq, profile.capacity, profile.k)
    ]
    forms = {(plan.form, plan.max_tokens, plan.profiles) for plan in engine.plans}
    parts = [(form, stage, engine.parts(form, stage)) for form, _, _ in forms for stage in STAGES]
    facts = (
        ("many_tokens" in {form for form, _, _ in forms}, "it has no plans for many tokens"),
        (len(forms) == len({form for form, _, _ in forms}), "plans of one form with different limits"),
        (
            all(found and [part.part for part in found] == [*range(len(found))] for *_, found in parts),
            "its plans' stages",
        ),
        ({call.form for call in engine.experts} <= {form for form, _, _ in forms}, "experts of a form without plans"),
        (all(_passes_plainly(found) for *_, found in parts), "what its plans hand on"),
        (
            all(_is_given(call, engine) for call in engine.experts),
            "experts that are given what no part before hands on",
        ),
        (all(_has_weights(call, engine) for call in engine.experts), "experts whose weights are not as they say"),
        (all(plan.profiles for plan in engine.plans), "a plan without profiles"),
        (all(part.min <= part.opt <= part.max for part in ranges), "a range that is none"),
        (len({weight.name for weight in engine.weights}) == len(engine.weights), "a weight named twice"),
        (all(_fits_shape(weight) for weight in engine.weights), "a weight whose size is not that of its shape"),
        (all(re.fullmatch(r"\d+\.\d+", text) for text in engine.compute_capabilities), "its compute capabilities"),
    )
    return next((what for ok, what in facts if not ok), None)


def _passes_plainly(parts: list[Plan | ExpertsCall]) -> bool:
    """Whether every tensor that parts hand on has a name of its own."""
    names = [passed.name for part in parts for passed in part.passes]
    return len({*names}) == len(names) and all(name.startswith(PASSED) for name in names)


def _is_given(call: ExpertsCall, engine: Engine) -> bool:
    """Whether earlier parts of its stage hand on what a call reads; the kernels read integers of 32 bits."""
    made = {passed.name: passed for part in engine.parts(call.form, call.stage)[: call.part] for passed in part.passes}
    ranges = [profile.tokens for plan in engine.plans if plan.form == call.form for profile in plan.profiles]
    sizes = {size for part in ranges for size in (part.min, part.max)}
    rows = {
        ("tokens",),
        *([(size,) for size in sizes] if len(sizes) == 1 else []),
    }  # a size that never changes is a number

    def is_made(wanted: Passed) -> bool:
        found = made.get(wanted.name)
        if found is None or found.integer != wanted.integer:
            return False
        return found.shape[:1] in rows and found.shape[1:] == wanted.shape[1:]

    return engine.integers == "int32" and all(map(is_made, call.given))


def _has_weights(call: ExpertsCall, engine: Engine) -> bool:
    """Whether the stacks a call reads are weights of its dtype, in the shapes that its sizes give."""
    weights = {weight.name: (weight.shape, weight.dtype) for weight in engine.weights}
    has_shared = {call.gate_up_shared is not None, call.down_shared is not None, call.shared > 0}
    stored = all(weights.get(name) == (shape, call.dtype) for name, shape in call.stacks)
    return stored and len(has_shared) == 1 and call.top_k <= call.routed


def _fits_shape(weight: Weight) -> bool:
    elements = 1
    for length in weight.shape:
        elements *= length
    return weight.size == elements * _SIZES[weight.stored]


def fits(engine: Engine, version: str, compute_capability: str, device: str) -> str | None:
    """Why an engine cannot run with a library of this version on this GPU; None where it can."""
    if _release(engine.version) != _release(version):
        return f"built with {engine.backend} {engine.version}, {version} is installed"
    if compute_capability not in engine.compute_capabilities:
        built = ", ".join(engine.compute_capabilities)
        return f"built for compute capability {built}, this GPU ({device}) has {compute_capability}"
    if engine.device and engine.device != device:
        return f"built on {engine.device}, this GPU is {device}"
    return None


def _release(version: str) -> tuple[str, ...]:
    """major.minor.patch: what decides whether a plan can be read."""
    return tuple(version.split(".")[:3])

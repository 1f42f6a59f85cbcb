"""What a step's time is made of: kernels of a GPU, or operators on a CPU, with what each must read and the rate that makes.

Where times come from is in traces.py. What is read is counted from the bundle's description (footprint.py): the weights that a
step must read, and the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mythos_export.footprint import Part

_MEMORY_BOUND = 0.5  # of the bandwidth measured
_SHORT = 5.0  # microseconds of a call that is launch and latency more than anything else

_MATRICES = (Part("NormalizedLinear", "matrix"), Part("ResidualLinear", "matrix"), Part("NormalizedLinear", "head"))
_CACHES = (Part("LatentAttention", "cache"), Part("GroupedQueryAttention", "cache"))


def _experts(weights: str) -> tuple[Part, ...]:
    return Part("MixtureOfExperts", weights), Part("FeedForward", weights)


# What the CUDA kernels of this project read. A part with several kernels in a step is told of none.
_KERNELS: dict[str, tuple[Part, ...]] = {
    **dict.fromkeys(("multiply_rows", "linear_quantized", "linear_many"), _MATRICES),
    "latent_few": (Part("LatentAttention", "w_uk"),),
    **dict.fromkeys(("attend_one", "attend_few_rows", "attend_many_rows"), _CACHES),
    "combine_latent": (Part("LatentAttention", "w_uv"),),
    **dict.fromkeys(("inner_few", "inner_quantized", "inner_many"), _experts("gate_up")),
    **dict.fromkeys(("outer_few", "outer_quantized", "outer_many"), _experts("down")),
    "head_products": (Part("LatentAttention", "w_uk"), Part("LatentAttention", "w_uv")),
    "recurrent_update": (Part("RecurrentUpdate", "rest"),),
}
_OURS = "mythos::cuda::"


class Activity(NamedTuple):
    """One run of a kernel or operator. microseconds: its own, without what ran inside of it or before the one before it ended."""

    name: str
    microseconds: float


@dataclass(frozen=True)
class Kernel:
    """All runs of a kernel in one step. share: of the step's time. bytes: what it must read, None where nobody knows. bound: what
    it sits on: "memory" from half of the bandwidth on, "launch" where a call takes less than 5 µs, else "compute or latency"; None
    where what it reads is not known and calls are longer."""

    name: str
    calls: float
    microseconds: float
    share: float
    bytes: float | None = None
    gb_per_second: float | None = None
    bandwidth_share: float | None = None
    bound: str | None = None


@dataclass(frozen=True)
class Profile:
    """One step, the mean of so many: microseconds from its begin to its end, those outside of all kernels, and the kernels, longest
    first. source: who timed them."""

    test: str
    source: str
    steps: int
    microseconds: float
    between_microseconds: float
    kernels: tuple[Kernel, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile(
    test: str,
    source: str,
    activities: Sequence[Activity],
    microseconds: float,
    steps: int,
    parts: Mapping[Part, float],
    bandwidth: float,
) -> Profile:
    """The table of activities in so many steps that took microseconds together. parts: bytes that one step reads, cache included;
    bandwidth: GB/s."""
    step = microseconds / steps
    calls: dict[str, int] = {}
    times: dict[str, float] = {}
    for activity in activities:
        calls[activity.name] = calls.get(activity.name, 0) + 1
        times[activity.name] = times.get(activity.name, 0.0) + activity.microseconds
    read = _bytes_by_name(times, parts)
    kernels = tuple(
        _kernel(name, calls[name] / steps, times[name] / steps, step, read.get(name), bandwidth)
        for name in sorted(times, key=lambda name: -times[name])
    )
    return Profile(test, source, steps, step, step - sum(times.values()) / steps, kernels)


def _kernel(name: str, calls: float, each: float, step: float, n_bytes: float | None, bandwidth: float) -> Kernel:
    short = each / calls < _SHORT
    if n_bytes is None or not each:
        return Kernel(name, calls, each, each / step, n_bytes, bound="launch" if short else None)
    rate = n_bytes / each / 1e3
    bound = "memory" if rate / bandwidth >= _MEMORY_BOUND else "launch" if short else "compute or latency"
    return Kernel(name, calls, each, each / step, n_bytes, rate, rate / bandwidth, bound)


def _bytes_by_name(names: Iterable[str], parts: Mapping[Part, float]) -> dict[str, float]:
    readers: dict[Part, list[str]] = {}
    for name in names:
        for part in _parts_of(name, parts):
            readers.setdefault(part, []).append(name)
    shared = {name for reading in readers.values() if len(reading) > 1 for name in reading}
    found: dict[str, float] = {}
    for part, reading in readers.items():
        for name in reading:
            if name not in shared:
                found[name] = found.get(name, 0.0) + parts[part]
    return found


def _parts_of(name: str, parts: Mapping[Part, float]) -> list[Part]:
    """What a kernel or operator reads of what there is."""
    if name.startswith(_OURS):
        return [part for part in _KERNELS.get(name.removeprefix(_OURS), ()) if part in parts]
    operator = name.removeprefix("Quantized").removesuffix("Int8Cache")
    return [part for part in parts if part.operator == operator]

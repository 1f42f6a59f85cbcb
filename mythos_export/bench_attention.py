"""Speed of the attention operator alone, at the sizes of a bundle's layers, over caches of any length and number format.

One new token of each sequence attends to a whole cache, so the time is that of reading it, if the kernel is good.

Shape letters: B batch, H query heads, N qk_nope_head_dim, Q qk_rope_head_dim, R kv_lora_rank, V v_head_dim, C rows and W width of
the cache.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from mythos_export import footprint, ops
from mythos_export.bandwidth import Bandwidth, DeviceBandwidth, ReadBandwidth
from mythos_export.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from mythos_export.environment import environment
from runtimes import cuda
from runtimes.errors import InputError
from runtimes.onnxruntime_backend import session_options
from runtimes.onnxruntime_cuda_session import Bound, CudaSession
from runtimes.runner import load

# Those of bundles, and the one the operators take besides.
CACHES: dict[str, tuple[int, np.dtype[Any]]] = {
    "float32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "float16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (TensorProto.BFLOAT16, np.dtype(np.uint16)),  # numpy holds its bits
    "int8": (TensorProto.INT8, np.dtype(np.int8)),
}


@dataclass(frozen=True)
class AttentionRow:
    """One context: microseconds of one call, bytes of cache it reads for all sequences, the rate that makes and its share of the
    bandwidth probed beside it."""

    context: int
    microseconds: float
    bytes: int
    gb_per_second: float
    bandwidth_share: float


@dataclass(frozen=True)
class AttentionReport:
    """What `mythos-export bench --attention` prints."""

    rows: tuple[AttentionRow, ...]
    read_bandwidth_gb_per_second: float
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_RUNS = 5  # of the operator in one measurement
Test = Callable[[], float]
Feeds = dict[str, NDArray[Any] | onnxruntime.OrtValue]
Progress = Callable[[str, int, int], None]


def bench_attention(
    bundle: str | Path,
    contexts: Sequence[int],
    cache_dtype: str | None = None,
    repetitions: int = 5,
    threads: int | None = None,
    native: bool | None = None,
    progress: Progress | None = None,
    *,
    batch: int = 1,
    device: str | None = None,
) -> AttentionReport:
    """Measures attention of a token of each of `batch` sequences over caches of `contexts` rows of cache_dtype, one of CACHES
    (default: the bundle's). device: "cpu", the default, or "cuda".

    The weights around it are random. Raises InputError for a context or batch below 1 or an unknown dtype, BackendError where
    nothing can run there.
    """
    if batch < 1:
        raise InputError(f"-b is {batch}; expected at least 1")
    if cache_dtype is not None and cache_dtype not in CACHES:
        raise InputError(f'cache_dtype is "{cache_dtype}"; expected one of {", ".join(CACHES)}')
    for context in contexts:
        if context < 1:
            raise InputError(f"attention over {context} rows; expected at least 1")
    with load(bundle, "onnxruntime", threads, native, device=device) as runner:
        cache_dtype = cache_dtype or runner.graph.cache_dtype
        n_threads = threads or os.cpu_count() or 1
        attention = ModelConfig.from_dict(runner.manifest.model).layers[0].attention
        about = environment(runner, n_threads)
        about |= {"attention": msgspec.to_builtins(attention), "cache_dtype": cache_dtype, "batch": batch}
        on_device, native = runner.device == "cuda", runner.native
    model, weights = _model(attention, cache_dtype, batch)
    bandwidth: Bandwidth = DeviceBandwidth() if on_device else ReadBandwidth(n_threads)
    alone = (
        _OnDevice(model, weights, cache_dtype, attention)
        if on_device
        else _OnHost(model, weights, cache_dtype, threads, native)
    )
    rows = []
    for done, context in enumerate(contexts):
        if progress:
            progress("measuring", done, len(contexts))
        shape = (1, batch, _rows(attention, context), attention.cache_width)
        test = alone.over(context, shape)
        test()  # warm-up
        n_bytes = shape[1] * shape[2] * footprint.row_bytes(attention.cache_width, cache_dtype)
        rows.append(_row(context, n_bytes, [bandwidth.beside(test) for _ in range(repetitions)]))
    return AttentionReport(tuple(rows), statistics.median(bandwidth.probes), about)


def _row(context: int, n_bytes: int, measured: list[tuple[float, float]]) -> AttentionRow:
    seconds = statistics.median(seconds for seconds, _ in measured)
    shares = [n_bytes / seconds / 1e9 / bandwidth for seconds, bandwidth in measured]
    return AttentionRow(context, seconds * 1e6, n_bytes, n_bytes / seconds / 1e9, statistics.median(shares))


def _model(config: AttentionConfig, cache_dtype: str, batch: int) -> tuple[ModelProto, Feeds]:
    """One node in a graph, and its inputs besides the cache."""
    random = np.random.default_rng(0)

    def numbers(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32)

    half = config.rope_dim // 2
    feeds: Feeds = {"cos": numbers(batch, 1, half), "sin": numbers(batch, 1, half), "slot": np.array(0)}
    attributes: dict[str, float]
    if isinstance(config, LatentAttentionConfig):
        head = config.qk_nope_head_dim + config.qk_rope_head_dim
        attributes = {"scale": head**-0.5, "epsilon": 1e-6}
        feeds |= {
            "q": numbers(batch, 1, config.n_heads * head),
            "kv": numbers(batch, 1, config.cache_width),
            "kv_norm": np.ones(config.kv_lora_rank, dtype=np.float32),
            "w_uk": numbers(config.n_heads, config.kv_lora_rank, config.qk_nope_head_dim),
            "w_uv": numbers(config.n_heads, config.v_head_dim, config.kv_lora_rank),
        }
    else:
        attributes = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "window": config.window}
        attributes["scale"] = config.head_dim**-0.5
        feeds["qkv"] = numbers(batch, 1, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
    name = "LatentAttention" if isinstance(config, LatentAttentionConfig) else "GroupedQueryAttention"
    if cache_dtype == "int8":
        name += "Int8Cache"
        attributes["row_scale"] = 0.0
    operator = next(o for o in ops.OPERATORS if o.name == name)
    kinds = {
        "past_kv": CACHES[cache_dtype][0],
        "past_len": TensorProto.INT64,
        "slot": TensorProto.INT64,
    }
    inputs = [
        helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name, _, _ in operator.inputs
    ]
    names = [name for name, _, _ in operator.inputs]
    node = helper.make_node(operator.name, names, [o[0] for o in operator.outputs], domain=ops.DOMAIN, **attributes)
    graph = helper.make_graph(
        [node], "attention", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    imports = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, ops.DOMAIN_VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=[operator.functions[""]])
    return model, feeds


def _rows(config: AttentionConfig, context: int) -> int:
    """What a cache holds of so many tokens."""
    return min(context, getattr(config, "window", 0) or context)


def _scales(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Of the rows of an int8 cache of that shape [1, B, C, W]."""
    return np.full(shape[:3], 0.01, dtype=np.float32)


class _OnHost:
    """The operator on onnxruntime's CPU provider."""

    def __init__(self, model: ModelProto, weights: Feeds, cache_dtype: str, threads: int | None, native: bool) -> None:
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(threads, native))
        self._weights, self._cache_dtype = weights, cache_dtype

    def over(self, context: int, shape: tuple[int, ...]) -> Test:
        """Seconds a call takes over a cache of that shape [1, B, C, W], of ones."""
        kind, dtype = CACHES[self._cache_dtype]
        past_kv: NDArray[Any] = np.full(shape, 0x3F80 if self._cache_dtype == "bfloat16" else 1, dtype)
        feeds = self._weights | {
            "past_kv": onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(past_kv, kind),
            "past_len": np.full(shape[1], context),
        }
        if self._cache_dtype == "int8":
            feeds["past_scale"] = _scales(shape)

        def test() -> float:
            began = time.perf_counter()
            for _ in range(_RUNS):
                self._session.run(None, feeds)
            return (time.perf_counter() - began) / _RUNS

        return test


class _OnDevice:
    """The operator on onnxruntime's CUDA provider, over caches that together are larger than the GPU's own."""

    _BYTES, _MOST = 256 * 2**20, 64  # of caches, and how many

    def __init__(self, model: ModelProto, weights: Feeds, cache_dtype: str, config: AttentionConfig) -> None:
        self._stream, self._weights, self._cache_dtype = cuda.Stream(), weights, cache_dtype
        values = config.v_head_dim if isinstance(config, LatentAttentionConfig) else config.head_dim
        self._y_width = config.n_heads * values
        self._held: list[Any] = []  # memory of the last test
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "attention.onnx"
            path.write_bytes(model.SerializeToString())
            self._session = CudaSession(path, self._stream, None, capture=True)

    def over(self, context: int, shape: tuple[int, ...]) -> Test:
        """Seconds a call takes over caches of that shape [1, B, C, W], of zeros, in turn. The test before it is of no use then."""
        (kind, dtype), batch = CACHES[self._cache_dtype], shape[1]
        self._held.clear()
        size = int(np.prod(shape)) * dtype.itemsize
        count = min(self._MOST, max(2, -(-self._BYTES // size)))
        caches = [cuda.DeviceBuffer(size, f"a cache of {batch} × {shape[2]} rows") for _ in range(count)]
        held, inputs = self._held, list[Bound]()
        held += caches
        scales = {"past_scale": _scales(shape)} if self._cache_dtype == "int8" else {}
        for name, value in (self._weights | {"past_len": np.full(batch, context)} | scales).items():
            array = np.ascontiguousarray(value)
            on_host = name in self._session.host_inputs
            place = array if on_host else cuda.DeviceBuffer(array.nbytes, name)
            if isinstance(place, cuda.DeviceBuffer):
                self._stream.upload(place.address, array)
            address = place.address if isinstance(place, cuda.DeviceBuffer) else place.ctypes.data
            inputs.append(Bound(name, array.dtype.type, array.shape, address, on_host))
            held.append(place)
        element_type = kind if self._cache_dtype == "bfloat16" else dtype.type
        held.append(cuda.DeviceBuffer(batch * self._y_width * 4, "y"))
        y = Bound("y", np.float32, (batch, 1, self._y_width), held[-1].address)
        bindings = []
        for cache in caches:
            self._stream.fill_zero(cache.address, size)
            past = Bound("past_kv", element_type, shape, cache.address)
            bindings.append(self._session.bind([*inputs, past], [y]))

        def in_turn() -> None:
            for binding in bindings:
                self._session.run(binding)

        for _ in range(2):  # onnxruntime takes its memory in the first runs
            in_turn()
        graph = self._stream.capture(in_turn) if self._session.obstacle is None else None

        def test() -> float:
            self._stream.synchronize()
            began = time.perf_counter()
            for _ in range(_RUNS):
                if graph is not None:
                    graph.launch()
                else:
                    in_turn()
            self._stream.synchronize()
            return (time.perf_counter() - began) / (_RUNS * count)

        return test

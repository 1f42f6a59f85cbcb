"""Speed of the attention operator alone, at the sizes of a bundle's layers, over caches of any length and number format.

One new token attends to a whole cache, so the time is that of reading it, if the kernel is good.

Shape letters: H query heads, N qk_nope_head_dim, Q qk_rope_head_dim, R kv_lora_rank, V v_head_dim, C rows and W width of the cache.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mythos_export import footprint, ops
from mythos_export.bandwidth import ReadBandwidth
from mythos_export.bench import environment
from mythos_export.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from runtimes.errors import InputError
from runtimes.onnxruntime_backend import session_options
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
    """One context: microseconds of one call, bytes of cache it reads, the rate that makes and its share of the read bandwidth."""

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
) -> AttentionReport:
    """Measures attention of one token over caches of `contexts` rows of cache_dtype, one of CACHES (default: the bundle's).

    The weights around it are random. Raises InputError for a context below 1 or an unknown dtype.
    """
    if cache_dtype is not None and cache_dtype not in CACHES:
        raise InputError(f'cache_dtype is "{cache_dtype}"; expected one of {", ".join(CACHES)}')
    for context in contexts:
        if context < 1:
            raise InputError(f"attention over {context} rows; expected at least 1")
    runner = load(bundle, "onnxruntime", threads, native)
    cache_dtype = cache_dtype or runner.graph.cache_dtype
    config = ModelConfig.from_dict(runner.manifest.model)
    attention = config.layers[0].attention
    session, weights = _session(attention, cache_dtype, threads, runner.native)
    n_threads = threads or os.cpu_count() or 1
    bandwidth = ReadBandwidth(n_threads)
    rows = []
    for done, context in enumerate(contexts):
        if progress:
            progress("measuring", done, len(contexts))
        feeds = {**weights, **_cache(attention, cache_dtype, context)}

        def test(feeds: Feeds = feeds) -> float:
            began = time.perf_counter()
            for _ in range(_RUNS):
                session.run(None, feeds)
            return (time.perf_counter() - began) / _RUNS

        test()  # warm-up
        n_bytes = _rows(attention, context) * footprint.row_bytes(attention.cache_width, cache_dtype)
        rows.append(_row(context, n_bytes, [bandwidth.beside(test) for _ in range(repetitions)]))
    about = environment(runner, n_threads)
    about |= {"attention": msgspec.to_builtins(attention), "cache_dtype": cache_dtype}
    return AttentionReport(tuple(rows), statistics.median(bandwidth.probes), about)


def _row(context: int, n_bytes: int, measured: list[tuple[float, float]]) -> AttentionRow:
    seconds = statistics.median(seconds for seconds, _ in measured)
    shares = [n_bytes / seconds / 1e9 / bandwidth for seconds, bandwidth in measured]
    return AttentionRow(context, seconds * 1e6, n_bytes, n_bytes / seconds / 1e9, statistics.median(shares))


def _session(
    config: AttentionConfig, cache_dtype: str, threads: int | None, native: bool
) -> tuple[onnxruntime.InferenceSession, Feeds]:
    """One node in a graph, and its inputs besides the cache."""
    random = np.random.default_rng(0)

    def numbers(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32)

    half = config.rope_dim // 2
    feeds: Feeds = {"cos": numbers(1, 1, half), "sin": numbers(1, 1, half), "slot": np.array(0)}
    attributes: dict[str, float]
    if isinstance(config, LatentAttentionConfig):
        head = config.qk_nope_head_dim + config.qk_rope_head_dim
        attributes = {"scale": head**-0.5, "epsilon": 1e-6}
        feeds |= {
            "q": numbers(1, 1, config.n_heads * head),
            "kv": numbers(1, 1, config.cache_width),
            "kv_norm": np.ones(config.kv_lora_rank, dtype=np.float32),
            "w_uk": numbers(config.n_heads, config.kv_lora_rank, config.qk_nope_head_dim),
            "w_uv": numbers(config.n_heads, config.v_head_dim, config.kv_lora_rank),
        }
    else:
        attributes = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "window": config.window}
        attributes["scale"] = config.head_dim**-0.5
        feeds["qkv"] = numbers(1, 1, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
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
    options = session_options(threads, native)
    return onnxruntime.InferenceSession(model.SerializeToString(), options), feeds


def _rows(config: AttentionConfig, context: int) -> int:
    """What a cache holds of so many tokens."""
    return min(context, getattr(config, "window", 0) or context)


def _cache(config: AttentionConfig, cache_dtype: str, context: int) -> Feeds:
    """Rows of ones."""
    shape, (kind, dtype) = (1, 1, _rows(config, context), config.cache_width), CACHES[cache_dtype]
    past_kv: NDArray[Any] = np.full(shape, 0x3F80 if cache_dtype == "bfloat16" else 1, dtype)
    feeds: Feeds = {
        "past_kv": onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(past_kv, kind),
        "past_len": np.array([context]),
    }
    if cache_dtype == "int8":
        feeds["past_scale"] = np.full(shape[:3], 0.01, dtype=np.float32)
    return feeds

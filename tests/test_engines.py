"""The folder of an engine, and the small modules below the TensorRT backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import clear_caches, has_gpu, install
from fake_engine import add_engine, rewrite
from fake_tensorrt import FakeTensorRT
from hypothesis import given
from hypothesis import strategies as st

from runtimes import cuda, device_weights, tensorrt_api
from runtimes.bundle import open_bundle, rewrite_manifest
from runtimes.device_weights import DeviceWeights
from runtimes.dtypes import convert
from runtimes.engine_folder import EngineWriter, check, list_engines, read_engine
from runtimes.engines import Engine, Weight, engine_key, fits
from runtimes.errors import BackendError, BundleError
from runtimes.runner import load

# The engine's folder


def test_engines_are_written_whole_or_not_at_all(engine: Path, own_bundle: Path) -> None:
    home = own_bundle / "engines"
    with pytest.raises(
        BundleError, match="exists already; choose another folder or pass --force to replace the engine"
    ):
        EngineWriter(own_bundle, engine.name)
    with pytest.raises(KeyboardInterrupt), EngineWriter(own_bundle, engine.name, force=True) as writer:  # noqa: PT012
        writer.create("many_tokens.loop.0.plan").write(b"half")
        raise KeyboardInterrupt
    with (
        pytest.raises(BundleError, match=r"many_tokens\.loop\.0\.plan.* was never written"),
        EngineWriter(own_bundle, "new") as writer,
    ):
        writer.commit(read_engine(engine))
    with pytest.raises(BundleError, match="is no name for an engine"):
        EngineWriter(own_bundle, "../new")
    assert [path.name for path in home.iterdir()] == [engine.name]
    check(engine, read_engine(engine), open_bundle(own_bundle)[1])
    # A killed build where files have names before they are whole; nothing is listed of it.
    (home / f".{engine.name}.partial-1234-99999999").mkdir()
    assert [path for path, _ in list_engines(own_bundle)] == [engine]


def test_a_layer_report_is_part_of_an_engine(engine: Path, own_bundle: Path) -> None:
    (engine / "many_tokens.loop.0.layers.json").unlink()
    with pytest.raises(BundleError, match=r"many_tokens\.loop\.0\.layers\.json: missing"):
        check(engine, read_engine(engine), open_bundle(own_bundle)[1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 1}, "format version 1, this release reads 4"),
        ({"format": "mythos-bundle"}, '"format" is not "mythos-engine"'),
        ({"plans": ()}, "contradicts itself: it has no plans for many tokens"),
        ({"compute_capabilities": ("sm90",)}, "contradicts itself: its compute capabilities"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(engine: Path, changes: dict[str, object], reason: str) -> None:
    rewrite(engine, **changes)
    with pytest.raises(BundleError, match=reason):
        read_engine(engine)


def test_engines_outlive_a_rewritten_manifest(engine: Path, own_bundle: Path) -> None:
    """verify and others rewrite the manifest; engines are not in it."""
    folder, manifest = open_bundle(own_bundle)
    rewrite_manifest(folder, manifest)
    check(engine, read_engine(engine), open_bundle(own_bundle)[1])


def test_keys_name_what_an_engine_is_for() -> None:
    assert engine_key("tensorrt", "8.6.1", ("9.0",), "NVIDIA H100 80GB HBM3", "float16") == (
        "tensorrt-8.6.1-sm90-NVIDIA-H100-80GB-HBM3-float16"
    )
    assert (
        engine_key("tensorrt-rtx", "1.7.1", ("8.7", "12.0"), "", "float32") == "tensorrt-rtx-1.7.1-sm87-sm120-float32"
    )


def test_an_engine_made_without_a_gpu_fits_all_of_its_capabilities(engine: Path) -> None:
    rewrite(engine, device="", compute_capabilities=("8.7", "12.0"), version="1.7.1", backend="tensorrt-rtx")
    made: Engine = read_engine(engine)
    assert fits(made, "1.7.1.116", "12.0", "Any GPU") is None
    assert fits(made, "1.7.2", "12.0", "Any GPU") == "built with tensorrt-rtx 1.7.1, 1.7.2 is installed"
    assert "has 9.0" in str(fits(made, "1.7.1", "9.0", "Any GPU"))


# The modules below


def test_versions_and_what_they_can() -> None:
    old, new, rtx = (
        tensorrt_api.capabilities_of(backend, version, has_progress_monitor=False)
        for backend, version in (("tensorrt", "8.6.1"), ("tensorrt", "10.3.0"), ("tensorrt-rtx", "1.7.1"))
    )
    assert not any((old.strongly_typed, old.int64, old.int4, old.fp8, old.bfloat16))
    assert old.explicit_batch_flag
    assert new == rtx
    assert new.strongly_typed
    assert not new.explicit_batch_flag


def test_a_profile_that_version_10_refuses_by_an_exception(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, "10.3.0")
    fake.fails.add("profile")
    add_engine(own_bundle, version="10.3.0")
    with pytest.raises(BackendError, match="tensorrt refuses profile 0: it gives no reason"):
        load(own_bundle, "tensorrt")


def test_the_real_library_has_what_is_called_here() -> None:
    """TensorRT-RTX builds without a GPU; to deserialize it wants one, and says so."""
    pytest.importorskip("tensorrt_rtx")
    clear_caches()
    library = tensorrt_api.find("tensorrt-rtx")
    module = library.module
    network = (builder := module.Builder(library.logger)).create_network(0)
    doubled = network.add_unary(network.add_input("x", module.float32, (4,)), module.UnaryOperation.NEG)
    network.mark_output(doubled.get_output(0))
    plan = bytes(builder.build_serialized_network(network, builder.create_builder_config()))
    assert tensorrt_api.header_problem("tensorrt-rtx", plan) is None
    assert "plans of tensorrt with" in str(tensorrt_api.header_problem("tensorrt", plan))
    for name in ("set_input_shape", "set_tensor_address", "set_optimization_profile_async", "execute_async_v3"):
        assert hasattr(module.IExecutionContext, name)
    if not has_gpu():
        with pytest.raises(BackendError, match=r"tensorrt-rtx .* refuses the plan: .*cudaError"):
            library.deserialize(plan)


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_bfloat16_is_rounded_as_torch_does(numbers: list[float]) -> None:
    torch = pytest.importorskip("torch")
    wide = np.array(numbers, dtype=np.float32)
    narrow = convert(wide, "float32", "bfloat16")
    want = torch.from_numpy(wide).bfloat16()
    again = convert(narrow, "bfloat16", "float32")
    np.testing.assert_array_equal(again, want.float().numpy())
    np.testing.assert_array_equal(convert(wide, "float32", "float32"), wide)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_reach_the_device_in_the_engines_dtype(
    fake: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, dtype: str
) -> None:
    """Two weights of a file, one behind a gap, copied a few numbers at a time; an empty one does no harm."""
    monkeypatch.setattr(device_weights, "_PIECE", 7)
    numbers = convert(np.random.default_rng(0).standard_normal(40).astype(np.float32), "float32", stored)
    (tmp_path / "weights.bin").write_bytes(b"\1" * 4096 + numbers.tobytes())
    size = numbers.itemsize
    weights = tuple(
        Weight(name, "weights.bin", 4096 + start * size, count * size, stored, dtype, (count,))
        for name, start, count in (("a", 0, 30), ("b", 30, 10), ("c", 40, 0))
    )
    stream = cuda.Stream()
    on_device = DeviceWeights(tmp_path, weights, stream)
    for name, part in (("a", numbers[:30]), ("b", numbers[30:])):
        want = convert(part, stored, dtype)
        np.testing.assert_array_equal(stream.download(on_device.addresses[name], want.dtype, want.shape), want)
        assert on_device.addresses[name] % 256 == 0
    on_device.close()
    assert fake.cuda.allocated == 0


def test_weights_too_large_for_float16_are_told() -> None:
    assert convert(np.array([1.5, np.inf], np.float32), "float32", "float16").tolist() == [1.5, np.inf]
    with pytest.raises(BackendError, match="too large for float16; build the engine with --dtype bfloat16"):
        convert(np.array([1e5], np.float32), "float32", "float16")


def test_rows_too_far_apart_for_one_copy_are_copied_one_by_one(fake: FakeTensorRT) -> None:
    stream = cuda.Stream()
    stream.copy_rows(256, 2**31, 0, 512, 16, 3)
    assert (fake.cuda.calls["cudaMemcpyAsync"], fake.cuda.calls["cudaMemcpy2DAsync"]) == (3, 0)
    fake.cuda.streams[stream.handle].work.clear()


def test_cuda_errors_name_the_call(fake: FakeTensorRT) -> None:
    fake.cuda.failing.add("cudaMallocHost")
    with pytest.raises(BackendError, match=r"cudaMallocHost failed: .*\(cudaErrorInvalidValue\)"):
        cuda.PinnedBuffer(10)

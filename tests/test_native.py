"""The native kernels in use: larger shapes, same tokens as the portable bodies, many threads, and what happens without them."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import OPERATORS, in_native, in_torch, ring
from onnx import TensorProto

from calibration.rounding import Format, pack_int4, round_to_nearest
from mythos_export.inspection import doctor
from mythos_export.quantize import quantize_bundle
from mythos_export.quantize.recipe import load_recipe, with_overrides
from runtimes import native_operators
from runtimes.errors import BackendError
from runtimes.runner import load

needs_library = pytest.mark.skipif(
    not native_operators.is_available(),
    reason="the native operators are not built; make native builds them, or says what is missing",
)
FLOAT, INT8 = TensorProto.FLOAT, TensorProto.INT8
GENERATOR = torch.Generator().manual_seed(1)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def quantized(weight: torch.Tensor, bits: int, block_size: int) -> list[torch.Tensor]:
    values, scales = round_to_nearest(weight, Format(f"int{bits}", block_size))
    return [pack_int4(values) if bits == 4 else values, scales]


def check_native(
    name: str,
    tensors: list[torch.Tensor],
    attributes: dict[str, float],
    atol: float = 5e-5,
    like: list[torch.Tensor] | None = None,
) -> None:
    """Every instruction set agrees with float64, of the same tensors or of those in `like`."""
    truth = in_torch(OPERATORS[name], like or tensors, attributes, double=True)
    for instruction_set, outputs in in_native(OPERATORS[name], tensors, attributes).items():
        for output, expected in zip(outputs, truth, strict=True):
            np.testing.assert_allclose(output, expected, rtol=1e-4, atol=atol, err_msg=f"{name}, {instruction_set}")


@needs_library
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "dim", "hidden"),
    [(1, 128, 8, 70, 34), (5, 3, 2, 18, 50), (512, 1, 1, 24, 10), (333, 128, 4, 40, 50), (64, 16, 2, 130, 98)],
)
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_mixture_of_many_sizes(tokens: int, experts: int, top_k: int, dim: int, hidden: int, bits: int) -> None:
    """One to 512 tokens, one to 128 experts, many of them without tokens; then every token to one expert."""
    tensors = [randn(1, tokens, dim), torch.ones(dim), randn(experts, dim), randn(experts)]
    weights = [randn(experts + 1, 2 * hidden, dim) / dim**0.5, randn(experts + 1, dim, hidden) / hidden**0.5]
    attributes: dict[str, float] = {"top_k": top_k, "epsilon": 1e-6}
    if bits < 32:
        weights = [part for weight in weights for part in quantized(weight, bits, 64)] + [torch.empty(0)]
        attributes |= {"bits": bits, "block_size": 64, "activation_type": FLOAT}
    name = "MixtureOfExperts" if bits == 32 else "QuantizedMixtureOfExperts"
    for crowded in (False, True):
        if crowded:
            tensors[3][0] = 1e4
        check_native(name, [*tensors, *weights], attributes)


@needs_library
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_integer_products_of_many_sizes(bits: int, block_size: int) -> None:
    """Rows of many chunks and groups of scales, few tokens and many: integer sums equal those of the rounded numbers."""
    for tokens, n_in, n_out in ((1, 2050, 70), (4, 640, 33), (37, 1034, 50), (130, 514, 9)):
        x, pair = randn(1, tokens, n_in), quantized(randn(n_out, n_in) / n_in**0.5, bits, block_size)
        attributes = {"block_size": block_size, "activation_type": INT8}
        operator = OPERATORS["QuantizedResidualLinear"]
        for activation_scale in (torch.empty(0), torch.tensor([0.017])):
            tensors = [randn(1, tokens, n_out), x, *pair, activation_scale]
            truth = in_torch(operator, tensors, attributes, double=False)[0]
            for instruction_set, outputs in in_native(operator, tensors, attributes).items():
                np.testing.assert_allclose(outputs[0], truth, rtol=1e-4, atol=1e-4, err_msg=instruction_set)


@needs_library
@pytest.mark.parametrize(("lengths", "seq"), [([700, 3], 1), ([0], 200), ([130, 0, 64], 67), ([1500], 1)])
@pytest.mark.parametrize("window", [0, 100])
def test_attention_over_many_rows(lengths: list[int], seq: int, window: int) -> None:
    """Several blocks and splits of rows and tiles of tokens, ragged, NaN in every dead row; rings of little more than a window."""
    batch, heads, nope, half, value, rank = len(lengths), 5, 12, 4, 10, 20

    def rows_of(width: int) -> list[torch.Tensor]:
        past = randn(3, batch, max(lengths) + 9, width)
        for b, length in enumerate(lengths):
            past[:, b, length:] = float("nan")
        return [past, torch.tensor(lengths), torch.tensor(1)]

    cos, sin = randn(batch, seq, half), randn(batch, seq, half)
    tensors = [randn(batch, seq, heads * (nope + 2 * half)), randn(batch, seq, rank + 2 * half), torch.ones(rank)]
    tensors += [randn(heads, rank, nope) / 4, randn(heads, value, rank) / 4, cos, sin, *rows_of(rank + 2 * half)]
    check_native("LatentAttention", tensors, {"scale": 0.2, "epsilon": 1e-6})
    kv_heads, group = 2, 3
    tensors = [randn(batch, seq, (kv_heads * group + 2 * kv_heads) * 2 * half), cos, sin]
    tensors += rows_of(4 * kv_heads * half)
    name = "GroupedQueryAttention"
    attributes = {"n_heads": kv_heads * group, "n_kv_heads": kv_heads, "window": window, "scale": 0.2}
    check_native(name, tensors, attributes)
    for capacity in (99, 100, 640) if window else ():
        check_native(name, ring(OPERATORS[name], tensors, capacity), attributes, like=tensors)


def latent_inputs(past: list[torch.Tensor], seq: int, heads: int, rank: int, half: int) -> list[torch.Tensor]:
    """Inputs of LatentAttention over a cache, scores of standard deviation 1 for a scale of 1."""
    batch, nope, value = len(past[-2]), 12, 10
    tensors = [
        randn(batch, seq, heads * (nope + 2 * half)) / (rank + 2 * half) ** 0.5,
        randn(batch, seq, rank + 2 * half),
    ]
    tensors += [torch.ones(rank), randn(heads, rank, nope) / nope**0.5, randn(heads, value, rank) / rank**0.5]
    return [*tensors, randn(batch, seq, half), randn(batch, seq, half), *past]


def relative_error(output: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(output - truth) / np.linalg.norm(truth))


@needs_library
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 1.0), (torch.float16, 0.1), (torch.int8, 0.1)])
@pytest.mark.parametrize(("lengths", "seq"), [([700, 3, 33], 1), ([130, 0, 64], 20)])
@pytest.mark.parametrize(("heads", "rank"), [(16, 96), (5, 21)])
def test_attention_adds_less_error_than_the_cache(
    dtype: torch.dtype, share: float, lengths: list[int], seq: int, heads: int, rank: int
) -> None:
    """What the kernels round, queries and weights of rows, costs less than `share` of what rounding the cache did; with widths that
    fill whole vectors and widths that do not."""
    half, head_dim = (16, 64) if rank == 96 else (3, 34)
    kv_heads, group = 2, (1 + heads) // 2
    qkv = [randn(len(lengths), seq, (kv_heads * group + 2 * kv_heads) * head_dim) / head_dim**0.25]
    qkv += [randn(len(lengths), seq, head_dim // 2), randn(len(lengths), seq, head_dim // 2)]
    attributes = {"n_heads": kv_heads * group, "n_kv_heads": kv_heads, "window": 0, "scale": head_dim**-0.25}
    for name, width in (("LatentAttention", rank + 2 * half), ("GroupedQueryAttention", 2 * kv_heads * head_dim)):
        rows = randn(2, len(lengths), max(lengths) + 3, width)
        scales = rows.abs().amax(-1) / 127
        rounded = (rows / scales[..., None]).round().to(dtype) if dtype == torch.int8 else rows.to(dtype)
        at = [torch.tensor(lengths), torch.tensor(1)]
        tensors = latent_inputs([rows, *at], seq, heads, rank, half) if name == "LatentAttention" else [*qkv, rows, *at]
        given = {"scale": 1.0, "epsilon": 1e-6} if name == "LatentAttention" else attributes
        exact = in_torch(OPERATORS[name], tensors, given, double=True)[0]
        tensors[-3:-2] = [rounded, scales] if dtype == torch.int8 else [rounded]
        given = given | ({"row_scale": 0.0} if dtype == torch.int8 else {})
        operator = OPERATORS[name + ("Int8Cache" if dtype == torch.int8 else "")]
        truth = in_torch(operator, tensors, given, double=True)[0]
        of_the_cache = relative_error(truth, exact)
        for instruction_set, outputs in in_native(operator, tensors, given).items():
            error = relative_error(outputs[0], truth)
            assert error < share * of_the_cache, f"{name}, {instruction_set}: {error} beside {of_the_cache}"


@needs_library
@pytest.mark.parametrize("width", [4096, 4098])
def test_long_int8_rows_do_not_overflow(width: int) -> None:
    """Every product as large as can be: up to 4096 channels their sums fit 32 bits, longer rows are multiplied as floats."""
    rows = torch.full((1, 1, 70, width), 127, dtype=torch.int8)
    rows[:, :, ::2] = -128
    scales = torch.full(rows.shape[:3], 1 / 128)
    q, kv, norm, w_uk, w_uv, cos, sin, *past = latent_inputs(
        [rows, scales, torch.tensor([70]), torch.tensor(0)], seq=1, heads=2, rank=width - 2, half=1
    )
    same = torch.ones_like
    tensors = [same(q), kv, norm, same(w_uk) / 12, w_uv, same(cos), 0 * sin, *past]  # queries all ones
    operator, attributes = (
        OPERATORS["LatentAttentionInt8Cache"],
        {"scale": 0.5 / width, "epsilon": 1e-6, "row_scale": 0.0},
    )
    truth = in_torch(operator, tensors, attributes, double=True)[0]
    for instruction_set, outputs in in_native(operator, tensors, attributes).items():
        assert relative_error(outputs[0], truth) < 1e-4, instruction_set


@needs_library
@pytest.mark.parametrize("which", ["tiny_bundle", "fixed_bundle"])
@pytest.mark.parametrize("recipe", [None, "int8", "int4"])
def test_same_tokens_with_and_without(
    which: str, recipe: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle = request.getfixturevalue(which)
    if recipe:
        quantize_bundle(bundle, tmp_path / recipe, with_overrides(load_recipe(recipe), None, 32))
        bundle = tmp_path / recipe
    native, portable = load(bundle, native=True), load(bundle, native=False)
    assert native.native
    assert not portable.native
    prompts = ["ROMEO.\nBut soft", "O", "Enter HAMLET, and a long line of others who have nothing to say.\n" * 3]
    for prompt in prompts:
        assert native.generate(prompt, 64).complete().ids == portable.generate(prompt, 64).complete().ids
    assert native.generate(prompts, 32).complete().ids == portable.generate(prompts, 32).complete().ids


@needs_library
@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_rounded_activations_with_and_without(fixed_bundle: Path, tmp_path: Path, recipe: str) -> None:
    """Where activations are rounded to 8 bits, the last bit of a float may move one by a level: the two agree to the noise of that,
    and differ in the likeliest token only where two were as good as equal."""
    quantize_bundle(fixed_bundle, tmp_path / recipe, recipe)
    native, portable = load(tmp_path / recipe, native=True), load(tmp_path / recipe, native=False)
    text = "ROMEO.\nBut soft, what light through yonder window breaks? It is the east, and Juliet is the sun.\n" * 4
    a, b = native.score(text, logits=True), portable.score(text, logits=True)
    assert np.abs(a - b).mean() < 0.01
    differs = a.argmax(-1) != b.argmax(-1)
    assert differs.mean() < 0.05
    for row_a, row_b in zip(a[differs], b[differs], strict=True):
        assert row_a.max() - row_a[row_b.argmax()] < 0.1


@needs_library
def test_two_threads_give_what_one_gives(tiny_bundle: Path) -> None:
    runners = [load(tiny_bundle, threads=2, native=True) for _ in range(2)]
    expected = runners[0].generate("KING.", 48).complete().ids
    results: list[list[int] | None] = [None] * 4

    def work(index: int) -> None:
        results[index] = runners[index % 2].generate("KING.", 48).complete().ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


@needs_library
def test_shapes_that_do_not_fit_are_an_error_not_a_crash() -> None:
    tensors = [randn(1, 2, 8), torch.ones(8), randn(4, 8), randn(4), randn(4, 6, 8), randn(4, 8, 5)]
    with pytest.raises(Exception, match="do not fit each other"):
        in_native(OPERATORS["MixtureOfExperts"], tensors, {"top_k": 2, "epsilon": 1e-6})


def test_a_library_that_cannot_be_loaded(tiny_bundle: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """Asked for, it is an error; by default the portable bodies run, and the reason is said once."""
    broken = tmp_path / "libmythos_ops.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native_operators, "LIBRARY", broken)
    with pytest.raises(BackendError, match="refuses it"):
        load(tiny_bundle, native=True)
    with caplog.at_level(logging.WARNING):
        runner = load(tiny_bundle)
        load(tiny_bundle)
    assert not runner.native
    assert sum("portable bodies run instead" in record.message for record in caplog.records) == 1
    assert len(runner.generate("O", 3).complete().ids) == 3
    assert "make native" in doctor()["missing"]["native operators"]
    assert doctor()["native_operators"] is None
    monkeypatch.setattr(native_operators, "LIBRARY", tmp_path / "nothing.so")
    assert not load(tiny_bundle).native
    with pytest.raises(BackendError, match="make native"):
        load(tiny_bundle, native=True)


NATIVE = Path(native_operators.__file__).parent / "native"
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def build(folder: Path, target: str, *options: str) -> None:
    """Builds a target of runtimes/native with the headers that `make native` found."""
    cache = NATIVE / "build" / platform.machine() / "CMakeCache.txt"
    if not cache.is_file():
        pytest.skip(f"needs the headers that make native finds, and there is no {cache}")
    headers = [line for line in cache.read_text().splitlines() if "_INCLUDE_DIR:PATH=" in line]
    for command in (
        [CMAKE, "-S", NATIVE, "-B", folder, *options, *(f"-D{line}" for line in headers)],
        [CMAKE, "--build", folder, "--target", target, "--parallel", "2"],
    ):
        run(*command)


def run(*command: object, fails: bool = False) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert (result.returncode != 0) is fails, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stderr if fails else result.stdout


def architecture(path: Path) -> bytes:
    """The machine field of an ELF file."""
    return path.read_bytes()[18:20]


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers: str, tmp_path: Path) -> None:
    """Every operator and instruction set over random shapes on two threads."""
    build(tmp_path, "stress", f"-DMYTHOS_SANITIZE={sanitizers}")
    assert "scalar ok" in run(tmp_path / "stress")


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder configured for aarch64, all symbols resolved, with programs that qemu-user runs without that system."""
    if platform.machine() == "aarch64":
        pytest.skip("aarch64 is this machine: the other tests run its kernels as they are")
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("aarch64-linux-gnu-g++ is missing; make toolchains installs it, or says why it cannot")
    folder = tmp_path_factory.mktemp("aarch64")
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    options += ["-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", "-DCMAKE_MODULE_LINKER_FLAGS=-Wl,--no-undefined"]
    build(folder, "mythos_ops", *options)
    return folder


@needs_library
@pytest.mark.slow
def test_aarch64_library(aarch64: Path) -> None:
    """The whole library compiles, door to onnxruntime included; it cannot be put where this machine's library lies."""
    assert architecture(aarch64 / "libmythos_ops.so") == (183).to_bytes(2, "little")
    assert "does not belong in" in run(CMAKE, "--install", aarch64, "--prefix", NATIVE / "lib", fails=True)
    assert architecture(native_operators.LIBRARY) == architecture(Path(sys.executable).resolve())


@needs_library
@pytest.mark.slow
def test_aarch64_under_emulation(aarch64: Path) -> None:
    """The NEON kernels agree with the scalar ones, those for i8mm and BF16 too."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("qemu-aarch64 is missing; make toolchains installs it, or says why it cannot")
    build(aarch64, "stress")
    assert "neon_i8mm ok" in run(emulator, "-cpu", "max", aarch64 / "stress")

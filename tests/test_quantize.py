"""Quantized bundles: what they hold, how well they predict, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.rounding import Format, pack_int4, round_to_nearest
from mythos_export.export import export_bundle
from mythos_export.ops.products import dequantize
from mythos_export.quantize import quantize_bundle
from mythos_export.quantize.recipe import load_recipe, with_overrides
from runtimes.bundle import open_bundle
from runtimes.errors import BundleError, InputError
from runtimes.runner import load

TEXT = "ROMEO.\nBut soft, what light through yonder window breaks? It is the east, and Juliet is the sun.\n" * 2
FLOAT32_STAYS = ("router", "norm", "halt", "lora", "decay", "injection", "loop_signal", "rope_")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    channels=st.integers(1, 200),
    bits=st.sampled_from([8, 4]),
    block_size=st.sampled_from([32, 64, 128]),
    size=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e5]),
)
def test_rounding_to_nearest(rows: int, channels: int, bits: int, block_size: int, size: float) -> None:
    """No error beyond half a level, no scale that is 0 or not finite."""
    channels += channels % 2
    weight = torch.randn(rows, channels, generator=torch.Generator().manual_seed(0)) * size
    values, scales = round_to_nearest(weight, Format(f"int{bits}", block_size))
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    assert int(values.abs().max()) < 2 ** (bits - 1)
    stored = pack_int4(values) if bits == 4 else values
    error = (dequantize(stored, scales, block_size) - weight).abs()
    level = scales.float().repeat_interleave(block_size, -1)[:, :channels]
    assert (error <= level * 0.51).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_cannot_be_quantized_are_named(value: float) -> None:
    weight = torch.ones(2, 32)
    weight[1, 3] = value
    with pytest.raises(InputError, match=r"prelude\.0\.ffn\.down"):
        round_to_nearest(weight, Format(), "prelude.0.ffn.down")


@pytest.mark.parametrize(("recipe", "worse"), [("int8", 1.002), ("int4", 1.3)])
def test_a_quantized_bundle(tiny_bundle: Path, tmp_path: Path, recipe: str, worse: float, caplog) -> None:
    manifest = quantize_bundle(tiny_bundle, tmp_path / "q", recipe).manifest
    assert manifest.graphs[0].weight_dtype == recipe
    assert manifest.quantization is not None
    assert {matrix["block"] for matrix in manifest.quantization["matrices"].values()} == {32}
    model = onnx.load(tmp_path / "q" / "decoder.onnx", load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds["embed.quantized"] == onnx.TensorProto.INT8  # embedding and head, whatever the recipe
    for name, kind in kinds.items():
        if any(part in name for part in FLOAT32_STAYS):
            assert kind == onnx.TensorProto.FLOAT, name
    before, after = (float(np.exp(-load(path).score(TEXT).mean())) for path in (tiny_bundle, tmp_path / "q"))
    assert after < before * worse
    assert "converted to float32" not in caplog.text
    weights = "weights.bin"
    assert manifest.files[weights].size < 0.5 * open_bundle(tiny_bundle)[1].files[weights].size


def test_runs_in_plain_onnxruntime_and_passes_the_checker(tiny_bundle: Path, tmp_path: Path) -> None:
    quantize_bundle(tiny_bundle, tmp_path / "q", with_overrides(load_recipe("int4"), 64, None))
    onnx.checker.check_model(tmp_path / "q" / "decoder.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "q" / "decoder.onnx")
    feeds = {
        "input_ids": np.array([[1, 2, 3]]),
        "past_len": np.array([0]),
        "past_kv": np.zeros((8, 1, 1, 48), dtype=np.float32),
        "logit_positions": np.array([[2]]),
        "n_loops": np.array([4]),
    }
    assert np.isfinite(session.run(["logits"], feeds)[0]).all()


def test_odd_sizes_stay_int8(tmp_path: Path) -> None:
    """int4 takes an even number of input channels; matrices with an odd one become int8."""
    config = tmp_path / "config.json"
    config.write_text(
        '{"vocab_size": 97, "dim": 24, "n_heads": 4, "n_kv_heads": 2, "attn_type": "gqa", "max_seq_len": 64, "max_loop_iters": 3,'
        '"prelude_layers": 1, "coda_layers": 1, "n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 9, "lora_rank": 2}'
    )
    export_bundle(f"random:{config}", tmp_path / "b")
    manifest = quantize_bundle(tmp_path / "b", tmp_path / "q", "int4").manifest
    assert manifest.quantization is not None
    formats = {name: matrix["format"] for name, matrix in manifest.quantization["matrices"].items()}
    assert formats["recurrent.layers.0.ffn.down"] == formats["recurrent.layers.0.ffn.gate_up"] == "int8"
    assert formats["recurrent.layers.0.attn.qkv.weight"] == "int4"
    assert len(load(tmp_path / "q").generate([1, 2], 4).complete().ids) == 4


def test_bad_input(tiny_bundle: Path, shakespeare: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match='recipe is "int3"; expected one of'):
        quantize_bundle(tiny_bundle, tmp_path / "q", "int3")
    with pytest.raises(InputError, match="block is 48; expected one of 32, 64, 128"):
        with_overrides(load_recipe("int4"), 48, None)
    with pytest.raises(InputError, match="activation bits are 16; expected 8 or 32"):
        with_overrides(load_recipe("int4"), None, 16)
    export_bundle(shakespeare, tmp_path / "half", dtype="float16")
    with pytest.raises(InputError, match="--dtype float32"):
        quantize_bundle(tmp_path / "half", tmp_path / "q", "int8")
    quantize_bundle(tiny_bundle, tmp_path / "q", "int8")
    with pytest.raises(InputError, match="is quantized already"):
        quantize_bundle(tmp_path / "q", tmp_path / "qq", "int4")
    with pytest.raises(BundleError, match="exists already"):
        quantize_bundle(tiny_bundle, tmp_path / "q", "int8")
    assert not (tmp_path / "qq").exists()

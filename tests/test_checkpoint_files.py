"""Checkpoints that must load, however they were saved; safetensors, whole and damaged."""

import re
import subprocess
import sys

import msgspec
import pytest
import torch
from checkpoints import SMALL, refused, same
from checkpoints import cfg as cfg
from checkpoints import model as model
from checkpoints import mythos_config as mythos_config
from checkpoints import save as save
from safetensors.torch import load_file, save_file

from mythos_export.checkpoint import load_checkpoint
from mythos_export.families.open_mythos import TIED

# What must load


def test_a_config_may_be_the_scripts_class_or_a_dict(save, model, cfg, mythos_config):
    record = mythos_config()
    record.__dict__.update(cfg)
    pickled, plain = load_checkpoint(save("class.pt", cfg=record)), load_checkpoint(save("dict.pt"))
    assert pickled.settings == plain.settings
    assert msgspec.to_builtins(plain.settings) | SMALL == msgspec.to_builtins(plain.settings)
    assert plain.source.step == 7
    assert same(pickled, model)
    assert same(plain, model)


def test_the_shipped_checkpoint_needs_no_reference_package(shakespeare):
    assert load_checkpoint(shakespeare).settings.vocab_size == 2048
    assert "open_mythos" not in sys.modules


@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrappers_leave_no_trace_in_names(save, model, prefix, wrapped_first):
    """DDP, torch.compile and FSDP put their own prefix before a name, FSDP also within it."""
    inside = "prelude.0._fsdp_wrapped_module." if prefix.startswith("_fsdp") else "prelude.0."
    wrapped = {prefix + name.replace("prelude.0.", inside): tensor for name, tensor in model.items()}
    order = list(wrapped) if wrapped_first else list(reversed(wrapped))
    assert same(load_checkpoint(save(model={name: wrapped[name] for name in order})), model)


def test_the_head_and_the_rope_tables_may_be_there_or_not(save, model):
    tables = {name: torch.zeros(4, dtype=torch.complex64) for name in ("freqs_cis", "freqs_cis_mla")}
    assert same(load_checkpoint(save(model={**model, **tables})), model)
    alone = {name: tensor for name, tensor in model.items() if name != "head.weight"}
    assert same(load_checkpoint(save(model=alone)), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_load_as_they_are(save, model, dtype):
    reduced = {name: tensor.to(dtype) for name, tensor in model.items()}
    checkpoint = load_checkpoint(save(model=reduced))
    assert checkpoint.get("embed.weight").dtype == dtype
    assert same(checkpoint, reduced)


def test_the_newest_step_of_a_folder_is_taken(save, tmp_path):
    for step in ("0000099", "0000100", "0000020", "3"):
        save(f"step_{step}.pt", step=int(step))
    save("final.pt", step=1000)
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.source.name, checkpoint.source.step) == ("step_0000100.pt", 100)


def test_the_optimizer_is_never_read_into_memory(save):
    """Its pages are neither read nor copied: the process that loads grows by a fraction of its size."""
    path = save(optimizer={"state": {0: {"exp_avg": torch.zeros(100_000_000)}}})
    assert path.stat().st_size > 400e6
    script = """if True:
        import re, sys
        from pathlib import Path
        from mythos_export.checkpoint import load_checkpoint
        def peak():  # KiB; that of getrusage starts at the parent's
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        load_checkpoint(sys.argv[2])
        before = peak()
        checkpoint = load_checkpoint(sys.argv[1])
        total = sum(tensor.sum().item() for tensor in checkpoint.state_dict().values())
        print(peak() - before)
    """
    small = save("small.pt")
    try:
        done = subprocess.run([sys.executable, "-c", script, path, small], capture_output=True, text=True, check=True)
    finally:
        path.unlink()
    assert int(done.stdout) < 40_000


# Safetensors


@pytest.fixture
def safetensors(tmp_path, shakespeare):
    """The shipped checkpoint as a folder of model.safetensors and config.json."""
    checkpoint = load_checkpoint(shakespeare)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.state_dict().items() if name != TIED[0]}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(checkpoint.settings))
    return tmp_path / "model.safetensors"


def test_safetensors_give_the_same_checkpoint(safetensors, shakespeare):
    expected = load_checkpoint(shakespeare)
    for source in (safetensors, safetensors.parent):
        checkpoint = load_checkpoint(source)
        assert checkpoint.settings == expected.settings
        assert checkpoint.source.kind == "safetensors"
        assert same(checkpoint, expected.state_dict())


def test_safetensors_without_a_config_are_refused(safetensors):
    (safetensors.parent / "config.json").unlink()
    refused(safetensors, r"model\.safetensors: expected config\.json beside it, with the fields of MythosConfig")


@pytest.mark.parametrize("config", ["", "{", "[]", "\x00"])
def test_safetensors_with_a_broken_config_are_refused(safetensors, config):
    (safetensors.parent / "config.json").write_text(config)
    refused(safetensors, r"config\.json: not a JSON object")


@pytest.mark.parametrize("kept", [0, 4, 100, 100_000, -1])
def test_truncated_safetensors_are_refused(safetensors, kept):
    safetensors.write_bytes(safetensors.read_bytes()[:kept])
    refused(safetensors, r"model\.safetensors: not a complete safetensors file")


def test_safetensors_with_wrong_tensors_are_refused(safetensors):
    tensors = load_file(safetensors)
    tensors["embed.weight"] = tensors["embed.weight"].to(torch.int32)
    tensors["norm.weight"] = tensors["norm.weight"][:5].clone()
    save_file({**tensors, "what": torch.zeros(1)}, safetensors)
    message = refused(safetensors, r"model\.safetensors: the tensors do not fit")
    assert "extra: what" in message
    assert "shape: norm.weight is [5], expected [128]" in message
    assert re.search(r"dtype: embed\.weight is .*(I|int)32, expected float32", message)

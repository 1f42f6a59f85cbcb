"""Small checkpoints for tests to save, changed or damaged, as fixtures that whoever needs them imports."""

import sys
import types

import msgspec
import pytest
import torch

from mythos_export.checkpoint import load_checkpoint
from mythos_export.shards import CheckpointError
from runtimes.errors import MythosError

SMALL = {
    "vocab_size": 32,
    "dim": 16,
    "n_heads": 2,
    "n_kv_heads": 1,
    "max_seq_len": 16,
    "max_loop_iters": 2,
    "prelude_layers": 1,
    "coda_layers": 1,
    "kv_lora_rank": 4,
    "q_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_experts": 2,
    "n_shared_experts": 1,
    "n_experts_per_tok": 1,
    "expert_dim": 4,
    "lora_rank": 2,
}


@pytest.fixture
def cfg():
    return dict(SMALL)


@pytest.fixture
def model(tmp_path):
    """All tensors of a small model, by the reference's names."""
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_bytes(msgspec.json.encode(SMALL))
    return load_checkpoint(f"random:{path}").state_dict()


@pytest.fixture
def save(tmp_path, model, cfg):
    """Saves a checkpoint like the training script's, with what a test changes, and returns its path."""

    def save(name="step_0000007.pt", **changes):
        torch.save({"model": model, "cfg": cfg, "step": 7, **changes}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def mythos_config(monkeypatch):
    """The class that a training script pickles, importable as open_mythos.main.MythosConfig while a test runs."""
    package, main = types.ModuleType("open_mythos"), types.ModuleType("open_mythos.main")
    main.MythosConfig = type("MythosConfig", (), {"__module__": "open_mythos.main"})
    monkeypatch.setitem(sys.modules, "open_mythos", package)
    monkeypatch.setitem(sys.modules, "open_mythos.main", main)
    return main.MythosConfig


def refused(source, match, kind=CheckpointError):
    with pytest.raises(kind, match=match) as caught:
        load_checkpoint(source)
    assert isinstance(caught.value, MythosError)
    return str(caught.value)


def same(checkpoint, model):
    return all(torch.equal(tensor.float(), model[name].float()) for name, tensor in checkpoint.state_dict().items())

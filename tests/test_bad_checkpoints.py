"""Checkpoints that cannot be: messages name the input, what was expected and the fix; nothing in one runs."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from checkpoints import cfg as cfg
from checkpoints import model as model
from checkpoints import mythos_config as mythos_config
from checkpoints import refused
from checkpoints import save as save

from mythos_export.checkpoint import load_checkpoint
from mythos_export.config import ConfigError
from mythos_export.shards import CheckpointError
from runtimes.errors import MythosError


class RunsCode:
    """Pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


# Pickles that would run code


@pytest.mark.parametrize("place", ["model", "cfg", "optimizer"])
def test_a_pickle_that_runs_code_is_refused_by_name_and_not_run(tmp_path, save, model, place):
    marker = tmp_path / "code_was_run"
    attack = RunsCode(f'echo > "{marker}"')
    path = save(**{place: {**model, "embed.weight": attack} if place == "model" else attack})
    refused(path, r"step_0000007\.pt: refused, its pickle names (posix|nt)\.system; loading it would run code")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the attack itself does not work: the test proves nothing"


@pytest.mark.parametrize("called", [eval, getattr, shutil.rmtree, torch.hub.load], ids=lambda called: called.__name__)
def test_any_name_but_the_config_class_is_refused(save, called):
    path = save(note=[1, {"deep": called}])
    refused(
        path, rf"refused, its pickle names {called.__module__}\.{called.__name__}; .* Expected tensors, plain Python"
    )


def test_no_other_class_of_the_training_script_is_accepted(save, mythos_config):
    mythos_config.__name__ = mythos_config.__qualname__ = "OpenMythos"
    sys.modules["open_mythos.main"].OpenMythos = mythos_config
    refused(save(cfg=mythos_config()), r"refused, its pickle names open_mythos\.main\.OpenMythos;")


def test_the_command_line_refuses_code_with_exit_2(tmp_path, save):
    marker = tmp_path / "code_was_run"
    path = save(cfg=RunsCode(f'echo > "{marker}"'))
    command = [sys.executable, "-m", "mythos_export.cli", "export", path, "-o", tmp_path / "bundle", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "system; loading it would run code" in json.loads(done.stdout)["error"]
    assert done.stderr.startswith(f"error: {path}: refused")
    assert not marker.exists()
    assert not (tmp_path / "bundle").exists()


# Files that are no checkpoints


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_pt_is_refused(save, kept):
    path = save()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    refused(path, r"step_0000007\.pt: not a complete torch checkpoint .*truncated.*; copy it again, or save it")


def test_a_file_that_is_no_zip_is_refused(tmp_path):
    path = tmp_path / "notes.pt"
    path.write_text("not a checkpoint at all\n" * 100)
    refused(path, r"notes\.pt: not a complete torch checkpoint .*save it with torch\.save as the training script does")


@pytest.mark.parametrize("names", [[], ["a.txt"], ["archive/data.pkl"]])
def test_a_zip_that_torch_did_not_write_is_refused(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        for name in names:
            file.writestr(name, b"\x80\x02}.")
    refused(tmp_path / "other.pt", r"other\.pt: not ")


@pytest.mark.parametrize("pickled", [b"\x80\x02X\xff\xff", b"\x80\x02K\x05Q.", b"\x80\x02", b"", b"\xff\xff"])
def test_a_pickle_that_makes_no_sense_is_refused(tmp_path, pickled):
    with zipfile.ZipFile(tmp_path / "odd.pt", "w") as file:
        file.writestr("odd/data.pkl", pickled)
        file.writestr("odd/version", "3\n")
    refused(tmp_path / "odd.pt", r"odd\.pt: .*(not readable as a torch checkpoint|not plain weights)")


def test_a_damaged_pickle_gives_an_error_of_ours(tmp_path, save):
    """Whatever bytes are flipped, what comes out is a checkpoint or a MythosError."""
    path, damaged, noise = save(), tmp_path / "damaged.pt", random.Random(0)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    for _ in range(100):
        data = bytearray(parts[pickled])
        for _ in range(noise.choice([1, 1, 2, 8])):
            data[noise.randrange(len(data))] = noise.randrange(256)
        if noise.random() < 0.3:
            del data[noise.randrange(len(data)) :]
        with zipfile.ZipFile(damaged, "w") as file:
            for name, part in parts.items():
                file.writestr(name, bytes(data) if name == pickled else part)
        try:
            load_checkpoint(damaged)
        except MythosError as error:
            assert str(damaged) in str(error)  # noqa: PT017 (it may load, too)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"state_dict": {"a": torch.zeros(2)}}, "state_dict"),
        ({"model": {}, "epoch": 1}, "model, epoch"),
        ({"model": torch.zeros(2), "cfg": {}}, "model, cfg"),
        ({}, "none"),
        ([1, 2], "list"),
        (torch.zeros(3), "Tensor"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "other.pt")
    refused(
        tmp_path / "other.pt", rf'other\.pt: not an OpenMythos .*expected the keys "model" and "cfg", found {found}'
    )


@pytest.mark.parametrize("wrong", [None, 5, "dim=16", [16], torch.zeros(2)])
def test_a_config_that_is_no_config_is_refused(save, wrong):
    message = refused(save(cfg=wrong), r"step_0000007\.pt: .*(cfg|config)")
    assert "the tensors do not fit" not in message


# Sources that are not there


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    refused(tmp_path / "no.pt", r"no\.pt: no such file or folder; expected a \.pt or \.safetensors .*mythos_1b")


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, r"expected step_\*\.pt files, or config\.json with one \.safetensors file or .*; found neither")


def test_a_folder_with_two_safetensors_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").touch()
    refused(tmp_path, r"one \.safetensors file or .*; found a\.safetensors, b\.safetensors")


@pytest.mark.parametrize("source", ["random:nosuch", "random:", "random:nosuch:3", "random:missing.json"])
def test_an_unknown_variant_is_refused(source):
    refused(
        source, rf"{source}: no variant or config\.json of that name; expected .*random:mythos_1b, .*random:mythos_1t"
    )


@pytest.mark.parametrize("seed", ["x", "-1", "1.5"])
def test_a_seed_that_is_no_number_is_refused(seed):
    refused(f"random:mythos_1b:{seed}", rf'random:mythos_1b:{seed}: the seed is "{seed}"; expected a number')


# Configs and tensors


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"n_layers": 3}, CheckpointError, "its config is not one of open-mythos .*`n_layers`"),
        ({"dim": "16"}, CheckpointError, r"Expected `int`, got `str` - at `\$\.dim`"),
        ({"attn_type": "flash"}, ConfigError, 'attn_type is "flash"; expected "mla" or "gqa"'),
        ({"n_experts_per_tok": 3}, ConfigError, "top_k is 3 but there are only 2 experts; lower n_experts_per_tok"),
        ({"qk_rope_head_dim": 3}, ConfigError, "qk_rope_head_dim is 3; RoPE needs an even number"),
        ({"kv_lora_rank": 0}, ConfigError, "kv_lora_rank is 0; expected an integer of at least 1"),
        ({"n_heads": 0}, ConfigError, "n_heads is 0 and dim 16; expected at least 1"),
        ({"prelude_layers": -1}, ConfigError, "prelude_layers is -1; expected 0 or more"),
        ({"max_loop_iters": 0}, ConfigError, "trained_loops is 0; expected an integer of at least 1"),
        ({"act_threshold": 0.0}, ConfigError, r"act_threshold is 0\.0; expected a number above 0"),
        ({"attn_type": "gqa", "n_kv_heads": 3}, ConfigError, "n_heads is 2 and n_kv_heads 3; .*multiple"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(save, tmp_path, cfg, changes, kind, match):
    refused(save(cfg={**cfg, **changes}), rf"step_0000007\.pt: .*{match}", kind)
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**cfg, **changes}))
    refused(f"random:{path}", rf"other\.json: .*{match}", kind)


def test_every_wrong_tensor_is_in_one_error(save, model):
    model["embed.weight"] = torch.zeros(32, 17)
    model["norm.weight"] = torch.zeros(16, dtype=torch.int64)
    model["prelude.0.attn.wo.weight"] = "no tensor"
    del model["head.weight"], model["coda.0.attn_norm.weight"], model["recurrent.injection.B"]
    model["prelude.7.extra"] = torch.zeros(1)
    message = refused(save(), r"step_0000007\.pt: the tensors do not fit the config it carries")
    for line in (
        "shape: embed.weight is [32, 17], expected [32, 16]",
        "missing: coda.0.attn_norm.weight [16]",
        "missing: recurrent.injection.B [16]",
        "extra: prelude.7.extra",
        "dtype: norm.weight is torch.int64, expected float32, float16 or bfloat16",
        "prelude.0.attn.wo.weight is",
    ):
        assert line in message


def test_a_long_list_of_wrong_tensors_is_shortened(save):
    message = refused(save(model={}), r"\(\d+ differences\)")
    assert message.count("missing: ") == 20
    assert message.splitlines()[-1].strip().startswith("… and ")


def test_a_tensor_given_twice_is_refused(save, model):
    model["module.norm.weight"] = torch.ones(16)
    refused(save(), "twice: norm.weight")


@pytest.mark.parametrize(
    "make",
    [lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: t.to(torch.complex64)],
    ids=["sparse", "meta", "complex"],
)
def test_a_tensor_that_is_not_plain_numbers_is_refused(save, model, make):
    model["prelude.0.ffn.gate.weight"] = make(model["prelude.0.ffn.gate.weight"])
    refused(save(), r"step_0000007\.pt: (.|\n)*prelude\.0\.ffn\.gate\.weight")


def test_an_untied_head_is_refused(save, model):
    model["head.weight"] = model["embed.weight"] + 1
    refused(save(), r"step_0000007\.pt: head\.weight differs from embed\.weight, but the model ties them")

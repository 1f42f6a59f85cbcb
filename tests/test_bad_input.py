"""What a user can get wrong: messages name the input, what was expected and the fix; nothing in a checkpoint runs."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
import zipfile

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from mythos_export import cli
from mythos_export.checkpoint import load_checkpoint
from mythos_export.config import ConfigError
from mythos_export.export import export_bundle
from mythos_export.families.open_mythos import TIED
from mythos_export.shards import CheckpointError
from runtimes.errors import BackendError, BundleError, InputError, MythosError
from runtimes.runner import load

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


class RunsCode:
    """Pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


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


def run_cli(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of the command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mythos-export", *map(str, arguments)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, *capsys.readouterr()


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


# What must load


def same(checkpoint, model):
    return all(torch.equal(tensor.float(), model[name].float()) for name, tensor in checkpoint.state_dict().items())


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


# Export options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loops": 0}, "loops is 0; expected at least 1"),
        ({"max_loops": -3}, "max_loops is -3; expected at least 1"),
        ({"loops": 2, "max_loops": 4}, "max_loops is 4 but loops fixes the count at 2"),
        ({"dtype": "int3"}, 'dtype is "int3"; expected one of float32, float16, bfloat16'),
        ({"eos": ["</s>"]}, r"tokenizer\.json: has no token </s>; eos expects tokens of its vocabulary"),
        ({"tokenizer": "missing.json"}, r"missing\.json: no such tokenizer file; expected a tokenizer\.json"),
    ],
)
def test_an_export_option_that_cannot_be_is_refused(shakespeare, tmp_path, options, match):
    with pytest.raises(InputError, match=match):
        export_bundle(shakespeare, tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())


def test_an_end_token_needs_a_tokenizer(save, tmp_path):
    with pytest.raises(InputError, match="eos names </s>, but there is no tokenizer; pass one with --tokenizer"):
        export_bundle(save(), tmp_path / "bundle", eos=["</s>"])


def test_a_tokenizer_that_cannot_be_the_models_is_refused(save, shakespeare, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(InputError, match=r"broken\.json: not a tokenizer\.json of Hugging Face tokenizers"):
        export_bundle(save(), tmp_path / "bundle", tokenizer=broken)
    with pytest.raises(InputError, match=r"tokenizer\.json: 2048 tokens, but the model's vocabulary is 32; pass the"):
        export_bundle(save(), tmp_path / "bundle", tokenizer=shakespeare / "tokenizer.json")


# The runner's requests


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("", "the prompt is empty; give at least one token"),
        ([], "the prompt is empty"),
        (["ok", ""], "prompt 1 is empty"),
        ([[1, 2], []], "prompt 1 is empty"),
        ([1] * 513, "the prompt has 513 tokens, more than the model's max_seq_len of 512; shorten it"),
        ("word " * 600, "the prompt has .* tokens, more than the model's max_seq_len of 512"),
        ([[1], [2] * 600], "prompt 1 has 600 tokens"),
        ([1, 2048], r"the prompt holds token id 2048; expected ids from 0 to 2047 \(is this the model's tokenizer"),
        ([1, -1], "the prompt holds token id -1; expected ids from 0 to 2047"),
        ([[0], [-5]], "prompt 1 holds token id -5"),
        ("\udcff", "prompt"),
    ],
)
def test_a_prompt_the_model_cannot_take_is_refused(runner, prompt, match):
    with pytest.raises(InputError, match=match):
        runner.generate(prompt)


@pytest.mark.parametrize(
    ("sequence", "match"),
    [
        ("", "the sequence is empty"),
        ([1] * 513, "the sequence has 513 tokens, more than the model's max_seq_len of 512"),
        ([5000], "the sequence holds token id 5000"),
    ],
)
def test_a_sequence_that_cannot_be_scored_is_refused(runner, sequence, match):
    with pytest.raises(InputError, match=match):
        runner.score(sequence)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_loops": 0}, "n_loops is 0; expected 1 to 12, the bundle's max_loops .export with --max-loops for more"),
        ({"n_loops": -1}, "n_loops is -1; expected 1 to 12"),
        ({"n_loops": 13}, "n_loops is 13; expected 1 to 12"),
        ({"n_loops": [4, 4]}, "n_loops has 2 values for 1 sequences; expected one number or one a sequence"),
        ({"n_loops": []}, "n_loops has 0 values for 1 sequences"),
        ({"n_loops": [99]}, "n_loops is 99; expected 1 to 12"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; expected at least 1"),
        ({"temperature": -1}, "temperature is -1; expected a number of at least 0"),
        ({"top_p": 0}, "top_p is 0; expected a number above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1; expected an integer of at least 0"),
        ({"min_p": 2}, "min_p is 2; expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a number above 0"),
        ({"stop": ""}, "stop texts .* must not be empty; pass token ids instead"),
        ({"stop": ["fine", ""]}, "must not be empty"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(runner, options, match):
    with pytest.raises(InputError, match=match):
        runner.generate("ROMEO:", **options)


def test_a_fixed_bundle_runs_its_own_loop_count_only(fixed_bundle, runner):
    fixed = load(fixed_bundle, threads=1)
    for wrong in (1, 5, [3]):
        with pytest.raises(
            InputError, match=r"n_loops is \d, but the bundle was exported for exactly 4; export it with"
        ):
            fixed.generate("ROMEO:", 5, n_loops=wrong)
    expected = runner.generate("ROMEO:", 5, n_loops=4).complete().ids
    assert fixed.generate("ROMEO:", 5, n_loops=4).complete().ids == expected
    assert fixed.generate("ROMEO:", 5).complete().ids == expected


def test_a_session_may_go_less_deep_but_never_deeper(runner):
    session = runner.session(2, [4, 8])
    session.advance([[5, 6], [7]])
    with pytest.raises(
        InputError, match=r"n_loops of sequence 0 would rise from 4 to 5: .*start a new sequence at the depth"
    ):
        session.lower_n_loops([5, 8])
    assert session.n_loops.tolist() == [4, 8]
    session.lower_n_loops([4, 2])
    logits, exits = session.advance([[8], [9]])
    assert logits.shape == (2, 2048)
    assert (logits == logits).all()
    assert exits[1] <= 2
    with pytest.raises(InputError, match="sequence 1 would rise from 2 to 4"):
        session.lower_n_loops(4)
    session.keep([1])
    with pytest.raises(InputError, match="sequence 0 would rise from 2 to 3"):
        session.lower_n_loops([3])


def test_a_session_refuses_what_it_cannot_feed_and_stays_usable(runner):
    session = runner.session(1, 1)
    session.advance([[1] * 510])
    for ids, match in (
        ([[1, 2, 3]], "sequence 0 has 513 tokens, more than the model's max_seq_len of 512"),
        ([[1], [2]], "2 rows of ids for a session of 1 sequences"),
        ([[]], "sequence 0 is empty; give at least one token"),
        ([[4096]], "sequence 0 holds token id 4096"),
    ):
        with pytest.raises(InputError, match=match):
            session.advance(ids)
    session.advance([[1, 2]])
    assert session.past_len.tolist() == [512]
    for options, match in (({"batch": 0}, "batch is 0"), ({"chunk": 0}, "chunk is 0")):
        with pytest.raises(InputError, match=match):
            runner.session(**options)


def test_a_backend_or_thread_count_that_is_not_there_is_refused(tiny_bundle):
    with pytest.raises(BackendError, match='backend is "cuda"; expected one of auto, onnxruntime'):
        load(tiny_bundle, backend="cuda")
    for threads in (0, -2):
        with pytest.raises(InputError, match=rf"threads is {threads}; expected at least 1"):
            load(tiny_bundle, threads=threads)


def test_a_bundle_without_tokenizer_takes_ids_only(runner):
    bare = type(runner)(runner.manifest, runner._backend, None)
    assert bare.generate([1, 2, 3], 3).complete().text == ""
    for call in (lambda: bare.generate("text"), lambda: bare.encode("text"), lambda: bare.decode([1])):
        with pytest.raises(
            InputError, match="the bundle has no tokenizer; pass token ids, or export it with --tokenizer"
        ):
            call()
    with pytest.raises(InputError, match="stop texts need a tokenizer in the bundle"):
        bare.generate([1], stop="text")


# The command line


def test_the_installed_command_prints_errors_with_exit_2(tmp_path):
    command = [sys.executable, "-m", "mythos_export.cli", "generate", tmp_path / "none", "-p", "x", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    message = f"{tmp_path / 'none'}: no such folder; expected a bundle made by `mythos-export export`"
    assert json.loads(done.stdout) == {"error": message}
    assert done.stderr == f"error: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["export", "nowhere.pt", "-o", "b"], "nowhere.pt: no such file or folder"),
        (["export", "random:nosuch", "-o", "b"], "random:nosuch: no variant"),
        (["export", "{shakespeare}", "-o", "b", "--loops", "many"], '--loops is "many"; expected whole numbers'),
        (
            ["export", "{shakespeare}", "-o", "b", "--loops", "1,2"],
            '--loops is "1,2"; expected one number or "dynamic"',
        ),
        (["export", "{shakespeare}", "-o", "b", "--loops", "0"], "loops is 0; expected at least 1"),
        (["export", "{shakespeare}", "-o", "{bundle}"], "exists already; choose another folder or pass --force"),
        (["generate", "{bundle}"], "expected either --prompt TEXT or --ids 1,2,3"),
        (["generate", "{bundle}", "-p", "a", "--ids", "1"], "expected either --prompt TEXT or --ids"),
        (["generate", "{bundle}", "--ids", "1;2"], '--ids is "1;2"; expected whole numbers'),
        (["generate", "{bundle}", "--ids", "1,9999"], "token id 9999"),
        (["generate", "{bundle}", "-p", ""], "the prompt is empty"),
        (["generate", "{bundle}", "-p", "a", "--threads", "0"], "threads is 0"),
        (["generate", "{bundle}", "-p", "a", "--loops", "13"], "n_loops is 13; expected 1 to 12"),
        (["generate", "{bundle}", "-p", "a", "--stop", ""], "must not be empty"),
        (["eval", "{bundle}", "--text", "none.txt"], "none.txt: no such text file"),
        (["eval", "{bundle}", "--text", "a.txt", "--against", "none"], "none: no such file or folder"),
        (["eval", "{bundle}", "--text", "a.txt", "--against", "{bundle}", "--loops", "13"], "n_loops is 13"),
        (["inspect", "."], "not a bundle, it holds no manifest.json"),
        (["inspect"], "expected a BUNDLE or a SOURCE, or --families alone"),
        (["inspect", "{bundle}", "--families"], "expected a BUNDLE or a SOURCE, or --families alone"),
        (["inspect", "random:myth_1b", "--context", "200000"], "context is 200000; expected 1 to 131072"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_arguments_exit_with_2_and_a_message(
    monkeypatch, capsys, tmp_path, shakespeare, tiny_bundle, arguments, match, as_json
):
    monkeypatch.chdir(tmp_path)
    places = {"{shakespeare}": str(shakespeare), "{bundle}": str(tiny_bundle)}
    filled = [places.get(argument, argument) for argument in arguments]
    code, out, err = run_cli(monkeypatch, capsys, *filled, *["--json"] * as_json)
    assert code == 2
    assert err.startswith("error: ")
    assert match in err
    assert (match in json.loads(out)["error"]) if as_json else out == ""
    assert not list(tmp_path.iterdir())


def test_a_damaged_bundle_is_refused_on_the_command_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    code, _, err = run_cli(monkeypatch, capsys, "inspect", tmp_path)
    assert code == 2
    assert "this is not a bundle of mythos-export" in err
    with pytest.raises(BundleError, match="this is not a bundle"):
        load(tmp_path)

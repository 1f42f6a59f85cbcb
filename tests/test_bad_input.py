"""What a user can get wrong in exports, requests and commands: messages name the input, what was expected and the fix."""

import json
import subprocess
import sys

import pytest
from checkpoints import cfg as cfg
from checkpoints import model as model
from checkpoints import mythos_config as mythos_config
from checkpoints import save as save

from mythos_export import cli
from mythos_export.export import export_bundle
from runtimes.errors import BackendError, BundleError, InputError
from runtimes.runner import load


def run_cli(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of the command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mythos-export", *map(str, arguments)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, *capsys.readouterr()


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

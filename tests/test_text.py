"""Texts to judge and calibrate a model with: what is refused and named, how documents are cut, which pieces a seed draws."""

import contextlib
import hashlib
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from calibration.text import read_documents, sample, unk_token_id, windows
from runtimes.errors import InputError

quick = settings(max_examples=100, deadline=None, database=None, derandomize=True)
plain_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1)


def write(folder: Path, content: str | bytes, name: str = "text.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("line", ["{", "not json", '{"text": "a"} {"text": "b"}', "null", "[1]", '"text"', "3"])
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    path = write(tmp_path, f'{{"text": "fine"}}\n\n{line}\n{{"text": "also fine"}}\n')
    with pytest.raises(InputError, match=r"text\.jsonl, line 3: expected an object with a \"text\" string"):
        read_documents(path)


@pytest.mark.parametrize("line", ["{}", '{"content": "a"}', '{"text": null}', '{"text": 5}', '{"text": ["a"]}'])
def test_a_line_without_a_text_is_named(tmp_path, line):
    with pytest.raises(InputError, match=r"line 1: expected an object with a \"text\" string: .*`(text|str)"):
        read_documents(write(tmp_path, line))


@pytest.mark.parametrize("name", ["text.jsonl", "text.txt"])
@pytest.mark.parametrize("content", ["", "\n\n \n", '{"text": ""}\n'])
def test_a_file_without_text_is_refused(tmp_path, name, content):
    path = write(tmp_path, content if name.endswith("jsonl") else "", name)
    with pytest.raises(InputError, match=rf"{name}: holds no text"):
        read_documents(path)


@pytest.mark.parametrize("name", ["text.jsonl", "text.txt"])
def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path, name):
    with pytest.raises(InputError, match=rf"{name}: not UTF-8 text .*byte 12"):
        read_documents(write(tmp_path, b'{"text": "ab\xff"}', name))


@pytest.mark.parametrize("name", ["missing.jsonl", "folder"])
def test_a_file_that_is_not_there_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=rf'{name}: no such text file; expected \.jsonl with a "text" field'):
        read_documents(tmp_path / name)


def test_fields_beside_text_and_blank_lines_do_no_harm(tmp_path):
    path = write(tmp_path, '{"id": 1, "text": "one"}\r\n\r\n{"text": "zwei €", "n": null}')
    assert read_documents(str(path)) == ["one", "zwei €"]


def test_other_files_are_one_document(tmp_path):
    assert read_documents(write(tmp_path, '{"text": "a"}\n{"text": "b"}\n', "a.txt")) == [
        '{"text": "a"}\n{"text": "b"}\n'
    ]


@pytest.mark.parametrize("ascii_only", [True, False])
@quick
@given(st.lists(plain_text, min_size=1, max_size=5))
@example(["a line separator \u2028 inside", "a next line \x85 inside", "\r\n"])
def test_any_text_comes_back_from_jsonl(tmp_path_factory, ascii_only, texts):
    """A line of JSON lines ends at a newline only: JSON lets U+0085 and U+2028 stand as they are in a string."""
    content = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts)
    assert read_documents(write(tmp_path_factory.getbasetemp(), content)) == texts


def encode(text):
    return list(text.encode())


def decode(ids):
    return bytes(ids).decode()


@quick
@given(st.lists(st.text(alphabet="abcdefgh ", max_size=40), max_size=4), st.integers(2, 20))
def test_windows_do_not_overlap_and_cover_every_document(documents, length):
    cut = list(windows(documents, encode, decode, length))
    assert all(2 <= len(window.ids) <= length for window in cut)
    assert all(window.scored_bytes == len(window.ids) - 1 for window in cut)
    expected = [encode(document) for document in documents]
    # only a last window of one token is left out
    expected = [token for ids in expected for token in (ids[:-1] if len(ids) % length == 1 else ids)]
    assert [token for window in cut for token in window.ids] == expected


@quick
@given(st.lists(st.text(alphabet="abc", max_size=40), max_size=4), st.integers(2, 20), st.integers(0, 100))
def test_windows_stop_after_max_tokens_scored_tokens(documents, length, max_tokens):
    everything = list(windows(documents, encode, decode, length))
    cut = list(windows(documents, encode, decode, length, max_tokens))
    scored = sum(len(window.ids) - 1 for window in cut)
    assert scored == min(max_tokens, sum(len(window.ids) - 1 for window in everything))
    assert [window.ids for window in cut[:-1]] == [window.ids for window in everything[: max(len(cut) - 1, 0)]]
    assert not cut or cut[-1].ids == everything[len(cut) - 1].ids[: len(cut[-1].ids)]


def test_scored_bytes_are_those_of_the_text_behind_the_scored_tokens(runner):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
    cut = list(windows([text], runner.encode, runner.decode, 64))
    firsts = sum(len(runner.decode(window.ids[:1]).encode()) for window in cut)
    assert sum(window.scored_bytes for window in cut) + firsts == len(text.encode())


# A sample of sequences for calibration

WORDS = "".join(chr(97 + i % 26) for i in range(1000))


def test_a_sample_is_windows_of_the_joined_documents(tmp_path):
    texts = ["abc", "defghij", "k" * 50, WORDS]
    path = write(tmp_path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    drawn = sample(path, encode, 256, n_sequences=20, length=16, seed=3)
    assert drawn.ids.shape == (20, 16)
    assert drawn.ids.dtype == np.int64
    joined = np.array(encode("".join(texts)))
    pieces = joined[: len(joined) // 16 * 16].reshape(-1, 16)
    order = np.argsort(np.random.PCG64(3).random_raw(len(pieces)))
    assert np.array_equal(drawn.ids, pieces[order[:20]])


def test_a_sample_is_the_same_whatever_reads_it(tmp_path):
    """The draw itself is pinned: what is in a manifest must be found again with the next release of numpy."""
    ids = np.arange(100)
    np.save(tmp_path / "ids.npy", ids.reshape(10, 10).astype(np.uint16))
    drawn = sample(tmp_path / "ids.npy", None, 100, n_sequences=4, length=10, seed=0)
    assert drawn.ids[:, 0].tolist() == [30, 20, 10, 80]
    write(tmp_path, bytes(range(100)), "text.txt")
    assert np.array_equal(sample(tmp_path / "text.txt", encode, 100, 4, 10, 0).ids, drawn.ids)
    assert np.array_equal(sample(str(tmp_path / "ids.npy"), None, 100, 2, 10, 0).ids, drawn.ids[:2])
    assert not np.array_equal(sample(tmp_path / "ids.npy", None, 100, 4, 10, 1).ids, drawn.ids)
    assert drawn.record == {
        "source": "ids.npy",
        "sha256": hashlib.sha256((tmp_path / "ids.npy").read_bytes()).hexdigest(),
        "seed": 0,
        "n_sequences": 4,
        "n_sequences_requested": 4,
        "length": 10,
        "ids_sha256": hashlib.sha256(drawn.ids.tobytes()).hexdigest(),
    }
    assert json.loads(json.dumps(drawn.record)) == drawn.record


@quick
@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**70))
def test_sequences_never_overlap(tmp_path_factory, n_tokens, length, n_sequences, seed):
    path = tmp_path_factory.getbasetemp() / "ids.npy"
    np.save(path, np.arange(n_tokens))
    if n_tokens < length:
        with pytest.raises(InputError, match=f"holds {n_tokens} tokens, fewer than one sequence of {length}"):
            sample(path, None, n_tokens, n_sequences, length, seed)
        return
    drawn = sample(path, None, n_tokens, n_sequences, length, seed)
    assert len(drawn.ids) == min(n_sequences, n_tokens // length) == drawn.record["n_sequences"]
    assert len(np.unique(drawn.ids)) == drawn.ids.size
    assert (np.diff(drawn.ids, axis=1) == 1).all()


def test_too_few_sequences_are_all_taken_and_said(tmp_path, caplog):
    np.save(tmp_path / "ids.npy", np.arange(35))
    drawn = sample(tmp_path / "ids.npy", None, 35, length=10)
    assert sorted(drawn.ids[:, 0].tolist()) == [0, 10, 20]
    assert (drawn.record["n_sequences"], drawn.record["n_sequences_requested"]) == (3, 128)
    (remark,) = caplog.messages
    assert remark.endswith("ids.npy: holds 3 sequences of 10 tokens, not 128; all are taken")


def test_a_sample_of_the_shipped_tokenizer(runner, shakespeare, tmp_path):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 200
    path = write(tmp_path, text, "play.txt")
    drawn = sample(path, runner.encode, runner.graph.vocab_size, 5, 64)
    ids = runner.encode(text)
    assert all(row.tolist() in [ids[start : start + 64] for start in range(0, len(ids) - 63, 64)] for row in drawn.ids)
    assert unk_token_id(Tokenizer.from_file(str(shakespeare / "tokenizer.json"))) is None


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros(600), r"an array of float64 with shape \[600\]; expected integers"),
        (np.zeros(600, dtype=bool), "an array of bool"),
        (np.zeros((2, 2, 600), dtype=np.int32), r"shape \[2, 2, 600\]; expected integers, \[tokens\] or \[seq"),
        (np.int64(3), r"shape \[\]"),
        (np.zeros(600, dtype="<U3"), "an array of <U3"),
        (np.zeros(0, dtype=np.int64), "holds no tokens"),
        (np.full(600, 100), "token id 100 is outside the model's vocabulary of 100; tokenize it with the model's own"),
        (np.full(600, -1), "token id -1 is outside"),
        (np.full(600, 2**64 - 1, dtype=np.uint64), "token id 18446744073709551615 is outside"),
        (np.zeros(511, dtype=np.int8), "holds 511 tokens, fewer than one sequence of 512; .* --length of at most 511"),
    ],
)
def test_token_ids_that_are_none_are_refused(tmp_path, array, match):
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(InputError, match=rf"ids\.npy: .*{match}"):
        sample(tmp_path / "ids.npy", None, 100)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "object.npy", np.array([Bomb()] * 600, dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Bomb()))
    for name in ("object.npy", "pickle.npy"):
        with pytest.raises(InputError, match=rf"{name}: not an \.npy file of numbers: .*; save token ids with numpy"):
            sample(tmp_path / name, None, 100)


@quick
@given(st.data())
def test_a_damaged_npy_raises_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    np.save(path, np.arange(100))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 127))] = data.draw(st.sampled_from(b"\0(){['-9,1O "))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(InputError):  # damage within the numbers goes unseen
        sample(path, None, 2**63, length=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_sequences": 0}, "n_sequences is 0; expected at least 1"),
        ({"length": -2}, "length is -2; expected at least 1"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
        ({"encode": None}, r"text\.txt: is text, and there is no tokenizer for it; pass one, or token ids in a \.npy"),
        ({"vocab_size": 100}, r"text\.txt: token id 122 is outside the model's vocabulary of 100"),
        ({"length": 2000}, r"text\.txt: holds 1000 tokens, fewer than one sequence of 2000"),
        ({"encode": lambda text: []}, r"text\.txt: holds no tokens"),
    ],
)
def test_samples_that_cannot_be_drawn(tmp_path, options, match):
    arguments = {"source": write(tmp_path, WORDS, "text.txt"), "encode": encode, "vocab_size": 256, "length": 10}
    with pytest.raises(InputError, match=match):
        sample(**(arguments | options))


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "none.txt", "none.npy", "/none", "a/b/c", Path("wikitext")])
def test_a_source_that_is_not_there(source):
    with pytest.raises(InputError, match=rf"{source}: no such file; expected .* or the name of a Hugging Face dataset"):
        sample(source, encode, 256)


def test_empty_text_is_refused(tmp_path):
    for name, content in (("a.txt", ""), ("a.jsonl", '{"text": ""}\n')):
        with pytest.raises(InputError, match=f"{name}: holds no text"):
            sample(write(tmp_path, content, name), encode, 256)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"), 1),
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), 0),
        (models.Unigram([("a", -1.0), ("<unk>", 0.0)], unk_id=1), 1),
        (models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"), 1),
        (models.BPE({"a": 0}, []), None),
        (models.Unigram([("a", -1.0)]), None),
    ],
)
def test_the_unknown_token(model, expected):
    assert unk_token_id(Tokenizer(model)) == expected


def test_a_tokenizer_that_does_not_know_the_text_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "known": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    unk_id = unk_token_id(tokenizer)

    def draw(text):
        path = write(tmp_path, text, "text.txt")
        return sample(path, lambda text: tokenizer.encode(text).ids, 2, length=10, unk_id=unk_id)

    assert len(draw("known known known known new " * 20).ids) == 10
    with pytest.raises(
        InputError, match=r"text\.txt: 25 % of its tokens are unknown .* \(id 0\), expected at most 20 %"
    ):
        draw("known known known new " * 20)


class DatasetsError(Exception):
    """As in the package: the base of its errors, and of nothing else."""


class FakeDataset(dict):
    @property
    def column_names(self):
        return list(self)


@pytest.fixture
def datasets(monkeypatch):
    """Stands in for the package of that name; called holds what load_dataset was asked for."""

    def load_dataset(name, config=None, *, split=None):
        module.called.append((name, config, split))
        if isinstance(module.answer, Exception):
            raise module.answer
        return FakeDataset(module.answer)

    module = SimpleNamespace(load_dataset=load_dataset, called=[], answer={"text": ["abc", "", WORDS]})
    module.exceptions = SimpleNamespace(DatasetsError=DatasetsError)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("wikitext", ("wikitext", None, "train")),
        ("wikitext:wikitext-2-raw-v1", ("wikitext", "wikitext-2-raw-v1", "train")),
        ("Salesforce/wikitext:wikitext-2-raw-v1:test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("wikitext::validation", ("wikitext", None, "validation")),
        ("c4:en:train[:1%]", ("c4", "en", "train[:1%]")),
    ],
)
def test_a_dataset(datasets, source, called):
    drawn = sample(source, encode, 256, 4, 10)
    assert datasets.called == [called]
    assert drawn.ids.shape == (4, 10)
    assert drawn.record["source"] == source
    assert drawn.record["sha256"] == hashlib.sha256(f"abc\0{WORDS}\0".encode()).hexdigest()


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (
            FileNotFoundError("Dataset 'wiki' doesn't exist on the Hub"),
            "no such file, and not readable as .* doesn't exist",
        ),
        (ValueError("BuilderConfig 'x' not found"), r"name\[:config\]\[:split\]: BuilderConfig"),
        (ConnectionError("offline"), "offline"),
        (DatasetsError("An error occurred while generating the dataset"), "not readable as .* while generating"),
        ({"title": [], "label": []}, 'has the columns title, label; expected one named "text"'),
        ({"text": ["a", None]}, 'its column "text" does not hold strings only'),
        ({"text": ["", ""]}, "holds no text"),
    ],
)
def test_a_dataset_that_cannot_be_read(datasets, answer, match):
    datasets.answer = answer
    with pytest.raises(InputError, match=f"^wiki: .*{match}"):
        sample("wiki", encode, 256)


def test_a_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"wiki: no such file, and .* run: pip install 'mythos-export\[datasets\]'"):
        sample("wiki", encode, 256)

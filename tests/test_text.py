"""Texts to judge a model with: what is refused and named, and how documents are cut."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calibration.text import read_documents, windows
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

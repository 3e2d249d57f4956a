"""Reading prompt files: every form, every mistake, and the public sets where they are at hand."""

import json
import os
import warnings
from pathlib import Path

import pytest

import mechguard as mg

PUBLIC = Path(os.environ.get("MECHGUARD_DATA", "no public data here"))
needs_public_data = pytest.mark.skipif(
    not (PUBLIC / "malicious_instruct").is_dir(), reason="no public data; set MECHGUARD_DATA"
)


def test_every_form_reads_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "one"}\r\n\r\n{"text": "two, \\"2\\""}'.encode())
    (tmp_path / "a.csv").write_bytes(b'text\r\none\r\n"two, ""2"""\r\n')
    (tmp_path / "a.txt").write_bytes(b'one\r\ntwo, "2"')
    read = [[p.text for p in mg.load_prompts(tmp_path / f"a.{form}")] for form in ("jsonl", "csv", "txt")]
    assert read == [["one", 'two, "2"']] * 3


def test_columns_are_read_and_survive_a_round_trip(tmp_path):
    (tmp_path / "set.csv").write_text("id,text,label,pair,category\nx,how?,0,p1,food\ny,why?,unsafe,p1,\n")
    prompts = mg.load_prompts(tmp_path / "set.csv")
    assert prompts[0] == mg.Prompt("x", "how?", "harmless", None, "p1", "food")
    assert prompts[1].label == "harmful"
    assert prompts[1].category is None
    prompts.save(tmp_path / "again.jsonl")
    assert mg.load_prompts(tmp_path / "again.jsonl") == prompts


def test_a_set_is_found_by_name_in_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("hello\n")
    assert mg.load_prompts("mine", data=tmp_path).name == "mine"
    monkeypatch.setenv("MECHGUARD_DATA", str(tmp_path))
    assert len(mg.load_prompts("mine")) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "\n\n", "holds no prompts"),
        ("broken.jsonl", '{"text": "a"}\n{oops\n', "broken.jsonl: line 2 is not JSON"),
        ("list.jsonl", "[1]\n", "not a JSON object"),
        ("textless.csv", "prompt\nhello\n", "has no text; its columns are prompt"),
        ("label.csv", "text,label\nhello,maybe\n", "label 'maybe' is not known"),
        ("twice.csv", "id,text\n1,a\n1,b\n", "has the id '1' twice"),
        ("odd.xml", "<a/>", "is none of .jsonl"),
        ("nothing.csv", "", "holds no prompts"),
        ("header.csv", "text,label\n", "holds no prompts"),
        ("comma.csv", "text,label\nred, green and blue,0\n", "line 2 has more values than the 2 columns"),
        ("quote.csv", 'text,label\n"never closed,0\nnext,1\n', "never closed; close it"),
        ("number.json", '{"text": 1}', "is a list of objects"),
        ("broken.json", '[{"text": "a"}', "not readable JSON"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        mg.load_prompts(tmp_path / name)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "model.txt").write_bytes(b"caf\xe9\0\0\n")
    with pytest.raises(ValueError, match="is not text"):
        mg.load_prompts(tmp_path / "model.txt")


@pytest.mark.parametrize(
    ("encoding", "warns"),
    [("utf-8", False), ("utf-8-sig", False), ("utf-16", False), ("cp1252", True), ("latin-1", True)],
)
def test_letters_survive_every_encoding_and_a_guess_is_said(tmp_path, encoding, warns):
    content = "label,text\r\n0,a café for “two”" if encoding != "latin-1" else "label,text\r\n0,a café \x81"
    (tmp_path / "set.csv").write_bytes(content.encode(encoding))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read = mg.load_prompts(tmp_path / "set.csv")
    assert read[0].text == content.partition("0,")[2]
    assert ["set.csv is not UTF-8" in str(one.message) for one in said] == [True] * warns


def test_a_text_may_hold_every_kind_of_line_end(tmp_path):
    texts = ["one\ntwo", "one\u2028two", "one\x85two", "one\x0ctwo"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "set.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "set.csv").write_bytes(b'text,label\r\n"one\r\ntwo",1\r\n"three\nfour",0')
    assert [p.text for p in mg.load_prompts(tmp_path / "set.jsonl")] == texts
    assert [p.text for p in mg.load_prompts(tmp_path / "set.csv")] == ["one\r\ntwo", "three\nfour"]


def test_a_name_without_a_folder_says_what_to_give(monkeypatch):
    monkeypatch.delenv("MECHGUARD_DATA", raising=False)
    with pytest.raises(ValueError, match="data=FOLDER"):
        mg.load_prompts("malicious_instruct")


def test_a_name_that_is_not_there_lists_what_is(tmp_path):
    (tmp_path / "mine.txt").write_text("hello\n")
    with pytest.raises(ValueError, match="found there: mine"):
        mg.load_prompts("yours", data=tmp_path)


@needs_public_data
def test_the_howto_anchors_are_pairs_that_begin_alike():
    anchors = mg.load_prompts("anchors", data=PUBLIC)
    harmful, harmless = anchors.pair_indices()
    for bad, good in zip(harmful, harmless, strict=True):
        assert anchors[bad].text.split()[:2] == anchors[good].text.split()[:2]

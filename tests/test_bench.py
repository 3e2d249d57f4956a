"""The benchmark times in turns, and says whether each bar is met."""

import json
import sys

import bench
import pytest

import mechguard as mg


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A benchmark of two rows that take no time, and where it writes."""
    rows = {
        "slower": bench.Row("work / plain", 1.05, lambda rounds: [1.0 + 0.1 * i for i in range(rounds)]),
        "faster": bench.Row("work over plain", 2, lambda rounds: [2.5] * rounds, "x faster"),
    }
    monkeypatch.setattr(bench, "ROWS", rows)
    return tmp_path / "benchmarks.json"


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    bench.main()


def test_rows_are_printed_with_their_bars_and_written_with_their_interval(toy, monkeypatch, capsys):
    run(monkeypatch, "--out", str(toy), "--rounds", "5")
    slower, faster = json.loads(toy.read_text())
    assert (slower["name"], slower["n"], slower["met"]) == ("slower", 5, False)
    assert slower["ratio"] == pytest.approx(1.2)
    assert slower["low"] < slower["ratio"] < slower["high"]
    assert faster["met"]
    assert "NOT MET" in capsys.readouterr().out.splitlines()[0]


def test_one_row_alone_leaves_the_others_as_they_are(toy, monkeypatch):
    run(monkeypatch, "--out", str(toy), "--rounds", "5")
    run(monkeypatch, "--out", str(toy), "--rounds", "3", "--only", "faster")
    assert [row["n"] for row in json.loads(toy.read_text())] == [5, 3]


def test_work_and_plain_are_timed_in_turns():
    calls = []
    found = bench.in_turns(lambda: calls.append("work"), lambda: calls.append("plain"), 2)
    assert calls == ["work", "plain", "work", "plain", "plain", "work"]
    assert len(found) == 2


def test_models_of_the_benchmark_can_be_traced(monkeypatch):
    small = {"D_MODEL": 32, "N_LAYERS": 2, "VOCABULARY": 64, "IMAGE_SIZE": 28}
    for name, value in small.items():
        monkeypatch.setattr(bench.bench_models, name, value)
    prompts = mg.Prompts([mg.Prompt(text, text) for text in bench.bench_models.texts(3)])
    lengths = [len(prompt.text.split()) for prompt in prompts]
    llama = mg.load(bench.bench_models.llama(), processor=bench.bench_models.tokenizer(), template=None)
    assert llama.count_tokens(list(prompts)) == lengths
    llava = mg.load(bench.bench_models.llava(), processor=bench.bench_models.processor())
    states = mg.collect(llava, prompts.with_image("noise"), progress=False)
    assert states.data.shape == (2, 3, 32)

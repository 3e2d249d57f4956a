"""Several processes share the work and leave what one would have left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny

import mechguard as mg
from mechguard import processes
from mechguard.processes import Processes, find_processes, own_device

SCRIPT = """
import sys, time
from mechguard.cli import app
from mechguard.processes import find_processes
from mechguard.errors import MechguardError

rank, (model, prompts, out) = find_processes().rank, sys.argv[1:]
for late in (0, 1):  # either process may come last
    time.sleep(0.5 * (rank == late))
    words = f"collect {model} {prompts} --image blank --shard-size 5 --batch-size 5 -q"
    app([*words.split(), "--out", f"{out}/states-{late}"], standalone_mode=False)
app(f"evaluate {model} {prompts} --max-new-tokens 3 -q --out {out}/table".split(), standalone_mode=False)

import mechguard as mg
vlm, asked = mg.load(model), mg.load_prompts(prompts)
store = f"{out}/responses.jsonl"
ssd = mg.fit_directions(mg.collect(vlm.llm, asked, progress=False))
grid = dict(layers=[[0], [1, 2]], alphas=[1.0], conditions=["blank"], max_new_tokens=2, progress=False)
mg.sweep(vlm, asked[:8], ssd, out=f"{out}/cells.jsonl", **grid).save(f"{out}/sweep-{rank}")
options = dict(conditions=["text", "blank"], max_new_tokens=3, batch_size=5, progress=False)
mg.evaluate(vlm, asked, responses=store, **options)
try:  # what one process refuses, the others refuse too
    mg.collect(vlm, asked[1:], out=f"{out}/states-0", progress=False)
except MechguardError as error:
    open(f"{out}/refusal-{rank}", "w").write(str(error))
"""


@pytest.fixture(scope="module")
def shared(llava_folder, tmp_path_factory):
    """What two processes of torchrun leave behind."""
    folder = tmp_path_factory.mktemp("shared")
    script, asked = folder / "script.py", tiny.prompts(pairs=12).save(folder / "prompts.jsonl")
    script.write_text(SCRIPT)
    command = (
        f"-m torch.distributed.run --standalone --nproc-per-node 2 {script} {llava_folder} {asked} {folder}"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(mg.__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, *command.split()], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def asked(shared):
    return mg.load_prompts(shared / "prompts.jsonl")


def test_two_processes_collect_the_files_of_one(shared, asked, llava_folder, tmp_path):
    vlm = mg.load(llava_folder)
    mg.collect(
        vlm, asked.with_image("blank"), out=tmp_path / "one", shard_size=5, batch_size=5, progress=False
    )
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert len([name for name in wanted if name.startswith("states-")]) == 5
    for late in (0, 1):
        found = {path.name: path.read_bytes() for path in (shared / f"states-{late}").iterdir()}
        assert found == wanted


def test_two_processes_evaluate_to_the_table_of_one(shared, asked, llava_folder, tmp_path):
    vlm = mg.load(llava_folder)
    mg.evaluate(vlm, asked, max_new_tokens=3, progress=False).save(tmp_path / "table")
    assert (shared / "table.csv").read_bytes() == (tmp_path / "table.csv").read_bytes()
    options = dict(conditions=["text", "blank"], max_new_tokens=3, batch_size=5, progress=False)
    mg.evaluate(vlm, asked, responses=tmp_path / "responses.jsonl", **options)
    ours, theirs = (pd.read_json(place / "responses.jsonl", lines=True) for place in (shared, tmp_path))
    timed = ["seconds", "crc32"]
    pd.testing.assert_frame_equal(ours.drop(columns=timed), theirs.drop(columns=timed))
    assert not list(shared.glob("*.rank*"))


def test_two_processes_sweep_to_the_table_of_one(shared, asked, llava_folder, tmp_path):
    vlm = mg.load(llava_folder)
    ssd = mg.fit_directions(mg.collect(vlm.llm, asked, progress=False))
    grid = dict(layers=[[0], [1, 2]], alphas=[1.0], conditions=["blank"], max_new_tokens=2, progress=False)
    mg.sweep(vlm, asked[:8], ssd, out=tmp_path / "cells.jsonl", **grid).save(tmp_path / "sweep")
    wanted = (tmp_path / "sweep.csv").read_bytes()
    assert [(shared / f"sweep-{rank}.csv").read_bytes() for rank in (0, 1)] == [wanted, wanted]
    assert (shared / "cells.jsonl").read_bytes() == (tmp_path / "cells.jsonl").read_bytes()


def test_what_one_process_refuses_all_refuse(shared):
    assert "their prompts is" in (shared / "refusal-0").read_text()
    assert "another process of this run failed" in (shared / "refusal-1").read_text()


def test_responses_that_other_processes_left_are_taken_up(vlm, prompts, tmp_path):
    store = tmp_path / "responses.jsonl"
    options = dict(conditions=["text"], max_new_tokens=3, batch_size=4, progress=False, out=store)
    whole = mg.gather_responses(vlm, prompts, **options)
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(lines[:8]))
    (tmp_path / "responses.rank1.jsonl").write_text("".join(lines[8:12]))
    again = mg.gather_responses(vlm, prompts, **options)
    assert again["seconds"].iloc[:].isin(whole["seconds"]).sum() >= 12  # those twelve were not asked again
    columns = ["key", "response"]
    pd.testing.assert_frame_equal(again[columns], whole[columns])


def test_pieces_are_dealt_in_turn_and_each_once():
    for count in (1, 2, 3):
        owners = [[rank for rank in range(count) if Processes(rank, count).owns(piece)] for piece in range(7)]
        assert owners == [[piece % count] for piece in range(7)]


def test_pieces_of_unequal_size_are_dealt_so_that_all_have_as_much():
    sizes = [150, 150, 200, 200, 200]
    own = [Processes(rank, 2).own_of(sizes) for rank in (0, 1)]
    assert own[0] | own[1] == set(range(5))
    assert not own[0] & own[1]
    assert sorted(sum(sizes[piece] for piece in one) for one in own) == [400, 500]
    assert Processes().own_of(sizes) == set(range(5))


def test_inside_alone_there_is_no_other_process(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with processes.alone():
        assert find_processes() == Processes()
        assert own_device() is not None
    assert find_processes() == Processes(1, 2)


def fall(rank_that_falls: int, how: str) -> None:
    """The work of a process, one of which falls."""
    with find_processes().together():
        if find_processes().rank == rank_that_falls:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise mg.MechguardError("a mistake")


@pytest.mark.parametrize("rank", [0, 1])
def test_what_stops_one_process_stops_all_and_is_said_once(rank, capfd):
    assert processes.launch(2, fall, rank, "raised") == 2
    assert capfd.readouterr().err == "mechguard: a mistake\n"
    with pytest.raises(mg.MechguardError, match=r"was stopped .*SIGKILL.* goes on"):
        processes.launch(2, fall, rank, "killed")
    assert processes.launch(2, fall, 2, "raised") == 0


def test_the_launcher_says_who_we_are(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert find_processes() == Processes(0, 1)
    assert own_device() is None
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_processes() == Processes(5, 8)
    assert own_device() == "cuda:1"
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(mg.MechguardError, match="RANK='8' of WORLD_SIZE='8'"):
        find_processes()
    monkeypatch.setenv("WORLD_SIZE", "many")
    for asked in (find_processes, own_device):
        with pytest.raises(mg.MechguardError, match="WORLD_SIZE='many'"):
            asked()


def test_one_process_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(processes, "_group", lambda: pytest.fail("no group is needed"))
    alone = Processes()
    rows = [json.loads('{"a": 1}')]
    assert alone.gather(rows) == rows
    with alone.together():
        pass

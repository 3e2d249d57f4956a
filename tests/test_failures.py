"""What goes wrong is said in a sentence, and what was done before it is kept."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image

import mechguard as mg
from mechguard import cli, responses, storage, tracing
from mechguard.study import Study

SENT = dict(conditions=["text"], max_new_tokens=2, batch_size=3, progress=False)


def gather(vlm, out, **options):
    return mg.gather_responses(vlm, tiny.prompts(pairs=6), out=out, **{**SENT, **options})


def stored(out):
    return len(storage.read_lines(out))


# ------------------------------------------------------------------------------- disk and locks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where the system lets us make one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip("making a file system needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_keeps_what_was_answered_and_goes_on_when_there_is_room(vlm, small_disk):
    expected = gather(vlm, None)
    ballast = small_disk / "ballast"
    gather(vlm, small_disk / "r.jsonl", guards=[mg.self_reminder()])
    ballast.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 4096))
    with pytest.raises(storage.DiskError, match=r"r\.jsonl cannot be written \(No space left on device\)"):
        for number in range(40):
            gather(
                vlm,
                small_disk / "r.jsonl",
                guards=[None, mg.Guard(f"g{number}", (), None, template="{query}")],
            )
    kept = stored(small_disk / "r.jsonl")
    assert kept >= 12
    ballast.unlink()
    found = gather(vlm, small_disk / "r.jsonl")
    assert found["response"].tolist() == expected["response"].tolist()
    assert stored(small_disk / "r.jsonl") >= kept


def test_a_write_that_fails_is_one_sentence_and_the_lines_before_it_stay(vlm, tmp_path, monkeypatch):
    left = [3]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patch,
        pytest.raises(storage.DiskError, match="what was written before it is kept"),
    ):
        patch.setattr(storage.os, "fsync", fsync)
        gather(vlm, tmp_path / "r.jsonl")
    assert len(gather(vlm, tmp_path / "r.jsonl")) == 12


HOLD = """
import sys
from mechguard.storage import hold_file, hold_folder
with (hold_folder if sys.argv[1] == "folder" else hold_file)(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process():
    """Another process that holds a place until it is told to end."""
    started = []

    def hold(kind, place):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, kind, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_second_process_on_a_folder_or_a_store_is_refused_until_the_first_ends(
    vlm, tmp_path, other_process
):
    first = other_process("file", tmp_path / "r.jsonl")
    with pytest.raises(mg.MechguardError, match=r"another process is at work on .*r\.jsonl; wait until"):
        gather(vlm, tmp_path / "r.jsonl")
    first.kill()  # the lock dies with it
    first.wait()
    assert len(gather(vlm, tmp_path / "r.jsonl")) == 12
    other_process("folder", tmp_path / "run")
    with pytest.raises(mg.MechguardError, match="another process is at work on .*run"):
        mg.compare_guards(
            vlm, anchors=tiny.prompts(pairs=2), validation=tiny.prompts(pairs=2), tests={},
            out=tmp_path / "run", methods=["self_reminder"], progress=False,
        )  # fmt: skip


def test_what_a_killed_run_left_half_written_is_swept_up(tmp_path):
    left = tmp_path / "results" / ".table.csv.abc.unfinished"
    left.parent.mkdir()
    left.write_text("half")
    with storage.hold_folder(tmp_path), storage.hold_folder(tmp_path):
        assert not left.exists()


# ----------------------------------------------------------------------------- altered products


def test_an_altered_or_cut_store_is_said(vlm, tmp_path):
    out = tmp_path / "r.jsonl"
    whole = gather(vlm, out)
    content = out.read_bytes()
    out.write_bytes(content.replace(b'"tokens": 2', b'"tokens": 3', 1))
    for read in (lambda: mg.read_responses(out), lambda: gather(vlm, out)):
        with pytest.raises(
            mg.MechguardError, match=r"line 1 of .*r\.jsonl is damaged \(its checksum differs\)"
        ):
            read()
    out.write_bytes(b"".join(content.splitlines(keepends=True)[1:]))
    with pytest.raises(
        mg.MechguardError, match="holds 11 of the 12 responses .* run the same evaluation again"
    ):
        mg.read_responses(out)
    assert gather(vlm, out)["response"].tolist() == whole["response"].tolist()
    assert len(mg.read_responses(out)) == 12


def test_a_later_evaluation_keeps_what_the_store_held(vlm, tmp_path):
    settings = dict(conditions=["text"], max_new_tokens=2, progress=False, responses=tmp_path / "r.jsonl")
    mg.evaluate(vlm, tiny.prompts(pairs=2), guards=[None], **settings)
    mg.evaluate(vlm, tiny.prompts(pairs=2), guards=[mg.self_reminder()], **settings)
    assert set(mg.read_responses(tmp_path / "r.jsonl")["guard"]) == {"none", "self_reminder"}


def test_an_altered_table_is_said_and_a_half_saved_one_is_made_again(tmp_path):
    def make():
        return mg.Result.from_rows([dict(guard="1", value=0.1 + 0.2), dict(guard="x", value=1.0)])

    study = Study(None, None, None, tmp_path)
    make().save(tmp_path / "table")
    assert mg.Result.load(tmp_path / "table").table["guard"].tolist() == ["1", "x"]
    file = tmp_path / "table.csv"
    file.write_text(file.read_text().replace("1.0", "1.5"))
    with pytest.raises(mg.MechguardError, match="is not the table that was saved"):
        study._kept(mg.Result, "table", make)
    (tmp_path / "table.json").unlink()  # as a kill between the two files leaves it
    study._kept(mg.Result, "table", make)
    assert mg.Result.load(tmp_path / "table").table["value"].tolist() == [0.1 + 0.2, 1.0]


def test_a_search_with_other_settings_is_refused(vlm, tmp_path):
    pytest.importorskip("optuna")
    settings = dict(trials=1, max_new_tokens=2, progress=False, out=tmp_path / "t.log")

    def search(pairs):
        make = lambda: mg.self_reminder()  # noqa: E731
        return mg.search_guards(vlm, tiny.prompts(pairs=pairs), make, {}, **settings)

    search(2)
    with pytest.raises(mg.MechguardError, match="holds a search with another model, prompts"):
        search(3)


# ------------------------------------------------------------------------- pictures and numbers


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A thousand prompts with a picture each, one of which is cut in the middle and one gone."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.effect_noise((16, 16), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:100])
    names = {500: "cut.png", 501: "gone.png"}
    rows = [
        {
            "id": str(n),
            "text": "what is in the picture",
            "image": names.get(n, "whole.png"),
            "label": "harmless",
        }
        for n in range(1000)
    ]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "p.jsonl"


def test_an_unreadable_picture_names_all_of_them_keeps_what_was_done_and_can_be_skipped(
    vlm, thousand, tmp_path
):
    settings = dict(conditions=["image"], max_new_tokens=1, batch_size=250, progress=False)
    out = tmp_path / "r.jsonl"
    prompts = mg.load_prompts(thousand)
    with pytest.raises(mg.MechguardError, match=r"2 of the 1000 prompts of 'p' have .* \(500, 501\): repair"):
        mg.gather_responses(vlm, prompts, out=out, **settings)
    kept = stored(out)
    assert kept == 500
    with pytest.warns(
        mg.datasets.DataWarning, match="2 of the 1000 prompts of 'p' are left out, .*: 500, 501"
    ):
        readable = mg.load_prompts(thousand, skip_unreadable=True)
    assert readable.skipped == ("500", "501")
    assert readable.with_image("blank").first(9)[1:].skipped == ("500", "501")
    found = mg.gather_responses(vlm, readable, out=out, **settings)
    assert len(found) == stored(out) == 998
    result = mg.evaluate(vlm, readable, responses=out, **{**settings, "batch_size": 250})
    assert result.about["skipped"] == ["500", "501"]


def test_the_partner_of_a_skipped_prompt_goes_with_it(tmp_path):
    pair = [
        mg.Prompt(name, "x", name, pair="p", own_image=tmp_path / name) for name in ("harmful", "harmless")
    ]
    Image.new("RGB", (4, 4)).save(tmp_path / "harmless", "png")
    kept = mg.Prompts([*pair, mg.Prompt("other", "y")]).without_unreadable()
    assert [prompt.id for prompt in kept] == ["other"]
    assert kept.skipped == ("harmful", "harmless")


def test_states_that_are_no_numbers_are_listed(vlm, prompts, monkeypatch):
    real = tracing._trace_states

    def broken(model, batch, *rest):
        states = real(model, batch, *rest)
        for row, prompt in enumerate(batch):
            if prompt.id == "harmful-3":
                states[1:, row] = float("nan")
        return states

    monkeypatch.setattr(tracing, "_trace_states", broken)
    with pytest.raises(
        mg.MechguardError, match=r"NaN or infinity: 1 of 24 prompts \(harmful-3\), from layer 1 on"
    ):
        mg.collect(vlm, prompts, progress=False)


@pytest.mark.parametrize("source", [None, "own", "llm-stream"])
def test_what_is_written_from_nan_is_refused_with_its_prompts(vlm, prompts, source):
    def spoil(_module, _inputs, output):
        spoilt = output.clone()
        spoilt[1] = float("nan")  # the second row of the batch
        return spoilt

    ssd = mg.fit_directions(mg.collect(vlm.llm, prompts, progress=False))
    guard = None if source is None else mg.vlm_guard(ssd, layers=[0], source=source, gate="always")
    same_length = mg.Prompts([replace(prompts[0], id=f"copy-{number}") for number in range(3)])
    norm = vlm.hf_model.get_submodule(vlm.parts.norm)
    handle = norm.register_forward_hook(spoil)
    try:
        with pytest.raises(mg.MechguardError, match=r"answers 1 prompts with NaN \(copy-1\)"):
            mg.generate(vlm, same_length, guard=guard, max_new_tokens=2, progress=False)
    finally:
        handle.remove()
    assert mg.generate(vlm, same_length, guard=guard, max_new_tokens=2, progress=False)


def test_answers_from_nan_are_refused(vlm, prompts, monkeypatch):
    monkeypatch.setattr(
        tracing, "_trace_logits", lambda model, batch, *_: torch.full((len(batch), 9), float("nan"))
    )
    with pytest.raises(mg.MechguardError, match="answers .* prompts with NaN .*float32 or bfloat16"):
        mg.predict_next_tokens(vlm, prompts[:4], progress=False)


# ----------------------------------------------------------------------------- memory and Ctrl-C


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_an_answering_batch_is_halved_when_memory_runs_out(vlm, prompts, monkeypatch, error):
    expected = mg.generate(vlm, prompts, max_new_tokens=3, batch_size=6, progress=False)
    real, sizes = tracing._plain_responses, []

    def small_memory(model, batch, settings):
        sizes.append(len(batch))
        if len(batch) > 6:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(model, batch, settings)

    monkeypatch.setattr(tracing, "_plain_responses", small_memory)
    with pytest.warns(UserWarning, match="out of memory: batches of 6 "):
        assert mg.generate(vlm, prompts, max_new_tokens=3, progress=False) == expected
    assert sizes[-1] <= 6
    with pytest.raises(mg.MechguardError, match="memory ran out on a batch of 8 prompts .*; use batch_size="):
        mg.generate(vlm, prompts, max_new_tokens=3, batch_size=8, progress=False)


def test_ctrl_c_is_one_sentence_exit_code_130_and_keeps_what_was_done(
    vlm, llava_folder, tmp_path, monkeypatch, capsys
):
    tiny.prompts(pairs=6).save(tmp_path / "p.jsonl")
    command = ["mechguard", "evaluate", str(llava_folder), str(tmp_path / "p.jsonl"), "-q"]
    command += ["--out", str(tmp_path / "t.csv"), "--max-new-tokens", "2"]
    real, left = tracing._plain_responses, [1]

    def interrupted(*call):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*call)

    monkeypatch.setattr(mg, "load", lambda *_: vlm)
    monkeypatch.setattr(sys, "argv", command)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(tracing, "_plain_responses", interrupted)
        cli.main()
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert "mechguard: interrupted; what was done is kept" in said
    assert "Traceback" not in said
    assert stored(tmp_path / "t.responses.jsonl") == 12
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert (tmp_path / "t.csv").is_file()
    assert responses.read_responses(tmp_path / "t.responses.jsonl").shape[0] == 24

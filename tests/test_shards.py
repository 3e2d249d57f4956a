"""States on disk: the same numbers as in memory, whole after any kill, and nothing damaged is used."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from filelock import FileLock

import mechguard as mg
from mechguard import moments, shards, storage
from mechguard.processes import Processes
from mechguard.prompts import Prompts

SIZE = 5  # prompts in a shard: five shards of the toy prompts
QUIET = dict(progress=False, shard_size=SIZE)


@pytest.fixture(scope="module")
def blank(prompts):
    return prompts.with_image("blank")


@pytest.fixture(scope="module")
def stored(vlm, blank, tmp_path_factory):
    """A finished store, which no test changes."""
    folder = tmp_path_factory.mktemp("stored") / "states"
    mg.collect(vlm, blank, out=folder, **QUIET)
    return folder


@pytest.fixture
def copied(stored, tmp_path):
    """A copy of it, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in contents(stored).items():
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_states_on_disk_are_those_in_memory(vlm, blank, stored):
    loaded = mg.Activations.load(stored)
    assert isinstance(loaded.data, shards.StoredStates)
    for start in range(0, len(blank), SIZE):  # a shard is what its prompts give by themselves
        alone = mg.collect(vlm, blank[start : start + SIZE], progress=False)
        assert torch.equal(loaded.data[:, start : start + SIZE], alone.data)
    assert torch.allclose(loaded.data, mg.collect(vlm, blank, progress=False).data, atol=1e-5)
    assert loaded.name == "vlm blank"
    assert loaded.pairs == [prompt.pair for prompt in blank]


def test_every_way_to_read_a_store_gives_what_a_tensor_gives(stored):
    states = mg.Activations.load(stored).data
    whole = states.clone()
    assert type(whole) is torch.Tensor
    odd = torch.tensor([7, 2, 11, 2])
    for pick in (
        lambda x: x[1],
        lambda x: x[-1],
        lambda x: x[:, 3],
        lambda x: x[:, -1],
        lambda x: x[1:, odd],
        lambda x: x[[2, 0]],
        lambda x: x[:, 4:13],
        lambda x: x[:, 3:20][:, odd],
        lambda x: x[:, 3:20:2],
        lambda x: x[:, odd > 5] if len(odd) == x.shape[1] else x[:, torch.arange(x.shape[1]) % 3 == 0],
        lambda x: x[..., 0],
        lambda x: x[0, 1, 2],
        lambda x: x[:, odd].mean(1),
        lambda x: x.norm(dim=-1),
        lambda x: x - x,
        lambda x: torch.stack(list(x)),
        lambda x: torch.cat([x, x], dim=1),
        lambda x: x.detach(),
        lambda x: x.double(),
    ):
        torch.testing.assert_close(pick(states).clone(), pick(whole).clone(), rtol=0, atol=1e-6)
    assert np.array_equal(np.asarray(states), whole.numpy())
    with pytest.raises(mg.MechguardError, match="not written over"):
        states[0] = 1.0
    with pytest.raises(mg.MechguardError, match="not written over"):
        states.add_(1.0)


def test_choosing_reads_no_more_than_what_is_chosen(stored, monkeypatch):
    read = []
    part = shards.Shards._part
    monkeypatch.setattr(shards.Shards, "_part", lambda self, *where: read.append(where) or part(self, *where))
    states = mg.Activations.load(stored).data
    few = states[:, [6, 8]]
    assert read == []
    few[2]
    assert read == [(1, 2, 1, 4)]  # shard, layer, from, to


def test_what_follows_takes_states_from_disk(vlm, blank, stored, prompts):
    kept, here = mg.Activations.load(stored), mg.Activations.load(stored)
    here = mg.Activations(kept.data.clone(), kept.layers, kept.prompts, kept.about)
    text = mg.collect(vlm.llm, prompts, progress=False)
    for measure in (
        lambda states: mg.measure_separability(states, resamples=20).table,
        lambda states: mg.measure_modality_gap(text, states, resamples=20).table,
        lambda states: mg.map_states([states]).table,
        lambda states: mg.measure_separability(states.shuffled(), resamples=20).table,
    ):
        ours, theirs = measure(kept)["value" if "value" in measure(kept) else "x"], measure(here)
        theirs = theirs["value" if "value" in theirs else "x"]
        np.testing.assert_allclose(ours.to_numpy(float), theirs.to_numpy(float), atol=1e-5)


@pytest.mark.parametrize("method", ["svd", "pca", "mean_difference", "lda"])
@pytest.mark.parametrize("together", [True, False], ids=["pairs together", "labels apart"])
def test_directions_added_up_piece_by_piece_are_those_of_all_states_at_once(
    method, together, tmp_path, monkeypatch
):
    states = planted(together)
    folder = write(states, tmp_path / "s", size=64)
    monkeypatch.setattr(moments, "PIECE", 50)
    rank = 3 if method in ("svd", "pca") else 1
    ours = mg.fit_directions(mg.Activations.load(folder), method=method, rank=rank)
    theirs = mg.fit_directions(states, method=method, rank=rank)
    assert torch.allclose(ours.data, theirs.data, atol=1e-5)
    assert torch.allclose(ours.midpoints, theirs.midpoints, atol=1e-5)
    assert ours.about == theirs.about


def test_adding_up_never_holds_a_layer(tmp_path, monkeypatch):
    folder = write(planted(True), tmp_path / "s", size=64)
    monkeypatch.setattr(moments, "PIECE", 50)
    longest = []
    read = shards.Shards.read
    monkeypatch.setattr(
        shards.Shards, "read", lambda self, layer, rows: longest.append(len(rows)) or read(self, layer, rows)
    )
    for method in ("svd", "lda"):
        mg.fit_directions(mg.Activations.load(folder), method=method)
    assert max(longest) == 50


def planted(together: bool) -> mg.Activations:
    """400 pairs in 24 dimensions, whose directions differ in strength so that each is told from the next."""
    generator = torch.Generator().manual_seed(0)
    scales = 4 * 0.8 ** torch.arange(24.0)
    base = torch.randn(2, 400, 24, generator=generator)
    bad = base + torch.randn(2, 400, 24, generator=generator) * scales + 2 * scales
    labels = [1, 0] * 400 if together else [1] * 400 + [0] * 400
    data = torch.stack([bad, base], 2).reshape(2, 800, 24) if together else torch.cat([bad, base], 1)
    pairs = [row // 2 if together else row % 400 for row in range(800)]
    return mg.Activations.from_tensor(data, labels=labels, pairs=pairs)


def write(states: mg.Activations, folder: Path, *, size: int) -> Path:
    """States from elsewhere as a store."""
    store = shards.Store(
        folder,
        identity={"model": "planted"},
        facts={"layers": states.layers, "name": states.prompts.name, "about": states.about},
        prompts=states.prompts.as_lines(),
        shape=tuple(states.data.shape),
        size=size,
        processes=Processes(),
    )
    store.fill(lambda number, span: states.data[:, span.start : span.stop])
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
def test_a_store_killed_at_any_step_is_finished_byte_for_byte(tmp_path):
    states = planted(True)
    whole = contents(write(states, tmp_path / "whole", size=150))  # six shards
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        if not die_at(step, lambda folder=folder: write(states, folder, size=150)):
            break
        there = len(list(folder.glob("states-*")))
        if not whole.keys() <= contents(folder).keys():
            with pytest.raises(mg.MechguardError):
                mg.Activations.load(folder)
        written = spans_of(lambda folder=folder: write(states, folder, size=150))
        assert len(written) <= 6 - there + 1  # a shard may have been written and not yet noted
        assert contents(folder) == whole, step
    assert step > 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
def test_a_killed_collection_goes_on_with_the_shards_that_are_missing(vlm, blank, stored, tmp_path):
    assert die_at(16, lambda: mg.collect(vlm, blank, out=tmp_path / "s", **QUIET))
    assert spans_of(lambda: mg.collect(vlm, blank, out=tmp_path / "s", **QUIET)) == [2, 3, 4]
    assert contents(tmp_path / "s") == contents(stored)


def die_at(step: int, work) -> bool:
    """Run work in a fork that is killed before its nth flush, renaming or removal of a file."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        left = [step]

        def before(function):
            def counted(*args, **options):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return counted

        storage.os.fsync, storage.os.replace = before(os.fsync), before(os.replace)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def spans_of(work) -> list[int]:
    """The shards that a piece of work writes."""
    written = []
    write_shard = shards.Store._write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shards.Store,
            "_write",
            lambda self, number, states: written.append(number) or write_shard(self, number, states),
        )
        work()
    return written


def test_a_finished_store_is_not_collected_again(vlm, blank, copied, stored):
    assert spans_of(lambda: mg.collect(vlm, blank, out=copied, **QUIET)) == []
    assert contents(copied) == contents(stored)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["states-00002.safetensors", "store.json", "prompts.jsonl"])
def test_a_damaged_file_is_found_named_and_never_used(vlm, blank, copied, stored, damage, name):
    damage(copied / name)
    with pytest.raises(mg.MechguardError, match=r"store\.json|copy" if name == "store.json" else name):
        mg.Activations.load(copied)
    if name == "store.json":
        return
    late = None
    if name.startswith("states") and damage is not Path.unlink:
        late = mg.Activations.load(copied, check=False)  # found at the first reading
        with pytest.raises(mg.MechguardError, match=f"{name} is not the file"):
            late.data[0]
    if damage is not Path.unlink:
        with pytest.raises(mg.MechguardError, match=f"{name} is not the file that was written.* remove it"):
            mg.collect(vlm, blank, out=copied, **QUIET)
        (copied / name).unlink()
    mg.collect(vlm, blank, out=copied, **QUIET)  # does what the message says
    assert contents(copied) == contents(stored)


def other_template(vlm, blank):
    return vlm.with_chat(template=None), blank, {}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda vlm, blank: (mg.load(tiny.llava(seed=1), processor=tiny.processor()), blank, {}), "model"),
        (lambda vlm, blank: (vlm, blank[1:], {}), "prompts"),
        (lambda vlm, blank: (vlm, blank.with_image("noise"), {}), "prompts"),
        (lambda vlm, blank: (vlm.llm, blank, {}), "view"),
        (other_template, "rendering"),
        (lambda vlm, blank: (vlm, blank, dict(position="last_text")), "position"),
        (lambda vlm, blank: (vlm, blank, dict(layers=[0])), "layers"),
        (lambda vlm, blank: (vlm, blank, dict(guard=mg.self_reminder())), "prompts"),
        (lambda vlm, blank: (vlm, blank, dict(guard=steering())), "guard"),
        (lambda vlm, blank: (vlm, blank, dict(shard_size=4)), "in shards of 4"),
    ],
)
def test_a_store_of_something_else_is_refused(vlm, blank, stored, change, word):
    model, asked, options = change(vlm, blank)
    before = contents(stored)
    with pytest.raises(mg.MechguardError, match=rf"{word}.*give another folder"):
        mg.collect(model, asked, out=stored, **{**QUIET, **options})
    assert contents(stored) == before


def steering() -> mg.Guard:
    return mg.projection(mg.Directions.from_tensor(torch.eye(32)[:3].unsqueeze(1)), layers=[1])


def test_a_folder_with_other_things_is_left_alone(vlm, blank, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(mg.MechguardError, match=r"thesis\.tex"):
        mg.collect(vlm, blank, out=tmp_path, **QUIET)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(mg.MechguardError, match="nothing can be written"):
        mg.collect(vlm, blank, out=tmp_path / "file", **QUIET)


def test_two_processes_do_not_fill_one_store(vlm, blank, tmp_path):
    with FileLock(tmp_path / shards.LOCK), pytest.raises(mg.MechguardError, match="another process"):
        mg.collect(vlm, blank, out=tmp_path, **QUIET)
    mg.collect(vlm, blank, out=tmp_path, **QUIET)


def test_a_full_disk_keeps_what_was_collected(vlm, blank, tmp_path, monkeypatch, stored):
    fsync, left = os.fsync, [9]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(mg.MechguardError, match="kept: make room"):
        patch.setattr(storage.os, "fsync", full)
        mg.collect(vlm, blank, out=tmp_path / "s", **QUIET)
    assert 0 < len(spans_of(lambda: mg.collect(vlm, blank, out=tmp_path / "s", **QUIET))) < 5
    assert contents(tmp_path / "s") == contents(stored)


def test_a_shard_is_about_64_megabytes():
    assert shards.shard_size_for(4, 64) == 1024
    assert shards.shard_size_for(32, 4096) == 128
    assert shards.shard_size_for(80, 8192) == 64


MEMORY = """
import resource, sys, time
sys.path.insert(0, {tests!r})
import tiny, torch
import mechguard as mg
torch.set_num_threads(1)
vlm = mg.load(tiny.llava(d_model=64), processor=tiny.processor())
few = list(tiny.prompts(pairs=50))
prompts = mg.Prompts([mg.Prompt(str(n), few[n % 100].text, few[n % 100].label) for n in range({n})])
mg.collect(vlm, prompts[:256], progress=False)
started = time.process_time()
mg.collect(vlm, prompts, out={out!r}, progress=False, shard_size=256, batch_size=256)
seconds = time.process_time() - started
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, seconds)
"""


def measure(n: int, folder: Path) -> tuple[float, float]:
    """Peak memory (kB) and processor seconds of a collection of n prompts in a process of its own."""
    code = MEMORY.format(tests=str(Path(__file__).parent), n=n, out=str(folder / str(n)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    memory, seconds = map(float, done.stdout.split())
    return memory, seconds


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path):
    (small, short), (large, long) = measure(1000, tmp_path), measure(10_000, tmp_path)
    print(f"peak memory {large / small:.2f} x, time {long / short:.1f} x, for 10 x the prompts")
    assert large <= 1.2 * small
    assert long <= 13 * short


def test_prompts_are_the_same_as_lines_and_as_a_file(prompts, tmp_path):
    assert prompts.save(tmp_path / "p.jsonl").read_bytes() == prompts.as_lines()
    assert Prompts([]).as_lines() == b""

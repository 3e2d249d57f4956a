"""Long runs that are killed end in the files of runs that are not, byte for byte."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jobs
import pytest
import tiny

KILLS = 20
SLOW = "MECHGUARD_KILLS"  # how many kills in the slow test, for a shorter or a longer one


class Forker:
    """A process that forks runs; see `jobs.main`."""

    def __init__(self, model: Path, data: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", jobs.__file__, str(model), str(data)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, job: str, folder: Path, last: int = 0) -> int:
        self.process.stdin.write(f"{job} {folder} {last}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        return int(self.process.stdout.readline())

    def run(self, job: str, folder: Path, last: int = 0) -> int:
        self.start(job, folder, last)
        return self.end()


@pytest.fixture(scope="module")
def forker(llava_folder, tmp_path_factory):
    data = tiny.write_study_data(tmp_path_factory.mktemp("data") / "d", pairs=6)
    harmful = tiny.prompts(pairs=5).with_label("harmful")
    harmful.with_template("please {query}").save(data / "jailbreak.jsonl")
    forker = Forker(llava_folder, data)
    yield forker
    forker.process.kill()
    forker.process.wait()


def whole(forker: Forker, job: str, folder: Path) -> tuple[dict[str, object], int, float]:
    """What a run leaves that nobody kills, how many file operations it makes, and its seconds."""
    began = time.monotonic()
    assert forker.run(job, folder) == 0
    return jobs.outputs(folder), int(Path(f"{folder}.count").read_text()), time.monotonic() - began


@pytest.mark.parametrize("job", ["evaluate", "sweep", "train"])
def test_a_run_killed_between_its_file_operations_ends_in_the_same_files(forker, tmp_path, job):
    expected, operations, _ = whole(forker, job, tmp_path / "whole")
    assert expected
    for part in (0.25, 0.6, 0.95):
        assert forker.run(job, tmp_path / "killed", max(1, int(part * operations / 2))) in (0, signal.SIGKILL)
    assert forker.run(job, tmp_path / "killed") == 0
    assert jobs.outputs(tmp_path / "killed") == expected
    left = list((tmp_path / "killed").rglob(".*.unfinished"))
    assert (
        not left or job != "train"
    )  # whoever holds a folder sweeps it up; beside a single file it is ignored


@pytest.mark.long
@pytest.mark.parametrize("job", list(jobs.JOBS))
def test_a_run_killed_at_twenty_random_moments_ends_in_the_same_files(forker, tmp_path, job):
    """Half of the kills come after a random time, half before a random file operation."""
    expected, operations, seconds = whole(forker, job, tmp_path / "whole")
    chance, wanted = random.Random(job), int(os.environ.get(SLOW, KILLS))
    killed = finished = 0
    folder = tmp_path / "killed-0"
    while killed < wanted:
        if killed % 2:
            status = forker.run(job, folder, chance.randint(1, max(1, operations // 2)))
        else:
            child = forker.start(job, folder)
            time.sleep(chance.uniform(0.02, 0.5) * seconds)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(child, signal.SIGKILL)
            status = forker.end()
        assert status in (0, signal.SIGKILL)
        killed += status == signal.SIGKILL
        if status == 0:  # through in spite of the kills: the next ones are for another run
            assert jobs.outputs(folder) == expected
            finished += 1
            folder = tmp_path / f"killed-{finished}"
    assert forker.run(job, folder) == 0
    assert jobs.outputs(folder) == expected
    print(
        f"{job}: {killed} kills over {finished + 1} runs, {len(expected)} files equal, {seconds:.0f} s a run"
    )

"""Files that were altered, by chance or on purpose, are read or refused, and do nothing else."""

import struct

import fuzz
import pytest
import torch
from PIL import Image

import mechguard as mg
from mechguard import storage

COUNT = 300


def test_mutated_files_are_read_or_refused():
    found = fuzz.run(COUNT, seed=1)
    assert not found["wrong"]
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == COUNT
    for kind in ("activations", "directions", "guard", "chain", "result", "responses"):
        assert outcomes[f"{kind}: refused"] > 0


@pytest.mark.long
def test_ten_thousand_mutated_files_are_read_or_refused():
    assert not fuzz.run(10_000, seed=0)["wrong"]


@pytest.mark.parametrize("claimed", [2**20, 2**40, 2**64 - 1])
def test_a_header_that_claims_more_than_the_file_holds_takes_no_memory(tmp_path, claimed):
    storage.save_tensors(tmp_path / "t", "things", {"data": torch.zeros(3)}, {})
    file = tmp_path / "t.safetensors"
    file.write_bytes(struct.pack("<Q", claimed) + file.read_bytes()[8:])
    fuzz.make_good([tmp_path / "t.json"])
    with pytest.raises(mg.MechguardError, match="does not hold tensors"):
        storage.load_tensors(tmp_path / "t", "things")


def test_a_picture_that_unpacks_into_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("1", (40, 40)).save(tmp_path / "bomb.png")
    prompts = mg.Prompts([mg.Prompt("0", "what is this?", image=tmp_path / "bomb.png")])
    with pytest.raises(
        mg.MechguardError, match=r"bomb\.png cannot be read as a picture .*decompression bomb"
    ):
        prompts[0].pictures()


@pytest.mark.parametrize("place", ["../secret.png", "a/../../secret.png"])
def test_a_picture_outside_of_the_prompts_folder_is_refused(tmp_path, place):
    (tmp_path / "set").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "set" / "p.jsonl").write_text(f'{{"text": "what is this?", "image": "{place}"}}\n')
    with pytest.raises(mg.MechguardError, match=r"leads out of the file's folder"):
        mg.load_prompts(tmp_path / "set" / "p.jsonl")


@pytest.mark.parametrize("name", ["organism/../../secret", "../secret", "/no/such/file"])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(mg.MechguardError, match="is not the name of a set"):
        mg.load_prompts(name, data=tmp_path / "data")


def test_a_name_becomes_a_file_in_its_folder():
    for name in ("../../x", "/etc/passwd", "a" * 400, ".", "..", "", "C:\\x", "a\0b"):
        made = storage.file_name(name)
        assert made
        assert len(made) < 100
        assert not set(made) & set("/\\.\0:")
    assert storage.file_name("vlm_guard") == "vlm_guard"
    assert storage.file_name("a b") != storage.file_name("a_b")

"""Files are whole or absent, and results come back as they were saved."""

import json

import pandas as pd
import pytest
import torch
from test_directions import planted

import mechguard as mg
from mechguard import storage


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    storage.write_text(file, "old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(storage.os, "replace", fail)
        storage.write_text(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_result_round_trips_with_its_origin(tmp_path):
    rows = [dict(value=0.5, metric="auroc", layer=3, n=10), dict(value=1.0, metric="dprime", layer=3, n=10)]
    result = mg.Result.from_rows(rows, model="m", seed=1)
    result.save(tmp_path / "r.csv")
    loaded = mg.Result.load(tmp_path / "r")
    pd.testing.assert_frame_equal(loaded.table, result.table)
    assert loaded.about == json.loads(json.dumps(result.about))
    assert list(result.table.columns) == ["layer", "metric", "value", "n"]
    assert "torch" in loaded.about["versions"]


def test_the_word_none_is_not_a_missing_value(tmp_path):
    mg.Result.from_rows([dict(guard="none", value=1.0)]).save(tmp_path / "r")
    assert mg.Result.load(tmp_path / "r").table["guard"].tolist() == ["none"]


def test_where_filters_and_names_the_columns_it_has():
    result = mg.Result.from_rows([dict(layer=i, value=i / 2) for i in range(4)])
    assert result.where(layer=[1, 2]).table["value"].tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="no column 'colour'; it has layer, value"):
        result.where(colour="red")


def test_a_result_that_is_missing_or_broken_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no result"):
        mg.Result.load(tmp_path / "nothing")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="not a readable CSV"):
        mg.Result.load(tmp_path / "empty")


def test_activations_round_trip_with_their_prompts(tmp_path):
    activations, _ = planted()
    activations.save(tmp_path / "a")
    loaded = mg.Activations.load(tmp_path / "a")
    assert torch.equal(loaded.data, activations.data)
    assert (loaded.labels == activations.labels).all()
    assert loaded.pairs == activations.pairs
    assert torch.equal(mg.fit_directions(loaded).data, mg.fit_directions(activations).data)


def test_collected_activations_keep_their_condition_on_disk(vlm, prompts, tmp_path):
    kept = mg.collect(vlm, prompts.with_image("blank"), out=tmp_path / "a", progress=False)
    assert mg.Activations.load(tmp_path / "a").name == kept.name == "vlm blank"


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (torch.zeros(2, 3, 4), [1, 0], r"shape \(2, 3, 4\) do not fit 2 labels"),
        (torch.zeros(3, 4), [1, 0, 1], r"wanted \[layer, prompt, d_model\]"),
        (torch.full((1, 2, 3), float("inf")), [1, 0], "NaN or infinity"),
    ],
)
def test_states_that_do_not_fit_are_refused(data, labels, message):
    with pytest.raises(ValueError, match=message):
        mg.Activations.from_tensor(data, labels=labels)

"""Quality of responses: the numbers that transformers and a hand give."""

import math

import pandas as pd
import pytest
import torch

import mechguard as mg
from mechguard.storage import read_lines, write_lines

TEXTS = ["sure here is a cake .", "", "cake cake cake cake cake cake", "i cannot help with that ."]


@pytest.fixture(scope="module")
def responses():
    rows = [
        dict(key=str(n), setting="s", condition="text", guard="none", label="harmful", id=str(n))
        | dict(request="how to make a cake ?", response=text, tokens=len(text.split()))
        for n, text in enumerate(TEXTS)
    ]
    return pd.DataFrame(rows)


def test_perplexity_is_that_of_the_models_own_loss(vlm, responses):
    table = mg.measure_perplexity(vlm, responses, batch_size=2, progress=False).set_index("key")
    prompt = mg.Prompt("0", "how to make a cake ?")
    before = vlm.llm.encode([prompt])["input_ids"]
    own = vlm.tokenizer(TEXTS[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([before, own], dim=1)
    labels = ids.clone()
    labels[:, : before.shape[1]] = -100
    loss = vlm.hf_model(input_ids=ids, labels=labels).loss.item()
    assert table.loc["0", "nll"] == pytest.approx(loss, abs=1e-4)
    assert table.loc["0", "nll_tokens"] == own.shape[1]
    assert math.isnan(table.loc["1", "nll"])  # an empty response has none


def test_without_the_request_a_response_stands_alone(vlm, responses):
    table = mg.measure_perplexity(vlm, responses, with_request=False, progress=False).set_index("key")
    own = vlm.tokenizer(TEXTS[3], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[vlm.tokenizer.bos_token_id, *own]])
    labels = ids.clone()
    labels[:, 0] = -100
    assert table.loc["3", "nll"] == pytest.approx(
        vlm.hf_model(input_ids=ids, labels=labels).loss.item(), abs=1e-4
    )


def test_perplexities_are_stored_and_taken_from_the_store(vlm, responses, tmp_path):
    path = tmp_path / "p.jsonl"
    first = mg.measure_perplexity(vlm, responses, out=path, progress=False)
    write_lines(path, [{**row, "nll": 7.0} for row in read_lines(path)])
    again = mg.measure_perplexity(vlm, responses, out=path, progress=False)
    assert set(again["nll"]) == {7.0}
    assert first["key"].tolist() == again["key"].tolist()


def test_quality_is_averaged_as_it_says(responses):
    joined = responses.assign(nll=[1.0, None, 3.0, 2.0], kl_first_token=[0.0, 1.0, 2.0, 3.0])
    table = mg.measure_quality(joined).table.set_index("metric")
    assert table.loc["perplexity", "value"] == pytest.approx(math.exp(2.0))
    assert table.loc["perplexity", "n"] == 3
    assert table.loc["degenerate", "value"] == 0.5
    assert table.loc["repetition", "value"] == pytest.approx((1 - 1 / 3) / 4)
    assert table.loc["length", "value"] == pytest.approx((6 + 0 + 6 + 6) / 4)
    assert table.loc["kl_first_token", "value"] == 1.5
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert "refusal_log_odds" not in table.index

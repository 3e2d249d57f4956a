"""Responses: stored as they come, gone on with after a kill, and never mixed with another run's."""

import json

import pandas as pd
import pytest
import tiny

import mechguard as mg
from mechguard import responses, tracing


@pytest.fixture(scope="module")
def guards(vlm, prompts):
    ssd = mg.fit_directions(mg.collect(vlm.llm, prompts, progress=False))
    return [None, mg.vlm_guard(ssd, layers=[1], gate="always", alpha=3.0), mg.self_reminder()]


def gather(vlm, guards, **options):
    settings = dict(guards=guards, conditions=["text", "blank"], max_new_tokens=4, progress=False)
    return mg.gather_responses(vlm, tiny.prompts(pairs=6), batch_size=5, **{**settings, **options})


@pytest.fixture(scope="module")
def whole(vlm, guards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return gather(vlm, guards, first_token=True, refusal_openings=("sorry",), out=folder / "r.jsonl"), folder


def test_a_row_says_exactly_what_was_sent_and_what_came_back(whole, vlm, guards):
    table, folder = whole
    assert len(table) == 12 * 2 * 3 == table["key"].nunique()
    row = table[(table["guard"] == "self_reminder") & (table["condition"] == "blank")].iloc[0]
    prompt = tiny.prompts(pairs=6)[:1].with_image("blank")
    assert row["request"] == prompt[0].text
    assert [row["sent"]] == guards[2].wrap(prompt).render(vlm)
    assert "responsible assistant" in row["sent"]
    assert row["response"] == mg.generate(vlm, prompt, guard=guards[2], max_new_tokens=4, progress=False)[0]
    assert (table["seconds"] > 0).all()
    assert all(set(gates) == ({"1"} if name == "vlm_guard" else set()) for name, gates in
               zip(table["guard"], table["gates"], strict=True))  # fmt: skip
    stored = mg.read_responses(folder / "r.jsonl").set_index("key").loc[table["key"]].reset_index()
    assert stored["response"].tolist() == table["response"].tolist()


def test_what_counts_is_kept_apart_from_the_whole_answer(vlm):
    marked = mg.Guard("marked", (), None, template="{query}", answer_mark="a")
    table = gather(vlm, [marked], conditions=["text"])
    plain = gather(vlm, [None], conditions=["text"])
    for row, answer in zip(table.to_dict("records"), plain["response"], strict=True):
        assert row["response"] == answer.rpartition("a")[2].strip()
        assert (row["raw"] if isinstance(row["raw"], str) else row["response"]) == answer


def test_the_first_token_is_measured_in_the_same_row(whole, vlm, guards):
    table, _ = whole
    plain = table[table["guard"] == "none"]
    assert (plain["kl_first_token"] == 0).all()
    moved = table[(table["guard"] == "vlm_guard") & (table["condition"] == "blank")]
    assert (moved["kl_first_token"] > 0).all()
    sent = tiny.prompts(pairs=6).with_image("blank")
    found = mg.predict_next_tokens(vlm, sent, guard=guards[1], progress=False).exp()
    p = found[:, vlm.tokenizer.convert_tokens_to_ids("sorry")]
    odds = moved.set_index("id").loc[[prompt.id for prompt in sent], "refusal_log_odds"]
    assert odds.tolist() == pytest.approx((p / (1 - p)).log().tolist(), abs=1e-3)


def test_an_interrupted_store_goes_on_with_the_same_batches(whole, vlm, guards, tmp_path, monkeypatch):
    table, folder = whole
    lines = (folder / "r.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "r.json").write_bytes((folder / "r.json").read_bytes())
    (tmp_path / "r.jsonl").write_bytes(b"".join(lines[:32]) + lines[32][:50])  # within a batch and a line
    asked = []
    plain = tracing._plain_responses
    monkeypatch.setattr(tracing, "_plain_responses", lambda *call: asked.append(call) or plain(*call))
    again = gather(vlm, guards, first_token=True, refusal_openings=("sorry",), out=tmp_path / "r.jsonl")
    columns = [column for column in table if column != "seconds"]
    assert again[columns].equals(table[columns])
    batches = 6  # of a guard: 12 prompts in fives, without and with a picture
    assert len(asked) == batches  # all of self_reminder's, none of the unguarded model's
    assert {row["key"] for row in map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())} == set(
        table["key"]
    )
    asked.clear()
    assert gather(vlm, guards, first_token=True, refusal_openings=("sorry",), out=tmp_path / "r.jsonl")[
        columns
    ].equals(table[columns])
    assert not asked


def test_a_store_of_something_else_is_refused(whole, vlm, guards):
    _, folder = whole
    other = mg.load(tiny.llava(seed=1), processor=tiny.processor())
    path = folder / "r.jsonl"
    with pytest.raises(ValueError, match="holds responses with another 'fingerprint'"):
        gather(other, [None], out=path)
    with pytest.raises(ValueError, match="another 'max_new_tokens'"):
        gather(vlm, [None], out=path, max_new_tokens=5)
    with pytest.raises(ValueError, match="another 'vlm_guard'"):
        gather(vlm, [guards[1].randomised(0).renamed("vlm_guard")], out=path)
    with pytest.raises(ValueError, match="another 'toy, text'"):
        mg.gather_responses(vlm, tiny.prompts(pairs=2), conditions=["text"], max_new_tokens=4, out=path)
    (folder / "r2.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"is there without its r2\.json"):
        gather(vlm, [None], out=folder / "r2.jsonl")


def test_a_guard_can_join_a_store(whole, vlm, guards, tmp_path):
    _, folder = whole
    for name in ("r.json", "r.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    more = gather(vlm, [None, mg.goal_priority()], out=tmp_path / "r.jsonl")
    assert set(more["guard"]) == {"none", "goal_priority"}
    assert len(mg.read_responses(tmp_path / "r.jsonl")) == 12 * 2 * 4


def test_a_guards_fingerprint_is_of_what_it_does(guards):
    guard = guards[1]
    assert guard.renamed("other").fingerprint == guard.fingerprint
    assert guard.randomised(0).fingerprint != guard.fingerprint
    assert guard.randomised(0).fingerprint != guard.randomised(1).fingerprint
    assert (guard | guards[2]).fingerprint not in (guard.fingerprint, guards[2].fingerprint)


def test_a_store_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="there are no responses in"):
        mg.read_responses(tmp_path / "r.jsonl")


def test_exchanges_carry_what_was_stored():
    row = dict(request="how?", response="so", label="harmless", refusal_log_odds=0.5, note=float("nan"))
    (one,) = responses.as_exchanges(pd.DataFrame([row]))
    assert (one.request, one.response, one.label) == ("how?", "so", "harmless")
    assert one.facts["refusal_log_odds"] == 0.5
    assert "note" not in one.facts

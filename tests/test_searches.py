"""Searches: trials are kept, the front is the front."""

import pytest
import tiny

import mechguard as mg


@pytest.fixture(scope="module")
def make(vlm):
    ssd = mg.fit_directions(mg.collect(vlm.llm, tiny.prompts(pairs=6), progress=False))
    return lambda layers, alpha: mg.vlm_guard(ssd, layers=layers, alpha=alpha, source="llm", gate="always")


def search(vlm, make, **options):
    space = {"layers": [[1], [0, 1, 2]], "alpha": (-2.0, 4.0)}
    settings = dict(trials=4, conditions=["text", "blank"], max_new_tokens=3, progress=False)
    return mg.search_guards(vlm, tiny.prompts(pairs=3), make, space, **{**settings, **options})


def test_the_front_holds_what_nothing_beats(vlm, make):
    table = search(vlm, make).table
    wide = table.pivot(index="trial", columns="metric", values="value")
    front = set(table.loc[table["pareto"], "trial"])
    assert len(wide) == 4
    assert front
    signs = {"attack_success": 1, "benign_compliance": -1, "kl_first_token": 1}
    costs = wide[list(signs)] * list(signs.values())
    for trial, own in costs.iterrows():
        beaten = any((other <= own).all() and (other < own).any() for _, other in costs.iterrows())
        assert (trial in front) is not beaten
    assert (wide["kl_first_token"] >= -1e-6).all()
    assert set(table["layers"]) <= {"[1]", "[0, 1, 2]"}


def test_a_search_goes_on_where_it_stopped(vlm, make, tmp_path):
    first = search(vlm, make, trials=2, out=tmp_path / "trials.log")
    more = search(vlm, make, trials=3, out=tmp_path / "trials.log")
    assert len(more.table) == 3 * 3
    columns = ["trial", "metric", "value"]
    assert more.table[columns].head(6).equals(first.table[columns])


def test_both_kinds_of_prompts_are_needed(vlm, make):
    with pytest.raises(ValueError, match="harmful and harmless prompts to trade between"):
        mg.search_guards(vlm, tiny.prompts(pairs=2).with_label("harmful"), make, {}, progress=False)

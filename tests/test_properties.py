"""Laws that hold for any prompts, states, results, guards and lines: what is saved comes back."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import mechguard as mg
from mechguard.storage import append_lines, read_lines

settings.register_profile(
    "mechguard",
    max_examples=25,
    deadline=None,
    derandomize=True,  # a test that fails must fail again
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("mechguard")

WORD = st.text(min_size=1, max_size=12)
SAID = WORD.filter(str.strip)
MAYBE = st.none() | WORD
NUMBER = st.floats(width=32, allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def prompts(draw, smallest=1):
    ids = draw(st.lists(WORD, min_size=smallest, max_size=8, unique=True))
    label = st.sampled_from(["harmful", "harmless"])
    return mg.Prompts(
        mg.Prompt(name, draw(SAID), draw(label), None, draw(MAYBE), draw(MAYBE), None, draw(MAYBE))
        for name in ids
    )


@given(prompts())
def test_saved_prompts_come_back(tmp_path, some):
    some.save(tmp_path / "p.jsonl")
    assert mg.load_prompts(tmp_path / "p.jsonl") == some


@given(prompts(), st.integers(0, 8), st.integers(0, 8))
def test_slices_concatenate_to_the_whole(some, first, second):
    first, second = sorted((first, second))
    assert some[:first] + some[first:second] + some[second:] == some
    assert (some[:first] + some[first:]).fingerprint == some.fingerprint


@given(prompts(), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_deals_every_prompt_once_and_no_pair_apart(some, share, seed):
    first, second = some.split(test=share, seed=seed)
    assert Counter(first) + Counter(second) == Counter(some)
    assert not {p.pair for p in first if p.pair is not None} & {p.pair for p in second}


@given(prompts())
def test_a_condition_replaces_the_one_before(some):
    assert some.with_image("blank").with_image("none") == some
    assert some.with_image("noise").with_image("blank") == some.with_image("blank")
    harmful, harmless = (some.with_label(label) for label in ("harmful", "harmless"))
    assert Counter(harmful + harmless) == Counter(some)


@given(st.data(), prompts(), st.dictionaries(WORD, JSON, max_size=3))
def test_saved_states_come_back_bit_for_bit(tmp_path, data, some, about):
    shape = (data.draw(st.integers(1, 3)), len(some), data.draw(st.integers(1, 4)))
    size = int(np.prod(shape))
    values = data.draw(st.lists(NUMBER, min_size=size, max_size=size))
    states = mg.Activations(torch.tensor(values).reshape(shape), list(range(shape[0])), some, about)
    states.save(tmp_path / "a")
    found = mg.Activations.load(tmp_path / "a")
    assert found.data.numpy().tobytes() == states.data.numpy().tobytes()
    assert (found.prompts, found.layers) == (some, states.layers)
    assert found.about == {**json.loads(json.dumps(about)), "condition": states.condition}


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99), MAYBE)
def test_saved_directions_come_back_bit_for_bit(tmp_path, layers, rank, seed, method):
    rows = torch.randn(layers, rank, rank + 2, generator=torch.Generator().manual_seed(seed))
    ssd = mg.Directions.from_tensor(rows)
    ssd.save(tmp_path / "d")
    found = mg.Directions.load(tmp_path / "d")
    assert torch.equal(found.data, ssd.data)
    assert repr(found) == repr(ssd)


@given(
    st.lists(
        st.tuples(WORD, st.none() | WORD, st.floats(), st.integers(-(2**53), 2**53)), min_size=1, max_size=6
    ),
)
def test_saved_results_come_back(tmp_path, rows):
    table = [dict(guard=name, note=note, value=value, n=n) for name, note, value, n in rows]
    result = mg.Result.from_rows(table, model="m")
    result.save(tmp_path / "r")
    found = mg.Result.load(tmp_path / "r")
    for column in ("guard", "note", "value", "n"):
        kept = [None if isinstance(x, float) and x != x else x for x in found.table[column]]
        assert kept == [None if x is None or x != x else x for x in result.table[column]], column
    assert found.about == result.about


@given(
    rank=st.integers(1, 2),
    alpha=st.floats(-4, 4),
    gate=st.sampled_from(["always", "sign", "cosine"]),
    source=st.sampled_from(["own", "last", "llm", "llm-stream"]),
    positions=st.sampled_from(["last", "all", "image", "text", "last_text"]),
    phase=st.sampled_from(["prompt", "generated", "both"]),
    name=WORD,
    seed=st.integers(0, 9),
)
def test_saved_guards_do_the_same(tmp_path, rank, alpha, gate, source, positions, phase, name, seed):
    random = torch.Generator().manual_seed(seed)
    ssd = mg.Directions.from_tensor(torch.randn(3, rank, 5, generator=random))
    scope = mg.Scope(positions, phase)
    guard = mg.vlm_guard(ssd, layers=[0, 2], alpha=alpha, gate=gate, source=source, scope=scope).renamed(name)
    guard.save(tmp_path / "g")
    found = mg.Guard.load(tmp_path / "g")
    assert (found.name, found.fingerprint) == (name, guard.fingerprint)
    hidden = torch.randn(2, 3, 5, generator=random)
    where = torch.ones(2, 3, dtype=torch.bool)
    for layer in guard.layers:
        assert torch.equal(*(one.steer(layer, hidden, hidden[:, :1], where) for one in (guard, found)))
        assert torch.equal(*(one.opens(layer, hidden[:, 0]) for one in (guard, found)))
    chain = guard | mg.self_reminder()
    chain.save(tmp_path / "c")
    assert mg.Chain.load(tmp_path / "c").fingerprint == chain.fingerprint


ROWS = st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), min_size=2, max_size=5)


@given(ROWS, st.data())
def test_a_file_of_lines_that_was_cut_anywhere_holds_the_lines_before_the_cut(tmp_path, rows, data):
    assume(not any("crc32" in row for row in rows))
    file = tmp_path / "l.jsonl"
    file.unlink(missing_ok=True)
    append_lines(file, rows[:1])
    append_lines(file, rows[1:])
    content = file.read_bytes()
    assert read_lines(file) == rows
    cut = data.draw(st.integers(0, len(content)))
    file.write_bytes(content[:cut])
    assert read_lines(file, adding=True) == rows[: content[:cut].count(b"\n")]
    append_lines(file, rows)
    assert read_lines(file) == [*rows[: content[:cut].count(b"\n")], *rows]


@given(ROWS, st.data())
def test_a_flipped_bit_in_a_file_of_lines_is_said(tmp_path, rows, data):
    file = tmp_path / "l.jsonl"
    file.unlink(missing_ok=True)
    append_lines(file, rows)
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 2))  # not the end of the last line
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(mg.MechguardError, match="damaged"):
        read_lines(file)


def test_half_of_a_surrogate_pair_is_refused_in_prompts_and_kept_in_lines(tmp_path):
    mg.Prompts([mg.Prompt("0", "how \ud83d ?")]).save(tmp_path / "p.jsonl")
    with pytest.raises(mg.MechguardError, match="row 1 of .* holds half of a surrogate pair"):
        mg.load_prompts(tmp_path / "p.jsonl")
    append_lines(tmp_path / "l.jsonl", [{"response": "\udc00"}])
    assert read_lines(tmp_path / "l.jsonl") == [{"response": "\udc00"}]

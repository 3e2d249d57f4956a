"""Keys and values with room: the same as transformers' own, without copying them at every token."""

import bench_models
import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import mechguard as mg
from mechguard import kv_cache
from mechguard.kv_cache import RoomyLayer, roomy_cache, with_room

EXACT = dict(atol=0, rtol=0)
STATIC = {"generation_config": GenerationConfig(cache_implementation="static")}


def drawn(count: int, seed: int) -> torch.Tensor:
    return torch.randn(3, 2, count, 4, generator=torch.Generator().manual_seed(seed))


def both(step) -> tuple[DynamicLayer, RoomyLayer]:
    """A plain layer and one with room, after the same steps."""
    layers = DynamicLayer(), RoomyLayer(room=2)
    for layer in layers:
        step(layer)
    return layers


def append(layer: DynamicLayer, *counts: int) -> None:
    for seed, count in enumerate(counts):
        layer.update(drawn(count, seed), drawn(count, seed + 100))


@pytest.mark.parametrize(
    "between",
    [
        lambda layer: None,
        lambda layer: layer.crop(-2),
        lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
        lambda layer: layer.reset(),
    ],
    ids=["append", "crop", "reorder", "reset"],
)
def test_a_layer_holds_what_the_plain_one_holds(between):
    def steps(layer):
        append(layer, 5, 1, 1)
        between(layer)
        append(layer, 1, 1, 3, 1)

    plain, roomy = both(steps)
    assert roomy.get_seq_length() == plain.get_seq_length()
    assert_close(roomy.keys, plain.keys, **EXACT)
    assert_close(roomy.values, plain.values, **EXACT)


def test_a_further_token_copies_nothing_while_there_is_room():
    layer = RoomyLayer(room=3)
    append(layer, 5)
    place = layer.keys.data_ptr()
    append(layer, 1, 1, 1)
    assert layer.keys.data_ptr() == place
    append(layer, 1)
    assert layer.keys.data_ptr() != place


def test_two_that_go_on_from_the_same_layer_leave_it_and_each_other_alone():
    held = DynamicCache()
    held.update(drawn(4, 0), drawn(4, 1), 0)
    kept = held.layers[0].keys.clone()
    first, second = with_room(held, 4), with_room(held, 4)
    first.update(drawn(1, 2), drawn(1, 2), 0)
    second.update(drawn(1, 3), drawn(1, 3), 0)
    again = with_room(first, 4)  # of one that has room already
    again.update(drawn(1, 5), drawn(1, 5), 0)
    first.update(drawn(1, 4), drawn(1, 4), 0)
    assert_close(held.layers[0].keys, kept, **EXACT)
    assert_close(first.layers[0].keys, torch.cat([kept, drawn(1, 2), drawn(1, 4)], -2), **EXACT)
    assert_close(second.layers[0].keys, torch.cat([kept, drawn(1, 3)], -2), **EXACT)
    assert_close(again.layers[0].keys, torch.cat([kept, drawn(1, 2), drawn(1, 5)], -2), **EXACT)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generate_writes_the_same_tokens_with_it(options):
    model, tokenizer = bench_models.llama(), bench_models.tokenizer()
    encoded = tokenizer(bench_models.texts(2), return_tensors="pt", padding=True)
    settings = {"do_sample": False, "max_new_tokens": 5, **options}
    made = roomy_cache(model, settings)
    assert any(isinstance(layer, RoomyLayer) for layer in made["past_key_values"].layers)
    found = []
    for given in ({}, made):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(model.generate(**encoded, **settings, **given))
    assert_close(found[0], found[1], **EXACT)


def test_a_caller_who_says_which_cache_gets_that_one(vlm):
    for said in ({"use_cache": False}, {"past_key_values": None}, {"cache_implementation": "static"}, STATIC):
        assert roomy_cache(vlm.hf_model, {"max_new_tokens": 2, **said}) == {}
    for said in ({"use_cache": False}, STATIC):
        assert mg.generate(vlm, "hello", max_new_tokens=2, progress=False, **said)


def test_sliding_windows_stay_what_they_are():
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4), DynamicLayer()]
    assert [type(layer) for layer in with_room(cache, 1).layers] == [DynamicSlidingWindowLayer, RoomyLayer]


def test_generation_uses_it(vlm, monkeypatch):
    made = []
    monkeypatch.setattr(
        kv_cache.RoomyLayer, "over", classmethod(lambda *given: made.append(given) or RoomyLayer(given[2]))
    )
    mg.generate(vlm, "hello", max_new_tokens=2, progress=False)
    assert len(made) == vlm.n_layers

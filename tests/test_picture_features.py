"""Every distinct picture goes through the vision encoder once, and gives the states it gives anyway."""

import pytest
import tiny
import tiny_families
import torch
from torch.testing import assert_close

import mechguard as mg
from mechguard.pictures import FeatureCache

CLOSE = dict(atol=2e-5, rtol=1e-5)


@pytest.fixture
def fresh() -> mg.VLM:
    return mg.load(tiny.llava(), processor=tiny.processor())


def collected(model: mg.VLM, sent: mg.Prompts, **options) -> torch.Tensor:
    return mg.collect(model, sent, progress=False, **options).data


def pictures_seen(model: mg.VLM, work) -> int:
    """How many pictures the vision encoder reads while `work` runs."""
    seen = []
    tower = model.hf_model.get_submodule(model.parts.vision_layers)[0]
    handle = tower.register_forward_hook(lambda _, given, out: seen.append(len(out)))
    try:
        work()
    finally:
        handle.remove()
    return sum(seen)


def test_each_distinct_picture_is_encoded_once_across_views_and_answers(fresh, prompts):
    blank, noise = (prompts[:6].with_image(word) for word in ("blank", "noise"))

    def work() -> None:
        for model, sent in ((fresh.llm, prompts[:6]), (fresh, blank), (fresh, noise), (fresh, noise)):
            collected(model, sent, batch_size=4)
        mg.generate(fresh, blank + noise, max_new_tokens=2, progress=False)

    assert pictures_seen(fresh, work) == 1 + 6  # the blank one, and noise of its own for every prompt


def test_states_do_not_depend_on_what_was_seen_before(fresh, prompts):
    sent = prompts[:5].with_image("noise")
    first = collected(fresh, sent)
    assert torch.equal(collected(fresh, sent), first)
    other = mg.load(tiny.llava(), processor=tiny.processor())
    collected(other, sent[3:])
    assert torch.equal(collected(other, sent), first)


@pytest.mark.parametrize("family", ["llava", "gemma3", "internvl", "llava_next"])
def test_states_are_those_of_encoding_every_time(family, tmp_path, monkeypatch):
    tiny_families.save(family, tmp_path)
    model = mg.load(tmp_path)
    prompts = tiny.prompts(pairs=2)
    sent = prompts.with_image("blank") + prompts.with_image("noise")
    known = collected(model, sent)
    assert (model.picture_features.encoded == 5) == (family != "llava_next")  # tiles are left to the family
    monkeypatch.setattr(FeatureCache, "fill", lambda self, hf_model, encoded, pictures: dict(encoded))
    assert_close(known, collected(model, sent), **CLOSE)


def test_no_features_of_other_weights_are_used(fresh, prompts):
    sent = prompts[:2].with_image("blank")
    before = collected(fresh, sent)
    with torch.no_grad():
        for parameter in fresh.hf_model.get_submodule(fresh.parts.projector).parameters():
            parameter.mul_(1.5)
    after = collected(fresh, sent)
    assert (before - after).abs().max() > 1e-3


def test_no_more_features_are_kept_than_the_limit_allows(fresh, prompts):
    fresh.picture_features.limit = 5 * 32 * 4 * 2  # two pictures of five positions
    collected(fresh, prompts[:6].with_image("noise"))
    assert len(fresh.picture_features._known) == 2

"""What a notebook shows of an object: what it is, its shape, what next; and never the markup of others."""

from __future__ import annotations

from html.parser import HTMLParser

import pandas as pd
import pytest
import tiny
import torch

import mechguard as mg
from mechguard.cards import draw_card, draw_line, draw_table

SCRIPT = "<script>alert(1)</script>"


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in ("img", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "polyline":
            assert self.open.pop() == tag


def check(markup: str, *said: str) -> None:
    """Well formed, without scripts, and saying what it should."""
    tags = Tags(markup)
    assert not tags.open
    assert "script" not in tags.seen
    for text in said:
        assert text in markup, text


def test_prompts_show_texts_labels_and_pictures_and_escape_them():
    prompts = mg.Prompts([mg.Prompt("a", SCRIPT), mg.Prompt("b", "cake", "harmless")], name=SCRIPT)
    check(prompts._repr_html_(), "&lt;script&gt;", "1 harmful, 1 harmless", "mg.collect(vlm, prompts)")
    assert "<img" not in prompts._repr_html_()
    assert prompts.with_image("blank")._repr_html_().count("data:image/jpeg") == 2


def test_states_directions_and_guards_say_their_shape_and_what_next():
    states = mg.Activations.from_tensor(
        torch.randn(3, 8, 16), labels=[1, 0] * 4, pairs=[0, 0, 1, 1, 2, 2, 3, 3]
    )
    check(states._repr_html_(), "layer 3 x prompt 8 x d_model 16", "mg.fit_directions", "<polyline")
    ssd = mg.fit_directions(states, rank=2)
    check(ssd._repr_html_(), "layer 3 x rank 2 x d_model 16", "mg.vlm_guard", "a gate can be centred")
    guard = mg.vlm_guard(ssd, layers=[1, 2])
    check(guard._repr_html_(), "Guard: vlm_guard", "1, 2", "mg.generate")
    both = guard | mg.self_reminder()
    check(both._repr_html_(), "Guards in a chain", "puts around every prompt", "{query}")


def test_a_model_says_what_it_reads(vlm: mg.VLM):
    check(vlm._repr_html_(), "pictures and text", "3 layers of d_model 32", "blocks.0..2.hook_resid_post")
    check(vlm.llm._repr_html_(), "Language model", "text alone")


def test_a_result_shows_its_first_rows_and_counts_all():
    table = pd.DataFrame({"condition": [SCRIPT] * 30, "layer": range(30), "value": 0.123456})
    shown = mg.Result(table, {"model": "toy"})._repr_html_()
    check(shown, "30", "toy", "0.123", "&lt;script&gt;", "(30 in all)")
    assert shown.count("0.123") == 6


def test_cards_leave_out_what_is_not_known():
    assert "nothing" not in draw_card("t", {"nothing": None, "neither": ""})
    assert draw_table([]) == ""
    assert "…" in draw_table([{"a": "x" * 200}])


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 1.0, 0.5]])
def test_a_line_stays_inside_its_box(values: list[float]):
    points = draw_line(values).split('points="')[1].split('"')[0].split()
    assert len(points) == len(values)
    assert all(0 <= float(y) <= 28 for _, y in (point.split(",") for point in points))


def test_single_layers_and_empty_prompts_have_cards_too():
    check(mg.Prompts([])._repr_html_())
    one = mg.Activations.from_tensor(torch.randn(1, 4, 8), labels=[1, 0, 1, 0])
    check(one._repr_html_())
    check(mg.Directions.from_tensor(torch.randn(1, 8))._repr_html_())
    assert tiny.prompts(pairs=1)._repr_html_()

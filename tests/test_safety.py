"""Nobody is let in: no code of others runs, and text of others stays text."""

import json
import os
import pickle
import shutil
from html.parser import HTMLParser

import pandas as pd
import pretend
import pytest
import tiny
import torch

import mechguard as mg
from mechguard.report import write_figures, write_report

EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
PROBE = '<script>alert(1)</script></script><xss-probe onx="1">"\'><img src=x onerror=alert(1)>'


# --------------------------------------------------------------------------------- code of others


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_beside_a_model_is_not_run_unless_asked_for(llava_folder, tmp_path, file):
    """A folder whose files name classes of their own, as `trust_remote_code` would run them."""
    folder = shutil.copytree(llava_folder, tmp_path / "model")
    (folder / "evil.py").write_text(EVIL)
    kinds = (
        "AutoConfig",
        "AutoProcessor",
        "AutoTokenizer",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
    )
    facts = json.loads((folder / file).read_text())
    facts |= {"auto_map": dict.fromkeys(kinds, "evil.Evil"), "processor_class": "Evil"}
    facts |= {"model_type": "evil"} if file == "config.json" else {}
    (folder / file).write_text(json.dumps(facts))
    try:
        mg.load(folder)
    except mg.MechguardError as error:
        assert str(folder) in str(error)  # noqa: PT017
    assert not list(tmp_path.rglob("ran"))


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_pickled_weights_are_not_read(llava_folder, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(mg.MechguardError, match="the weights of .* cannot be read"):
        mg.load(folder)
    (tmp_path / "g.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    (tmp_path / "g.json").write_text('{"kind": "guard"}')
    with pytest.raises(mg.MechguardError):
        mg.Guard.load(tmp_path / "g")
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------- text of others


class Tags(HTMLParser):
    """The tags of a page, as a browser finds them: what stands in a script is none."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts.append(data)


def refuse_probe(page: str) -> None:
    """The probe may stand in a page as text, not as tags or code."""
    tags = Tags(page)
    assert "xss-probe" not in {tag for tag, _ in tags.found}
    for tag, attributes in tags.found:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert not any(code.strip().startswith("alert(1)") for code in tags.scripts)


def poisoned(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """A table that says something of its author's in every text it may hold."""
    frame = frame.copy()
    for column in columns:
        frame[column] = [f"{PROBE} {value}" if isinstance(value, str) else value for value in frame[column]]
    return frame


def test_a_probe_is_found_where_it_is_not_escaped():
    for page in (f"<p>{PROBE}</p>", f"<script>x = {json.dumps(PROBE)}</script>", '<b onclick="x">y</b>'):
        with pytest.raises(AssertionError):
            refuse_probe(page)


def test_the_report_and_its_figures_hold_texts_as_text(tmp_path):
    """Prompts, answers, names of models and sources, and words in results."""
    folder = pretend.write_study(tmp_path / PROBE.replace("/", "-")[:20])
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    for row in rows:
        row |= dict.fromkeys(("sent", "response", "request", "raw", "category"), PROBE)
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = json.loads((folder / "study.json").read_text())
    facts |= {"model": PROBE, "command": PROBE, "family": PROBE, "versions": {PROBE: PROBE}}
    facts["sources"] = {"anchors": dict.fromkeys(("what", "source", "licence", "citation"), PROBE)}
    facts["settings"] = {PROBE: PROBE}
    (folder / "study.json").write_text(json.dumps(facts))
    for name in ("states", "projections", "tokens"):
        result = mg.Result.load(folder / "results" / name)
        texts = [column for column in ("text", "prompt", "id", "token", "category") if column in result.table]
        mg.Result(poisoned(result.table, *texts), {**result.about, "model": PROBE}).save(
            folder / "results" / name
        )
    refuse_probe(write_report(folder).read_text())
    pages = [path for path in write_figures(folder) if path.suffix == ".html"]
    assert pages
    for page in pages:
        refuse_probe(page.read_text())


def test_the_response_table_holds_answers_as_text(tmp_path):
    rows = [
        dict.fromkeys(("setting", "id", "sent", "response"), PROBE)
        | dict(condition="blank", guard=guard, label="harmful", complied=True)
        | dict(complete_refusal=False, keyword_refusal=False)
        for guard in ("none", "vlm_guard")
    ]
    figure = mg.plots.response_table(mg.Result(pd.DataFrame(rows)))
    mg.plots.save(figure, tmp_path / "r", pictures=False, include_plotlyjs=False)
    refuse_probe((tmp_path / "r.html").read_text())
    for column in figure.data[0].cells.values:  # plotly reads a few tags in texts by itself
        assert not any("<script" in cell or "<xss" in cell or "<img" in cell for cell in column)


def test_cards_hold_texts_as_text(vlm):
    prompts = mg.Prompts([mg.Prompt(PROBE, PROBE, category=PROBE)], name=PROBE)
    states = mg.Activations(
        torch.randn(2, 2, 5), [0, 1], tiny.prompts(pairs=1).renamed(PROBE), {"model": PROBE}
    )
    ssd = mg.Directions(torch.eye(5)[None, :2].repeat(2, 1, 1), [0, 1], PROBE, None, {"model": PROBE})
    guard = mg.vlm_guard(ssd, layers=[0], gate="sign").renamed(PROBE)
    wrapped = mg.Guard(PROBE, (), None, template=f"{PROBE} {{query}}")
    result = mg.Result.from_rows([dict(guard=PROBE, metric=PROBE, value=1.0)], model=PROBE)
    named = mg.VLM(vlm.hf_model, vlm.processor, name=PROBE)
    for shown in (prompts, states, ssd, guard, wrapped, guard | wrapped, result, named):
        refuse_probe(shown._repr_html_())

"""The explorer: a finished study in JupyterLab, from its folder, without a model.

    layer -> state map, histogram of projections, tokens
    prompt (chosen, or clicked in the map) -> its tokens, its picture, its responses

Needs the extra `notebooks`.
"""

from __future__ import annotations

import os
from functools import cached_property
from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mechguard import plots
from mechguard.cards import draw_table
from mechguard.errors import MechguardError
from mechguard.plots.responses import verdict
from mechguard.report import StudyFolder

NEEDED = ("states", "projections")
NOT_KEPT = "<em>The tokens of this prompt were not kept; those of a few test prompts are.</em>"
MAP_HEIGHT = 520


def explore(study_dir: str | os.PathLike[str]) -> Explorer:
    """Explore a finished study in a notebook: its layers, its prompts, its responses.

    Args:
        study_dir: a folder that `mechguard study` made; nothing else is read.

    Raises:
        MechguardError: the folder is not that of a study, lacks the states or projections, or ipywidgets and
            anywidget are not installed.
    """
    try:
        import anywidget  # noqa: F401
        import ipywidgets  # noqa: F401
    except ImportError:
        raise MechguardError(
            "exploring needs ipywidgets and anywidget; install mechguard[notebooks]"
        ) from None
    study = StudyFolder.read(study_dir)
    missing = [name for name in NEEDED if name not in study.results]
    if missing:
        raise MechguardError(
            f"{study_dir} holds no results/{missing[0]}.csv, which the explorer shows; run `mechguard study` "
            "there again: it makes only what is missing"
        )
    return Explorer(study)


class Explorer:
    """Linked widgets over one study.

    Attributes:
        layer: the slider over layers.
        prompt: the choice of a prompt.
        condition: the choice of a condition, for the tokens.
        map, histogram, tokens: the figures.
        answers: what was answered to the prompt, by condition and guard.
    """

    def __init__(self, study: StudyFolder) -> None:
        import ipywidgets as widgets

        self.study = study
        points = study.results["states"].table
        self._frames = {frame.name: frame for frame in self._drawn.frames}
        layers = [int(name) for name in self._frames]
        self.layer = widgets.SelectionSlider(options=layers, value=layers[0], description="layer")
        self.play = widgets.Play(min=0, max=len(layers) - 1, interval=900)
        widgets.link((self.play, "value"), (self.layer, "index"))
        known = points.drop_duplicates("id")
        choices = [(f"{row.label}: {row.text}"[:90], row.id) for row in known.itertuples()]
        self.prompt = widgets.Dropdown(options=choices, description="prompt", layout={"width": "60%"})
        self.condition = widgets.Dropdown(description="condition")
        self.map = self._make_map()
        self.histogram = _fill(go.FigureWidget(), self._histogram(layers[0]))
        self.tokens = go.FigureWidget()
        self._token_box = widgets.VBox([self.tokens])
        self.note = widgets.HTML()
        self.answers = widgets.HTML()
        head = widgets.HTML(f"<h3>{escape(study.model)}</h3>")
        self.box = widgets.VBox(
            [
                head,
                widgets.HBox([self.play, self.layer]),
                self.map,
                self.histogram,
                widgets.HBox([self.prompt, self.condition]),
                self.note,
                self._token_box,
                self.answers,
            ]
        )
        self.layer.observe(lambda change: self.show_layer(change["new"]), "value")
        self.prompt.observe(lambda change: self.show_prompt(change["new"]), "value")
        self.condition.observe(lambda change: self._show_tokens(), "value")
        self.show_prompt(self._first_read())

    def show_layer(self, layer: int) -> None:
        """Move every figure to a layer."""
        frame = self._frames[str(layer)]
        with self.map.batch_update():
            for trace, place in zip(self.map.data, frame.data, strict=False):
                trace.x, trace.y = place.x, place.y
            self.map.layout.update(_plain(frame.layout))
        drawn = self._histogram(layer)
        with self.histogram.batch_update():
            for trace, fresh in zip(self.histogram.data, drawn.data, strict=True):
                trace.x, trace.xbins = fresh.x, fresh.xbins
            self.histogram.layout.shapes = drawn.layout.shapes
            self.histogram.layout.title = _plain(drawn.layout).title
        self._show_tokens()

    def show_prompt(self, id: str) -> None:
        """Show one prompt: where it lies, its tokens and what was answered."""
        self.prompt.value = id
        table = self._tokens
        found = list(dict.fromkeys(table.loc[table["id"].astype(str) == str(id), "condition"]))
        self.condition.options = found
        if found:
            self.condition.value = found[-1]
        self.answers.value = self._answers(id)
        with self.map.batch_update():
            for trace in self.map.data:
                ids = (trace.meta or {}).get("ids")
                if ids is not None:
                    trace.selectedpoints = [ids.index(id)] if id in ids else []
        self._show_tokens()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)

    @cached_property
    def _drawn(self) -> go.Figure:
        return plots.state_map(self.study.results["states"])

    @property
    def _tokens(self) -> pd.DataFrame:
        if "tokens" not in self.study.results:
            return pd.DataFrame({"id": [], "condition": []})
        return self.study.results["tokens"].table

    def _first_read(self) -> str:
        """The first prompt whose tokens were kept, else the first of all."""
        known = self._tokens["id"].astype(str)
        return str(known.iloc[0]) if len(known) else str(self.prompt.options[0][1])

    def _make_map(self) -> go.FigureWidget:
        """The map without frames, which a widget does not have: the slider moves its points."""
        figure = _fill(go.FigureWidget(), self._drawn)
        figure.update_layout(height=MAP_HEIGHT, margin={"b": 60}, hovermode="closest")
        first = self.study.results["states"].table
        first = first[first["layer"] == first["layer"].min()]
        order = first[["condition", "label"]].drop_duplicates().itertuples(index=False)
        for trace, (condition, label) in zip(figure.data, order, strict=False):
            rows = first[(first["condition"] == condition) & (first["label"] == label)]
            trace.meta = {"ids": sorted(rows["id"].tolist())}
            trace.selected = {"marker": {"size": 16, "opacity": 1}}
            trace.unselected = {"marker": {"opacity": 0.55}}
            trace.on_click(self._clicked)
        return figure

    def _clicked(self, trace: Any, points: Any, _: Any) -> None:
        if points.point_inds:
            self.show_prompt(trace.meta["ids"][points.point_inds[0]])

    def _histogram(self, layer: int) -> go.Figure:
        return plots.projection_histogram(self.study.reported("projections"), layer=layer)

    def _show_tokens(self) -> None:
        known = bool(self.condition.options)
        self.note.value = "" if known else NOT_KEPT
        self._token_box.layout.display = "" if known else "none"
        if not known:
            return
        drawn = plots.token_view(
            self.study.results["tokens"],
            id=str(self.prompt.value),
            condition=self.condition.value,
            layer=self.layer.value,
        )
        _fill(self.tokens, drawn)
        self.tokens.layout.margin.b = 20

    def _answers(self, id: str) -> str:
        table = self.study.responses
        if table.empty:
            return ""
        rows = table[table["id"] == id]
        return draw_table(
            [
                {
                    "condition": row["condition"],
                    "guard": row["guard"],
                    "judged": verdict(
                        row["complied"],
                        row.get("complete_refusal", False),
                        row.get("keyword_refusal", False),
                    ),
                    "response": row["response"] or "(empty)",
                }
                for row in rows.to_dict("records")
            ]
        )


def _fill(widget: go.FigureWidget, figure: go.Figure) -> go.FigureWidget:
    """Put a figure into a widget that may hold another one.

    What a widget is given when it is made does not always reach the browser; what it is given later does.
    """
    widget.data = ()
    widget.layout = _plain(figure.layout)
    widget.add_traces(list(figure.data))
    return widget


def _plain(layout: go.Layout) -> go.Layout:
    """A layout without what moves frames, its subtitle in its title."""
    plain = go.Layout(layout)
    plain.sliders = plain.updatemenus = ()
    plain.meta = None
    title = plain.title.text
    plain.title = {"text": f"{title}<br><sup>{plain.title.subtitle.text}</sup>"}
    return plain

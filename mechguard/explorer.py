"""The explorer: a finished study in JupyterLab, from its folder, without a model.

    layer  -> state map, histogram of projections, tokens
    prompt -> its place in the map and the histogram, its tokens, its responses

A prompt is chosen from the list or by a click in the map. Needs the extra `notebooks`.
"""

from __future__ import annotations

import os
from functools import cache
from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from mechguard import plots
from mechguard.cards import draw_table
from mechguard.errors import MechguardError
from mechguard.plots.responses import verdict
from mechguard.plots.style import GREEN
from mechguard.report import StudyFolder

NEEDED = ("states", "projections")
NOT_KEPT = "<em>The tokens of this prompt were not kept; those of a few test prompts are.</em>"
MAP_HEIGHT = 520
CHOSEN = {"color": GREEN, "width": 2}  # neither label's colour
# anywidget gives a module two seconds to load, which plotly.js takes on a busy machine (a FigureWidget then
# stays empty). So it comes as a value, and is loaded when it is needed. Figures are drawn when they are shown
# or resized: a notebook makes its widgets before they have a size.
VIEW = """
const load = source => window.Plotly ? Promise.resolve() : new Promise(done => {
  const script = document.createElement("script");
  script.onload = done;
  script.src = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  document.head.append(script);
});
async function render({ model, el }) {
  el.classList.add("mechguard-explorer");
  const places = {};
  const place = name => {
    if (!places[name]) el.append(places[name] = document.createElement("div"));
    return places[name];
  };
  const draw = () => {
    for (const [name, figure] of Object.entries(model.get("drawn"))) {
      const div = place(name);
      div.hidden = !figure;
      if (!figure || !el.clientWidth) continue;
      const { data, layout } = JSON.parse(figure);
      const width = el.clientWidth;
      Plotly.react(div, data, { ...layout, width }, { displaylogo: false });
      if (div.listens) continue;
      div.listens = true;
      div.on("plotly_click", event => {
        model.set("clicked", String(event.points[0].id ?? ""));
        model.save_changes();
      });
    }
  };
  await load(model.get("plotlyjs"));
  model.on("change:drawn", draw);
  const watch = new ResizeObserver(draw);
  watch.observe(el);
  return () => watch.disconnect();
}
export default { render };
"""

# A figure's own text is mid-grey; here it has the notebook's ink.
INKED = """
.mechguard-explorer :is(.xaxislayer-above, .yaxislayer-above, .infolayer, .heatmaplayer) text {
  fill: var(--jp-ui-font-color1, currentColor) !important;
}
"""


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
        figures: what is drawn: "map", "histogram", and "tokens" or None where none were kept.
        answers: what was answered to the prompt, by condition and guard.
    """

    def __init__(self, study: StudyFolder) -> None:
        import ipywidgets as widgets

        self.study = study
        self.figures: dict[str, go.Figure | None] = {}
        points = study.results["states"].table
        layers = sorted(int(layer) for layer in points["layer"].unique())
        self.layer = widgets.SelectionSlider(options=layers, value=layers[0], description="layer")
        self.play = widgets.Play(min=0, max=len(layers) - 1, interval=900)
        widgets.link((self.play, "value"), (self.layer, "index"))
        known = points.drop_duplicates("id")
        choices = [(f"{row.label}: {row.text}"[:90], str(row.id)) for row in known.itertuples()]
        wide = {"width": "60%"}
        self.prompt = widgets.Dropdown(options=choices, description="prompt", layout=wide)
        self.condition = widgets.Dropdown(description="tokens")
        self.view = _make_view()
        self.note, self.answers = widgets.HTML(), widgets.HTML()
        self.box = widgets.VBox(
            [
                widgets.HTML(f"<h3>{escape(study.model)}</h3>"),
                widgets.HBox([self.play, self.layer]),
                widgets.HBox([self.prompt, self.condition]),
                self.note,
                self.view,
                self.answers,
            ]
        )
        self._map_of = cache(self._draw_map)
        self.prompt.value = self._first_read()
        self._show_prompt()
        self.layer.observe(lambda change: self._draw("map", "histogram", "tokens"), "value")
        self.prompt.observe(lambda change: self._show_prompt(), "value")
        self.condition.observe(lambda change: self._draw("tokens"), "value")
        self.view.observe(lambda change: self._click(change["new"]), "clicked")

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)

    def _show_prompt(self) -> None:
        """Show the chosen prompt: where it lies, its tokens and what was answered."""
        table = self._tokens
        found = list(dict.fromkeys(table.loc[table["id"].astype(str) == self.prompt.value, "condition"]))
        self.condition.options = found
        if found:
            self.condition.value = found[-1]
        self.note.value = "" if found else NOT_KEPT
        self.answers.value = self._answers(self.prompt.value)
        self._draw("map", "histogram", "tokens")

    def _click(self, id: str) -> None:
        if id in {value for _, value in self.prompt.options}:
            self.prompt.value = id

    def _draw(self, *names: str) -> None:
        """Draw these figures again, for the layer, the prompt and the condition that are chosen."""
        makers = {"map": self._map, "histogram": self._histogram, "tokens": self._token_view}
        self.figures |= {name: makers[name]() for name in names}
        self.view.drawn = {
            name: None if figure is None else figure.to_json() for name, figure in self.figures.items()
        }

    def _map(self) -> go.Figure:
        """The layer's map, with the prompt's places joined in the order of the conditions."""
        rows = self.study.results["states"].table
        chosen = rows[(rows["layer"] == self.layer.value) & (rows["id"].astype(str) == self.prompt.value)]
        ring = {"symbol": "circle-open", "size": 19, "color": CHOSEN["color"], "line": {"width": 3}}
        figure = go.Figure(self._map_of(self.layer.value))
        return figure.add_scatter(
            x=chosen["x"].tolist(), y=chosen["y"].tolist(), name="chosen", mode="markers", marker=ring,
            hoverinfo="skip",
        )  # fmt: skip

    def _draw_map(self, layer: int) -> go.Figure:
        figure = plots.state_map(self.study.results["states"].where(layer=layer))
        figure.frames, figure.layout.sliders, figure.layout.updatemenus = (), (), ()
        figure.layout.meta = None
        return figure.update_layout(height=MAP_HEIGHT, margin={"b": 60}, hovermode="closest")

    def _histogram(self) -> go.Figure:
        result = self.study.reported("projections")
        figure = plots.projection_histogram(result, layer=self.layer.value)
        rows = result.table
        mine = rows[(rows["layer"] == self.layer.value) & (rows["id"].astype(str) == self.prompt.value)]
        conditions = list(rows["condition"].dropna().unique())
        for row in mine.itertuples():
            figure.add_vline(row.value, line=CHOSEN, row=1, col=conditions.index(row.condition) + 1)
        return figure

    def _token_view(self) -> go.Figure | None:
        if not self.condition.options:
            return None
        figure = plots.token_view(
            self.study.results["tokens"],
            id=self.prompt.value,
            condition=self.condition.value,
            layer=self.layer.value,
        )
        figure.frames, figure.layout.sliders, figure.layout.updatemenus = (), (), ()
        return figure.update_layout(margin={"b": 20}, height=figure.layout.height - 90)

    @property
    def _tokens(self) -> pd.DataFrame:
        if "tokens" not in self.study.results:
            return pd.DataFrame({"id": [], "condition": []})
        return self.study.results["tokens"].table

    def _first_read(self) -> str:
        """The first prompt whose tokens were kept, else the first of all."""
        known = self._tokens["id"].astype(str)
        return str(known.iloc[0]) if len(known) else str(self.prompt.options[0][1])

    def _answers(self, id: str) -> str:
        table = self.study.responses
        if table.empty:
            return ""
        return draw_table([_answer(row) for row in table[table["id"].astype(str) == id].to_dict("records")])


def _answer(row: dict[str, Any]) -> dict[str, str]:
    refused = row.get("complete_refusal", False), row.get("keyword_refusal", False)
    return {
        "condition": row["condition"],
        "guard": row["guard"],
        "judged": verdict(row["complied"], *refused),
        "response": row["response"] or "(empty)",
    }


def _make_view() -> Any:
    """A widget that draws figures, given by name as plotly's JSON, and tells which point was clicked."""
    import anywidget
    import traitlets

    class View(anywidget.AnyWidget):
        _esm, _css = VIEW, INKED
        plotlyjs = traitlets.Unicode(get_plotlyjs()).tag(sync=True)
        drawn = traitlets.Dict().tag(sync=True)
        clicked = traitlets.Unicode().tag(sync=True)

    return View()

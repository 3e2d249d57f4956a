"""Motion: a saved map's points glide from layer to layer, without a figure drawn anew for each of them.

Plotly draws all of a figure for a frame: axes, legend, slider. On a page the coordinates of all layers come
as one array of whole numbers instead, and while the layer changes a canvas above the figure draws the points;
when it rests, plotly draws that layer, with its axes and hover boxes. In a notebook a figure has frames.
"""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import numpy as np
import plotly.graph_objects as go

STEPS = 65534  # from one end of an axis to the other; two bytes a coordinate
GAP = 65535  # the end of an arrow
FLAT = ("scatter", "scattergl")
MOTION_SCRIPT = """
(figure => {
  const {layers, counts, views, places} = MOTION, STEPS = 65534, GAP = 65535;
  const known = new Uint16Array(Uint8Array.from(atob(places), c => c.charCodeAt(0)).buffer);
  const size = known.length / layers.length;   // of a layer: for each trace all x, then all y
  const starts = counts.map((_, t) => 2 * counts.slice(0, t).reduce((a, b) => a + b, 0));
  const canvas = figure.appendChild(document.createElement("canvas"));
  Object.assign(canvas.style, {position: "absolute", pointerEvents: "none", visibility: "hidden"});
  figure.style.position = "relative";
  const corners = (c, places) => {
    places.forEach(([x, y], n) => n ? c.lineTo(x, y) : c.moveTo(x, y));
    c.closePath();
  };
  const shapes = {
    square: (c, x, y, r) => c.rect(x - r, y - r, 2 * r, 2 * r),
    diamond: (c, x, y, r) => corners(c, [[x, y - r], [x + r, y], [x, y + r], [x - r, y]]),
    "triangle-up": (c, x, y, r) => corners(c, [[x, y - r], [x + r, y + r], [x - r, y + r]]),
    cross: (c, x, y, r) => {
      c.rect(x - r, y - r / 3, 2 * r, r * 2 / 3);
      c.rect(x - r / 3, y - r, r * 2 / 3, 2 * r);
    },
    circle: (c, x, y, r) => { c.moveTo(x + r, y); c.arc(x, y, r, 0, 7); },
  };
  let now = Float32Array.from(known.subarray(0, size)), from = now;
  let began = 0, at = 0, moving = false, held = false, rest, beat;
  function paint() {
    const {_size: area} = figure._fullLayout, scale = window.devicePixelRatio;
    canvas.width = area.w * scale;
    canvas.height = area.h * scale;
    const box = {left: area.l, top: area.t, width: area.w, height: area.h};
    for (const side in box) canvas.style[side] = `${box[side]}px`;
    const c = canvas.getContext("2d");
    c.scale(scale, scale);
    figure.data.forEach((trace, t) => {
      if (trace.visible === "legendonly") return;
      const lines = trace.mode !== "markers", look = trace.marker || {}, open = /-open$/.test(look.symbol);
      const shape = shapes[String(look.symbol).replace("-open", "")] || shapes.circle;
      const radius = (look.size || 6) / 2, middle = starts[t] + counts[t];
      const xs = now.subarray(starts[t], middle), ys = now.subarray(middle, middle + counts[t]);
      c.beginPath();
      for (let n = 0; n < counts[t]; n++) {
        if (xs[n] === GAP) continue;
        const x = xs[n] / STEPS * area.w, y = (1 - ys[n] / STEPS) * area.h;
        if (!lines) shape(c, x, y, radius);
        else if (n === 0 || xs[n - 1] === GAP) c.moveTo(x, y);
        else c.lineTo(x, y);
      }
      c.strokeStyle = c.fillStyle = lines ? trace.line.color : look.color;
      if (lines || open) c.stroke(); else c.fill();
    });
  }
  function tick(time) {
    const part = Math.min(1, (time - began) / 250), goal = known.subarray(at * size, (at + 1) * size);
    for (let n = 0; n < size; n++) now[n] = goal[n] === GAP ? GAP : from[n] + (goal[n] - from[n]) * part;
    paint();
    if (part < 1) requestAnimationFrame(tick); else moving = false;
  }
  function settle() {
    const value = (ends, place) => place === GAP ? null : ends[0] + place / STEPS * (ends[1] - ends[0]);
    const ends = views[at], x = [], y = [], base = at * size;
    counts.forEach((count, t) => {
      const here = base + starts[t];
      x.push(Array.from(known.subarray(here, here + count), p => value(ends.x, p)));
      y.push(Array.from(known.subarray(here + count, here + 2 * count), p => value(ends.y, p)));
    });
    const title = {"title.text": ends.title, "title.subtitle.text": ends.subtitle};
    const view = {...title, "xaxis.range": ends.x, "yaxis.range": ends.y, "sliders[0].active": at};
    Plotly.update(figure, {x, y}, view).then(() => show(false));
  }
  function show(canvasOnly) {
    const parts = (names, style, value) =>
      figure.querySelectorAll(names).forEach(part => { part.style[style] = value; });
    canvas.style.visibility = canvasOnly ? "visible" : "hidden";
    parts(".gl-container, .scatterlayer", "visibility", canvasOnly ? "hidden" : "");
    // What only the figure at rest has right: the numbers on its axes and its title.
    parts(".xaxislayer-above, .yaxislayer-above, .g-gtitle", "opacity", canvasOnly ? 0.2 : 1);
  }
  const restIn = wait => { clearTimeout(rest); rest = held ? null : setTimeout(settle, wait); };
  figure.goTo = layer => {
    const next = layers.indexOf(layer);
    if (next < 0 || next === at) return;
    [at, from, began] = [next, now.slice(), performance.now()];
    show(true);
    if (!moving) requestAnimationFrame(tick);
    moving = true;
    restIn(450);
    figure.dispatchEvent(new CustomEvent("layer", {detail: layer}));
  };
  figure.on("plotly_sliderstart", () => { held = true; clearTimeout(rest); });
  figure.on("plotly_sliderend", () => { held = false; restIn(250); });
  figure.on("plotly_sliderchange", event => figure.goTo(Number(event.step.label)));
  figure.on("plotly_buttonclicked", event => {
    clearInterval(beat);
    if (event.active === 0) beat = setInterval(() => figure.goTo(layers[(at + 1) % layers.length]), 400);
  });
})(document.getElementById("{plot_id}"));
"""


def set_in_motion(figure: go.Figure) -> tuple[go.Figure, str]:
    """A figure without its frames, and the script that moves it; as it is where frames are no points."""
    if not figure.frames or any(trace.type not in FLAT for trace in figure.data):
        return figure, ""
    still = go.Figure(figure)
    still.frames = ()
    for step in still.layout.sliders[0].steps:
        step.method = "skip"
    for button in still.layout.updatemenus[0].buttons:
        button.method = "skip"
    # A slash inside a title must not end the page's script.
    motion = json.dumps(_describe(figure)).replace("<", "\\u003c")
    return still, MOTION_SCRIPT.replace("MOTION", motion, 1)


def _describe(figure: go.Figure) -> dict[str, Any]:
    places = [_quantised(trace, frame.layout) for frame in figure.frames for trace in frame.data]
    return {
        "layers": [int(frame.name) for frame in figure.frames],
        "counts": [len(trace.x) for trace in figure.frames[0].data],
        "views": [_view(frame.layout) for frame in figure.frames],
        "places": b64encode(np.concatenate(places).astype("<u2").tobytes()).decode(),
    }


def _view(layout: go.Layout) -> dict[str, Any]:
    title = {"title": layout.title.text, "subtitle": layout.title.subtitle.text}
    return {**title, "x": list(layout.xaxis.range), "y": list(layout.yaxis.range)}


def _quantised(trace: Any, layout: go.Layout) -> np.ndarray:
    """All x of a trace, then all y, in steps along their axes."""
    parts = []
    for values, (low, high) in ((trace.x, layout.xaxis.range), (trace.y, layout.yaxis.range)):
        steps = np.rint((np.asarray(values, dtype=float) - low) / (high - low) * STEPS)
        parts.append(np.where(np.isnan(steps), GAP, steps))
    return np.concatenate(parts)

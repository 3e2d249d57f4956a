"""The methods of the literature, each a small function that makes a guard of fitted directions or states.

VLM-Guard and its neighbours over the same parts: a move, a gate, a source, a scope, layers. Each docstring
gives the formula as we read it, the citation, and what we are unsure of. h is the state of the VLM, q that of
the language model reading the text alone, v a direction with |v| = 1, d a mean difference with its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.activations import Activations
from mechguard.directions import Directions, fit_directions
from mechguard.errors import MechguardError
from mechguard.guards.gates import Gate, Word, make_gate
from mechguard.guards.guard import Guard, Scope, Source
from mechguard.guards.moves import Add, Multiply, Realign, Restore

EVERYWHERE = Scope("all", "both")


def vlm_guard(
    directions: Directions,
    *,
    layers: Sequence[int],
    alpha: float = 1.0,
    project: bool = True,
    gate: Word = "midpoint",
    source: Source = "llm-stream",
    scope: Scope | None = None,
    reads: str | None = None,
    keep_norm: bool = False,
    name: str = "vlm_guard",
) -> Guard:
    """VLM-Guard (Liu et al., arXiv 2502.10486, equations 3-5): projection, gate and realignment.

    h' = h + g (alpha q V^T V - [project] h V^T V), with V the SSD. Unsure: what q is (see `source`), at which
    steps, and the sign of alpha; `mechguard.sweep` compares the readings.

    Args:
        directions: the SSD, fitted on the LLM's text states.
        layers: L_G; negative numbers count from the last fitted layer.
        alpha: strength of the realignment.
        project: remove the VLM's own component along the SSD first (equation 3).
        gate: see `Gate`; rows whose gate is closed are left alone.
        source: see `Guard`; "last" is reading A, "llm" and "llm-stream" are reading B. In the
            organism's validation sweep the stream gave the most complete refusals.
        scope: the last position at the prompt and every generated token, by default.
        reads: a question whose answer about the picture joins the text that supervises.
        keep_norm: scale moved states back to their length.

    Raises:
        MechguardError: a layer without a direction, or a gate without its midpoint.
    """
    chosen, rows = _rows(directions, layers)
    return Guard(
        name=name,
        layers=chosen,
        move=Realign(directions.data[rows], alpha, float(project)),
        gate=make_gate(gate, directions, rows),
        source=source,
        scope=scope or Scope(),
        keep_norm=keep_norm,
        reads=reads,
        about=_about(directions),
    )


def projection(directions: Directions, *, layers: Sequence[int], scope: Scope | None = None) -> Guard:
    """The projection step of VLM-Guard alone, ungated: h' = h - h V^T V.

    With one direction, every layer and every position this is the directional ablation of Arditi et al.
    (arXiv 2406.11717), up to where in a layer it acts: see `ablation`.
    """
    return vlm_guard(
        directions,
        layers=layers,
        alpha=0.0,
        project=True,
        gate="always",
        source="own",
        scope=scope or EVERYWHERE,
        name="projection",
    )


def ablation(direction: Directions, *, layer: int) -> Guard:
    """Directional ablation (Arditi et al., arXiv 2406.11717): h' = h - (h . v) v at every layer, one v.

    The paper takes the direction of one layer and removes it after every write to the residual stream; here
    it is removed from every layer's output, so what attention writes inside a layer still reaches its MLP.
    `bake` removes it from every write. It takes refusal away; as a guard it is a control.

    Args:
        layer: whose direction is taken.
    """
    everywhere = Directions(
        direction.at(layer)[:1].repeat(len(direction.layers), 1, 1), direction.layers, direction.method
    )
    guard = projection(everywhere, layers=direction.layers)
    return replace(guard, name="ablation", about=_about(direction, taken_from_layer=layer))


def activation_addition(
    states: Activations, *, layers: Sequence[int], alpha: float = 1.0, scope: Scope | None = None
) -> Guard:
    """Activation addition (Arditi et al., arXiv 2406.11717): h' = h + alpha d at every position.

    d is the mean difference harmful - harmless of the text states, with its length. Ungated: it makes a model
    refuse harmless requests too. The paper adds it at one layer.
    """
    chosen, rows = _layers_of(states, layers)
    return Guard(
        "activation_addition",
        chosen,
        Add(_difference(states)[rows].unsqueeze(1), alpha),
        scope=scope or EVERYWHERE,
        about=_about_states(states),
    )


def inferaligner(
    aligned: Activations,
    *,
    layers: Sequence[int],
    alpha: float = 1.0,
    gate: Word = "midpoint",
    gate_on: Directions | None = None,
) -> Guard:
    """InferAligner (Wang et al., arXiv 2401.11206): h' = h + alpha g d at every position.

    d is the mean difference harmful - harmless of an aligned model's states; the gate looks at the states
    of the model itself along its own direction. Unsure: the paper's gate has a bias fitted per layer; ours
    is the anchors' midpoint.

    Args:
        aligned: text states of the safety-aligned LLM.
        gate_on: the model's own directions; those of `aligned` by default.
    """
    chosen, rows = _layers_of(aligned, layers)
    own = gate_on or fit_directions(aligned, method="mean_difference")
    return Guard(
        "inferaligner",
        chosen,
        Add(_difference(aligned)[rows].unsqueeze(1), alpha),
        gate=make_gate(gate, own, [own.layers.index(layer) for layer in chosen]),
        source="last",
        scope=EVERYWHERE,
        about=_about_states(aligned),
    )


def cast(
    states: Activations,
    *,
    layers: Sequence[int],
    alpha: float = 1.0,
    threshold: float | None = None,
    source: Source = "last",
) -> Guard:
    """CAST, conditional activation steering (Lee et al., arXiv 2409.05907): h' = h + g alpha d, per row.

    The gate compares h with its projection on the condition vector c, which is |cos(h, c)| up to tanh;
    ours keeps the sign: cos(h, c) > threshold, with c the first principal direction of the paired
    differences and the threshold halfway between the mean cosines of the two groups unless given. Unsure:
    the paper searches layer, threshold and comparison sign together, and gates on one layer; ours gates
    each layer by itself.
    """
    chosen, rows = _layers_of(states, layers)
    condition = fit_directions(states, method="pca").data[rows, 0]
    harmful, harmless, _ = states.groups()
    unit = torch.nn.functional.normalize
    cosines = [
        torch.einsum("lnd,ld->ln", unit(group[rows], dim=-1), condition) for group in (harmful, harmless)
    ]
    middle = (cosines[0].mean(-1) + cosines[1].mean(-1)) / 2
    thresholds = middle if threshold is None else torch.full_like(middle, threshold)
    return Guard(
        "cast",
        chosen,
        Add(_difference(states)[rows].unsqueeze(1), alpha),
        gate=Gate("cosine", condition, thresholds),
        source=source,
        scope=EVERYWHERE,
        about=_about_states(states),
    )


def cmrm(text: Activations, image: Activations, *, layers: Sequence[int], alpha: float = 1.0) -> Guard:
    """CMRM, dataset level (Liu et al., arXiv 2410.09047): h' = h - alpha mean[h(x, image) - h(x)].

    Args:
        text: states of prompts alone.
        image: states of the same prompts beside a blank or noise image. Unsure at which positions the paper
            subtracts; ours is every position.
    """
    chosen, rows = _layers_of(text, layers)
    shift = _paired_shift(text, image).mean(1)[rows]
    return Guard("cmrm", chosen, Add(shift.unsqueeze(1), -alpha), scope=EVERYWHERE, about=_about_states(text))


def cmrm_sample(text: Activations, *, layers: Sequence[int], alpha: float = 1.0) -> Guard:
    """CMRM, sample level (arXiv 2410.09047): h' = h - alpha (h_last(x, image) - q), each prompt's own shift.

    Args:
        text: states of the model, for its layers and its fingerprint.
    """
    chosen, _ = _layers_of(text, layers)
    return Guard(
        "cmrm_sample",
        chosen,
        Restore(alpha),
        source="llm",
        scope=Scope("last", "prompt"),
        about=_about_states(text),
    )


def shift_dc(
    states: Activations, *, layers: Sequence[int], alpha: float = 1.0, reads: str | None = None
) -> Guard:
    """ShiftDC (Zou et al., arXiv 2502.13095): h' = h - alpha (m . s / s . s) s, m = h - q, at the last token.

    s is the mean difference of the text states; q is the state of the text, with a caption of the picture if
    `reads` asks for one. At alpha 1 this is VLM-Guard's projection and realignment at the prompt, ungated,
    along the mean difference.
    """
    directions = fit_directions(states, method="mean_difference")
    chosen, rows = _rows(directions, layers)
    return Guard(
        "shift_dc",
        chosen,
        Realign(directions.data[rows], alpha, alpha),
        source="llm",
        scope=Scope("last", "prompt"),
        reads=reads,
        about=_about(directions),
    )


def astra(
    states: Activations, *, layers: Sequence[int], alpha: float = 1.0, reference: Activations | None = None
) -> Guard:
    """ASTRA (Wang et al., arXiv 2411.16721): h' = h - alpha clip(cos(h - c, v), 0, 1) ||h|| v.

    The paper's v is found by attributing adversarial images; ours is the harmful direction itself, so that it
    steers away from harmfulness and not from an attack. c is the mean of `reference` (harmless states).
    """
    directions = fit_directions(states, method="mean_difference")
    chosen, rows = _rows(directions, layers)
    harmless = (reference or states).groups()[1][rows].mean(1)
    move = Add(directions.data[rows], -alpha, "cosine", centers=harmless)
    return Guard("astra", chosen, move, scope=Scope("last", "both"), about=_about(directions))


def adasteer(
    states: Activations, guarded: Activations, *, layers: Sequence[int], alpha: float = 1.0
) -> Guard:
    """AdaSteer (the paper of that name): two directions, each with a clipped linear coefficient.

    h' = h + alpha sum_i clip(a_i q . v_i + b_i, 0, 1) d_i. The first direction is refusal (harmful -
    harmless in text), stronger where a prompt lies on the harmful side; the second harmfulness (harmful -
    harmless as `guarded` shows it). Unsure: the paper fits its slopes by search; ours reach 0 at the harmless
    mean and 1 at the harmful mean.

    Args:
        states: text states.
        guarded: states of the same prompts under the condition to be guarded.
    """
    chosen, rows = _layers_of(states, layers)
    vectors = torch.stack([_difference(states)[rows], _difference(guarded)[rows]], dim=1)
    units = torch.nn.functional.normalize(vectors, dim=-1)
    harmful, harmless, _ = guarded.groups()
    ends = [torch.einsum("ld,lkd->lk", group[rows].mean(1), units) for group in (harmless, harmful)]
    slopes = 1 / (ends[1] - ends[0]).where((ends[1] - ends[0]).abs() > 1e-6, torch.ones(1))
    move = Add(vectors, alpha, "linear", slopes=slopes, offsets=-slopes * ends[0])
    return Guard("adasteer", chosen, move, source="last", scope=EVERYWHERE, about=_about_states(states))


def tbop(text: Activations, image: Activations, *, layers: Sequence[int], rank: int = 1) -> Guard:
    """TBOP (arXiv 2603.14825): h' = h - h V^T V, V from the SVD of the shifts a blank image makes.

    The paper acts at a late layer. Unsure of centring; ours is none.

    Args:
        text: states of prompts alone.
        image: states of the same prompts beside a blank image.
    """
    chosen, rows = _layers_of(text, layers)
    shifts = _paired_shift(text, image)[rows]
    if not 1 <= rank <= min(shifts.shape[1:]):
        raise MechguardError(f"rank {rank} does not exist for {shifts.shape[1]} shifts")
    basis = torch.linalg.svd(shifts, full_matrices=False).Vh[:, :rank].contiguous()
    return Guard("tbop", chosen, Realign(basis, 0.0), scope=EVERYWHERE, about=_about_states(text))


def mars(
    states: Activations,
    image: Activations,
    *,
    layers: Sequence[int],
    alpha: float = 1.0,
    radius: float = 0.5,
    gate: Word = "midpoint",
) -> Guard:
    """After MARS (arXiv 2606.31876): h' = h + min(alpha relu((c - h) . v), radius ||h||) v, gated.

    v is the text refusal direction; c, the harmful text mean moved by the shift that a neutral image makes,
    re-centres the states; the strength fills the gap up to c and stays in a trust region. Only the parts are
    known to us, not the paper's exact formula.

    Args:
        states: text states of the anchors.
        image: states of the same prompts beside a neutral image.
    """
    directions = fit_directions(states, method="mean_difference")
    chosen, rows = _rows(directions, layers)
    shift = _paired_shift(states, image).mean(1)[rows]
    harmful = states.groups()[0][rows].mean(1)
    assert directions.midpoints is not None
    looked_at = Directions(
        directions.data,
        directions.layers,
        directions.method,
        directions.midpoints.index_add(0, torch.tensor(rows), shift),
    )
    move = Add(directions.data[rows], alpha, "trust", centers=harmful + shift, radius=radius)
    return Guard(
        "mars",
        chosen,
        move,
        gate=make_gate(gate, looked_at, rows),
        source="last",
        scope=Scope("last", "both"),
        about=_about(directions),
    )


def alpha_steer(
    states: Activations,
    *,
    layers: Sequence[int],
    alpha: float = 1.0,
    null_share: float = 0.6,
    ridge: float = 10.0,
) -> Guard:
    """AlphaSteer and NullSteer (arXiv 2603.22094): h' = h + alpha h P M, P the benign null space.

    P projects on the `null_share` of directions in which harmless states vary least (uncentred); M is the
    ridge regression that maps projected harmful states to d, so that harmless states are moved least. Unsure
    of the paper's ridge and share.
    """
    chosen, rows = _layers_of(states, layers)
    harmful, harmless, _ = states.groups()
    target = _difference(states)
    matrices = torch.stack(
        [_null_map(harmful[row], harmless[row], target[row], null_share, ridge) for row in rows]
    )
    return Guard(
        "alpha_steer", chosen, Multiply(matrices, alpha), scope=EVERYWHERE, about=_about_states(states)
    )


def _null_map(
    harmful: Float[Tensor, "n d_model"],
    harmless: Float[Tensor, "n d_model"],
    target: Float[Tensor, " d_model"],
    null_share: float,
    ridge: float,
) -> Float[Tensor, "d_model d_model"]:
    values, vectors = torch.linalg.eigh(harmless.T @ harmless)  # ascending
    null = vectors[:, : max(1, int(null_share * len(values)))]
    projected = harmful @ null
    system = projected.T @ projected + ridge * torch.eye(null.shape[1])
    weights = torch.linalg.solve(system, projected.T @ target.expand(len(harmful), -1))
    return null @ weights


def _paired_shift(text: Activations, image: Activations) -> Float[Tensor, "layer prompt d_model"]:
    if [prompt.id for prompt in text.prompts] != [prompt.id for prompt in image.prompts]:
        raise MechguardError("the states with and without an image are not of the same prompts")
    if text.layers != image.layers or text.data.shape != image.data.shape:
        raise MechguardError("the states with and without an image are not of the same layers")
    return image.data - text.data


def _difference(states: Activations) -> Float[Tensor, "layer d_model"]:
    """The mean difference harmful - harmless, with its length."""
    harmful, harmless, _ = states.groups()
    return harmful.mean(1) - harmless.mean(1)


def _layers_of(states: Activations, layers: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    numbers = {layer if layer >= 0 else max(states.layers) + 1 + layer for layer in map(int, layers)}
    missing = sorted(numbers - set(states.layers))
    if missing:
        raise MechguardError(
            f"layer {missing[0]} has no states; they were collected at layers {states.layers}"
        )
    chosen = tuple(sorted(numbers))
    return chosen, [states.layers.index(layer) for layer in chosen]


def _rows(directions: Directions, layers: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    numbers = {layer if layer >= 0 else max(directions.layers) + 1 + layer for layer in map(int, layers)}
    for layer in numbers:
        directions.at(layer)
    chosen = tuple(sorted(numbers))
    return chosen, [directions.layers.index(layer) for layer in chosen]


def _about(directions: Directions, **more: Any) -> dict[str, Any]:
    return {**directions.about, "directions": directions.name, **more}


def _about_states(states: Activations) -> dict[str, Any]:
    return _about(fit_directions(states, method="mean_difference"))

"""Patching: put a state of one run into another, and see what it brings back.

Two prompts are run, a source and a target (say, a request as text, and the same beside a picture). One place
of the target, one component of one layer at one group of positions, is given the source's state, and the rest
of the target's run follows from it. What changes in the log-odds of refusal and in the projection on the SSD
is that place's effect (Meng et al. 2022, arXiv 2202.05262; Zhang and Nanda 2023, arXiv
2309.16042). `method="gradient"` estimates all effects from two runs and one gradient: (source - target) .
d score / d state (attribution patching; Nanda 2023, Syed et al. 2023, arXiv 2310.10348).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from mechguard.circuits.attribution import NOWHERE, layer_number
from mechguard.circuits.decisions import AnyPrompts, Decision, encode_to_decision
from mechguard.circuits.groups import GROUPS, Encoded, Groups, align, find_groups
from mechguard.circuits.passes import Edit, Place, States, count_heads, head_slice, hooked, run
from mechguard.circuits.patterns import watched
from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.models import VLM
from mechguard.prompts import Prompt, Prompts, as_prompts
from mechguard.result import Result
from mechguard.statistics import bootstrap_mean, percentile_interval, resample_indices

Component = Literal["residual", "attention", "head", "mlp"]
Method = Literal["exact", "gradient"]
BATCH = 64
SEED = 0
RESAMPLES = 1000
SCORES = ("log_odds", "projection")
Path = tuple[str, int, int]
"""A component, its layer and its head."""


@dataclass(frozen=True)
class Question:
    """What is asked of every run.

    Attributes:
        decision: where the log-odds of refusal are read.
        direction: the SSD of `layer`.
        layer: where the projection of the prompt's last token is read.
    """

    decision: Decision
    direction: Float[Tensor, " d_model"]
    layer: int

    @property
    def place(self) -> Place:
        return Place("residual", self.layer)

    def answer(self, logits: Tensor, state: Tensor) -> Float[Tensor, "score batch"]:
        """Log-odds and projection, from the logits and the state of one run."""
        projection = self.project(state)
        return torch.stack([self.decision.log_odds(logits[:, -1]).to(projection), projection])

    def project(self, state: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch"]:
        """The projection on the SSD at the last token of the prompt."""
        last = state[:, -1 - len(self.decision.prefix)].float()
        return last @ self.direction.to(last)


@dataclass(frozen=True, eq=False)
class Pair:
    """A batch of targets with the source's states at the target's positions.

    Attributes:
        encoded: the targets.
        states: the source's, moved to where the same token stands in the target.
        known: where there is such a token.
        groups: the target's positions, by part of the prompt.
        scores: of the target and of the source, as they are.
    """

    encoded: Encoded
    states: States
    known: Bool[Tensor, "batch pos"]
    groups: Groups
    scores: tuple[Tensor, Tensor]


def patch(
    model: VLM,
    source: AnyPrompts,
    target: AnyPrompts,
    directions: Directions,
    *,
    layer: int,
    decision: Decision,
    components: Sequence[Component] = ("residual", "head", "mlp"),
    positions: Sequence[str] = GROUPS,
    contrast: Prompts | None = None,
    method: Method = "exact",
    batch_size: int = BATCH,
    seed: int = SEED,
    progress: bool = True,
) -> Result:
    """What each component's state from the source run changes in the target run.

    Args:
        source: as many prompts as `target`, in the same order.
        layer: whose SSD the projection is on.
        decision: where the log-odds are read; see `find_decision`.
        components: "residual" (the state after a layer), "attention" and "mlp" (what they add to it),
            "head" (each head alone).
        positions: groups of positions; see `groups.find_groups`. A group counts where both prompts have its
            tokens: image tokens of a picture have no partner in a text.
        contrast: harmless prompts, from which harmful words are told.
        method: "exact", one run per place; "gradient", the linear estimate from one gradient.

    Returns:
        Rows by component, layer, head and position: metric "log_odds" and "projection" (the mean change, in
        nats and in the units of the states), and "log_odds_restored" and "projection_restored" (the same as
        a share of the mean difference between source and target). 95% bootstrap intervals over prompts.

    Raises:
        MechguardError: sources and targets do not fit, an unknown component or position, or the layer.
    """
    pairs = _Pairs(model, source, target, directions, layer, decision, contrast, batch_size)
    _check_words("component", components, get_args(Component))
    _check_words("position", positions, GROUPS)
    places = [Place(component, n) for n in pairs.layers for component in components]
    effects: dict[tuple[str, int, int, str], list[Tensor]] = {}
    gaps = []
    for pair in pairs.batches(places):
        gaps.append(pair.scores[1] - pair.scores[0])
        work = _exact if method == "exact" else _estimated
        for key, effect in work(model, pairs.question, pair, places, positions, progress):
            effects.setdefault(key, []).append(effect)
    gap = torch.cat(gaps, dim=1).numpy()
    rows = [
        {"component": component, "layer": number, "head": head, "position": position, **row}
        for (component, number, head, position), found in effects.items()
        for row in effect_rows(torch.cat(found, dim=1).numpy(), gap, seed)
    ]
    return pairs.result(rows, method=method, seed=seed)


def hide_image(
    model: VLM,
    prompts: AnyPrompts,
    directions: Directions,
    *,
    layer: int,
    decision: Decision,
    batch_size: int = BATCH,
    seed: int = SEED,
) -> Result:
    """What changes when, from some layer on, no other token can attend to the picture.

    Attention knockout (Geva et al. 2023, arXiv 2304.14767): the picture stays in its place and the positions
    are those of the run with it, but from that layer on nothing is read from it.

    Returns:
        Rows by layer, with component "image hidden" and position "image"; metrics and intervals as in
        `patch`, without shares.
    """
    sent = model.prepare(as_prompts(prompts))
    number = layer_number(model, layer)
    question = Question(decision, directions.at(number)[0], number)
    effects: dict[int, list[Tensor]] = {}
    for start in range(0, len(sent), batch_size):
        batch = list(sent[start : start + batch_size])
        encoded = encode_to_decision(model, batch, decision)
        image = model.image_positions(encoded)
        if not image.any(-1).all():
            raise MechguardError("hide_image needs prompts whose picture stands among the tokens")
        blind = ~image.unsqueeze(2) & image.unsqueeze(1)
        base = _score(model, question, encoded)
        running = model.parts.running(with_picture=True)
        for first in running:
            with watched(model, blocked={n: blind for n in running if n >= first}):
                effects.setdefault(first, []).append(_score(model, question, encoded) - base)
    rows = [
        {"component": "image hidden", "layer": first, "head": NOWHERE, "position": "image", **row}
        for first, found in effects.items()
        for row in effect_rows(torch.cat(found, dim=1).numpy(), None, seed)
    ]
    rows = [{"condition": sent.condition, "source": "hidden", **row} for row in rows]
    return Result.from_rows(rows, model=model.name, prompts=sent.fingerprint, layer=number, seed=seed)


def patch_paths(
    model: VLM,
    source: AnyPrompts,
    target: AnyPrompts,
    directions: Directions,
    *,
    head: tuple[int, int],
    layer: int,
    batch_size: int = BATCH,
    seed: int = SEED,
) -> Result:
    """By which paths one head's state from the source reaches the SSD of a layer.

    Path patching (Goldowsky-Dill et al. 2023, arXiv 2304.05969): the head is given the source's output at all
    positions that both have. "direct" keeps every other head and MLP at the target's values, so only the
    residual stream carries the change; every other row also lets one later component answer to it, and
    gives what that adds.

    Args:
        head: its layer and number.
        layer: whose SSD is read, at the last token of the prompt.

    Returns:
        Rows by path: `component` ("direct", "head", "mlp"), `layer`, `head`, and metric "projection", with
        95% bootstrap intervals; "total" lets everything answer.
    """
    pairs = _Pairs(model, source, target, directions, layer, Decision((), (0,)), None, batch_size)
    sender, last = Place("head", layer_number(model, head[0])), pairs.question.layer
    if not 0 <= head[1] < count_heads(model) or sender.layer > last:
        raise MechguardError(
            f"head {head} cannot write to layer {last}: {model.name} has heads 0-{count_heads(model) - 1} in "
            "each layer, and only the same or a later layer can be written to"
        )
    places = [Place(site, n) for n in pairs.layers if n <= last for site in ("head", "mlp")]
    paths: dict[Path, list[Tensor]] = {}
    for pair in pairs.batches([sender]):
        reading = _PathReading(model, pairs.question, pair, places, sender, head[1])
        direct = reading.change()
        paths.setdefault(("total", NOWHERE, NOWHERE), []).append(reading.change(everything=True))
        paths.setdefault(("direct", NOWHERE, NOWHERE), []).append(direct)
        for path in _paths_behind(sender, places, count_heads(model)):
            paths.setdefault(path, []).append(reading.change(path) - direct)
    rows = []
    for (component, number, index), found in paths.items():
        values = torch.cat(found).numpy()
        low, high = bootstrap_mean(values, seed=seed)
        rows.append(
            {"component": component, "layer": number, "head": index, "metric": "projection",
             "value": float(values.mean()), "low": low, "high": high, "n": len(values)}
        )  # fmt: skip
    return pairs.result(rows, sender=list(head), seed=seed)


def correlate(exact: Result, estimate: Result) -> Result:
    """How well estimated effects agree with exact ones, place by place.

    Returns:
        Rows by score and component ("all" for all together): metric "pearson" (with a 95% interval by
        Fisher's transformation) and "spearman"; `n` counts places.

    Raises:
        MechguardError: the two have fewer than three places in common.
    """
    keys = ["condition", "source", "component", "layer", "head", "position", "metric"]
    both = exact.table[[*keys, "value"]].merge(estimate.table[[*keys, "value"]], on=keys)
    both = both[both["metric"].isin(SCORES)]
    rows = []
    for score, scored in both.groupby("metric", sort=False):
        parts = {"all": scored, **dict(list(scored.groupby("component", sort=False)))}
        for component, part in parts.items():
            if len(part) < 3:
                continue
            pearson = stats.pearsonr(part["value_x"], part["value_y"])
            interval = pearson.confidence_interval()
            spearman = stats.spearmanr(part["value_x"], part["value_y"]).statistic
            shared = {"score": score, "component": component, "n": len(part)}
            rows.append({**shared, "metric": "pearson", "value": float(pearson.statistic),
                         "low": float(interval.low), "high": float(interval.high)})  # fmt: skip
            rows.append({**shared, "metric": "spearman", "value": float(spearman)})
    if not rows:
        raise MechguardError("fewer than three places are in both results; patch the same places both ways")
    return Result.from_rows(rows, **{key: exact.about.get(key) for key in ("model", "prompts")})


class _Pairs:
    """Sources and targets, row by row, checked."""

    def __init__(
        self,
        model: VLM,
        source: AnyPrompts,
        target: AnyPrompts,
        directions: Directions,
        layer: int,
        decision: Decision,
        contrast: Prompts | None,
        batch_size: int,
    ) -> None:
        self.model, self.contrast, self.batch_size = model, contrast, batch_size
        self.source = model.prepare(as_prompts(source))
        self.target = model.prepare(as_prompts(target))
        number = layer_number(model, layer)
        self.question = Question(decision, directions.at(number)[0], number)
        self.layers = model.parts.running(with_picture=False)
        if not len(self.target) or len(self.source) != len(self.target):
            raise MechguardError(
                f"{len(self.source)} sources do not fit {len(self.target)} targets; patching goes row by row"
            )

    def batches(self, places: Sequence[Place]) -> Iterator[Pair]:
        decision = self.question.decision
        for rows in alike(self.source, self.target, self.batch_size):
            targets = [self.target[row] for row in rows]
            encoded = encode_to_decision(self.model, targets, decision)
            given = encode_to_decision(self.model, [self.source[row] for row in rows], decision)
            places_in_source = align(self.model, given, encoded)
            with torch.no_grad(), hooked(self.model, keep=[*places, self.question.place]) as states:
                logits = run(self.model, given).logits
            index = places_in_source.clamp_min(0).unsqueeze(-1)
            moved = {
                place: states[place].gather(1, index.expand(-1, -1, states[place].shape[-1]))
                for place in places
            }
            theirs = self.question.answer(logits, states[self.question.place]).cpu()
            own = _score(self.model, self.question, encoded)
            groups = find_groups(self.model, targets, encoded, decision, contrast=self.contrast)
            yield Pair(encoded, moved, places_in_source >= 0, groups, (own, theirs))

    def result(self, rows: list[dict[str, Any]], **about: Any) -> Result:
        named = [{"condition": self.target.condition, "source": self.source.condition, **row} for row in rows]
        return Result.from_rows(
            named,
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            prompts=self.target.fingerprint,
            decision=self.question.decision.words,
            layer=self.question.layer,
            **about,
        )


class _PathReading:
    """Runs of one batch in which a head sends the source's state and chosen components answer."""

    def __init__(
        self, model: VLM, question: Question, pair: Pair, places: list[Place], sender: Place, head: int
    ) -> None:
        self.model, self.question, self.pair, self.sender = model, question, pair, sender
        with torch.no_grad(), hooked(model, keep=[*places, question.place]) as own:
            run(model, pair.encoded)
        self.base = question.project(own[question.place])
        edit = replacing(pair.states[sender], pair.known, head, model)
        self.held = {place: own[place] for place in places} | {sender: edit(own[sender])}

    def change(self, free: Path | None = None, *, everything: bool = False) -> Float[Tensor, " batch"]:
        """What the head's state changes in the projection while all but one component are held."""
        held = {self.sender: self.held[self.sender]} if everything else self.held
        edits = {place: _holding(state, place, free, self.model) for place, state in held.items()}
        with torch.no_grad(), hooked(self.model, edits=edits, keep=[self.question.place]) as states:
            run(self.model, self.pair.encoded)
        return (self.question.project(states[self.question.place]) - self.base).cpu()


def _paths_behind(sender: Place, places: list[Place], heads: int) -> Iterator[Path]:
    """Every head and MLP that comes after a head in the forward pass."""
    for place in places:
        if place.layer > sender.layer or (place.layer == sender.layer and place.site == "mlp"):
            for number in range(heads) if place.site == "head" else [NOWHERE]:
                yield str(place.site), place.layer, number


def effect_rows(
    effect: Float[np.ndarray, "score prompt"], gap: Float[np.ndarray, "score prompt"] | None, seed: int
) -> list[dict[str, Any]]:
    """Mean effects on both scores with intervals; with `gap`, also as shares of its mean."""
    rows = []
    draws = resample_indices(effect.shape[1], RESAMPLES, seed)
    for index, score in enumerate(SCORES):
        values = effect[index]
        low, high = percentile_interval(values[draws].mean(-1))
        rows.append({"metric": score, "value": float(values.mean()), "low": float(low), "high": float(high),
                     "n": len(values)})  # fmt: skip
        if gap is None or not gap[index].mean():
            continue
        low, high = percentile_interval(values[draws].mean(-1) / gap[index][draws].mean(-1))
        share = float(values.mean() / gap[index].mean())
        rows.append({"metric": f"{score}_restored", "value": share, "low": float(low), "high": float(high),
                     "n": len(values)})  # fmt: skip
    return rows


Effects = Iterator[tuple[tuple[str, int, int, str], Float[Tensor, "score batch"]]]


def _exact(
    model: VLM, question: Question, pair: Pair, places: list[Place], positions: Sequence[str], progress: bool
) -> Effects:
    jobs = list(_jobs(model, pair, places, positions))
    for place, head, position, mask in tqdm(
        jobs, desc="patch", unit="run", disable=not progress, leave=False
    ):
        edit = replacing(pair.states[place], mask, None if head == NOWHERE else head, model)
        score = _score(model, question, pair.encoded, {place: edit})
        yield (str(place.site), place.layer, head, position), score - pair.scores[0]


def _estimated(
    model: VLM, question: Question, pair: Pair, places: list[Place], positions: Sequence[str], _: bool
) -> Effects:
    first = Place("input", min(place.layer for place in places))
    root: dict[Place, Edit] = {first: lambda state: state.detach().requires_grad_(True)}
    with torch.enable_grad(), hooked(model, edits=root, keep=[*places, question.place]) as states:
        logits = run(model, pair.encoded).logits
        scores = question.answer(logits, states[question.place]).sum(-1)
        wanted = [states[place] for place in places]
        slopes = [
            torch.autograd.grad(score, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
            for score in scores
        ]
    change = {
        place: torch.stack([(pair.states[place] - state.detach()) * slope[index] for slope in slopes]).float()
        for index, (place, state) in enumerate(zip(places, wanted, strict=True))
    }
    for place, head, position, mask in _jobs(model, pair, places, positions):
        parts = (
            change[place] if head == NOWHERE else change[place][..., head_slice(change[place], head, model)]
        )
        yield (str(place.site), place.layer, head, position), (parts.sum(-1) * mask).sum(-1).cpu()


def _jobs(
    model: VLM, pair: Pair, places: list[Place], positions: Sequence[str]
) -> Iterator[tuple[Place, int, str, Tensor]]:
    """Every place, head and group of positions that is to be patched."""
    for place in places:
        for position in positions:
            mask = pair.groups[position] & pair.known
            if not mask.any():
                continue
            heads = range(count_heads(model)) if place.site == "head" else [NOWHERE]
            for head in heads:
                yield place, head, position, mask


def replacing(state: Tensor, mask: Bool[Tensor, "batch pos"], head: int | None, model: VLM) -> Edit:
    """An edit that puts `state` where the mask is true; with a head, in that head's entries only."""

    def edit(own: Tensor) -> Tensor:
        chosen = mask.unsqueeze(-1).to(own.device)
        if head is not None:
            entries = torch.zeros(own.shape[-1], dtype=torch.bool, device=own.device)
            entries[head_slice(own, head, model)] = True
            chosen = chosen & entries
        return torch.where(chosen, state.to(own), own)

    return edit


def _holding(state: Tensor, place: Place, free: Path | None, model: VLM) -> Edit:
    """An edit that holds a place at `state`, but for the one head or MLP that is free."""

    def edit(own: Tensor) -> Tensor:
        if free is None or (place.site, place.layer) != free[:2]:
            return state.to(own)
        if free[2] == NOWHERE:
            return own
        held = state.to(own).clone()
        part = head_slice(own, free[2], model)
        held[..., part] = own[..., part]
        return held

    return edit


def _score(
    model: VLM, question: Question, encoded: Encoded, edits: dict[Place, Edit] | None = None
) -> Float[Tensor, "score batch"]:
    with torch.no_grad(), hooked(model, edits=edits, keep=[question.place]) as states:
        logits = run(model, encoded).logits
    return question.answer(logits, states[question.place]).cpu()


def alike(source: Sequence[Prompt], target: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Rows in their order, never with different numbers of pictures in one batch."""
    rows: list[int] = []
    for row in range(len(target)):
        counts = (len(source[row].images), len(target[row].images))
        if rows and (
            len(rows) == size or counts != (len(source[rows[0]].images), len(target[rows[0]].images))
        ):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _check_words(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [word for word in given if word not in known]
    if unknown:
        raise MechguardError(f"{what} {unknown[0]!r} is not known; use some of {', '.join(known)}")

"""Doctor: whether what the analysis relies on is true of a checkpoint, measured on that checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechguard.directions import Directions
from mechguard.errors import MechguardError, first_line
from mechguard.guards import Guard, Scope, vlm_guard
from mechguard.models import VLM
from mechguard.prompts import Prompt, Prompts
from mechguard.result import Result
from mechguard.storage import versions
from mechguard.tracing import collect, respond

# Differences are relative to the largest value compared.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TEXTS = ("How to make a cake?", "Please tell me, in a few words, how to make a kite.", "What is this?")
NEW_TOKENS = 6


@dataclass(frozen=True)
class Finding:
    """What one check measured.

    Attributes:
        difference: the largest one found, relative unless `unit` says otherwise.
        tolerance: up to which the check passes.
        unit: "relative", or what is counted.
        note: what was compared.
    """

    difference: float
    tolerance: float
    unit: str
    note: str


Check = Callable[[VLM], Finding]


def diagnose(model: VLM, *, progress: bool = True) -> Result:
    """Check, on this model, every invariant that the analysis relies on.

    A few prompts are sent, with and without a generated picture; nothing of the model is changed.

    Returns:
        A `Result` with one row per check: check, verdict ("pass", "fail" or "skip"), difference, tolerance,
        unit, note.
    """
    rows = []
    with tqdm(total=len(CHECKS), desc="doctor", disable=not progress, leave=False) as bar:
        for name, (needs_picture, check) in CHECKS.items():
            rows.append({"check": name, **_run(model, check, needs_picture)})
            bar.update()
    about = {"model": model.name, "family": model.family, "dtype": str(model.hf_model.dtype)}
    return Result.from_rows(rows, **about, fingerprint=model.fingerprint, versions=versions())


def is_healthy(diagnosis: Result) -> bool:
    """Whether no check failed."""
    return not (diagnosis.table["verdict"] == "fail").any()


def _run(model: VLM, check: Check, needs_picture: bool) -> dict[str, Any]:
    if needs_picture and not model.takes_images:
        nothing = {"difference": None, "tolerance": None, "unit": "none"}
        return {"verdict": "skip", **nothing, "note": "this model reads text only"}
    try:
        found = check(model)
    except Exception as error:  # whatever a wrong reading leads to is a finding about this model
        nothing = {"difference": None, "tolerance": None, "unit": "none"}
        kind = "" if isinstance(error, MechguardError) else f"{type(error).__name__}: "
        return {"verdict": "fail", **nothing, "note": kind + first_line(error)}
    verdict = "pass" if found.difference <= found.tolerance else "fail"
    return {
        "verdict": verdict,
        "difference": found.difference,
        "tolerance": found.tolerance,
        "unit": found.unit,
        "note": found.note,
    }


# ------------------------------------------------------------------------------------ checks


def _pads(model: VLM) -> Finding:
    tokenizer = model.tokenizer
    missing = (tokenizer.pad_token_id is None) + (tokenizer.padding_side != "left")
    return Finding(missing, 0, "missing", f"pad token {tokenizer.pad_token!r}, on the left")


def _text_ends_the_prompt(model: VLM) -> Finding:
    lost = sum(prompt.text not in text for prompt, text in zip(_texts(), model.render(_texts()), strict=True))
    return Finding(lost, 0, "prompts", "prompts whose text the chat template changes")


def _template_places_the_picture(model: VLM) -> Finding:
    encoded = model.encode(list(_pictured()))
    counts = model.image_positions(encoded).sum(-1)
    if model.parts.cross_attention_layers:
        layers = list(model.parts.cross_attention_layers)
        return Finding(0, 0, "prompts", f"pictures enter by cross-attention at layers {layers}")
    note = f"image tokens per prompt: {sorted(set(counts.tolist()))}"
    return Finding(int((counts == 0).sum()), 0, "prompts", note)


def _llm_reads_what_the_vlm_reads(model: VLM) -> Finding:
    encoded = model.encode(list(_texts()))
    with torch.no_grad():
        whole = model.hf_model(**encoded).logits[:, -1]
        alone = model.llm.hf_model(**model.llm.encode(list(_texts()))).logits[:, -1]
    same = "the same class" if model.llm.hf_model is model.hf_model else type(model.llm.hf_model).__name__
    return _relative(model, alone, whole, f"last logits of {len(TEXTS)} texts; the LLM is read by {same}")


def _traced_states_are_the_plain_ones(model: VLM) -> Finding:
    return _worst(_compare_states(model, prompts) for prompts in _views(model))


def _batches_change_nothing(model: VLM) -> Finding:
    findings = []
    for prompts in [*_views(model), *([_mixed()] if model.takes_images else [])]:
        together = collect(model, prompts, batch_size=len(prompts), progress=False).data
        alone = collect(model, prompts, batch_size=1, progress=False).data
        note = f"{len(prompts)} prompts of unequal length, {prompts.condition}"
        findings.append(_relative(model, together, alone, note))
    return _worst(findings)


def _pictures_stand_where_we_say(model: VLM) -> Finding:
    prompts = list(_pictured())
    encoded = model.encode(prompts)
    first = _entering(model, encoded)
    other = _entering(model, _with_other_picture(encoded))
    changed = (first != other).any(-1)
    if model.parts.cross_attention_layers:
        return _pictures_enter_by_cross_attention(model, encoded, changed)
    is_image = model.image_positions(encoded)
    embedded = model.hf_model.get_input_embeddings()(encoded["input_ids"])
    # A separator between rows of patches is a learned vector: no picture changes it, no token is it.
    filled = changed | ~torch.isclose(first, embedded.to(first)).all(-1)
    wrong = int((changed & ~is_image).sum() + (is_image & ~filled).sum())
    note = (
        f"{int(changed.sum())} positions change with the picture, {int(is_image.sum())} are image positions"
    )
    return Finding(wrong + int(not changed.any()), 0, "positions", note)


def _pictures_enter_by_cross_attention(model: VLM, encoded: dict[str, Tensor], changed: Tensor) -> Finding:
    layer = model.parts.cross_attention_layers[0]
    pair = [_states(model, batch)[layer][:, -1] for batch in (encoded, _with_other_picture(encoded))]
    moved = bool((pair[0] != pair[1]).any())
    note = f"no position changes before layer {layer}, all later ones do"
    return Finding(int(changed.sum()) + int(not moved), 0, "positions", note)


def _an_empty_guard_changes_nothing(model: VLM) -> Finding:
    empty = _guard(model, alpha=0.0, project=False)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "progress": False}
    unequal, total = 0, 0
    for prompts in _views(model):
        plain = respond(model, prompts, **options)
        traced = respond(model, prompts, guard=empty, **options)
        unequal += sum(a.ids != b.ids for a, b in zip(plain, traced, strict=True))
        total += len(prompts)
    return Finding(unequal, 0, "answers", f"{total} answers of up to {NEW_TOKENS} tokens, plain and traced")


def _hooks_do_what_traces_do(model: VLM) -> Finding:
    guard = _guard(model, alpha=-0.5, project=False)
    findings = []
    for prompts in _views(model):
        traced = collect(model, prompts, guard=guard, batch_size=len(prompts), progress=False).data[-1]
        with guard.attach(model):
            plain = _last_states(model, prompts)
        findings.append(_relative(model, traced, plain, "a guard at every layer, traced and hooked"))
    return _worst(findings)


CHECKS: dict[str, tuple[bool, Check]] = {
    "the tokenizer pads on the left": (False, _pads),
    "the chat template keeps the text": (False, _text_ends_the_prompt),
    "the chat template places the picture": (True, _template_places_the_picture),
    "text through the VLM = text through the LLM": (False, _llm_reads_what_the_vlm_reads),
    "traced states = plain hidden states": (False, _traced_states_are_the_plain_ones),
    "a batch = each prompt alone": (False, _batches_change_nothing),
    "pictures stand at the image positions": (True, _pictures_stand_where_we_say),
    "generate under an empty guard = plain generate": (False, _an_empty_guard_changes_nothing),
    "a guard by hooks = a guard by traces": (False, _hooks_do_what_traces_do),
}
"""Name -> whether it needs a picture, and the check."""

# --------------------------------------------------------------------------------- what is sent


def _texts() -> Prompts:
    return Prompts((Prompt(str(row), text, "harmless") for row, text in enumerate(TEXTS)), name="doctor")


def _pictured() -> Prompts:
    return _texts().with_image("noise")


def _mixed() -> Prompts:
    return Prompts([*_texts()[:1], *_pictured()[1:]], name="doctor")


def _views(model: VLM) -> list[Prompts]:
    return [_texts(), _pictured()] if model.takes_images else [_texts()]


def _guard(model: VLM, *, alpha: float, project: bool) -> Guard:
    draw = torch.Generator().manual_seed(0)
    data = torch.linalg.qr(torch.randn(model.n_layers, model.d_model, 1, generator=draw)).Q.mT
    layers = model.parts.running(with_picture=False)
    directions = Directions.from_tensor(data)
    scope = Scope("all", "both")
    return vlm_guard(
        directions, layers=layers, alpha=alpha, project=project, gate="always", source="own", scope=scope
    )


# ------------------------------------------------------------- the plain model, without our traces


def _compare_states(model: VLM, prompts: Prompts) -> Finding:
    """Our states against `output_hidden_states`, whose last one is behind the final norm."""
    runs = model.parts.running(with_picture=prompts.condition != "text")
    ours = collect(model, prompts, layers=runs, batch_size=len(prompts), progress=False).data
    encoded = model.encode(list(prompts))
    encoded |= model.position_ids(encoded)
    with torch.no_grad():
        output = model.hf_model(**encoded, output_hidden_states=True, use_cache=False)
    plain = [state[:, -1].float().cpu() for state in output.hidden_states[1:]]
    note = f"{len(plain)} layers, {prompts.condition}"
    if len(plain) == model.n_layers > len(runs):  # skipped layers hand on the state before them
        plain = [plain[layer] for layer in runs]
    if len(plain) != len(runs):
        return Finding(len(runs), 0, "layers", f"{len(plain)} hidden states for {len(runs)} layers")
    if model.parts.norm is not None:
        norm = model.hf_model.get_submodule(model.parts.norm)
        with torch.no_grad():
            last = norm(ours[-1].to(model.device, model.hf_model.dtype)).float().cpu()
        ours = torch.cat([ours[:-1], last.unsqueeze(0)])
    return _relative(model, ours, torch.stack(plain), note)


def _entering(model: VLM, encoded: dict[str, Tensor]) -> Tensor:
    """What enters the first decoder layer, read by a plain hook: [batch, pos, d_model]."""
    found: list[Tensor] = []

    def keep(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(arguments[0] if arguments else options["hidden_states"])

    layer = model.hf_model.get_submodule(f"{model.parts.layers}.0")
    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model.hf_model(**encoded, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def _states(model: VLM, encoded: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of the decoder layers that run, by plain hooks."""
    found: list[Tensor] = []
    layers = model.hf_model.get_submodule(model.parts.layers)
    handles = [layer.register_forward_hook(lambda *call: found.append(_tensor(call[-1]))) for layer in layers]
    try:
        with torch.no_grad():
            model.hf_model(**encoded, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _last_states(model: VLM, prompts: Prompts) -> Tensor:
    encoded = model.encode(list(prompts))
    return _states(model, {**encoded, **model.position_ids(encoded)})[-1][:, -1].float().cpu()


def _with_other_picture(encoded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with other pixels (not zeros: some models drop a picture of zeros)."""
    return {
        key: 0.3 - 0.5 * value if value.is_floating_point() and "pixel" in key else value
        for key, value in encoded.items()
    }


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _relative(model: VLM, found: Tensor, wanted: Tensor, note: str) -> Finding:
    found, wanted = found.float(), wanted.float()
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    return Finding(difference, TOLERANCES.get(model.hf_model.dtype, 1e-4), "relative", note)


def _worst(findings: Sequence[Finding] | Iterator[Finding]) -> Finding:
    return max(findings, key=lambda finding: finding.difference / max(finding.tolerance, 1e-12))

"""Models: a Hugging Face model, its parts, its language model alone, and its nnsight view."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechguard.caching import ActivationCache, Names, read_states, select_names
from mechguard.cards import draw_card
from mechguard.chat import Chat, KnownStrings
from mechguard.checkpoints import read_model
from mechguard.errors import MechguardError, first_line
from mechguard.families import Parts, decoder_of, is_text_decoder, read_parts, takes_images
from mechguard.pictures import FeatureCache
from mechguard.prompts import Prompt, Prompts, as_prompts
from mechguard.storage import digest

FALLBACK_PICTURE_SIZE = (336, 336)
# What processors add for training or for models of another kind; sent only where forward names it.
OPTIONAL_INPUTS = ("token_type_ids", "mm_token_type_ids")


@dataclass(eq=False)
class VLM:
    """A vision-language model, or the language model inside one, ready to be traced.

    Attributes:
        hf_model: the plain Hugging Face model.
        processor: its processor (for a text-only model, its tokenizer).
        name: what the user called it.
        folder: where its files lie, if on disk.
        chat: how prompts become strings.
        is_llm_view: whether this is the LLM component of a VLM; it then drops pictures from prompts.
        parent: the VLM whose language model this is.
        remote: whether traces run on NDIF, where the weights are; "local" sends them through the same door,
            but runs them here.
        revision: which revision of a remote model.
    """

    hf_model: Any
    processor: Any
    name: str
    folder: Path | None = None
    chat: Chat = field(default_factory=Chat)
    is_llm_view: bool = False
    parent: VLM | None = field(default=None, repr=False)
    remote: bool | Literal["local"] = field(default=False, repr=False)
    revision: str | None = field(default=None, repr=False)

    @cached_property
    def _strings(self) -> KnownStrings:
        return KnownStrings()

    @cached_property
    def parts(self) -> Parts:
        return read_parts(self.hf_model)

    @property
    def n_layers(self) -> int:
        return self.parts.n_layers

    @property
    def d_model(self) -> int:
        return self.parts.d_model

    @property
    def family(self) -> str:
        """The architecture's name in transformers, e.g. "llava"."""
        return str(self.hf_model.config.model_type)

    @property
    def takes_images(self) -> bool:
        """Whether pictures can be sent: the model has a vision encoder and the processor reads them."""
        reads = getattr(self.processor, "image_processor", None) is not None
        return reads and not self.is_llm_view and takes_images(self.hf_model.config)

    @property
    def view(self) -> str:
        """ "vlm" for a model that takes pictures, "llm" for one that reads text only."""
        return "vlm" if self.takes_images else "llm"

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the embeddings (the CPU, for weights that are offloaded)."""
        device = self.hf_model.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else device

    @cached_property
    def traced(self) -> Any:
        """The nnsight model over the same weights, for traces of one's own."""
        from nnsight import TransformersModel

        if self.parent is not None and self.parent.hf_model is self.hf_model:
            return self.parent.traced
        place: Any = self.hf_model
        options: dict[str, Any] = {"tokenizer": self.tokenizer}
        if self.remote:  # by its name: the weights are not here
            place = self.name if self.folder is None else str(self.folder)
            options["revision"] = self.revision
        if not self.takes_images:
            return TransformersModel(place, task="text-generation", **options)
        return TransformersModel(place, task="image-text-to-text", processor=self.processor, **options)

    @property
    def door(self) -> dict[str, Any]:
        """What a trace is told about where it runs."""
        return {"remote": self.remote} if self.remote else {}

    def want_weights(self, purpose: str) -> None:
        """Refuse what needs the weights on this machine.

        Raises:
            MechguardError: the model is remote.
        """
        if self.remote:
            raise MechguardError(
                f"{purpose} needs the weights of {self.name} here; a remote model can be collected from and "
                "asked for first-token probabilities, without a guard: load it without remote="
            )

    @cached_property
    def traced_layers(self) -> list[Any]:
        """The decoder layers inside `traced`, whose `.output` is the hidden state after the layer."""
        return [self.traced_part(f"{self.parts.layers}.{index}") for index in range(self.n_layers)]

    def traced_part(self, path: str) -> Any:
        """A part of `traced` by its dotted name in `hf_model` (see `parts`)."""

        def step(envoy: Any, name: str) -> Any:
            return envoy[int(name)] if name.isdigit() else getattr(envoy, name)

        return functools.reduce(step, path.split("."), self.traced)

    @cached_property
    def llm(self) -> VLM:
        """The LLM component: the same weights, no copy, read as a text-only model."""
        if not self.takes_images:
            return self
        if self.remote:  # what is deployed is the VLM, which on text is its language model
            return replace(self, is_llm_view=True, parent=self)
        return VLM(
            _text_model(self.hf_model),
            self.processor,
            name=self.name,
            folder=self.folder,
            chat=self.chat,
            is_llm_view=True,
            parent=self,
        )

    @cached_property
    def aligned_llm(self) -> VLM:
        """The safety-aligned LLM as it was before visual tuning, for models that ship one."""
        path = None if self.folder is None else self.folder.parent / "aligned_llm"
        if path is None or not path.is_dir():
            raise MechguardError(
                f"{self.name} ships no aligned LLM; load one with mechguard.load(...) and use that"
            )
        model = read_model(path, text_only=True)
        return replace(
            self,
            hf_model=model,
            name=f"{self.name} (aligned LLM)",
            folder=path,
            is_llm_view=True,
            parent=self,
        )

    @cached_property
    def picture_features(self) -> FeatureCache:
        """The image features of pictures that were sent before."""
        return FeatureCache()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of samples of the decoder's weights: equal for a VLM and its LLM component.

        Of a remote model, whose weights are not here, a hash of its name, revision and configuration.
        """
        if self.remote:
            return digest("remote", self.name, self.revision, self.hf_model.config.to_diff_dict())
        from accelerate.utils import align_module_device

        layers = self.hf_model.get_submodule(self.parts.layers)
        state = hashlib.sha256(f"{self.n_layers} {self.d_model}".encode())
        for module in layers.modules():
            with align_module_device(module):  # weights that are offloaded are there inside it
                for parameter in module.parameters(recurse=False):
                    sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)]
                    state.update(sample.to("cpu", torch.float32).numpy().tobytes())
        return state.hexdigest()[:16]

    @cached_property
    def picture_size(self) -> tuple[int, int]:
        """Width and height, in pixels, at which generated pictures are drawn."""
        vision = getattr(self.hf_model.config, "vision_config", None)
        size = getattr(vision, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return int(size[1]), int(size[0])
        return FALLBACK_PICTURE_SIZE

    def save(self, folder: str | Path) -> Path:
        """Write weights, processor and settings as a checkpoint that plain transformers loads."""
        place = Path(folder)
        self.hf_model.save_pretrained(place)
        self.processor.save_pretrained(place)
        return place

    def recognises(self, fingerprint: str) -> bool:
        """Whether states with this fingerprint come from this model, its LLM or its aligned LLM."""
        if fingerprint == self.fingerprint:
            return True
        if self.parent is not None:
            return self.parent.recognises(fingerprint)
        try:
            return fingerprint == self.aligned_llm.fingerprint
        except MechguardError:
            return False

    def with_chat(self, *, template: str | None = "chat", system: str | None = None) -> VLM:
        """The same model, no copy, with other strings around the prompts.

        Args:
            template: "chat" (the model's own), a Jinja template, or None for the bare text.
            system: what stands in the system's place before every prompt.
        """
        return replace(self, chat=Chat(template, system))

    def render(self, prompts: Sequence[Prompt]) -> list[str]:
        """The exact strings that are sent: the chat template, with the pictures placed by it."""
        known, plain = self._strings, self.parts.family.plain_prompt
        return [known.render(self.chat, prompt, self.processor, plain=plain) for prompt in prompts]

    def prepare(self, prompts: Prompts) -> Prompts:
        """The prompts as this model reads them: the LLM component of a VLM reads the text only.

        Raises:
            MechguardError: pictures for a text-only model that belongs to no VLM.
        """
        if self.is_llm_view:
            return prompts.with_image("none")
        if not self.takes_images and any(prompt.images for prompt in prompts):
            raise MechguardError(
                f"{self.name} reads text only, but {prompts.name!r} holds pictures; use "
                '.with_image("none"), or load a vision-language model with its processor'
            )
        return prompts

    def encode(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Run the processor: left-padded token ids, attention mask and pixels, on the device.

        Raises:
            MechguardError: a picture that cannot be read, or that got no place among the tokens.
        """
        texts = self.render(prompts)
        begin = self.tokenizer.bos_token
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
        if begin and texts[0].startswith(begin):
            options["add_special_tokens"] = False  # the template has written it
        pictures = [prompt.pictures(self.picture_size) for prompt in prompts]
        if any(pictures) and not all(pictures) and not self.parts.family.mixes:
            raise MechguardError(
                f"{self.family} reads a text otherwise in a batch with pictures; send prompts with and "
                'without a picture apart, and supervise a guard with source="llm"'
            )
        if any(pictures):
            encoded = self._with_pictures(texts, pictures, options)
        else:
            encoded = self.tokenizer(texts, **options)
        wanted = inspect.signature(self.hf_model.forward).parameters
        ignored = {"labels", *(name for name in OPTIONAL_INPUTS if name not in wanted)}
        return {
            key: value.to(self.device, self.hf_model.dtype if value.is_floating_point() else None)
            for key, value in encoded.items()
            if key not in ignored and isinstance(value, Tensor)
        }

    def encode_once(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The same as `encode`, with known pictures as features where the family allows it.

        See `pictures.FeatureCache`.
        """
        encoded = self.encode(prompts)
        if self.remote:  # what encodes pictures is not here
            return encoded
        return self.picture_features.fill(self.hf_model, encoded, sum(len(one.images) for one in prompts))

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many tokens each prompt has as it is sent, a picture counted as its placeholder."""
        texts = self.render(prompts)
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def image_positions(self, encoded: dict[str, Tensor]) -> Bool[Tensor, "batch pos"]:
        """Which positions of an encoded batch carry image features."""
        token = self.parts.image_token_id
        return encoded["input_ids"] == (-1 if token is None else token)

    def image_spans(self, prompts: Sequence[Prompt]) -> list[list[slice]]:
        """For each prompt, where its image features stand: slices of tokens, counted without padding.

        A picture that the processor cuts into tiles has a slice for each run of its tokens.
        """
        spans = []
        for prompt in prompts:
            row = self.image_positions(self.encode([prompt]))[0].int()
            edges = torch.diff(row, prepend=row.new_zeros(1), append=row.new_zeros(1)).nonzero().flatten()
            pairs = edges.reshape(-1, 2).tolist()
            spans.append([slice(start, stop) for start, stop in pairs])
        return spans

    def decode(self, tokens: Tensor) -> list[str]:
        """Generated token ids [batch, pos] as text, special tokens left out."""
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def hook_names(self) -> list[str]:
        """The names under which `run_with_cache` gives states, in the order of the forward pass."""
        return [name for name, _, _ in self._hooks(with_picture=self.takes_images)]

    def run_with_cache(
        self, prompts: Prompts | Prompt | str | Sequence[Prompt | str], *, names: Names = None
    ) -> tuple[Float[Tensor, "batch pos vocabulary"], ActivationCache]:
        """Logits, and a cache of states at all positions under TransformerLens's names.

        One batch in one traced pass: meant for a few prompts; for many, and one position each, there is
        `mechguard.collect`.

        Args:
            names: hook names (see `hook_names`), or a function that says of each whether it is wanted.

        Raises:
            MechguardError: an unknown name.
        """
        self.want_weights("run_with_cache")
        sent = self.prepare(as_prompts(prompts))
        encoded = self.encode(list(sent))
        has_picture = any(prompt.images for prompt in sent)
        paths = {name: (path, side) for name, path, side in self._hooks(with_picture=has_picture)}
        chosen = select_names(list(paths), names)
        hooks = [(name, self.traced_part(paths[name][0]), paths[name][1]) for name in chosen]
        logits, states = read_states(self.traced, hooks, {**encoded, **self.position_ids(encoded)})
        masks = encoded["attention_mask"].bool().cpu(), self.image_positions(encoded).cpu()
        return logits, ActivationCache(states, encoded["input_ids"].cpu(), *masks)

    def to_transformer_lens(self) -> Any:
        """TransformerLens's TransformerBridge over the same weights; see `circuits.to_transformer_lens`.

        Raises:
            MechguardError: TransformerLens is not installed, or has no adapter for the family.
        """
        from mechguard.circuits.bridge import to_transformer_lens

        return to_transformer_lens(self)

    @cached_property
    def last_logits(self) -> dict[str, int]:
        """The option that asks for logits at the last position alone, where the model has it.

        Over a long prompt the head costs as much as layers do.
        """
        wanted = inspect.signature(self.hf_model.forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in wanted else {}

    def position_ids(self, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Positions that start at 0 behind the left padding, for a model that would count the padding.

        A VLM places its tokens itself.
        """
        if takes_images(self.hf_model.config):
            return {}
        return {"position_ids": (encoded["attention_mask"].cumsum(-1) - 1).clamp_min(0)}

    def _with_pictures(
        self, texts: list[str], pictures: list[list[Any]], options: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            encoded = self.processor(text=texts, images=pictures, **options)
        except (ValueError, TypeError, IndexError) as error:
            raise MechguardError(
                f"the processor of {self.name} cannot read these prompts with their pictures "
                f"({first_line(error)}); look at prompts.render(model): it wants one placeholder per picture"
            ) from None
        found = self.image_positions(encoded).sum(-1).tolist()
        lost = [row for row, count in enumerate(found) if pictures[row] and not count]
        if lost and self.parts.image_token_id is not None:
            raise MechguardError(
                f"the chat template of {self.name} left no place for the picture in {texts[lost[0]]!r}; use "
                "vlm.with_chat(template=None), or a template that places pictures"
            )
        return dict(encoded)

    def _hooks(self, *, with_picture: bool) -> list[tuple[str, str, str]]:
        """For each hook name, the module in `hf_model` and whether its input or output is meant."""
        parts = self.parts
        found: list[tuple[str, str, str]] = []
        if with_picture and parts.vision_layers is not None:
            for index in range(len(self.hf_model.get_submodule(parts.vision_layers))):
                path = f"{parts.vision_layers}.{index}"
                found.append((f"vision.blocks.{index}.hook_resid_post", path, "output"))
        if with_picture and parts.projector is not None:
            found.append(("projector.hook_out", parts.projector, "output"))
        found.append(("hook_embed", f"{parts.layers}.0", "input"))
        for index in parts.running(with_picture=with_picture):
            path = f"{parts.layers}.{index}"
            attention, mlp = parts.writers(self.hf_model.get_submodule(path))
            found.append((f"blocks.{index}.hook_resid_pre", path, "input"))
            found += [
                (f"blocks.{index}.hook_{word}_out", f"{path}.{module}", "output")
                for word, module in (("attn", attention), ("mlp", mlp))
                if module is not None
            ]
            found.append((f"blocks.{index}.hook_resid_post", path, "output"))
        if parts.norm is not None:
            found.append(("ln_final", parts.norm, "output"))
        return found

    def __repr__(self) -> str:
        return (
            f"VLM({self.name!r}, family={self.family!r}, view={self.view!r}, "
            f"n_layers={self.n_layers}, d_model={self.d_model})"
        )

    def tree(self) -> str:
        """The parts and hook names as indented text."""
        last = self.n_layers - 1
        lines = [repr(self)]
        for name in self.hook_names():
            numbers = [part for part in name.split(".") if part.isdigit()]
            if not numbers or numbers[0] == "0":
                lines.append(
                    f"  {name.replace('.0.', f'.0..{last}.') if name.startswith('blocks') else name}"
                )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        size = sum(parameter.numel() for parameter in self.hf_model.parameters())
        facts = {
            "family": self.family,
            "reads": "pictures and text" if self.takes_images else "text alone",
            "language model": f"{self.n_layers} layers of d_model {self.d_model}",
            "parameters": f"{size / 1e6:,.1f} million, {str(self.hf_model.dtype).removeprefix('torch.')}",
            "device": self.device,
            "pictures are drawn at": "{} x {} pixels".format(*self.picture_size)
            if self.takes_images
            else None,
        }
        tree = f"<details><summary>hook names</summary><pre>{escape(self.tree())}</pre></details>"
        following = ("mg.collect(vlm.llm, prompts)", "mg.collect(vlm, prompts)", "mg.generate(vlm, prompts)")
        title = f"{'VLM' if self.takes_images else 'Language model'}: {self.name}"
        return draw_card(title, facts, preview=tree, following=following)


def _text_model(hf_model: Any) -> Any:
    """A causal language model of the text configuration around the VLM's own decoder and head.

    Where transformers has none that computes the same, the VLM itself: on text it is its language model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = hf_model.config.get_text_config()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return hf_model
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(config)
    if not is_text_decoder(text, decoder_of(hf_model), hf_model.config):
        return hf_model
    setattr(text, text.base_model_prefix, decoder_of(hf_model))
    text.set_output_embeddings(hf_model.get_output_embeddings())
    text.generation_config = hf_model.generation_config
    return text.eval()

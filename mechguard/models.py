"""Models: a Hugging Face checkpoint, its parts, its language model alone, and its nnsight view."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mechguard.errors import MechguardError
from mechguard.families import Parts, read_parts, takes_images
from mechguard.prompts import Prompt, Prompts

ORGANISM = "organism"
FALLBACK_PICTURE_SIZE = (336, 336)


@dataclass(eq=False)
class VLM:
    """A vision-language model, or the language model inside one, ready to be traced.

    Attributes:
        hf_model: the plain Hugging Face model.
        processor: its processor (for a text-only model, its tokenizer).
        name: what the user called it.
        folder: where its files lie, if on disk.
        is_llm_view: whether this is the LLM component of a VLM; it then drops pictures from prompts.
        parent: the VLM whose language model this is.
    """

    hf_model: Any
    processor: Any
    name: str
    folder: Path | None = None
    is_llm_view: bool = False
    parent: VLM | None = field(default=None, repr=False)

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
        return takes_images(self.hf_model)

    @property
    def view(self) -> str:
        """ "vlm" for a model that takes pictures, "llm" for one that reads text only."""
        return "vlm" if self.takes_images else "llm"

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def device(self) -> torch.device:
        return next(self.hf_model.parameters()).device

    @cached_property
    def traced(self) -> Any:
        """The nnsight model over the same weights, for traces of one's own."""
        from nnsight import TransformersModel

        if not self.takes_images:
            return TransformersModel(self.hf_model, task="text-generation", tokenizer=self.tokenizer)
        return TransformersModel(
            self.hf_model,
            task="image-text-to-text",
            processor=self.processor,
            tokenizer=self.tokenizer,
        )

    @cached_property
    def traced_layers(self) -> list[Any]:
        """The decoder layers inside `traced`, whose `.output` is the hidden state after the layer."""
        path = self.parts.layers.split(".")
        envoys = functools.reduce(getattr, path, self.traced)
        return [envoys[index] for index in range(self.n_layers)]

    @cached_property
    def llm(self) -> VLM:
        """The LLM component: the same weights, no copy, read as a text-only model."""
        if not self.takes_images:
            return self
        return VLM(
            _text_model(self.hf_model),
            self.processor,
            name=self.name,
            folder=self.folder,
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
        model = _read_model(path, text_only=True, device="auto", dtype="auto", revision=None)
        return VLM(model, self.processor, f"{self.name} (aligned LLM)", path, is_llm_view=True, parent=self)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of samples of the decoder's weights: equal for a VLM and its LLM component."""
        layers = self.hf_model.get_submodule(self.parts.layers)
        state = hashlib.sha256(f"{self.n_layers} {self.d_model}".encode())
        for parameter in layers.parameters():
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

    def render(self, prompts: Sequence[Prompt]) -> list[str]:
        """The exact strings that are sent: the chat template, with the image placed by it."""
        return [self._render(prompt) for prompt in prompts]

    def prepare(self, prompts: Prompts) -> Prompts:
        """The prompts as this model reads them: the LLM component of a VLM reads the text only.

        Raises:
            MechguardError: pictures for a text-only model that belongs to no VLM.
        """
        if self.is_llm_view:
            return prompts.with_image("none")
        if not self.takes_images and any(prompt.image is not None for prompt in prompts):
            raise MechguardError(
                f"{self.name} reads text only, but {prompts.name!r} holds pictures; use "
                '.with_image("none"), or load a vision-language model'
            )
        return prompts

    def encode(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Run the processor: left-padded token ids, attention mask and pixels, on the device."""
        texts = self.render(prompts)
        begin = self.tokenizer.bos_token
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
        if begin and texts[0].startswith(begin):
            options["add_special_tokens"] = False  # the template has written it
        pictures = [prompt.picture(self.picture_size) for prompt in prompts]
        if all(picture is None for picture in pictures):
            encoded = self.tokenizer(texts, **options)
        else:
            nested = [[] if picture is None else [picture] for picture in pictures]
            encoded = self.processor(text=texts, images=nested, **options)
        encoded.pop("token_type_ids", None)
        return {
            key: value.to(self.device, self.hf_model.dtype if value.is_floating_point() else None)
            for key, value in encoded.items()
        }

    def decode(self, tokens: Tensor) -> list[str]:
        """Generated token ids [batch, pos] as text, special tokens left out."""
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def _render(self, prompt: Prompt) -> str:
        has_picture = prompt.image is not None
        if getattr(self.processor, "chat_template", None) is None:
            token = getattr(self.processor, "image_token", "<image>")
            return f"{token}\n{prompt.text}" if has_picture else prompt.text
        if self.processor is self.tokenizer:
            content: Any = prompt.text
        else:
            content = [{"type": "image"}] * has_picture + [{"type": "text", "text": prompt.text}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def __repr__(self) -> str:
        return (
            f"VLM({self.name!r}, family={self.family!r}, view={self.view!r}, "
            f"n_layers={self.n_layers}, d_model={self.d_model})"
        )

    def _repr_html_(self) -> str:
        return f"<p><code>{escape(repr(self))}</code>: mg.collect(vlm, ...), mg.collect(vlm.llm, ...)</p>"


def load(
    model: Any,
    *,
    processor: Any = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    remote: bool = False,
) -> VLM:
    """Load a model to trace.

    Args:
        model: "organism" (built in), a Hugging Face name, a folder, or a model in memory.
        processor: needed beside a model in memory; otherwise read from the same place.
        device: "auto" (the accelerator if there is one), or a torch device.
        dtype: "auto" keeps the checkpoint's, but float16 becomes float32 on a CPU.
        revision: branch, tag or commit on the hub.
        remote: run on a remote nnsight backend; not available yet.

    Raises:
        MechguardError: the model or its processor cannot be found or read.
    """
    if remote:
        raise MechguardError("remote=True is not available in this version; load the model locally")
    if isinstance(model, nn.Module):
        return _from_memory(model, processor)
    name = os.fspath(model)
    source = _organism_folder(name) if _is_organism(name) else name
    hf_model = _read_model(source, text_only=False, device=device, dtype=dtype, revision=revision)
    found = processor or _read_processor(source, hf_model, revision)
    folder = Path(source) if Path(source).is_dir() else None
    return VLM(hf_model, _left_padded(found), name=name, folder=folder)


def _is_organism(name: str) -> bool:
    return name == ORGANISM or name.startswith(f"{ORGANISM}:")


def _organism_folder(name: str) -> Path:
    from mechguard import organism

    _, _, seed = name.partition(":")
    if seed and not seed.isdigit():
        raise MechguardError(f"{name!r} is no organism; write organism, or organism:SEED")
    try:
        return (organism.checkpoint(int(seed)) if seed else organism.checkpoint()) / "vlm"
    except ValueError as error:
        raise MechguardError(str(error)) from None


def _from_memory(model: nn.Module, processor: Any) -> VLM:
    if processor is None:
        raise MechguardError(
            f"a {type(model).__name__} in memory needs its processor (or tokenizer): "
            "load(model, processor=...)"
        )
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return VLM(model.eval(), _left_padded(processor), name=str(name))


def _read_model(
    source: str | Path,
    *,
    text_only: bool,
    device: str,
    dtype: str | torch.dtype,
    revision: str | None,
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise MechguardError(
            f'no model {os.fspath(source)!r} was found: it is neither "organism" nor a folder with a '
            f"config.json nor a model that the hub gave ({_first_line(error)}); check the name"
        ) from None
    is_vlm = not text_only and getattr(config, "vision_config", None) is not None
    loader = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if dtype == "auto" and on_cpu and getattr(config, "dtype", None) == torch.float16:
        dtype = torch.float32  # half precision on a CPU is slow and loses digits
    place = {} if on_cpu else {"device_map": device}
    try:
        hf_model = loader.from_pretrained(source, dtype=dtype, revision=revision, **place)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise MechguardError(
            f"the weights of {os.fspath(source)!r} cannot be read ({_first_line(error)})"
        ) from None
    return hf_model.eval()


def _read_processor(source: str | Path, hf_model: Any, revision: str | None) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    reader, noun = (AutoProcessor, "processor") if takes_images(hf_model) else (AutoTokenizer, "tokenizer")
    try:
        found = reader.from_pretrained(source, revision=revision)
        if takes_images(hf_model) and getattr(found, "image_processor", None) is None:
            raise ValueError("what was found there cannot read pictures")
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise MechguardError(
            f"{os.fspath(source)!r} has a model but no readable {noun} ({_first_line(error)}); save the "
            f"{noun} there with {noun}.save_pretrained, or give load(..., processor=...)"
        ) from None


def _left_padded(processor: Any) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _text_model(hf_model: Any) -> Any:
    """A causal language model of the text configuration around the VLM's own decoder and head."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(hf_model.config.get_text_config())
    setattr(text, text.base_model_prefix, hf_model.get_decoder())
    text.set_output_embeddings(hf_model.get_output_embeddings())
    text.generation_config = hf_model.generation_config
    return text.eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""Where the parts of a model are: one generic reading for every family.

transformers itself knows where a model keeps its decoder, its vision encoder and its head
(`get_decoder`, `get_encoder`, `get_input_embeddings`, `get_output_embeddings`). This room turns those
objects into names, so that the same parts can be found in a traced model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mechguard.errors import MechguardError

# Names that families use inside the decoder, in the order they are tried.
LAYER_LISTS = ("layers", "h", "blocks")
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
PROJECTORS = ("multi_modal_projector", "connector", "embed_tokens_extend")
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class Parts:
    """Dotted names, inside a Hugging Face model, of what the analysis touches.

    Attributes:
        decoder: the text decoder, whose output is the final hidden state.
        layers: the list of decoder layers; layer i is `f"{layers}.{i}"`.
        norm: the final norm of the decoder; None if there is none.
        head: the unembedding.
        vision: the vision encoder; None for a text-only model.
        projector: what maps visual features into the residual stream; None if inside the encoder.
        image_token_id: the placeholder token that visual features replace; None if text only.
    """

    decoder: str
    layers: str
    norm: str | None
    head: str | None
    vision: str | None
    projector: str | None
    image_token_id: int | None
    n_layers: int
    d_model: int


def read_parts(hf_model: Any) -> Parts:
    """Find the parts of a Hugging Face model.

    Raises:
        MechguardError: the model has no decoder with a list of layers.
    """
    names = {id(module): name for name, module in hf_model.named_modules()}
    decoder = hf_model.get_decoder() if hasattr(hf_model, "get_decoder") else None
    list_name = next((name for name in LAYER_LISTS if hasattr(decoder, name)), None)
    if decoder is None or list_name is None:
        raise MechguardError(
            f"no decoder layers were found in {type(hf_model).__name__}; wanted a Hugging Face model "
            f"whose get_decoder() has one of {', '.join(LAYER_LISTS)}"
        )
    path = names[id(decoder)]
    norm = next((name for name in FINAL_NORMS if hasattr(decoder, name)), None)
    config = hf_model.config
    text_config = config.get_text_config()
    return Parts(
        decoder=path,
        layers=_join(path, list_name),
        norm=None if norm is None else _join(path, norm),
        head=names.get(id(hf_model.get_output_embeddings())),
        vision=_vision(hf_model, names),
        projector=_projector(names),
        image_token_id=_image_token(config),
        n_layers=len(getattr(decoder, list_name)),
        d_model=int(text_config.hidden_size),
    )


def takes_images(hf_model: Any) -> bool:
    """Whether the configuration describes a vision encoder beside the text decoder."""
    return getattr(hf_model.config, "vision_config", None) is not None


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _vision(hf_model: Any, names: dict[int, str]) -> str | None:
    if not takes_images(hf_model):
        return None
    return names.get(id(hf_model.get_encoder("image"))) or None


def _projector(names: dict[int, str]) -> str | None:
    found = [name for name in names.values() if name.rpartition(".")[2] in PROJECTORS]
    return min(found, key=len) if found else None


def _image_token(config: Any) -> int | None:
    fields = [getattr(config, field, None) for field in IMAGE_TOKEN_FIELDS]
    return next((int(value) for value in fields if value is not None), None)

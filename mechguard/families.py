"""Where the parts of a model are: one generic reading, and a small record where a family needs one.

transformers itself knows where a model keeps its decoder, its vision encoder and its head
(`get_decoder`, `get_encoder`, `get_input_embeddings`, `get_output_embeddings`). This room turns those
objects into names, so that the same parts can be found in a traced model. What the accessors do not say is
written down in `FAMILIES`; nothing outside this room asks for the name of a family.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mechguard.errors import MechguardError

if TYPE_CHECKING:
    import pandas as pd

TESTED = Path(__file__).parent / "families.csv"
# Names that families use inside the decoder, in the order they are tried.
LAYER_LISTS = ("layers", "h", "blocks")
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "embedding_norm")
ATTENTIONS = ("self_attn", "attn", "attention", "cross_attn", "linear_attn", "conv")
MLPS = ("mlp", "feed_forward", "ffn")
PROJECTORS = ("multi_modal_projector", "connector", "embed_tokens_extend")
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class Family:
    """What the accessors of transformers do not say about a family.

    Attributes:
        vision: the vision encoder, where `get_encoder("image")` does not give it.
        cross_attention: the field of the text configuration that lists the layers through which pictures
            enter, for families whose pictures take no place among the tokens. Those layers are skipped on
            text alone.
        reads_text_itself: the text-only model of transformers computes something else than the VLM does on
            text, so the LLM component is the VLM without pictures.
        attention_out: the module of a layer whose output is added to the residual stream after attention,
            where that is not the attention itself.
        mlp_out: the same for the MLP.
        plain_prompt: the prompt where there is no chat template, with {image} and {text}.
        processor_adds: what the processor itself puts behind a prompt with a picture.
        mixes: whether a text without a picture means the same in a batch with prompts that have one.
        attention: the attention implementation to load with, where the default one is wrong.
    """

    vision: str | None = None
    cross_attention: str | None = None
    reads_text_itself: bool = False
    attention_out: str | None = None
    mlp_out: str | None = None
    plain_prompt: str = "{image}\n{text}"
    processor_adds: str = ""
    mixes: bool = True
    attention: str | None = None


POST_NORMS = {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
FAMILIES: dict[str, Family] = {
    # Cohere's own text model scales the logits (`logit_scale`), Aya Vision does not.
    "aya_vision": Family(reads_text_itself=True),
    "gemma2": Family(**POST_NORMS),  # type: ignore[arg-type]
    "gemma3": Family(**POST_NORMS),  # type: ignore[arg-type]
    "gemma3_text": Family(**POST_NORMS),  # type: ignore[arg-type]
    "glm4v": Family(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"),
    # In a batch with prompts of more pictures (transformers 5.23), a prompt gets other states than alone.
    "mllama": Family(cross_attention="cross_attention_layers", mixes=False),
    # The processor changes texts, its tokenizer alone does not. With sdpa (transformers 5.23) a text
    # without padding is read in both directions, one with padding is not.
    "paligemma": Family(plain_prompt="{image}{text}", processor_adds="\n", mixes=False, attention="eager"),
    "phi4_multimodal": Family(vision="model.embed_tokens_extend.image_embed"),
}


@dataclass(frozen=True)
class Parts:
    """Dotted names, inside a Hugging Face model, of what the analysis touches.

    Attributes:
        decoder: the text decoder, whose output is the final hidden state.
        layers: the list of decoder layers; layer i is `f"{layers}.{i}"`.
        norm: the final norm of the decoder; None if there is none.
        head: the unembedding.
        embeddings: the token embeddings.
        vision: the vision encoder; None for a text-only model.
        vision_layers: the longest list of layers in it.
        projector: what maps visual features into the residual stream; None if inside the encoder.
        image_token_id: the placeholder token that visual features replace; None if text only, or if
            pictures enter by cross-attention and stand at no position.
        cross_attention_layers: the decoder layers through which pictures enter, if they do.
        family: what is known of the family besides.
    """

    decoder: str
    layers: str
    norm: str | None
    head: str | None
    embeddings: str | None
    vision: str | None
    vision_layers: str | None
    projector: str | None
    image_token_id: int | None
    n_layers: int
    d_model: int
    cross_attention_layers: tuple[int, ...] = ()
    family: Family = Family()

    def running(self, *, with_picture: bool) -> list[int]:
        """The decoder layers that run: all, but those for pictures only where there is one."""
        skipped = () if with_picture else self.cross_attention_layers
        return [layer for layer in range(self.n_layers) if layer not in skipped]

    def writers(self, layer: nn.Module) -> tuple[str | None, str | None]:
        """The modules of one layer whose outputs attention and MLP add to the residual stream."""
        attention = self.family.attention_out or _first_of(ATTENTIONS, layer)
        return attention, self.family.mlp_out or _first_of(MLPS, layer)


def read_parts(hf_model: Any) -> Parts:
    """Find the parts of a Hugging Face model.

    Raises:
        MechguardError: the model has no decoder with a list of layers.
    """
    names = {id(module): name for name, module in hf_model.named_modules()}
    decoder = decoder_of(hf_model)
    list_name = _first_of(LAYER_LISTS, decoder)
    if decoder is None or list_name is None:
        raise MechguardError(
            f"no decoder layers were found in {type(hf_model).__name__}; wanted a Hugging Face model "
            f"whose decoder has one of {', '.join(LAYER_LISTS)}"
        )
    path = names[id(decoder)]
    norm = _first_of(FINAL_NORMS, decoder)
    config = hf_model.config
    text_config = config.get_text_config()
    family = family_of(config)
    vision = _vision(hf_model, names, family)
    crossing = getattr(text_config, family.cross_attention, ()) if family.cross_attention else ()
    return Parts(
        decoder=path,
        layers=_join(path, list_name),
        norm=None if norm is None else _join(path, norm),
        head=names.get(id(hf_model.get_output_embeddings())),
        embeddings=names.get(id(hf_model.get_input_embeddings())),
        vision=vision,
        vision_layers=_longest_list(hf_model, vision),
        projector=_projector(names),
        image_token_id=None if crossing else _image_token(config),
        n_layers=len(getattr(decoder, list_name)),
        d_model=int(text_config.hidden_size),
        cross_attention_layers=tuple(int(layer) for layer in crossing),
        family=family,
    )


def family_of(config: Any) -> Family:
    """What is known of the family of a configuration."""
    return FAMILIES.get(str(config.model_type), Family())


def takes_images(config: Any) -> bool:
    """Whether a configuration describes a vision encoder beside the text decoder."""
    return getattr(config, "vision_config", None) is not None


def is_text_decoder(text_model: Any, decoder: Any, config: Any) -> bool:
    """Whether a text-only model can hold a VLM's decoder and compute on text what the VLM does."""
    return type(text_model.base_model) is type(decoder) and not family_of(config).reads_text_itself


def tested_families() -> pd.DataFrame:
    """What was tried of each family, and whether it works; filled by running `make families`."""
    import pandas as pd

    return pd.read_csv(TESTED, keep_default_na=False)


def decoder_of(hf_model: Any) -> Any:
    """The text decoder: what transformers calls so, or else what holds the token embeddings."""
    decoder = hf_model.get_decoder() if hasattr(hf_model, "get_decoder") else None
    while decoder is not None and _first_of(LAYER_LISTS, decoder) is None:
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else None
        decoder = None if inner is decoder else inner  # some families wrap a whole language model
    if decoder is None and hasattr(hf_model, "get_input_embeddings"):
        names = {id(module): name for name, module in hf_model.named_modules()}
        path = names.get(id(hf_model.get_input_embeddings()), "")
        decoder = hf_model.get_submodule(path.rpartition(".")[0])
    return decoder


def _first_of(names: tuple[str, ...], module: Any) -> str | None:
    return next((name for name in names if hasattr(module, name)), None)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _vision(hf_model: Any, names: dict[int, str], family: Family) -> str | None:
    if not takes_images(hf_model.config):
        return None
    return family.vision or names.get(id(hf_model.get_encoder("image"))) or None


def _longest_list(hf_model: Any, part: str | None) -> str | None:
    if part is None:
        return None
    inside = hf_model.get_submodule(part).named_modules()
    lists = {name: len(module) for name, module in inside if isinstance(module, nn.ModuleList)}
    return _join(part, max(lists, key=lambda name: lists[name])) if lists else None


def _projector(names: dict[int, str]) -> str | None:
    found = [name for name in names.values() if name.rpartition(".")[2] in PROJECTORS]
    return min(found, key=len) if found else None


def _image_token(config: Any) -> int | None:
    vision = getattr(config, "vision_config", None)
    fields = [getattr(home, field, None) for home in (config, vision) for field in IMAGE_TOKEN_FIELDS]
    return next((int(value) for value in fields if value is not None), None)

"""Image features: a picture that was seen before need not go through the vision encoder again.

Transformers takes features in the place of pixels (`mm_encoder_outputs`). Where a family gives each picture
features of its own, every distinct picture is encoded alone and kept, so that its features do not depend on
what else is in the batch, nor on whether they were known.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIMIT = 2**29
PIXELS, FEATURES = "pixel_values", "mm_encoder_outputs"
Features = Tensor | tuple[Tensor, ...]
"""Of one picture: [1, pos, d_model], or a tuple of one [pos, d_model], as the family has it."""


class FeatureCache:
    """Features by pixels and weights; those used longest ago leave first.

    Attributes:
        limit: how many bytes of features are kept.
        encoded: how many pictures have gone through the encoder.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.encoded = 0
        self._known: OrderedDict[str, Features] = OrderedDict()

    def fill(self, hf_model: Any, encoded: dict[str, Tensor], pictures: int) -> dict[str, Any]:
        """An encoded batch with features in the place of its pixels.

        Tried on LLaVA, Gemma 3, PaliGemma, InternVL and Aya Vision. It stays as it is where the family does
        not take them so: a transformers without `mm_encoder_outputs`, pictures that are cut into tiles or
        flattened into patches (LLaVA-NeXT, LLaVA-OneVision, Qwen-VL, GLM-4V, Idefics 3, SmolVLM), and
        cross-attention (Mllama).

        Args:
            pictures: how many pictures the batch holds.
        """
        pixels = encoded.get(PIXELS)
        encode = getattr(hf_model.base_model, "get_image_features", None)
        if pixels is None or encode is None or not _one_tensor_each(hf_model, encode, encoded, pictures):
            return dict(encoded)
        state = _state_of(hf_model)
        found = []
        for picture in pixels.split(1):
            features = self._features(picture, state, encode)
            if features is None:
                return dict(encoded)
            found.append(features)
        rest = {name: value for name, value in encoded.items() if name != PIXELS}
        return {**rest, FEATURES: {"image": _as_output(found)}}

    def _features(self, picture: Tensor, state: str, encode: Callable[..., Any]) -> Features | None:
        mark = hashlib.blake2b(picture.contiguous().view(torch.uint8).cpu().numpy().data, digest_size=16)
        key = f"{mark.hexdigest()} {tuple(picture.shape)} {state}"
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        with torch.no_grad():
            output = encode(**{PIXELS: picture}, return_dict=True)
        self.encoded += 1
        features = getattr(output, "pooler_output", None)
        if features is None or getattr(output, "deepstack_features", None) is not None or len(features) != 1:
            return None
        self._known[key] = features if isinstance(features, Tensor) else tuple(features)
        while len(self._known) > 1 and sum(map(_size, self._known.values())) > self.limit:
            self._known.popitem(last=False)
        return self._known[key]


def _one_tensor_each(
    hf_model: Any, encode: Callable[..., Any], encoded: dict[str, Tensor], pictures: int
) -> bool:
    """Whether the batch holds one block of pixels a picture, and nothing else is needed to encode it."""
    pixels = encoded[PIXELS]
    needed = set(inspect.signature(encode).parameters) & set(encoded)
    takes = FEATURES in inspect.signature(hf_model.forward).parameters
    return takes and needed == {PIXELS} and pixels.ndim == 4 and len(pixels) == pictures


def _state_of(hf_model: Any) -> str:
    """Changes when a weight outside the decoder is written to, so that no stale features are used."""
    decoder = {id(parameter) for parameter in hf_model.get_decoder().parameters()}
    others = [parameter for parameter in hf_model.parameters() if id(parameter) not in decoder]
    return f"{sum(parameter._version for parameter in others)} {sum(p.data_ptr() for p in others)}"


def _as_output(features: list[Features]) -> Any:
    """Features as the encoder would have returned them for all pictures at once."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    tensors = [one for one in features if isinstance(one, Tensor)]
    pooled: Any = torch.cat(tensors) if tensors else [one for single in features for one in single]
    return BaseModelOutputWithPooling(pooler_output=pooled)


def _size(features: Features) -> int:
    tensor = features if isinstance(features, Tensor) else features[0]
    return tensor.numel() * tensor.element_size()

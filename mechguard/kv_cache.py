"""Keys and values with room for the tokens to come.

The cache that transformers' `generate` makes by default copies all keys and values at every token. Here they
are written behind each other into tensors that are large enough: the same numbers, one copy fewer.
"""

from __future__ import annotations

import copy
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# With which a caller says, or may say, another cache.
OPTIONS = {"past_key_values", "cache_implementation", "use_cache", "generation_config"}
States = Float[Tensor, "batch head pos d_head"]


class RoomyLayer(DynamicLayer):
    """The keys and values of one layer; transformers' own class, but for how it grows.

    Attributes:
        room: positions that are kept free for what follows, whenever there are too few.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._places: dict[str, tuple[Tensor, Tensor]] = {}  # where there is room, and the part in use

    @classmethod
    def over(cls, layer: DynamicLayer, room: int) -> RoomyLayer:
        """A layer that goes on from another, whose tensors stay as they are."""
        found = cls(room)
        found.__dict__.update(layer.__dict__)
        return found

    def update(self, key_states: States, value_states: States, *_: Any, **__: Any) -> tuple[States, States]:
        """Append the keys and values of further tokens; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self.keys = self._grown("keys", key_states)
        values = self.values = self._grown("values", value_states)
        return keys, values

    def _grown(self, name: str, added: States) -> States:
        held = getattr(self, name)
        start = held.shape[-2] if held.numel() else 0
        stop = start + added.shape[-2]
        place, used = self._places.get(name, (None, None))
        if place is None or used is not held or stop > place.shape[-2]:
            place = added.new_empty(*added.shape[:-2], stop + self.room, added.shape[-1])
            if start:
                place[..., :start, :] = held
        place[..., start:stop, :] = added
        found = place[..., :stop, :]
        self._places[name] = place, found
        return found


def roomy_cache(hf_model: Any, settings: dict[str, Any]) -> dict[str, Cache]:
    """The option for `generate` that gives it such a cache, where it would make the plain growing one.

    Args:
        settings: the other options, with max_new_tokens.
    """
    said = set(settings) & OPTIONS or hf_model.generation_config.cache_implementation is not None
    if said or hf_model.config.is_encoder_decoder or not hf_model._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=hf_model.config.get_text_config(decoder=True))
    return {"past_key_values": with_room(cache, settings["max_new_tokens"])} if cache.layers else {}


def with_room(cache: Any, room: int) -> Any:
    """A cache over the same tensors that grows by itself; sliding windows are left to transformers."""
    own = copy.copy(cache)
    own.layers = [
        RoomyLayer.over(layer, room) if type(layer) is DynamicLayer else copy.copy(layer)
        for layer in cache.layers
    ]
    return own


def take_rows(cache: Any, rows: list[int]) -> Any:
    """A cache of some rows of the batch."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in own.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    return own


def grows(cache: Any) -> bool:
    """Whether a cache is one of growing keys and values alone, and can be shared so."""
    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in growing for layer in cache.layers)

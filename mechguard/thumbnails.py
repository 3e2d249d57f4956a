"""Thumbnails: pictures as small data URIs, for pages that must need no other file."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 72  # pixels of the longer side


def draw_thumbnail(picture: Image, *, side: int = SIDE) -> str:
    """A picture as the data URI of a JPEG whose longer side has at most `side` pixels."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    content = BytesIO()
    small.save(content, format="JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + b64encode(content.getvalue()).decode()

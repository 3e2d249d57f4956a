"""The pictures of the world, drawn with Pillow: blank, scenes of shapes, and words.

Pictures are RGB, `SIZE` pixels wide and high. Words use the font inside Pillow, so that every
machine draws the same pictures.
"""

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from mechguard.organism.world import COLORS, SHAPES, with_article

SIZE = 64
WHITE = (255, 255, 255)

Color = tuple[int, int, int]
Rendering = Literal["train", "validation", "test"]

RGB: dict[str, Color] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
}
PLACES: dict[str, tuple[int, int]] = {
    "left": (-14, 0),
    "right": (14, 0),
    "top": (0, -14),
    "bottom": (0, 14),
    "middle": (0, 0),
}
OPPOSITE_PLACES = (("left", "right"), ("top", "bottom"))
LIGHT_BACKGROUNDS: tuple[Color, ...] = (
    WHITE,
    (250, 250, 235),
    (235, 245, 250),
    (200, 200, 200),
    (200, 230, 200),
    (245, 210, 200),
)
DARK_BACKGROUNDS: tuple[Color, ...] = ((0, 0, 0), (40, 40, 60), (50, 20, 20), (10, 40, 25))
DARK_INKS: tuple[Color, ...] = (
    *((0, 0, 0), (60, 0, 0), (0, 0, 90), (0, 60, 0)),
    *((80, 50, 0), (30, 80, 100), (50, 50, 50), (100, 20, 60)),
)
LIGHT_INKS: tuple[Color, ...] = (WHITE, (255, 240, 120), (180, 220, 255), (255, 200, 200))
# The other renderings pair inks and backgrounds that training never shows.
HELD_OUT_STYLES: dict[str, tuple[tuple[Color, Color], ...]] = {
    "validation": (
        ((70, 0, 70), (225, 225, 250)),
        ((0, 60, 60), (250, 235, 200)),
        ((200, 255, 200), (30, 0, 40)),
    ),
    "test": (
        ((20, 40, 70), (255, 220, 235)),
        ((75, 35, 20), (215, 250, 215)),
        ((225, 200, 255), (0, 30, 50)),
    ),
}


@dataclass(frozen=True)
class Item:
    """One coloured shape at a named place."""

    color: str
    shape: str
    place: str


Scene = tuple[Item, ...]


def blank(color: Color = WHITE) -> Image.Image:
    """A picture of one color, white by default."""
    return Image.new("RGB", (SIZE, SIZE), color)


def draw_background(rng: Random) -> Color:
    """Draw a background color: white or light most of the time, dark now and then."""
    kind = rng.random()
    if kind < 0.4:
        return WHITE
    return rng.choice(LIGHT_BACKGROUNDS if kind < 0.8 else DARK_BACKGROUNDS)


def background_of(picture: Image.Image) -> Color:
    """The color of the top left corner, which no drawing reaches."""
    red, green, blue = picture.tobytes()[:3]
    return red, green, blue


def is_dark(color: Color) -> bool:
    """Whether a background counts as dark."""
    return sum(color) < 300


# ------------------------------------------------------------------------------------ scenes


def random_scene(rng: Random) -> Scene:
    """One shape, or with probability 0.35 two shapes on opposite sides."""
    places = rng.choice(OPPOSITE_PLACES) if rng.random() < 0.35 else (rng.choice(list(PLACES)),)
    return tuple(Item(rng.choice(COLORS), rng.choice(SHAPES), place) for place in places)


def describe(scene: Scene) -> str:
    """The scene in words: "a red circle on the left and a blue bar on the right"."""
    return " and ".join(f"{with_article(item.color)} {item.shape} on the {item.place}" for item in scene)


def visible_background(scene: Scene, background: Color) -> Color:
    """The background, or white where a shape would vanish in it."""
    distances = [sum(abs(a - b) for a, b in zip(background, RGB[item.color], strict=True)) for item in scene]
    return background if min(distances) >= 120 else WHITE


def draw_scene(scene: Scene, rng: Random, background: Color = WHITE) -> Image.Image:
    """Paint a scene; places and sizes jitter by a pixel or two."""
    picture = blank(visible_background(scene, background))
    pencil = ImageDraw.Draw(picture)
    for item in scene:
        shift_x, shift_y = PLACES[item.place]
        center_x = SIZE // 2 + shift_x + rng.randint(-1, 1)
        center_y = SIZE // 2 + shift_y + rng.randint(-1, 1)
        _draw_shape(pencil, item, center_x, center_y, radius=rng.randint(9, 12))
    return picture


def _draw_shape(pencil: ImageDraw.ImageDraw, item: Item, x: int, y: int, *, radius: int) -> None:
    color, r = RGB[item.color], radius
    if item.shape == "circle":
        pencil.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif item.shape == "square":
        pencil.rectangle((x - r, y - r, x + r, y + r), fill=color)
    elif item.shape == "triangle":
        pencil.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=color)
    elif item.shape == "diamond":
        pencil.polygon([(x, y - r), (x - r, y), (x, y + r), (x + r, y)], fill=color)
    elif item.shape == "cross":
        pencil.rectangle((x - r, y - 3, x + r, y + 3), fill=color)
        pencil.rectangle((x - 3, y - r, x + 3, y + r), fill=color)
    else:  # bar
        pencil.rectangle((x - r, y - 3, x + r, y + 3), fill=color)


# ------------------------------------------------------------------------------------- words


def draw_word(word: str, rng: Random, rendering: Rendering = "train") -> Image.Image:
    """Write a word, on two lines if it is long, in the inks and backgrounds of a rendering."""
    ink, background = _draw_style(rng, rendering)
    picture = blank(background)
    pencil = ImageDraw.Draw(picture)
    text = "\n".join(_break_word(word))
    font = _font(_largest_size(word) - rng.choice((0, 1)))
    stroke = rng.choice((0.0, 0.4)) if rendering == "train" else 0.2
    left, top, right, bottom = pencil.multiline_textbbox((0, 0), text, font=font, stroke_width=stroke)
    free_x, free_y = SIZE - (right - left), SIZE - (bottom - top)
    x = _within(rng.randint(3, 5), free_x)
    y = _within(free_y / 2 + rng.randint(-1, 1), free_y)
    pencil.multiline_text((x - left, y - top), text, fill=ink, font=font, stroke_width=stroke)
    return picture


def _within(offset: float, free: float) -> int:
    """The offset, moved so that one pixel stays free on both sides where there is room."""
    return int(max(1, min(offset, free - 2)))


def _draw_style(rng: Random, rendering: Rendering) -> tuple[Color, Color]:
    if rendering in HELD_OUT_STYLES:
        return rng.choice(HELD_OUT_STYLES[rendering])
    background = draw_background(rng)
    return rng.choice(LIGHT_INKS if is_dark(background) else DARK_INKS), background


def _break_word(word: str) -> list[str]:
    if len(word) <= 5:
        return [word]
    half = (len(word) + 1) // 2
    return [word[:half], word[half:]]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "this Pillow was built without FreeType, so it cannot scale its built-in font; "
            "install the Pillow wheel from PyPI"
        )
    return font


@cache
def _largest_size(word: str) -> int:
    """The largest font size, 24 at most and 10 at least, at which every line fits."""
    size = 24
    while size > 10 and max(_font(size).getlength(line) for line in _break_word(word)) > 56:
        size -= 1
    return size

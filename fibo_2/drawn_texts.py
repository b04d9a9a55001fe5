"""Drawings of the texts that a caption's `text_render` lists, which the text encoder sees beside the words.

Source: diffusers' BriaFibo2Pipeline (`text_images.py`), which draws them as in training.
"""

import functools
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modules.errors import OptionError

FONT_SIZE = 20
MAX_CHARACTERS = 256  # of a line; longer texts are broken wherever they are
BORDER = 2  # white pixels on each side
LINE_GAP = 4  # white pixels between lines
TALLEST = "Ag"  # a line is at least as high as these letters
_NO_CHARACTER = "\ufffe"  # every font draws its box for missing characters instead
FONT_SUFFIXES = (".ttf", ".otf", ".ttc")


def read_fonts(paths: Sequence[Path]) -> list[ImageFont.FreeTypeFont]:
    """Read font files, and the fonts of folders in the order of their names.

    Raises:
        OptionError: If a file is no font, or if a folder has none.
    """
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in FONT_SUFFIXES)
            if not found:
                raise OptionError(f"--fonts {path}: no font lies there ({', '.join(FONT_SUFFIXES)})")
        files += found
    fonts = []
    for file in files:
        try:
            # the basic layout, so that a text looks the same whether or not Pillow has the library raqm
            fonts.append(ImageFont.truetype(file, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC))
        except OSError as error:
            raise OptionError(f"--fonts {file}: it is no font that can be read ({error})") from None
    return fonts


@functools.cache
def _builtin_font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(FONT_SIZE)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise OptionError(
            "this build of Pillow has no FreeType, which draws the texts of text_render. Install another "
            "build, or omit the drawings with --no_text_images"
        )
    return font


@functools.lru_cache(maxsize=4096)
def _has_character(font: ImageFont.FreeTypeFont, character: str) -> bool:
    if ord(character) < 128:  # taken as present in every font
        return True
    box, drawn = font.getmask(_NO_CHARACTER), font.getmask(character)
    return drawn.size != box.size or bytes(drawn) != bytes(box)


def _select_font(character: str, fonts: Sequence[ImageFont.FreeTypeFont]) -> ImageFont.FreeTypeFont:
    """Return the first font that has a character; the first of all if none has it."""
    return next((font for font in fonts if _has_character(font, character)), fonts[0])


def find_undrawable(text: str, fonts: Sequence[ImageFont.FreeTypeFont] = ()) -> str:
    """Return the characters of a text that neither Pillow's own font nor `fonts` have, each once."""
    known = [_builtin_font(), *fonts]
    missing = {
        character
        for character in text
        if not character.isspace() and not any(_has_character(font, character) for font in known)
    }
    return "".join(sorted(missing))


def draw_text(text: str, fonts: Sequence[ImageFont.FreeTypeFont] = ()) -> Tensor:
    """Draw a text, black on white, in lines of at most `MAX_CHARACTERS`: H W 3 uint8.

    Args:
        text: The text; each run of white space becomes one space.
        fonts: Fonts for the characters that Pillow's own font lacks, in this order.
    """
    words = " ".join(text.split())
    starts = range(0, len(words), MAX_CHARACTERS)
    lines = [words[start : start + MAX_CHARACTERS] for start in starts] or [""]
    own = _builtin_font()
    if all(_has_character(own, character) for character in words):
        image = _draw_in_one_font(lines, own)
    else:
        image = _draw_in_fonts(lines, [own, *fonts])
    return torch.from_numpy(np.array(image))


def _draw_in_one_font(lines: Sequence[str], font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw lines that lie as close together as their letters allow."""
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    _, top, _, bottom = ruler.textbbox((0, 0), TALLEST, font=font)
    min_height = max(1, bottom - top)
    boxes = [ruler.textbbox((0, 0), line or " ", font=font) for line in lines]
    heights = [max(min_height, box[3] - box[1]) for box in boxes]
    width = max(1, *(box[2] - box[0] for box in boxes)) + 2 * BORDER
    height = sum(heights) + LINE_GAP * (len(lines) - 1) + 2 * BORDER
    image = Image.new("RGB", (int(width), int(height)), "white")
    pen = ImageDraw.Draw(image)
    y: float = BORDER
    for line, box, line_height in zip(lines, boxes, heights, strict=True):
        pen.text((BORDER - box[0], y - box[1]), line, font=font, fill="black")
        y += line_height + LINE_GAP
    return image


def _draw_in_fonts(lines: Sequence[str], fonts: Sequence[ImageFont.FreeTypeFont]) -> Image.Image:
    """Draw lines whose characters need several fonts, on the base lines of the first font."""
    ascent, descent = fonts[0].getmetrics()
    line_height = max(1, ascent + descent)
    lines_of_runs = [
        [("".join(run), font) for font, run in groupby(line or " ", lambda one: _select_font(one, fonts))]
        for line in lines
    ]
    widths = [round(sum(font.getlength(run) for run, font in runs)) for runs in lines_of_runs]
    height = line_height * len(lines) + LINE_GAP * (len(lines) - 1) + 2 * BORDER
    image = Image.new("RGB", (max(1, *widths) + 2 * BORDER, height), "white")
    pen = ImageDraw.Draw(image)
    y = BORDER
    for runs in lines_of_runs:
        x: float = BORDER
        for run, font in runs:
            pen.text((x, y + ascent), run, font=font, fill="black", anchor="ls")  # on the base line
            x += font.getlength(run)
        y += line_height + LINE_GAP
    return image

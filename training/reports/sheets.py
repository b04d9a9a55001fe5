"""Draw the samples of one step on one picture: a row of frames for each prompt."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from modules.control_codes import escape_control_codes
from modules.media.reading import Frame
from modules.media.writing import write_png

GAP = 8  # pixels
TITLE_SIZE, TEXT_SIZE = 18, 14
MOST_ROWS = 40  # a picture of more would be too tall to look at
LEAST_WIDTH = 480  # so that a prompt can be read


def sheet_path(folder: Path, name: str, mark: str) -> Path:
    """Return the name of the sheet, which sorts behind the samples on it."""
    return folder / f"{name}_{mark}_sheet.png"


def write_sheet(path: Path, title: str, strips: Mapping[int, Frame], prompts: Mapping[int, str]) -> None:
    """Write the sheet of these samples as PNG: strips from `join_strip`, each below its prompt.

    Raises OutputError if that fails.
    """
    rows = [(prompts.get(index, ""), strips[index]) for index in sorted(strips)[:MOST_ROWS]]
    if not rows:
        return
    width = max(LEAST_WIDTH, *(strip.shape[1] for _, strip in rows)) + 2 * GAP
    text_height = TEXT_SIZE + GAP
    height = TITLE_SIZE + 3 * GAP + sum(text_height + strip.shape[0] + 2 * GAP for _, strip in rows)
    sheet = Image.new("RGB", (width, height), (24, 24, 27))
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), _fit(title, width, TITLE_SIZE), font=_font(TITLE_SIZE), fill=(250, 250, 250))
    y = TITLE_SIZE + 3 * GAP
    for prompt, strip in rows:
        draw.text((GAP, y), _fit(prompt, width, TEXT_SIZE), font=_font(TEXT_SIZE), fill=(210, 210, 215))
        sheet.paste(Image.fromarray(strip), (GAP, y + text_height))
        y += text_height + strip.shape[0] + 2 * GAP
    write_png(path, np.asarray(sheet))


def _fit(text: str, width: int, size: int) -> str:
    """Return as much of a text, on one line, as the sheet is wide."""
    text = escape_control_codes(" ".join(text[:1000].split()))
    font = _font(size)
    if font.getlength(text) <= width - 2 * GAP:
        return text
    while text and font.getlength(text + "\u2026") > width - 2 * GAP:
        text = text[: -max(1, len(text) // 20)]
    return text + "\u2026"


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)

"""Draw a text as a QR code: as lines for a terminal, or as SVG for a page."""

import cv2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

QUIET = 2  # light cells around the code


def compute_cells(text: str) -> NDArray[np.bool_]:
    """Return the cells of a QR code as an (H, W) array, with a light margin. True is light."""
    cells = cv2.QRCodeEncoder.create().encode(text) > 0
    return np.pad(cells, QUIET, constant_values=True)


def draw_code(text: str) -> str:
    """Return a QR code as lines of half-block characters, dark on light in any terminal."""
    cells = compute_cells(text)
    cells = np.pad(cells, ((0, len(cells) % 2), (0, 0)), constant_values=True)
    blocks = {(True, True): " ", (True, False): "\u2584", (False, True): "\u2580", (False, False): "\u2588"}
    code = ""
    for upper_row, lower_row in zip(cells[::2], cells[1::2], strict=True):
        pairs = zip(upper_row, lower_row, strict=True)
        line = "".join(blocks[bool(upper), bool(lower)] for upper, lower in pairs)
        code += f"\033[30;107m{line}\033[0m\n"
    return code


def draw_svg(text: str, label: str) -> Markup:
    """Return a QR code as SVG, dark on light in any color scheme. `label` describes it for screen readers."""
    cells = compute_cells(text)
    height, width = cells.shape
    dark = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(~cells))
    return Markup(
        '<svg class="code" viewBox="0 0 {} {}" role="img" aria-label="{}" shape-rendering="crispEdges">'
        '<path fill="#fff" d="M0 0h{}v{}H0z"/><path fill="#000" d="{}"/></svg>'
    ).format(width, height, label, width, height, dark)

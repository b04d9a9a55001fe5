"""An image as a stack of transparent layers: a file for each layer, and their composition."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modules.media.colors import Frame
from modules.media.writing import write_png

LAYER, COMPOSITE = "_layer{}", "_composite"  # suffixes of a result's name; layer 0 is the whole image


def compose_layers(layers: Sequence[Frame]) -> Frame:
    """Blend RGBA images with straight alpha, H W 4 uint8, the first one at the bottom."""
    height, width, _ = layers[0].shape
    colors: NDArray[np.float64] = np.zeros((height, width, 3))  # colors multiplied by opacity
    opacity: NDArray[np.float64] = np.zeros((height, width, 1))
    for layer in layers:
        alpha = layer[..., 3:] / 255.0
        colors = layer[..., :3] * alpha + colors * (1 - alpha)
        opacity = alpha + opacity * (1 - alpha)
    unmultiplied = np.divide(colors, opacity, out=np.zeros_like(colors), where=opacity > 0)
    return np.concatenate([unmultiplied, opacity * 255], axis=2).round().astype(np.uint8)


def write_layers(
    folder: Path, stem: str, frames: Iterable[Frame], has_full: bool, tags: Mapping[str, str]
) -> list[Path]:
    """Write each image as a PNG with alpha, then the composition of all layers; return the paths.

    Args:
        folder: Existing folder to write into.
        stem: Beginning of the file names.
        frames: Images, H W 4; the layers are ordered from back to front.
        has_full: Whether the first image is the full image instead of a layer.
        tags: Strings to store in the files, by name.
    """
    layers: list[Frame] = []
    paths: list[Path] = []
    # index 0 is the full image, which is not part of the composition
    for index, frame in zip(count(0 if has_full else 1), frames, strict=False):
        paths.append(folder / f"{stem}{LAYER.format(index)}.png")
        write_png(paths[-1], frame, tags)
        if index:
            layers.append(frame)
    paths.append(folder / f"{stem}{COMPOSITE}.png")
    write_png(paths[-1], compose_layers(layers), tags)
    return paths

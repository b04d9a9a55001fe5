"""A tiny RetinaFace with the names of the published files, to which a red dot is a face."""

import math
from pathlib import Path

import torch
from torch import Tensor

from postprocessing.faces.retinaface import SIZES, RetinaFace, RetinaFaceConfig
from postprocessing.faces.retinaface_bodies import MobileNetConfig, ResNetConfig
from tests.tiny.dit_files import write_tensors

MOBILE = RetinaFaceConfig(MobileNetConfig(((4, 4, 6, 6, 8, 8), (8,) * 6, (8, 8))), 8)
RESNET = RetinaFaceConfig(ResNetConfig(4, (1, 2, 1, 1), (2, 2, 4, 4), (8, 8, 12, 12)), 16)
EVEN_RED = 150.0  # R - (G + B) / 2 at which the score is one half; at 200 it is 0.97, at 100 it is 0.03
# eyes, nose, corners of the mouth, as parts of a face's size from its center
POINTS = ((-0.2, -0.15), (0.2, -0.15), (0.0, 0.05), (-0.15, 0.25), (0.15, 0.25))


def random_retinaface(config: RetinaFaceConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RetinaFace(config).state_dict()


def red_retinaface(face: float = 16.0) -> dict[str, Tensor]:
    """Random weights whose channel 0 carries the redness of every eighth pixel, seen by one head alone.

    A dot of 8 x 8 pixels in pure red is one face: a box of `face` pixels around it (at most 3.5 pixels off)
    with landmarks. Larger dots are several faces, 8 pixels apart each, as far as their boxes do not overlap.
    """
    weights = random_retinaface(MOBILE)
    for name, weight in weights.items():
        if name.endswith(".weight") and weight.ndim == 4 and "Head" not in name:
            weight[0] = 0
            if name == "body.stage1.0.0.weight":
                weight[0, :, 1, 1] = torch.tensor([-0.5, -0.5, 1.0])  # blue, green, red
            elif not name.startswith(("fpn.output2", "fpn.output3")):
                center = weight.shape[2] // 2
                weight[0, 0, center, center] = 1
        elif name.endswith((".weight", "running_var")) and weight.ndim == 1:
            weight[0] = 1
        elif name.endswith((".bias", "running_mean")) and weight.ndim == 1 and "Head" not in name:
            weight[0] = 0
    for name in [name for name in weights if "Head" in name]:
        weights[name] = torch.zeros_like(weights[name])
    mean = 123 - (104 + 117) / 2
    steep = 0.07
    weights["ClassHead.0.conv1x1.weight"][1, 0] = steep  # the face of the first anchor of a place
    weights["ClassHead.0.conv1x1.bias"][1] = -steep * (EVEN_RED - mean)
    for scale in range(3):  # no other anchor is ever a face
        weights[f"ClassHead.{scale}.conv1x1.bias"][3] = -50.0
        weights[f"ClassHead.{scale}.conv1x1.bias"][1] += -50.0 if scale else 0.0
    anchor = SIZES[0][0]
    # a dot is seen where a pixel at a multiple of 8 is red; the anchor's center is 4 pixels further
    weights["BboxHead.0.conv1x1.bias"][:4] = torch.tensor(
        [-3.5 / (0.1 * anchor)] * 2 + [math.log(face / anchor) / 0.2] * 2
    )
    weights["LandmarkHead.0.conv1x1.bias"][:10] = torch.tensor(
        [(part * face - 3.5) / (0.1 * anchor) for point in POINTS for part in point]
    )
    return weights


def write_red_detector(path: Path, face: float = 16.0) -> Path:
    """A file of `red_retinaface`, .pth or .safetensors."""
    return write_tensors(path, red_retinaface(face))


write_weights = write_tensors

"""Guide images: how they are read, and which options of ControlNets are refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from modules.errors import MediaError, OptionError
from stable_diffusion.control_net import BatchGuides
from stable_diffusion.control_options import CannyThresholds, ControlOptions, ControlUse
from tests.stable_diffusion.controlling import picture

NONE, CANNY = (ControlUse(Path("net"), canny, 1.0, 1.0) for canny in (None, CannyThresholds(63, 191)))
OPTION = "--control_net_models"


def options_of(count: int = 2, **values: object) -> ControlOptions:
    paths = tuple(Path(f"{number}.safetensors") for number in range(count))
    return ControlOptions.usual(**{"control_net_models": paths, **values})


def test_edges_are_white_lines_at_the_size_of_the_picture(tmp_path: Path) -> None:
    image = np.zeros((96, 128, 3), dtype=np.uint8)
    image[32:64, 32:96] = (255, 128, 0)
    Image.fromarray(image).save(tmp_path / "guide.png")

    (found,) = BatchGuides([CANNY], OPTION, [picture(tmp_path / "guide.png")], 64, 48).guides

    small = Image.fromarray(image).resize((64, 48), Image.Resampling.LANCZOS)
    edges = cv2.Canny(np.asarray(small.convert("L")), 63, 191)
    assert found.unique().tolist() == [0, 1]
    assert torch.equal(found[0, 0], torch.from_numpy(edges).float() / 255)
    assert torch.equal(found[0, 0], found[0, 2])


def test_a_missing_guide_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"missing\.png"):
        BatchGuides([NONE], OPTION, [picture(tmp_path / "missing.png")], 64, 48)


def test_values_belong_to_models_in_their_order() -> None:
    first, second = options_of(
        control_net_preps=("none", "canny_10_20"),
        control_net_multipliers=(0.5, 2.0),
        control_net_ratios=(1.0, 0.25),
    ).uses

    assert first == ControlUse(Path("0.safetensors"), None, 0.5, 1.0)
    assert second == ControlUse(Path("1.safetensors"), CannyThresholds(10, 20), 2.0, 0.25)
    assert options_of(1, control_net_preps=("canny",)).uses[0].canny == CannyThresholds(63, 191)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"control_net_preps": ("canny",)}, "--control_net_preps has 1 value for 2 models"),
        ({"control_net_multipliers": (1.0, 1.0, 1.0)}, "--control_net_multipliers has 3 values for 2 models"),
        ({"control_net_ratios": (0.5,)}, "--control_net_ratios has 1 value for 2 models"),
        ({"control_net_preps": ("none", "openpose")}, "--control_net_preps openpose: only none and canny"),
    ],
)
def test_values_that_do_not_fit_are_refused(values: dict[str, tuple[object, ...]], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        options_of(**values)

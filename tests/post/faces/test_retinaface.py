"""RetinaFace against stored results, from files of any width and in any container."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modules.checkpoints.opening import open_checkpoint
from post.faces.detectors import check_detector, load_detector
from post.faces.retinaface import (
    RetinaFaceDetector,
    anchors,
    decode_boxes,
    decode_landmarks,
    load_retinaface,
    read_retinaface,
)
from tests.golden_cases import make_weights, read_case
from tests.manifests import tensor_list, write_hollow
from tests.post.faces.pictures import dotted, surrounds
from tests.tiny.post_faces import (
    MOBILE,
    RESNET,
    random_retinaface,
    red_retinaface,
    write_red_detector,
    write_weights,
)

CPU = torch.device("cpu")
PUBLISHED = ("resnet50", "mobile0.25")


def load(path: Path, device: torch.device = CPU) -> RetinaFaceDetector:
    with open_checkpoint(path) as checkpoint:
        return load_retinaface(read_retinaface(checkpoint, "--model"), device, torch.float32, None, "--model")


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


@pytest.mark.parametrize("name", PUBLISHED)
def test_scores_boxes_and_landmarks_are_those_of_the_reference(tmp_path: Path, name: str) -> None:
    case, stored = read_case("retinaface")
    table = [
        [key, list(shape)]
        for key, (_, shape) in tensor_list(f"retinaface-{name}").items()
        if not key.endswith("num_batches_tracked")
    ]
    weights = make_weights(case["models"][name]["weights_model_key"], table)
    check = case["models"][name]["weights_check_before_damping"]
    assert sum(float(weight.double().sum()) for weight in weights.values()) == pytest.approx(check["sum"])
    weights = {key: weight * 0.2 if "Head" in key else weight for key, weight in weights.items()}
    counted = {key: torch.tensor(0) for key in tensor_list(f"retinaface-{name}") if "num_batches" in key}
    detector = load(write_weights(tmp_path / "detector.pth", weights | counted))
    image = stored["image_bgr"].numpy()[..., ::-1]

    with torch.no_grad():
        scores, boxes, landmarks = detector.network(detector._to_input(image))

    priors = anchors(64, 96)
    size = torch.tensor([96.0, 64.0])
    assert near(priors, stored["anchors_cxcywh_relative"])
    assert near(scores[0], stored[f"{name}_scores"])
    assert near((decode_boxes(boxes[0], priors) * size.repeat(2))[::3], stored[f"{name}_boxes_every_3rd"])
    points = (decode_landmarks(landmarks[0], priors) * size).flatten(1)
    assert near(points[::3], stored[f"{name}_landmarks_every_3rd"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_fit_at_their_full_size(tmp_path: Path, name: str) -> None:
    check_detector(write_hollow(tmp_path / "detector.safetensors", tensor_list(f"retinaface-{name}")))


@pytest.mark.parametrize("config", [MOBILE, RESNET], ids=["mobile", "resnet"])
@pytest.mark.parametrize("size", [(16, 16), (33, 71), (1, 9)])
def test_files_of_any_width_look_at_pictures_of_any_size(
    tmp_path: Path, config: object, size: tuple[int, int]
) -> None:
    weights = {f"module.{name}": weight for name, weight in random_retinaface(config).items()}  # type: ignore[arg-type]
    detector = load(write_weights(tmp_path / "detector.pth", weights))

    found = detector.find(np.zeros((*size, 3), np.uint8), 0.0)

    assert found
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)


def test_a_red_dot_is_the_one_face(tmp_path: Path) -> None:
    detector = load_detector(write_red_detector(tmp_path / "red.pth"), CPU)

    (found,) = detector.find(dotted(64, 96, (40, 30)), 0.5)

    assert surrounds(found, 36, 26, 44, 34)
    assert found.box[2] - found.box[0] == pytest.approx(16, abs=0.01)
    assert found.landmarks is not None
    assert found.landmarks.shape == (5, 2)
    assert found.landmarks[0, 0] < found.landmarks[1, 0]
    assert not detector.find(dotted(64, 96), 0.5)
    assert len(detector.find(dotted(64, 96, (20, 20), (70, 40)), 0.5)) == 2


def test_what_half_precision_cannot_hold_is_found_in_float32(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = red_retinaface()
    weights["ClassHead.0.conv1x1.weight"][1, 0] *= 10_000  # times 240: beyond float16
    with open_checkpoint(write_weights(tmp_path / "red.pth", weights)) as checkpoint:
        plan = read_retinaface(checkpoint, "--model")
        detector = load_retinaface(plan, CPU, torch.float16, None, "--model")

    with caplog.at_level(logging.INFO):
        (found,) = detector.find(dotted(64, 96, (40, 30)), 0.5)

    assert surrounds(found, 36, 26, 44, 34)
    assert "goes on in float32" in caplog.text


class Says(nn.Module):
    """A network that finds what it is told to, at the anchors themselves."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores[None])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = self.scores.shape[1]
        return self.scores, torch.zeros(1, count, 4), torch.zeros(1, count, 10)


def test_faces_that_overlap_by_more_than_0_4_are_one() -> None:
    places = anchors(64, 64) * 64
    scores = torch.zeros(len(places))
    for score, (x, y, size) in (
        (0.9, (20, 20, 32)),
        (0.8, (28, 20, 32)),
        (0.7, (36, 20, 32)),
        (0.6, (20, 20, 16)),
    ):
        scores[(places == torch.tensor([x, y, size, size])).all(dim=1)] = score
    network: Any = Says(scores)

    found = RetinaFaceDetector(network, None, torch.device("cpu")).find(np.zeros((64, 64, 3), np.uint8), 0.5)

    assert [round(each.score, 3) for each in found] == [0.9, 0.7, 0.6]  # 0.6 and 0.33 of both are shared

"""GFPGAN, CodeFormer and ParseNet: numbers, released files, other files."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from checkpoints.dialects import load_planned
from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from postprocessing.faces.codeformer import CodeFormer, read_codeformer
from postprocessing.faces.detectors import check_detector, load_detector
from postprocessing.faces.gfpgan import Gfpgan, read_gfpgan
from postprocessing.faces.restorers import ParseNet, read_parsenet
from postprocessing.faces.retinaface import (
    RetinaFaceDetector,
    anchors,
    decode_boxes,
    decode_landmarks,
    load_retinaface,
    read_retinaface,
)
from tests.golden_cases import make_weights, read_case
from tests.manifests import fit, tensor_list, write_hollow
from tests.postprocessing.faces.test_detectors import dotted, surrounds
from tests.tiny import post_restorers as tiny
from tests.tiny.post_faces import (
    MOBILE,
    RESNET,
    random_retinaface,
    red_retinaface,
    write_red_detector,
    write_weights,
)

META, CPU = torch.device("meta"), torch.device("cpu")
KINDS: dict[str, tuple[Any, Any]] = {
    "gfpgan-v1.4": (read_gfpgan, Gfpgan),
    "codeformer": (read_codeformer, CodeFormer),
    "parsenet": (read_parsenet, ParseNet),
}
WEIGHTS = {
    "gfpgan-v1.4": tiny.gfpgan_weights,
    "codeformer": tiny.codeformer_weights,
    "parsenet": tiny.parsenet_weights,
}


def _hollow(manifest: str, folder: Path) -> Any:
    """The network of a manifest at full size on the meta device, loaded from a file without data."""
    read, build = KINDS[manifest]
    return fit(write_hollow(folder / "x.safetensors", tensor_list(manifest)), read, build)


def _tiny(kind: str, folder: Path) -> Any:
    read, build = KINDS[kind]
    with open_checkpoint(tiny.write_model(folder / "x.pth", WEIGHTS[kind]())) as checkpoint:
        return load_planned(read(checkpoint), build, CPU, torch.float32, "--model")


def test_the_released_file_of_each_kind_loads_at_full_size(tmp_path: Path) -> None:
    sizes = [getattr(_hollow(kind, tmp_path).config, "size", None) for kind in KINDS]

    assert sizes == [512, 512, None]


@pytest.mark.slow
@torch.inference_mode()
def test_gfpgan_equals_the_reference(tmp_path: Path) -> None:
    case, stored = read_case("gfpgan")
    network = fill(_hollow("gfpgan-v1.4", tmp_path), "gfpgan-v1.4", case)

    made = network(wave_face(512, case["phase"]))

    assert_close(made[..., ::8, ::8], stored["out_every_8th"], case["tolerance"]["out"]["rtol_of_max"])


@pytest.mark.slow
@torch.inference_mode()
def test_codeformer_equals_the_reference(tmp_path: Path) -> None:
    case, stored = read_case("codeformer")
    network = fill(_hollow("codeformer", tmp_path), "codeformer", case)
    face, limit = wave_face(512, case["phase"]), case["tolerance"]["out"]["rtol_of_max"]

    assert torch.equal(network.codes(face), stored["codes"].long())
    for fidelity in (0.5, 0.0):
        made = network(face, fidelity)[..., ::8, ::8]
        assert_close(made, stored[f"out_w{fidelity}_every_8th"], limit)


@torch.inference_mode()
def test_parsenet_equals_the_reference(tmp_path: Path) -> None:
    case, stored = read_case("parsenet")
    network = fill(_hollow("parsenet", tmp_path), "parsenet", case)

    scores = network(wave_face(case["n"], case["phase"]))

    limit = case["tolerance"]["logits"]["rtol_of_max"]
    assert_close(scores[..., ::4, ::4], stored["logits_every_4th"], limit)
    assert torch.equal(scores.argmax(dim=1), stored["classes"].long())


# of the tiny networks, computed when those of real size equalled the reference: (mean, spread, three pixels)
RECORDED = {
    "gfpgan-v1.4": [-0.158493, 0.281835, -0.416717, -0.181953, 0.182192],
    "codeformer": [0.113791, 0.847354, 0.57628, -0.304985, 0.861556],
}


@pytest.mark.parametrize("kind", ["gfpgan-v1.4", "codeformer"])
@torch.inference_mode()
def test_tiny_networks_give_the_recorded_numbers(kind: str, tmp_path: Path) -> None:
    network, face = _tiny(kind, tmp_path), wave_face(tiny.SIZE, 0.3)

    made = network(face, 0.7) if kind == "codeformer" else network(face)

    found = [made.mean(), made.std(), *made[0, :, 5, 9]]
    assert [float(value) for value in found] == pytest.approx(RECORDED[kind], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_face_is_the_same_alone_and_beside_others_but_for_rounding(kind: str, tmp_path: Path) -> None:
    network: nn.Module = _tiny(kind, tmp_path)
    more = () if kind != "codeformer" else (0.5,)
    faces = torch.cat([wave_face(tiny.SIZE, phase) for phase in (0.1, 0.9, 2.0)])

    together = network(faces, *more)

    for face, beside in zip(faces.split(1), together, strict=True):
        assert_close(beside, network(face, *more)[0], 1e-5)


@torch.inference_mode()
def test_noise_of_a_seed_replaces_that_of_the_file(tmp_path: Path) -> None:
    network, face = _tiny("gfpgan-v1.4", tmp_path), wave_face(tiny.SIZE, 0.3)
    made = [network(face)]
    for seed in (1, 2, 1):
        network.draw_noise(torch.Generator().manual_seed(seed))
        made.append(network(face))

    assert torch.equal(made[1], made[3])
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])


@pytest.mark.parametrize(
    ("kind", "other"),
    [("gfpgan-v1.4", "codeformer"), ("codeformer", "parsenet"), ("parsenet", "gfpgan-v1.4")],
)
def test_another_file_is_named_as_what_it_is(kind: str, other: str, tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "x.safetensors", WEIGHTS[other]())
    names = {"gfpgan-v1.4": "GFPGAN", "codeformer": "CodeFormer", "parsenet": "ParseNet"}
    said = rf"is not a {names[kind]}.*looks like a {names[other]}"
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=said):
        KINDS[kind][0](checkpoint)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_layout_is_an_error_of_the_file(kind: str, tmp_path: Path) -> None:
    weights = WEIGHTS[kind]()
    for number, name in enumerate(sorted(weights)[::32]):
        for change in ({}, {name: torch.zeros(())}, {name: torch.zeros(2, 2, 2)}):
            broken = {other: weight for other, weight in weights.items() if other != name} | change
            path = tiny.write_model(tmp_path / f"{number}.safetensors", broken)
            try:
                with open_checkpoint(path) as checkpoint:
                    load_planned(KINDS[kind][0](checkpoint), KINDS[kind][1], META, torch.float32, "--model")
            except CheckpointError:
                continue
            unused = ("toRGB", "style_mlp", "out_img_conv", "num_batches_tracked")
            assert any(part in name for part in unused), f"{name} {change}"


def test_codeformer_of_another_shape_of_codes_is_refused(tmp_path: Path) -> None:
    config = replace(tiny.CODEFORMER, num_positions=15)
    path = tiny.write_model(tmp_path / "x.pth", tiny.codeformer_weights(config))
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="CodeFormer"):
        read_codeformer(checkpoint)


PUBLISHED = ("resnet50", "mobile0.25")


def load(path: Path, device: torch.device = CPU) -> RetinaFaceDetector:
    with open_checkpoint(path) as checkpoint:
        return load_retinaface(read_retinaface(checkpoint, "--model"), device, torch.float32, None, "--model")


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


@pytest.mark.slow_cases("resnet50")
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


@pytest.mark.parametrize(("config", "size"), [(MOBILE, (33, 71)), (RESNET, (1, 9))])
def test_files_of_any_width_look_at_pictures_of_any_size(
    tmp_path: Path, config: Any, size: tuple[int, int]
) -> None:
    weights = {f"module.{name}": weight for name, weight in random_retinaface(config).items()}
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
    assert "continues in float32" in caplog.text


@pytest.mark.parametrize(("side", "count"), [(16, 2), (20, 1)])  # 0.33 and 0.43 of both are shared
def test_faces_that_overlap_by_more_than_0_4_are_one(tmp_path: Path, side: float, count: int) -> None:
    detector = load_detector(write_red_detector(tmp_path / "red.pth", side), CPU)

    assert len(detector.find(dotted(64, 96, (40, 28), (48, 28)), 0.5)) == count


def wave_face(size: int, phase: float) -> Tensor:
    """The input that the descriptions state, 1 3 size size."""
    channel = torch.arange(3, dtype=torch.float64)[:, None, None]
    y = torch.arange(size, dtype=torch.float64)[:, None]
    x = torch.arange(size, dtype=torch.float64)
    turn = 2 * math.pi / size
    first = 0.5 * torch.sin(turn * ((2 + channel) * x + (1 + 2 * channel) * y) + phase)
    second = 0.4 * torch.cos(turn * ((5 - channel) * x - (3 + channel) * y) + 2 * phase + channel)
    return (first + second).float()[None]


def fill(network: nn.Module, manifest: str, case: dict[str, Any]) -> nn.Module:
    """Fill a network made on the meta device with a case's weights, after comparing their sums."""
    table = [[name, list(shape)] for name, (dtype, shape) in tensor_list(manifest).items() if dtype != "I64"]
    weights = make_weights(case["weights_model_key"], table)
    total = sum(float(weight.double().sum()) for weight in weights.values())
    assert math.isclose(total, case["weights_check"]["sum"], rel_tol=1e-4, abs_tol=1e-2)
    missing, _ = network.load_state_dict(weights, strict=False, assign=True)
    assert not missing
    return network.eval()


def assert_close(found: Tensor, expected: Tensor, rtol_of_max: float) -> None:
    """The tolerance of the descriptions: of the largest absolute value."""
    limit = rtol_of_max * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)

"""GFPGAN, CodeFormer and ParseNet: numbers, released files, other files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from post.faces.codeformer import CodeFormer, read_codeformer
from post.faces.gfpgan import Gfpgan, read_gfpgan
from post.faces.restorers import ParseNet, read_parsenet
from tests.golden_cases import read_case
from tests.manifests import tensor_list, write_hollow
from tests.post.faces.golden_faces import assert_close, fill, wave_face
from tests.tiny import post_restorers as tiny

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
    with open_checkpoint(write_hollow(folder / "x.safetensors", tensor_list(manifest))) as checkpoint:
        return load_planned(read(checkpoint), build, META, torch.float32, "--model")


def _tiny(kind: str, folder: Path) -> Any:
    read, build = KINDS[kind]
    with open_checkpoint(tiny.write_model(folder / "x.pth", WEIGHTS[kind]())) as checkpoint:
        return load_planned(read(checkpoint), build, CPU, torch.float32, "--model")


@pytest.mark.parametrize("manifest", KINDS)
def test_the_released_file_loads_at_full_size(manifest: str, tmp_path: Path) -> None:
    network = _hollow(manifest, tmp_path)

    assert manifest == "parsenet" or network.config.size == 512


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_another_file_is_named_as_what_it_is(kind: str, other: str, tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "x.safetensors", WEIGHTS[other]())
    names = {"gfpgan-v1.4": "GFPGAN", "codeformer": "CodeFormer", "parsenet": "ParseNet"}
    with open_checkpoint(path) as checkpoint:
        if kind == other:
            KINDS[kind][0](checkpoint)
            return
        with pytest.raises(CheckpointError, match=rf"is not a {names[kind]}.*looks like a {names[other]}"):
            KINDS[kind][0](checkpoint)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_layout_is_an_error_of_the_file(kind: str, tmp_path: Path) -> None:
    weights = WEIGHTS[kind]()
    for number, name in enumerate(sorted(weights)[::16]):
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
    config = replace(tiny.CODEFORMER, places=15)
    path = tiny.write_model(tmp_path / "x.pth", tiny.codeformer_weights(config))
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="CodeFormer"):
        read_codeformer(checkpoint)

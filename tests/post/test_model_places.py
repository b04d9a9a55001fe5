"""Models of tools that a chain does not name are found where tools/download.py puts them."""

import logging
from pathlib import Path

import pytest

from downloads.catalogue import model_sets
from modules.errors import OptionError
from post.chain_options import TASKS, default_model
from post.options import CODEFORMER, GFPGAN, WITH_FLOWFORMER, WITH_RAFT

SETS = {one.task: one for one in model_sets() if one.family == "tools"}


def write(folder: Path, task: str) -> None:
    """Empty files in the places of a set."""
    for file in SETS[task].components[0].files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.name).touch()


def test_every_set_of_tools_is_taken_by_a_mode() -> None:
    modes = ("swinir", "esrgan", WITH_RAFT, WITH_FLOWFORMER, GFPGAN, CODEFORMER, "")
    assert sorted(task for mode in modes for task in TASKS.get(mode, (mode,))) == sorted(SETS)


@pytest.mark.parametrize(
    ("tool", "mode", "task", "found"),
    [
        ("upscaler", "swinir", "swinir", "upscalers/003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN.pth"),
        ("upscaler", "esrgan", "realesrgan_x2", "upscalers/RealESRGAN_x2plus.pth"),
        ("GIMMVFI", "gimmvfi_r", "gimmvfi_r", "gimmvfi"),
        ("facefix", "codeformer", "codeformer", "facefix/codeformer.pth"),
        ("yolo_blur", "", "yunet", "facefix/face_detection_yunet_2023mar.onnx"),
    ],
)
def test_what_was_downloaded_is_found_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tool: str, mode: str, task: str, found: str
) -> None:
    write(tmp_path / "second", task)

    with caplog.at_level(logging.INFO):
        path = default_model(tool, mode, [tmp_path / "first", tmp_path / "second"])

    assert path == tmp_path / "second" / found
    assert f"{path} is used" in caplog.text


def test_a_model_that_is_not_there_is_answered_with_its_download(tmp_path: Path) -> None:
    write(tmp_path, "gimmvfi_r")
    (tmp_path / "gimmvfi" / "gimmvfi_f_arb_lpips_fp32.safetensors").touch()  # without its optical flow

    with pytest.raises(OptionError, match=r"download\.py --family tools --task gimmvfi_f$"):
        default_model("GIMMVFI", "gimmvfi_f", [tmp_path])

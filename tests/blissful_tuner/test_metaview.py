"""blissful_tuner/metaview.py: what files of every kind say, as lines and as JSON."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blissful_tuner.metadata import as_png_texts, as_tags
from generation.outputs import save_latents
from modules.media.writing import write_png, write_video
from tests.commands import assert_user_error, run_script

SCRIPT = "blissful_tuner/metaview.py"
PROMPT = 'ein Käfer: "läuft" = 漢字 🐞, \\d\n--w 3\n' + "wide " * 1000  # 5 KB
METADATA = {
    "bt_tunerver": "reelsmith",
    "bt_fps": "16",
    "bt_cfg_schedule": "1-3, e~2",
    "bt_guidance_scale": "5.0",
    "bt_embedded_cfg_scale": "6.0",
    "bt_infer_steps": "20",
    "bt_seeds": "12345678901234567890",
    "bt_negative_prompt": "N/A",
    "bt_prompt": PROMPT,
    "bt_task": "t2v-14B",
    "bt_model_type": "wan",
    "bt_height": "480",
}
LINES = [
    "MODEL_TYPE: wan",
    "TASK: t2v-14B",
    "PROMPT: " + PROMPT.replace("\n", "\\n"),
    "NEGATIVE_PROMPT: N/A",
    "SEEDS: 12345678901234567890",
    "INFER_STEPS: 20",
    "EMBEDDED_CFG_SCALE: 6.0",
    "GUIDANCE_SCALE: 5.0",
    "CFG_SCHEDULE: 1-3, e~2",
    "FPS: 16",
    "HEIGHT: 480",
    "TUNERVER: reelsmith",
]
FRAME = np.zeros((64, 64, 3), dtype=np.uint8)


def write(folder: Path, name: str, metadata: Mapping[str, str] = METADATA) -> Path:
    """A file of the kind that its name says, with metadata as outputs have them."""
    path = folder / name
    if path.suffix == ".png":
        write_png(path, FRAME, as_png_texts(metadata))
    elif path.suffix == ".safetensors":
        save_latents(path, torch.zeros(1, 16, 1, 2, 2), metadata)
    else:
        write_video(path, [FRAME], 16.0, tags=as_tags(metadata))
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.png", "a_latent.safetensors"])
def test_every_kind_of_output_gives_the_same_lines(name: str, tmp_path: Path) -> None:
    said = run_script(SCRIPT, write(tmp_path, name), folder=tmp_path)  # from another folder
    lines = said.stdout.splitlines()
    assert lines[: len(LINES)] == LINES
    assert [line.partition(":")[0] for line in lines[len(LINES) :]] == (
        ["parameters"] if name == "a.png" else []
    )
    assert said.stderr == ""


def test_a_lora_gives_its_training_notes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"ss_network_dim": "4", "modelspec.title": "käfer", "prompt": "x"})
    assert run_script(SCRIPT, path).stdout.splitlines() == [
        "modelspec.title: käfer",
        "prompt: x",
        "ss_network_dim: 4",
    ]


def test_control_codes_of_hostile_files_reach_no_terminal(tmp_path: Path) -> None:
    hostile = {"bt_prompt": "\x1b[2J\x9b1m\u202ecat\r\n\x07", "bt_\x1b]0;x": "y"}
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, hostile)
    shown = run_script(SCRIPT, path).stdout + run_script(SCRIPT, path, "--json").stdout
    assert not set(shown) & set("\x1b\x9b\u202e\r\x07")
    assert "PROMPT: \\x1b[2J\\x9b1m\\u202ecat\\n\\x07" in shown


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.png", "a_latent.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 100])
def test_a_file_that_is_cut_short_is_one_message_and_the_others_are_shown(
    name: str, keep: int, tmp_path: Path
) -> None:
    whole = write(tmp_path, "whole.png", {"bt_seeds": "1"})
    cut = write(tmp_path, name)
    cut.write_bytes(cut.read_bytes()[:keep])
    done = run_script(SCRIPT, cut, whole, check=False)
    assert "SEEDS: 1" in done.stdout
    if done.returncode:  # what is there of a Matroska file can be read
        assert_user_error(done, cut.name)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1 or (name, keep) == ("a.mkv", 100)

"""What outputs say about themselves, and what blissful_tuner/metaview.py shows of it."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blissful_tuner.metadata import (
    TUNER_VERSION,
    as_png_texts,
    as_tags,
    output_metadata,
    read_decoded_metadata,
    read_frame_rate,
    read_stored_seed,
    with_plain_keys,
)
from blissful_tuner.metaview import main
from generation.outputs import save_latents
from modules.media.writing import write_png, write_video
from protocols.requests import Request
from tests.commands import assert_user_error, run_script
from tests.preparing import prepare

ASKED = Request("a\ncat ä", 7, 832, 480, 81, 50, 5.0, None, 5.0, "unipc", 16.0, "bad")
REQUEST = replace(prepare(ASKED), embedded_guidance=None)


def test_metadata_has_the_known_keys_and_the_sizes() -> None:
    about = {"model_type": "wan", "task": "t2v-14B"}
    found = output_metadata(REQUEST, about, {"": [("style.safetensors", 0.8)]})
    expected = {
        **about,
        "tunerver": TUNER_VERSION,
        "seeds": "7",
        "prompt": "a\ncat ä",
        "negative_prompt": "bad",
        "infer_steps": "50",
        "guidance_scale": "5.0",
        "cfg_schedule": "N/A",
        "flow_shift": "5.0",
        "height": "480",
        "width": "832",
        "video_length": "81",
        "fps": "16",
        "lora_0": "style.safetensors: 0.8",
    }
    assert found == {f"bt_{name}": text for name, text in expected.items()}


def test_a_latent_file_says_it_in_both_spellings_and_pixels_in_one() -> None:
    settings = {"guidance_rescale": 0.0, "sample_solver": "unipc"}
    made = output_metadata(
        replace(REQUEST, extra_metadata={"video_seconds": "5", "latent_window_size": "9"}),
        {},
        settings=settings,
    )
    latents = with_plain_keys(made)
    plain = {name: text for name, text in latents.items() if not name.startswith("bt_")}
    assert plain == {
        **{"seeds": "7", "prompt": "a\ncat ä", "negative_prompt": "bad", "height": "480", "width": "832"},
        **{"video_seconds": "5", "infer_steps": "50", "guidance_scale": "5.0", "latent_window_size": "9"},
        **{"guidance_rescale": "0.0", "sample_solver": "unipc", "fps": "16"},
    }
    assert made.items() <= latents.items()
    assert not plain.keys() & read_decoded_metadata(latents, {}, (), 16.0).keys()
    assert with_plain_keys({"bt_seeds": "N/A"}) == {"bt_seeds": "N/A"}


def test_the_known_names_without_prefix_are_read() -> None:
    assert read_stored_seed({"seeds": "12"}) == 12
    assert read_frame_rate({"fps": "24"}) == 24.0
    assert read_stored_seed({"bt_seeds": "3", "seeds": "12"}) == 3


@pytest.mark.parametrize(
    ("text", "seed"), [("9007199254740993", 9007199254740993), ("-5", -5), ("N/A", 0), ("1.5", 0)]
)
def test_a_seed_is_read_to_the_last_digit(text: str, seed: int) -> None:
    assert read_stored_seed({"bt_seeds": text}) == seed
    assert read_stored_seed({}) == 0


def read_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings, as AUTOMATIC1111's web UI reads them from a PNG."""
    *lines, last = text.strip().split("\n")
    prompt, negative = [], []
    for line in map(str.strip, lines):
        if not negative and line.startswith("Negative prompt:"):
            negative.append(line.removeprefix("Negative prompt:").strip())
        else:
            (negative or prompt).append(line)
    settings = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    return "\n".join(prompt), "\n".join(negative), dict(settings)


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a cat", "bad"),
        ("ein Käfer 漢字\nin two lines", "blurry,\nSteps: 9, Seed: 8"),
        ('</script> "quoted", Steps: 3, Size: 1x1', "Negative prompt: twice"),
        ("x" * 100_000, "y" * 100_000),
    ],
)
def test_pictures_say_what_made_them_in_the_words_of_other_viewers(prompt: str, negative: str) -> None:
    request = replace(REQUEST, request=replace(ASKED, prompt=prompt), negative_prompt=negative)
    metadata = output_metadata(
        request, {"model_type": "wan", "task": "t2v-14B"}, settings={"sample_solver": "unipc"}
    )

    found = read_parameters(as_png_texts(metadata)["parameters"])

    assert found[:2] == (prompt, negative)
    assert found[2] == {
        "Steps": "50",
        "Sampler": "unipc",
        "CFG scale": "5.0",
        "Seed": "7",
        "Size": "832x480",
        "Model": "wan t2v-14B",
        "Version": TUNER_VERSION,
    }
    assert as_tags(metadata).items() <= as_png_texts(metadata).items()


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
    *("NEGATIVE_PROMPT: N/A", "SEEDS: 12345678901234567890", "INFER_STEPS: 20"),
    *("EMBEDDED_CFG_SCALE: 6.0", "GUIDANCE_SCALE: 5.0", "CFG_SCHEDULE: 1-3, e~2", "FPS: 16"),
    *("HEIGHT: 480", "TUNERVER: reelsmith"),
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


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.png", "a_latent.safetensors"])
def test_every_kind_of_output_gives_the_same_lines(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(capsys, write(tmp_path, name))
    assert lines[: len(LINES)] == LINES
    assert [line.partition(":")[0] for line in lines[len(LINES) :]] == (
        ["parameters"] if name == "a.png" else []
    )


def test_a_lora_gives_its_training_notes(tmp_path: Path) -> None:
    metadata = {"ss_network_dim": "4", "modelspec.title": "käfer", "prompt": "x"}
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata)
    said = run_script(SCRIPT, "x.safetensors", folder=tmp_path)  # from another folder
    assert said.stdout.splitlines() == ["modelspec.title: käfer", "prompt: x", "ss_network_dim: 4"]
    assert said.stderr == ""


def test_control_codes_of_hostile_files_reach_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = {"bt_prompt": "\x1b[2J\x9b1m\u202ecat\r\n\x07", "bt_\x1b]0;x": "y"}
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, hostile)
    lines = [*shown(capsys, path), *shown(capsys, path, "--json")]
    assert not set("".join(lines)) & set("\x1b\x9b\u202e\r\x07")
    assert "PROMPT: \\x1b[2J\\x9b1m\\u202ecat\\n\\x07" in lines


@pytest.mark.parametrize(
    ("name", "keep"),
    [("a.mp4", 0), ("a.mp4", 100), ("a.mkv", 5), ("a.png", 100), ("a.safetensors", 5)],
)
def test_a_file_that_is_cut_short_is_one_message_and_the_others_are_shown(
    name: str, keep: int, tmp_path: Path
) -> None:
    full = write(tmp_path, "whole.png", {"bt_seeds": "1"})
    cut = write(tmp_path, name)
    cut.write_bytes(cut.read_bytes()[:keep])
    done = run_script(SCRIPT, cut, full, check=False)
    assert "SEEDS: 1" in done.stdout
    assert_user_error(done, cut.name)

"""What the options of a script that makes pictures are, and the lines of its prompt files."""

from pathlib import Path

import pytest

from blissful_tuner.video_to_video_options import SourceDefaults
from generation.options import GenerationOptions, read_generation
from generation.prompt_lines import EMBEDDED_IMAGE_OPTIONS
from generation.sample_lines import parse_sample_line
from generation.script_options import PICTURE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from modules.errors import OptionError
from modules.options import NoOptions
from tests.golden_cases import read_case

DEFAULTS = ScriptDefaults(
    fps=PICTURE_FPS,
    video_length=1,
    size=(1024, 768),
    pictures=True,
    output_types=PICTURE_OUTPUTS,
    media=frozenset(),
    source=SourceDefaults(share="strength", takes_video=False),
    embedded_guidance=3.5,
    line_options=EMBEDDED_IMAGE_OPTIONS,
)


def read(tmp_path: Path, *words: str) -> GenerationOptions:
    argv = ["--save_path", str(tmp_path), "--prompt", "a cat", *words]
    options, _ = read_generation("", DEFAULTS, NoOptions, argv)
    return options


def test_a_picture_script_makes_single_images_of_its_size(tmp_path: Path) -> None:
    options = read(tmp_path)

    assert options.request.video_size == (1024, 768)
    assert (options.request.video_length, options.output.output_type) == (1, "images")


@pytest.mark.parametrize(
    "words",
    [
        ("--video_length", "5"),
        ("--fps", "24"),
        ("--codec", "h265"),
        ("--keep_pngs",),
        ("--save_last_frame",),
        ("--trim_tail_frames", "1"),
        ("--video_path", "a.mp4"),
        ("--v2v_pad_mode", "front"),
    ],
)
def test_what_only_videos_have_is_refused_by_name(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match=f"{words[0]} is not supported.*makes pictures"):
        read(tmp_path, *words)


def test_a_video_as_output_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(tmp_path, "--output_type", "video")

    assert "makes pictures" in capsys.readouterr().err


SAMPLE_NAMES = {  # of the measured keys -> ours
    "scale": "cfg_scale",
    "flow_shift": "discrete_flow_shift",
    "controlnet_image": "control_video_path",
}


def test_sample_lines_of_the_image_guides_are_read_as_measured() -> None:
    cases, _ = read_case("image_prompt_lines")
    for line, expected in cases["training_sample_lines"]:
        wanted = {SAMPLE_NAMES.get(key, key): value for key, value in expected.items()}
        if "discrete_flow_shift" in wanted:
            wanted["discrete_flow_shift"] = float(wanted["discrete_flow_shift"])
        read = {key: value for key, value in parse_sample_line(line).items() if value != ""}
        if "seed" not in wanted:
            read.pop("seed", None)  # ours reads a word as a seed too

        assert read == wanted, line

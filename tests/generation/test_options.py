"""Options of generation scripts, --optimized among them, and the requests that come from them and lines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_generate_video
from blissful_tuner.guidance import check_guidance
from blissful_tuner.video_to_video_options import SourceDefaults, SourceOptions
from generation.network_setup import leave_out_missing
from generation.options import GenerationOptions, generation_parser, read_arguments, read_generation
from generation.prompt_lines import (
    EMBEDDED_IMAGE_OPTIONS,
    GENERATION_OPTIONS,
    REFERENCES,
    parse_generation_line,
)
from generation.request import make_request, parse_seed
from generation.sample_lines import parse_sample_line
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, RequestOptions, ScriptDefaults
from modules.errors import OptionError
from modules.options import NoOptions, read_options
from modules.run_limits import limit_run
from modules.speed_options import Quantization
from tests.generation.toy_family import ToyFamily
from tests.golden_cases import read_case
from tests.preparing import prepare

DEFAULTS = ScriptDefaults(fps=16, guidance_scale=5.0)


def read(folder: Path, *arguments: str, defaults: ScriptDefaults = DEFAULTS) -> GenerationOptions:
    parser = generation_parser(None, defaults)
    return read_options(GenerationOptions, read_arguments(parser, ["--save_path", str(folder), *arguments]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from_file", "no such.txt"], "--from_file no such.txt: no such file"),
        (["--prompt", "p", "--trim_tail_frames", "-1"], "--trim_tail_frames"),
        (["--prompt", "p", "--blocks_to_swap", "-4"], "--blocks_to_swap -4: use a number"),
        (["--prompt", "p", "--upcast_linear"], "--upcast_linear needs --fp8_scaled"),
        (["--video_path", "x.mp4", "--i2i_path", "x.png"], "--video_path and --i2i_path exclude each other"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(tmp_path, *arguments)


def test_a_script_may_have_options_about_each_video_of_its_own(tmp_path: Path) -> None:
    defaults = ScriptDefaults(fps=30, guidance_scale=1.0, in_sections=True)
    parser = generation_parser(None, defaults)
    parser.set_defaults(extras={"paws": "feet"})  # as `make_request_facts` says of an option of a record
    parser.add_argument("--paws", type=int, default=4)
    args = read_arguments(
        parser, ["--save_path", str(tmp_path), "--prompt", "p", "--paws", "3", "--guidance_rescale", "0.5"]
    )
    options = read_options(GenerationOptions, args)
    assert options.request.extras == {"paws": ("feet", 3)}
    assert options.request.video_length is None
    assert options.guidance.guidance_rescale == 0.5
    with pytest.raises(SystemExit):
        parser.parse_args(["--save_path", str(tmp_path), "--video_length", "5"])


def test_optimized_turns_on_what_it_stands_for(tmp_path: Path) -> None:
    speed = read(tmp_path, "--prompt", "p", "--optimized").speed
    assert speed.attention.choice.mode == "sage"
    assert speed.compilation.choice is not None
    assert speed.fp8.quantization == Quantization("rows", fp8_matmul=True)
    assert set(speed.by_preset) == {"attn_mode", "compile", "fp8_scaled", "fp8_fast"}
    assert read(tmp_path, "--prompt", "p").speed.by_preset == ()


OPTIONS = RequestOptions.from_defaults(
    prompt="a cat", video_size=(480, 832), fps=16.0, guidance_scale=5.0, source=SourceOptions()
)


def test_a_line_wins_over_the_command_line() -> None:
    line = {
        "prompt": "a dog",
        "video_size_width": 64,
        "video_length": 9,
        "seed": 3,
        "infer_steps": 4,
        "guidance_scale": 2.0,
        "flow_shift": 1.5,
        "image_path": "~/x.png",
        "cfg_schedule": "1-2",
    }
    request = make_request(replace(OPTIONS, seed="9", control_path=Path("c.mp4")), line)
    assert (request.prompt, request.width, request.height, request.frames) == ("a dog", 64, 480, 9)
    assert (request.seed, request.steps, request.guidance_scale) == (3, 4, 2.0)
    assert (request.flow_shift, request.cfg_schedule) == (1.5, "1-2")
    assert request.image_path == Path("~/x.png").expanduser()
    assert request.control_path == Path("c.mp4")


@pytest.mark.parametrize("own", [None, 6.0])
def test_embedded_guidance_of_a_line_is_told_where_a_script_has_none(
    own: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    make_request(replace(OPTIONS, embedded_guidance=own), {"embedded_cfg_scale": 3.0})
    assert ("embedded guidance 3 (--g) is ignored" in caplog.text) == (own is None)


def test_references_of_a_line_replace_those_of_the_command_line() -> None:
    options = replace(OPTIONS, control_image_path=("a.png", "b.png"))
    assert make_request(options).control_images == (Path("a.png"), Path("b.png"))
    assert make_request(options, {"control_image_path": ["c.png"]}).control_images == (Path("c.png"),)


def test_an_empty_path_of_a_line_cancels_that_of_the_command_line() -> None:
    source = SourceOptions(video_path=Path("c.mp4"))
    options = replace(OPTIONS, image_path=Path("a.png"), control_image_path=("b.png",), source=source)
    line = parse_generation_line('a --i "" --ci \'\' --v ""', {**GENERATION_OPTIONS, **REFERENCES})
    request = make_request(options, line)
    assert (request.image_path, request.control_images, request.source) == (None, (), None)


def test_what_only_the_family_reads_goes_there_as_text() -> None:
    """It is not a path here even where it looks like one; of a list each has a line of its own."""
    extras = {
        "image_path": ("image_path", "a.png"),
        "seconds": ("length", 5.0),
        "one": ("one", None),
        "controls": ("controls", ["a", "b"]),
    }
    request = make_request(replace(OPTIONS, extras=extras, image_path=Path("a.png")))
    assert request.extra == {"image_path": "a.png", "length": "5.0", "controls": "a\nb"}
    assert request.image_path is None


def test_a_given_seed_is_kept_or_hashed_and_then_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert parse_seed(" 42 ") == 42
        assert not caplog.messages
        assert make_request(replace(OPTIONS, seed="hello")).seed == 2475399061
    assert caplog.messages == ["Seed of the text 'hello': 2475399061"]


@pytest.mark.parametrize(
    "line",
    [
        {"video_length": 0},
        {"infer_steps": 10**11},
        {"video_size_width": 0},
        {"video_size_height": 16 * 10**8},
        {"guidance_scale": float("nan")},
        {"flow_shift": 0.0},
        {"seed": 2**70},
    ],
)
def test_numbers_that_make_no_sense_are_refused(line: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        make_request(OPTIONS, line)


@pytest.mark.parametrize(
    ("scale", "negative", "is_told"),
    [(5.0, "bad", False), (1.0, None, False), (1.0, "bad", True)],
    ids=["guided", "the family's own", "without guidance"],
)
def test_a_negative_prompt_without_guidance_is_warned_about(
    scale: float, negative: str | None, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    options = replace(OPTIONS, guidance_scale=scale, negative_prompt=negative)
    check_guidance(prepare(make_request(options)))
    assert ("'bad' is ignored" in caplog.text) is is_told
    assert is_told or "ignored" not in caplog.text


def test_a_prompt_that_is_no_text_is_refused_before_the_work() -> None:
    with pytest.raises(OptionError, match="the prompt .* is not UTF-8 text"):
        make_request(OPTIONS, {"prompt": "d\udcffog"})
    assert make_request(OPTIONS, {"prompt": "d\u00f6g", "seed": None}).prompt == "dög"


CPU = torch.device("cpu")


def read_wan(folder: Path, *arguments: object) -> GenerationOptions:
    parser = generation_parser(None, wan_generate_video.DEFAULTS)
    parser.set_defaults(rope_func="default")
    words = ["--save_path", folder, "--prompt", "p", *arguments]
    return read_options(GenerationOptions, read_arguments(parser, [str(word) for word in words]))


def test_what_a_cpu_lacks_is_left_out_with_a_warning_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = leave_out_missing(ToyFamily(), read_wan(tmp_path, "--optimized", "--fp8_fast"), CPU)

    assert options.speed.attention.choice.mode == "sdpa"
    assert not options.speed.fp16_accumulation
    assert options.speed.fp8.fp8_scaled
    assert options.speed.fp8.fp8_fast  # given by name: an error later
    assert {"attn_mode", "fp16_accumulation"}.isdisjoint(options.speed.by_preset)
    assert [line.split(". ")[0] for line in caplog.messages] == [
        "--optimized skips --attn_mode here",
        "--optimized skips --fp16_accumulation here",
    ]
    assert "CUDA devices only" in caplog.messages[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ("--compile",),
            "--optimized sets --fp8_scaled --rope_func; skipped, see the warnings above: "
            "--attn_mode, --fp16_accumulation; as you set them: --compile",
        ),
        (
            ("--compile", "--fp8", "--attn_mode", "torch", "--fp16_accumulation"),
            "--optimized sets --rope_func; as you set them: --attn_mode, --compile, --fp8_scaled, "
            "--fp16_accumulation",
        ),
    ],
)
def test_one_line_says_what_is_set_what_is_missing_and_what_was_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: tuple[str, ...], said: str
) -> None:
    with caplog.at_level("INFO"):
        leave_out_missing(ToyFamily(), read_wan(tmp_path, "--optimized", *given), CPU)
    assert [text for text in caplog.messages if text.startswith("--optimized sets")] == [said]


def read_images(tmp_path: Path, *words: str) -> GenerationOptions:
    """The options of a script that makes pictures."""
    images = ScriptDefaults(
        fps=IMAGE_FPS,
        video_length=1,
        size=(1024, 768),
        pictures=True,
        output_types=PICTURE_OUTPUTS,
        media=frozenset(),
        source=SourceDefaults(denoise_option="strength", takes_video=False),
        embedded_guidance=3.5,
        line_options=EMBEDDED_IMAGE_OPTIONS,
    )
    argv = ["--save_path", str(tmp_path), "--prompt", "a cat", *words]
    return read_generation("", images, NoOptions, argv)[0]


@pytest.mark.parametrize(
    "words",
    [
        ("--video_length", "5"),
        ("--codec", "h265"),
        ("--save_last_frame",),
        ("--video_path", "a.mp4"),
    ],
)
def test_what_only_videos_have_is_refused_by_name(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match=f"{words[0]} is refused: .*makes images"):
        read_images(tmp_path, *words)


def test_a_picture_script_makes_single_images_of_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = read_images(tmp_path)

    assert options.request.video_size == (1024, 768)
    assert (options.request.video_length, options.output.output_type) == (1, "images")
    with pytest.raises(SystemExit):
        read_images(tmp_path, "--output_type", "video")
    assert "makes images" in capsys.readouterr().err


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
        found = {key: value for key, value in parse_sample_line(line).items() if value != ""}
        if "seed" not in wanted:
            found.pop("seed", None)  # ours reads a word as a seed too
        if "sample_steps" in wanted:  # brought into 1..1000 there; here the samples say what is too much
            wanted["sample_steps"] = found["sample_steps"]

        assert found == wanted, line


def test_a_tag_that_loads_a_lora_elsewhere_causes_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    make_request(OPTIONS, {"prompt": "a cat <lora:style:0.8>, 1 < 2 > 0"})
    (record,) = caplog.records
    assert record.getMessage().startswith("<lora:style:0.8> in a prompt loads nothing and is read as words")


def test_a_prompt_that_names_a_json_file_is_the_object_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a caption ü.json"
    path.write_text('\ufeff{\n "short_description": "a c\u00e4t",\r\n "own": 1.0}\n', encoding="utf-8")
    content = '{\n "short_description": "a cät",\n "own": 1.0}'

    request = make_request(replace(OPTIONS, prompt=f"@{path}", negative_prompt=f" @{path} "))
    assert (request.prompt, request.negative_prompt) == (content, content)
    assert request.typed_texts["prompt"] == f"@{path}"
    assert make_request(OPTIONS, {"prompt": f"@{path}"}).prompt == content
    assert make_request(replace(OPTIONS, prompt="@ohwx in a hat")).prompt == "@ohwx in a hat"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file.*one JSON object"),
        ("{a cat", "not JSON.*one JSON object"),
        ("[1]", "not a JSON object"),
        ("<!doctype html>", "not JSON"),
    ],
)
def test_a_prompt_that_names_no_json_object_is_refused(
    content: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(OptionError, match=words):
        make_request(replace(OPTIONS, prompt=f"@{path}"))


def test_commands_of_pages_read_no_file_for_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{}", encoding="utf-8")
    with limit_run([tmp_path]), pytest.raises(OptionError, match="Pass the JSON itself"):
        make_request(replace(OPTIONS, prompt=f"@{path}"))

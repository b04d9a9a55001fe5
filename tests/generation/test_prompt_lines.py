"""Prompt lines against the measured ones, and what is mended in them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from generation.prompt_lines import (
    EMBEDDED_GENERATION_OPTIONS,
    GENERATION_OPTIONS,
    IMAGE_GENERATION_OPTIONS,
    SECTIONED_GENERATION_OPTIONS,
    LineOption,
    parse_generation_line,
    read_generation_lines,
    split_line,
)
from generation.sample_lines import parse_sample_line, parse_sample_prompts, read_sample_file
from modules.errors import OptionError
from modules.option_values import text_to_seed
from stable_diffusion.lines import read_line
from tests.golden_cases import read_case

CASE, _ = read_case("prompt_lines")
SEEDS, _ = read_case("string_seeds")


@pytest.mark.parametrize(("line", "expected"), CASE["training_sample_lines"])
def test_sample_lines_are_read_as_measured(line: str, expected: dict[str, Any]) -> None:
    if "--s 5000" in line:  # cut to 1000 there; here as many as a generation makes
        expected = expected | {"sample_steps": 5000}
    assert parse_sample_line(line) == expected


@pytest.mark.parametrize(("line", "expected"), CASE["wan_generation_lines"])
def test_generation_lines_are_read_as_measured(line: str, expected: dict[str, Any]) -> None:
    assert parse_generation_line(line) == expected


@pytest.mark.parametrize(("line", "expected"), CASE["framepack_generation_lines"])
def test_lines_of_videos_in_sections_are_read_as_measured(line: str, expected: dict[str, Any]) -> None:
    """`fs` and `cs` are newer than what was measured."""
    found = parse_generation_line(line, SECTIONED_GENERATION_OPTIONS)
    newer = {"flow_shift": 3.0, "cfg_schedule": "1-2"} if "--fs" in line else {}
    assert found == {**expected, **newer}


IMAGES = {"image_path": "my cat.png", "end_image_path": "b.png"}
PLAIN, EMBEDDED = GENERATION_OPTIONS, EMBEDDED_GENERATION_OPTIONS
SECTIONS = SECTIONED_GENERATION_OPTIONS


@pytest.mark.parametrize(
    ("options", "line", "expected"),
    [
        # what a letter means is the script's
        (PLAIN, "p --g 3 --f 5", {"guidance_scale": 3.0, "video_length": 5}),
        (EMBEDDED, "p --g 3 --f 5", {"embedded_cfg_scale": 3.0, "video_length": 5}),
        (PLAIN, "p --zz 3", {}),
        # the sections of the command line are not to count
        (SECTIONS, "p --f 3", {"video_seconds": 3.0, "video_sections": None}),
        (SECTIONS, "p --vs 2 --f 3", {"video_sections": 2, "video_seconds": 3.0}),
        (SECTIONS, "p --g 2 --l 3", {"guidance_scale": 3.0}),
        (SECTIONS, "p --i 0:a.png;;;-1:b.png", {"image_path": "0:a.png;;;-1:b.png"}),
        (SECTIONS, "p --cn a.mp4 --ii b.png", {}),
        (SECTIONS, 'p --v "b c.mp4" --vd 0.4', {"video_path": "b c.mp4", "denoise": 0.4}),
        (
            SECTIONS,
            'p --i "my cat.png" --ei \'b.png\' --ci "c.png"',
            {**IMAGES, "control_image_path": ["c.png"]},
        ),
        (SECTIONS, 'p --i " --ei "b.png', {"image_path": '"', "end_image_path": '"b.png'}),
        # where there are two text encoders
        (EMBEDDED, "p --p2 a dog - with a hat", {"prompt_2": "a dog - with a hat"}),
        (SECTIONS, "p --p2 a dog - with a hat", {"prompt_2": "a dog - with a hat"}),
        (PLAIN, "p --p2 a dog", {}),
        # long names are those of the script
        (PLAIN, "p --guidance_scale 5 --infer_steps 3", {"guidance_scale": 5.0, "infer_steps": 3}),
        (PLAIN, "p --seed hello", {"seed": 2475399061}),
        (PLAIN, "p --video_size 480 832", {"video_size_height": 480, "video_size_width": 832}),
        (PLAIN, "p --video_size 480 832 --w 64", {"video_size_height": 480, "video_size_width": 64}),
        (PLAIN, "p --fps 24 --sample_solver vanilla", {"fps": 24, "sample_solver": "vanilla"}),
        (PLAIN, "p --g 3 --guidance_scale 5", {"guidance_scale": 5.0}),
        (
            PLAIN,
            "p --image_path 'a b.png' --negative_prompt",
            {"image_path": "a b.png", "negative_prompt": ""},
        ),
        (SECTIONS, "p --embedded_cfg_scale 3", {"embedded_cfg_scale": 3.0}),
        (SECTIONS, "p --video_seconds 2", {"video_seconds": 2.0, "video_sections": None}),
        (SECTIONS, "p --control_image_path a --control_image_path b", {"control_image_path": ["a", "b"]}),
        (PLAIN, "p --embedded_cfg_scale 3 --video_seconds 2 --control_image_path a", {}),
    ],
)
def test_a_line_is_read_with_the_options_of_its_script(
    options: Mapping[str, LineOption],
    line: str,
    expected: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert parse_generation_line(line, options) == {"prompt": "p", **expected}
    is_twice = line in ("p --g 2 --l 3", "p --g 3 --guidance_scale 5")
    assert bool(caplog.text) == (expected == {} or is_twice)  # what has no meaning is reported


PLACE = {
    "width": ("video_size_width", "width", 64),
    "height": ("video_size_height", "height", 32),
    "frames": ("video_length", "frame_count", 9),
    "num_frames": ("video_length", "frame_count", 9),
    "frame_count": ("video_length", "frame_count", 9),
    "seed": ("seed", "seed", 4),
    "steps": ("infer_steps", "sample_steps", 2),
    "num-inference-steps": ("infer_steps", "sample_steps", 2),
    "sample_steps": ("infer_steps", "sample_steps", 2),
    "cfg": ("guidance_scale", "cfg_scale", 5.5),
    "CFG": ("guidance_scale", "cfg_scale", 5.5),
    "guidance_scale": ("guidance_scale", "cfg_scale", 5.5),
    "scale": ("guidance_scale", "cfg_scale", 5.5),
    "embedded_cfg_scale": ("embedded_cfg_scale", "guidance_scale", 6.0),
    "shift": ("flow_shift", "discrete_flow_shift", 3.0),
    "negative": ("negative_prompt", "negative_prompt", "ugly"),
    "image": ("image_path", "image_path", "a.png"),
    "end_image": ("end_image_path", "end_image_path", "a.png"),
    "control": ("control_path", "control_video_path", "a.mp4"),
    "sampler": ("sample_solver", "sample_sampler", "euler"),
    "cfg_schedule": ("cfg_schedule", "cfg_schedule", "1-2"),
    "prompt_2": ("prompt_2", "prompt_2", "a pet"),
    "fps": ("fps", "fps", 12),
}


@pytest.mark.parametrize("name", PLACE)
def test_long_names_mean_the_same_in_generations_and_in_samples(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    key, sample_key, value = PLACE[name]
    line = f"a cat --{name} {value:g}" if isinstance(value, float) else f"a cat --{name} {value}"

    assert parse_generation_line(line, EMBEDDED_GENERATION_OPTIONS) == {"prompt": "a cat", key: value}
    assert parse_sample_line(line) == {"prompt": "a cat", sample_key: value}
    assert not caplog.records


def test_an_option_of_a_guide_may_have_one_dash() -> None:
    found = parse_sample_line("a cat --ctr 0.25 -rcfg 1.0 --w 64")
    assert found == {"prompt": "a cat", "cfg_trunc_ratio": 0.25, "renorm_cfg": 1.0, "width": 64}


@pytest.mark.parametrize("name", ["size", "video_size", "image_size"])
def test_a_size_by_a_long_name_has_the_height_first(name: str) -> None:
    sides = {"video_size_height": 480, "video_size_width": 832}
    assert parse_generation_line(f"a --{name} 480 832") == {"prompt": "a", **sides}
    assert parse_sample_line(f"a --{name} 480 832") == {"prompt": "a", "height": 480, "width": 832}


@pytest.mark.parametrize("parse", [parse_generation_line, parse_sample_line])
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stpes 3", "the unknown option --stpes 3 is ignored. Did you mean --steps?"),
        ("widht 3", "the unknown option --widht 3 is ignored. Did you mean --width?"),
        ("negativ x", "the unknown option --negativ x is ignored. Did you mean --negative?"),
        ("framez 3", "the unknown option --framez 3 is ignored. Did you mean --frames?"),
        # of the command line; no similar name that has no effect in lines either
        ("lora_weight 3", "the unknown option --lora_weight 3 is ignored. It has no effect in "),
        ("zz 3", "the unknown option --zz 3 is ignored. Use --w --h --f --d --s --g --l"),
    ],
)
def test_the_nearest_name_is_suggested(
    parse: Callable[[str], dict[str, Any]], word: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert parse(f"a cat --{word}") == {"prompt": "a cat"}
    assert message in caplog.text


def test_an_option_that_only_other_lines_have_is_not_taken_for_a_similar_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    parse_generation_line("a cat --end_image a.png --frames 9", IMAGE_GENERATION_OPTIONS)
    parse_sample_line("a cat --vd 0.5")

    assert "--end_image a.png is ignored. It has no effect in lines of this script" in caplog.text
    assert "--frames 9 is ignored. It has no effect in lines of this script" in caplog.text
    assert "--vd 0.5 is ignored. It has no effect in samples of a training" in caplog.text


def test_long_names_stand_in_entries_too(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    entry = {"prompt": "a", "steps": 3, "cfg": 2, "video_length": 5, "guidance_scale": 7}
    path.write_text(json.dumps([entry]), "utf-8")

    (found,) = parse_sample_prompts(read_sample_file(path), path)

    # `guidance_scale` is the embedded one in files of entries, as other trainers have it
    assert found == {
        "prompt": "a",
        "sample_steps": 3,
        "cfg_scale": 2.0,
        "frame_count": 5,
        "guidance_scale": 7.0,
    }


@pytest.mark.parametrize(("text", "seeds"), SEEDS["cases"])
def test_text_seeds_are_the_measured_ones(text: str, seeds: dict[str, int]) -> None:
    assert {bits: text_to_seed(text, int(bits)) for bits in seeds} == seeds


def test_a_size_in_one_word_is_height_first_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    found = parse_generation_line("p --video_size 480x832", GENERATION_OPTIONS)
    assert (found["video_size_height"], found["video_size_width"]) == (480, 832)
    assert "a height of 480 and a width of 832" in caplog.text


def test_an_option_given_twice_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_generation_line("p --w 32 --ci a --ci b --w 64", SECTIONS)["video_size_width"] == 64
    (told,) = caplog.messages
    assert told.endswith(": --w: given more than once, the last counts")


def test_seed_minus_one_is_a_seed_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_generation_line("p --d -1", GENERATION_OPTIONS)["seed"] == -1
    assert "omit it for a random one" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("p --w 5x", "--w: '5x' is not a whole number"),
        ("p --video_size 480", "--video_size: '480' is not a height and a width, such as 480 832"),
        ("p --w 832x480", "--w: '832x480' is not a whole number: pass --w 832 --h 480"),
        ("p --fps 0", "--fps: 0 is not a frame rate: use a number from 1 to 1000"),
        ("p --infer_steps many", "--infer_steps: 'many' is not a whole number"),
    ],
)
def test_wrong_values_are_refused(line: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_generation_line(line)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(OptionError, match="no prompt"):
        read_generation_lines(path)


def test_a_toml_subset_wins_over_what_all_share(tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(
        '[prompt]\nwidth = 64\nseed = 1\n[[prompt.subset]]\nprompt = "a"\nwidth = '
        '32\n[[prompt.subset]]\nprompt = "b"\n'
    )
    assert parse_sample_prompts(read_sample_file(path), path) == [
        {"prompt": "a", "width": 32, "seed": 1},
        {"prompt": "b", "width": 64, "seed": 1},
    ]


def test_the_control_picture_has_the_name_that_other_image_trainers_give_it(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": "a", "controlnet_image": "edges/a.png"}]), encoding="utf-8")

    (entry,) = parse_sample_prompts(read_sample_file(path), path)

    assert entry == {"prompt": "a", "control_video_path": "edges/a.png"}


def test_json_holds_lines_and_objects(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(["a --w 32", {"prompt": "b", "sample_steps": 5000, "cfg_scale": 2}]))
    assert parse_sample_prompts(read_sample_file(path), path) == [
        {"prompt": "a", "width": 32},
        {"prompt": "b", "sample_steps": 5000, "cfg_scale": 2.0},
    ]


@pytest.mark.parametrize("size", [[48, 32], "48 32"])
def test_a_size_is_a_key_of_prompt_files_too(size: object, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": "a", "size": size, "steps": 4}]))

    assert parse_sample_prompts(read_sample_file(path), path) == [
        {"prompt": "a", "height": 48, "width": 32, "sample_steps": 4}
    ]

    path.write_text(json.dumps([{"prompt": "a", "size": "large"}]))
    with pytest.raises(OptionError, match="entry 1: size: 'large' is not a height and a width"):
        parse_sample_prompts(read_sample_file(path), path)


def test_a_wrong_type_names_file_entry_and_key(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": "b", "width": "wide"}]))
    with pytest.raises(OptionError, match=r"prompts\.json, entry 1: width = 'wide' must be of type int"):
        parse_sample_prompts(read_sample_file(path), path)


@pytest.mark.parametrize(
    ("name", "text"), [("p.toml", "x ="), ("p.json", "{"), ("p.json", '{"a": 1}'), ("p.csv", "a")]
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(OptionError, match="--sample_prompts"):
        parse_sample_prompts(read_sample_file(path), path)


@pytest.mark.parametrize(
    ("text", "seed", "said"),
    [
        ("12abc", 12, "'12abc' in a sample prompt is read as 12"),
        ("-3", -3, ""),
        ("hello", 2475399061, "Seed of the text 'hello': 2475399061"),
        ("nan", 599687776, "Seed of the text 'nan': 599687776"),
    ],
)
def test_a_sample_of_a_training_may_have_a_text_as_seed_which_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, seed: int, said: str
) -> None:
    caplog.set_level("INFO")
    assert parse_sample_line(f"a cat --d {text}")["seed"] == seed
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)
    if not text.startswith("1"):
        assert parse_generation_line(f"a cat --d {text}")["seed"] == seed
    path = tmp_path / "samples.json"
    path.write_text(json.dumps([{"prompt": "a cat", "seed": text}]), encoding="utf-8")
    assert parse_sample_prompts(read_sample_file(path), path)[0]["seed"] == seed


def test_what_stands_behind_a_number_of_a_sample_is_told(caplog: pytest.LogCaptureFixture) -> None:
    found = parse_sample_line("a cat --w 832x480 --l 1.5e1 --fs 3,5 --ctr .5")

    assert found == {
        "prompt": "a cat",
        "width": 832,
        "cfg_scale": 15,
        "discrete_flow_shift": 3,
        "cfg_trunc_ratio": 0.5,
    }
    assert [record.args[:2] for record in caplog.records] == [("832x480", "832"), ("3,5", "3")]
    with pytest.raises(OptionError, match="--l: 'nan' does not begin with a number"):
        parse_sample_line("a cat --l nan")


@pytest.mark.parametrize("text", ["", "9" * 200])
def test_a_seed_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(OptionError, match="--d[ :].*Fix the line"):
        parse_sample_line(f"a cat --d {text}")
    path = tmp_path / "samples.json"
    path.write_text(json.dumps([{"prompt": "a cat", "seed": text}]), encoding="utf-8")
    with pytest.raises(OptionError, match="entry 1: seed: "):
        parse_sample_prompts(read_sample_file(path), path)


def test_the_guides_name_of_the_guidance_scale_is_read_from_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('[{"prompt": "a", "scale": 4}, {"prompt": "b", "scale": 4, "cfg_scale": 2}]')
    assert [entry["cfg_scale"] for entry in parse_sample_prompts(read_sample_file(path), path)] == [4.0, 2.0]


@pytest.mark.parametrize("dash", ["-", "\u2013", "\u2014", "-\u2014"])
def test_an_option_behind_another_dash_is_refused_and_a_dash_in_a_text_is_not(dash: str) -> None:
    for parse in (parse_generation_line, parse_sample_line):
        with pytest.raises(OptionError, match="two plain dashes. Write --w$|Write --w. Fix the line"):
            parse(f"a cat {dash}w 64 --s 2")
        text = f"a cat {dash} w 64, {dash}i was there, x{dash}w 64, {dash}zz 3"
        assert parse(text)["prompt"] == text


@pytest.mark.parametrize("letter", ["i", "ei", "ci", "w", "d", "of", "sample_solver", "from_latent"])
def test_an_option_without_a_value_is_told(letter: str) -> None:
    quoted = f'a cat --{letter} "" --n'
    for line in (f"a cat --{letter}", quoted):
        if line != quoted or letter not in {"i", "ei", "ci", "from_latent"}:
            with pytest.raises(OptionError, match=f"^--{letter} has no value"):
                parse_generation_line(line, SECTIONED_GENERATION_OPTIONS)
    assert parse_generation_line("a cat --n") == {"prompt": "a cat", "negative_prompt": ""}


WEB_UI = (
    '--prompt "a castle" --negative_prompt "trees, \\"x\\"" --width 128 --height 64 --steps 3 --cfg_scale 5'
)
DEFAULT = 'a castle --n trees, "x" --w 128 --h 64 --s 3 --l 5'


@pytest.mark.parametrize(
    ("web_ui", "usual"),
    [
        (WEB_UI, DEFAULT),
        ("--steps 3 --prompt 'a castle'", "a castle --s 3"),  # in any order
        ("  --Prompt a castle --seed 9", "a castle --d 9"),  # without marks
        ('--prompt "a castle" --seed "9" --negative_prompt ""', "a castle --d 9 --n"),
        ('a castle --n "trees" --s 3', "a castle --n trees --s 3"),
        ("a castle --n 'two words'", "a castle --n two words"),
        ('a castle --n "trees" and "rocks"', 'a castle --n "trees" and "rocks" '),  # not around all of it
    ],
)
def test_lines_of_the_web_ui_mean_what_the_usual_form_means(web_ui: str, usual: str) -> None:
    for read in (parse_generation_line, parse_sample_line, read_line):
        found, expected = read(web_ui), read(usual)
        expected.setdefault("negative_prompt", found.get("negative_prompt"))
        assert {"negative_prompt": None} | found == expected


def test_dashes_in_a_value_in_quotation_marks_belong_to_it() -> None:
    line = '--prompt "a castle --n not an option" --negative_prompt "b --s 3" --steps 4'

    found = parse_generation_line(line)

    assert found == {"prompt": "a castle --n not an option", "negative_prompt": "b --s 3", "infer_steps": 4}
    assert parse_generation_line('say "hi" --n 5" tall --s 3')["infer_steps"] == 3


@pytest.mark.parametrize("parse", [parse_generation_line, parse_sample_line])
def test_dashes_in_a_json_object_belong_to_it(parse: Callable[[str], dict[str, Any]]) -> None:
    text = '{"short_description": "a -- b --s 9", "objects": [{"description": "} --d 1"}]}'

    for line in (f"{text} --n {text} --d 4", f"--prompt {text} --d 4 --n {text}"):
        found = parse(line)
        assert (found["prompt"], found["negative_prompt"], found["seed"]) == (text, text, 4)
    found = parse("{red|blue} {cat --d 4")  # no object
    assert (found["prompt"], found["seed"]) == ("{red|blue} {cat", 4)


@pytest.mark.parametrize("line", ["a castle --prompt b", '--prompt "a" --prompt "b"'])
def test_a_line_with_two_prompts_is_refused(line: str) -> None:
    with pytest.raises(OptionError, match="two prompts"):
        split_line(line)


def test_a_line_that_begins_with_an_option_says_what_becomes_of_it(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_sample_line("--w 100")["prompt"] == "--w 100"
    assert "begins with --w, which is taken as its text" in caplog.text


def test_paths_in_quotation_marks_keep_their_backslashes() -> None:
    found = parse_generation_line(r'--prompt "a" --image_path "\\host\share\a b.png"')

    assert found["image_path"] == r"\\host\share\a b.png"

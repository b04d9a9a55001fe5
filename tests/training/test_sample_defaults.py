"""A sample's line that says nothing is made as the family's generation script makes the same prompt."""

import contextlib
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from blissful_tuner.metadata import output_metadata
from fibo_2.captions import NULL
from generation.request import prepare_line
from krea2.family import family_for_samples
from protocols.families import FAMILIES as ENTRIES
from protocols.requests import Prepared
from tests.tiny.families import FAMILIES, OUTPUT, family_called
from tests.tiny.flux import write_tiny_flux
from tests.tiny.krea2 import tiny_state, write_dit
from tests.tiny.project import write_clips, write_image
from training.image_options import read_image_training
from training.next_commands import make_sample_arguments
from training.options import TrainedNetworkOptions, read_training
from training.samples import read_requests, settings_to_repeat, warn_about_unused_keys

MEDIA = ("image_path", "end_image_path", "control_path", "control_images", "extra")
BASE, TURBO = ("model/Z_Image_BF16.safetensors", "model/my_z_image_turbo.safetensors")
A14B = ["--dit_high_noise", "model/dit.safetensors"]
SMALL = ["--width", "64", "--height", "96", "--sample_num_frames", "9"]
# tiny family -> further options of the training, what replaces its words, what its samples have. Source of
# the numbers: the releases' own pipelines and pages
Case = tuple[str, list[str], dict[str, str], dict[str, Any]]
CASES: dict[str, Case] = {one.name: (one.name, [], {}, {}) for one in FAMILIES}
VIDEO = {
    "steps": 50,
    "flow_shift": 5.0,
    "guidance_scale": (5.0,),
    "frames": 81,
    "fps": 16.0,
    "solver": "unipc",
}
CASES |= {
    "wan t2v-1.3B": ("wan t2v-1.3B", [], {}, {**VIDEO, "width": 256, "height": 256}),
    "wan t2i": ("wan t2v-1.3B", [], {"t2v-1.3B": "t2i-14B"}, {**VIDEO, "frames": 1}),
    # the area of 256 x 256 in the shape of 131 x 75
    "wan i2v-14B": ("wan i2v-14B", [], {}, {**VIDEO, "steps": 40, "width": 336, "height": 192}),
    "wan flf2v-14B": ("wan flf2v-14B", [], {}, {**VIDEO, "flow_shift": 16.0}),
    "wan t2v-A14B": (
        *("wan t2v-1.3B", A14B, {"t2v-1.3B": "t2v-A14B"}),
        {**VIDEO, "steps": 40, "flow_shift": 12.0, "guidance_scale": (3.0, 4.0)},
    ),
    "wan ti2v-5B": ("wan ti2v-5B", [], {}, {**VIDEO, "frames": 121, "fps": 24.0}),
    "hunyuan_video": (
        *("hunyuan_video", [], {}),
        {"steps": 50, "flow_shift": 7.0, "guidance_scale": (1.0,), "frames": 129, "embedded_guidance": 6.0},
    ),
    "kandinsky": (
        *("kandinsky", [], {}),
        {"steps": 50, "flow_shift": 10.0, "guidance_scale": (5.0,), "frames": 121, "fps": 24.0, "width": 768},
    ),
    "kandinsky_6": (
        *("kandinsky_6", [], {}),
        {"steps": 50, "flow_shift": 5.0, "guidance_scale": (5.0,), "frames": 121, "fps": 24.0},
    ),
    "kandinsky 10 seconds": (
        *("kandinsky", [], {"k5-lite-t2v-5s-sd": "k5-lite-t2v-10s-sd"}),
        {"frames": 241, "height": 512},
    ),
    "kandinsky image": (
        *("kandinsky image", [], {}),
        {"steps": 50, "flow_shift": 3.0, "guidance_scale": (3.5,), "frames": 1, "negative_prompt": ""},
    ),
    "hunyuan_video_15": (
        *("hunyuan_video_15", [], {}),
        {"steps": 50, "flow_shift": 7.0, "guidance_scale": (6.0,), "frames": 121, "fps": 24.0, "width": 848},
    ),
    "framepack, window of 3": ("framepack", [], {"1": "3"}, {"steps": 25, "frames": 12 * 12 + 1}),
    "flux": (
        "flux",
        [],
        {},
        {"steps": 50, "embedded_guidance": 3.5, "guidance_scale": (1.0,), "width": 1024},
    ),
    "flux schnell": ("flux", [], {}, {"steps": 4, "embedded_guidance": None, "flow_shift": 1.0}),
    "chroma": ("chroma", [], {}, {"steps": 50, "guidance_scale": (4.0,)}),
    "kontext": ("kontext", [], {}, {"steps": 25, "embedded_guidance": 2.5}),
    "flux_2": ("flux_2", [], {}, {"steps": 50, "guidance_scale": (4.0,), "width": 1024}),
    "flux_2 klein": ("flux_2", [], {"klein-base-4b": "klein-4b"}, {"steps": 4, "guidance_scale": (1.0,)}),
    "flux_3": (
        *("flux_3", [], {}),
        {"steps": 50, "guidance_scale": (3.5,), "flow_shift": 6.93, "negative_prompt": ""},
    ),
    "lumina": ("lumina", [], {}, {"steps": 36, "guidance_scale": (3.5,), "flow_shift": 6.0}),
    "hunyuan_image": ("hunyuan_image", [], {}, {"steps": 50, "guidance_scale": (3.5,), "height": 2048}),
    "qwen_image": ("qwen_image", [], {}, {"steps": 25, "guidance_scale": (4.0,), "negative_prompt": " "}),
    "krea2": ("krea2", [], {}, {"steps": 28, "guidance_scale": (5.5,), "negative_prompt": ""}),
    "krea2 turbo": (
        *("krea2", [], {"model/dit.safetensors": TURBO}),
        {"steps": 8, "guidance_scale": (1.0,), "flow_shift": math.exp(1.15)},
    ),
    "qwen_image_21": ("qwen_image_21", [], {}, {"steps": 40, "guidance_scale": (1.0,), "width": 1024}),
    "moss_image": (
        *("moss_image", [], {}),
        {"steps": 50, "guidance_scale": (3.0,), "flow_shift": 5.0, "negative_prompt": ""},
    ),
    "fibo_2": (
        *("fibo_2", [], {}),
        {"steps": 30, "guidance_scale": (5.0,), "flow_shift": math.exp(1.15), "negative_prompt": NULL},
    ),
    "hidream_o1": (
        *("hidream_o1", [], {}),
        {"steps": 50, "flow_shift": 3.0, "guidance_scale": (5.0,), "width": 2048, "solver": "unipc"},
    ),
    "hidream_o1 dev": (
        *("hidream_o1", ["--model_type", "dev"], {}),
        {"steps": 28, "guidance_scale": (1.0,), "solver": "lcm"},
    ),
    "ernie_image": (
        *("ernie_image", [], {}),
        {"steps": 50, "guidance_scale": (4.0,), "flow_shift": 4.0, "negative_prompt": ""},
    ),
    "ideogram4": (
        *("ideogram4", [], {}),
        {"steps": 20, "guidance_scale": (7.0,), "negative_prompt": ""},
    ),
    "ernie_image turbo": (
        *("ernie_image", [], {"model/dit.safetensors": TURBO}),
        {"steps": 8, "guidance_scale": (1.0,), "flow_shift": 4.0},
    ),
    "fibo_2 turbo": ("fibo_2", [], {"model/dit.safetensors": TURBO}, {"steps": 4, "guidance_scale": (1.0,)}),
    "qwen_image_21 turbo": (
        *("qwen_image_21", [], {"model/dit.safetensors": TURBO}),
        {"steps": 8, "guidance_scale": (1.0,)},
    ),
    "z_image": ("z_image", [], {}, {"steps": 25, "guidance_scale": (0.0,), "flow_shift": 3.0}),
    "z_image base": (
        *("z_image", [], {"model/dit.safetensors": BASE}),
        {"steps": 28, "guidance_scale": (4.0,)},
    ),
    "z_image turbo": (
        *("z_image", [], {"model/dit.safetensors": TURBO}),
        {"steps": 8, "guidance_scale": (0.0,)},
    ),
    "ltx_2": (
        "ltx_2",
        SMALL,
        {},
        {"width": 64, "height": 96, "frames": 9, "steps": 30, "audio_video_shapes": None},
    ),
    "ltx_2 with sound": ("ltx_2 with sound", SMALL, {}, {"width": 64, "height": 96, "frames": 9}),
}
GENERATION = {"ltx_2": ["--video_size", "96", "64", "--video_length", "9"]}  # what a training has options for
GENERATION["ltx_2 with sound"] = GENERATION["ltx_2"]
GENERATION["qwen_image_21 edit"] = ["--image_size", "1024", "1024"]  # else that of the picture to edit


def bare_line(line: str) -> str:
    """Return a line of prompts without all but the pictures, clips and places that its model needs."""
    prompt, *parts = line.split(" --")
    kept = [part for part in parts if part.split()[0] in {"i", "ei", "cn", "ci", "of"}]
    return " --".join([prompt, *kept, "d 7"])


def training_of(words: list[str]) -> tuple[Any, Any, Any]:
    """Return the entry, the family and its own options of a training's command line."""
    script, *argv = words
    entry = next(one for one in ENTRIES.values() if one.script and script.startswith(f"{one.script}_train"))
    record = entry.options_record("Training")
    module = import_module(script.removesuffix(".py"))
    if hasattr(module, "DEFAULTS"):
        _, own, _ = read_image_training(None, record, module.DEFAULTS, argv)
    else:
        _, own, _ = read_training(None, record, argv, TrainedNetworkOptions)
    return entry, entry.make_family("training", own), own


@pytest.mark.slow_cases(
    "chroma",
    "flux schnell",
    "flux_2 klein",
    "framepack f1",
    "framepack one frame",
    "framepack, window of 3",
    "kontext",
    "krea2 edit",
    "ltx_2 with sound",
    "ltx_2",
    "qwen_image edit-2511",
    "moss_image edit",
    "fibo_2 edit",
    "hidream_o1 edit",
    "qwen_image_21 edit",
    "wan flf2v-14B",
    "wan i2v-14B-FC",
    "wan t2i",
    "wan t2v-1.3B-FC",
)
@pytest.mark.parametrize("case", CASES)
def test_a_line_that_says_nothing_is_made_as_the_generation_script_makes_it(
    tmp_path: Path, case: str
) -> None:
    name, more, changed, expected = CASES[case]
    tiny = family_called(name)
    tiny.prepare(tmp_path)
    if case == "flux schnell":
        write_tiny_flux(tmp_path / "model", "schnell")
    for file in {*changed.values()} & {BASE, TURBO}:
        (tmp_path / "model" / "dit.safetensors").rename(tmp_path / file)
    if (tmp_path / "start.png").exists():
        write_image(tmp_path / "start.png", 131, 75)
    if (tmp_path / "control" / "clip 0.mp4").exists():  # as long as a video of which a line says nothing
        write_clips(tmp_path / "control", count=1, frames=81)
    (tmp_path / "prompts.txt").write_text(bare_line(tiny.sample_line), encoding="utf-8")
    found: list[Prepared] = []

    with contextlib.chdir(tmp_path):
        words = [changed.get(word, word) for word in tiny.train]
        entry, family, own = training_of([*words, *OUTPUT, *more])
        ((entry_of_line,), (sample,)) = read_requests(family, Path("prompts.txt"))
        media = {key: value for key, value in vars(sample.request).items() if key in MEDIA}
        alone = ["--prompt", "a cat", "--seed", "7", *GENERATION.get(name, [])]
        printed = settings_to_repeat(sample, True, family)
        for values, words in ((media, alone), (printed, make_sample_arguments(printed))):
            script, *argv = entry.generation_argv(own, values)
            import_module(script.removesuffix(".py")).main(
                [*argv, *words, "--save_path", "made"],
                lambda family, options: found.append(prepare_line(family, options, {})),
            )

    made, again = found
    assert entry_of_line["seed"] == 7
    assert replace(sample, request=made.request, extra_metadata=made.extra_metadata) == made
    here, there = (output_metadata(one, {}, experts=family.experts) for one in (sample, made))
    assert here == there
    assert replace(again, request=made.request, extra_metadata=made.extra_metadata) == made
    assert {key: getattr(made, key) for key in expected} == expected
    assert (made.audio_video_shapes is not None) == (case == "ltx_2 with sound")


def test_the_printed_command_has_the_schedule_of_guidance() -> None:
    words = make_sample_arguments({"cfg_schedule": "1-3"})

    assert words[words.index("--cfg_schedule") + 1] == "1-3"


@pytest.mark.parametrize("name", ["flux", "flux_kontext", "framepack", "hunyuan_video"])
def test_the_printed_command_has_the_prompt_of_the_second_encoder(name: str) -> None:
    entry = ENTRIES[name]
    own = entry.options_record("Training").from_defaults(embedded_guidance=3.5)

    argv = entry.generation_argv(own, {"second_prompt": "a cat", "extra": {}}, {})

    assert argv[argv.index("--prompt_2") + 1] == "a cat"


@pytest.mark.slow_cases("--y1 1 --y2 2-1.625")
@pytest.mark.parametrize(
    ("words", "mu"),
    [("--mu 0.3", 0.3), ("--y1 1", 1 + 0.15 * 3840 / 6144), ("--y1 1 --y2 2", 1 + 3840 / 6144)],
)
def test_a_line_sets_the_noise_levels_of_krea_2(
    tmp_path: Path, words: str, mu: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 1024 x 1024 pixels, 4096 tokens; the command that makes it again says them, that of Turbo too."""
    tiny = family_called("krea2")
    tiny.prepare(tmp_path)
    (tmp_path / "prompts.txt").write_text(f"a cat --d 7 {words} --ctr 0.5", encoding="utf-8")
    turbo, made = write_dit(tmp_path / "model", tiny_state(), name="turbo"), []

    with contextlib.chdir(tmp_path):
        entry, family, own = training_of([*tiny.train, *OUTPUT, "--turbo_dit", str(turbo)])
        for one in (family, family_for_samples(own)):
            ((said,), (sample,)) = read_requests(one, Path("prompts.txt"))
            printed = settings_to_repeat(sample, True, one)
            script, *argv = entry.generation_argv(own, printed)
            import_module(script.removesuffix(".py")).main(
                [*argv, *make_sample_arguments(printed), "--save_path", "made"],
                lambda family, options: made.append(prepare_line(family, options, {})),
            )
            assert sample.flow_shift == made[-1].flow_shift == pytest.approx(math.exp(mu))
        warn_about_unused_keys([said], family, Path("prompts.txt"))

    assert "cfg_trunc_ratio (--ctr) is ignored because this model has no such setting" in caplog.text
    assert "--mu" not in caplog.text
    assert "--y1" not in caplog.text

"""What outputs say about themselves."""

import re
from dataclasses import replace

import pytest

from blissful_tuner.metadata import (
    TUNER_VERSION,
    as_png_texts,
    as_tags,
    frame_rate_in,
    output_metadata,
    read_decoded_metadata,
    seed_in,
    with_plain_keys,
)
from modules.contract.requests import Request
from tests.preparing import prepare

ASKED = Request("a\ncat ä", 7, 832, 480, 81, 50, 5.0, None, 5.0, "unipc", 16.0, "bad")
REQUEST = replace(prepare(ASKED), embedded_guidance=None)


def test_metadata_has_the_known_keys_and_the_sizes() -> None:
    found = output_metadata(
        REQUEST, {"model_type": "wan", "task": "t2v-14B"}, {"": [("style.safetensors", 0.8)]}
    )
    assert found == {
        "bt_model_type": "wan",
        "bt_task": "t2v-14B",
        "bt_tunerver": TUNER_VERSION,
        "bt_seeds": "7",
        "bt_prompt": "a\ncat ä",
        "bt_negative_prompt": "bad",
        "bt_infer_steps": "50",
        "bt_guidance_scale": "5.0",
        "bt_cfg_schedule": "N/A",
        "bt_flow_shift": "5.0",
        "bt_height": "480",
        "bt_width": "832",
        "bt_video_length": "81",
        "bt_fps": "16",
        "bt_lora_0": "style.safetensors: 0.8",
    }


def test_a_latent_file_says_it_in_both_spellings_and_pixels_in_one() -> None:
    settings = {"guidance_rescale": 0.0, "sample_solver": "unipc"}
    made = output_metadata(
        replace(REQUEST, own_metadata={"video_seconds": "5", "latent_window_size": "9"}),
        {},
        settings=settings,
    )
    latents = with_plain_keys(made)
    plain = {name: text for name, text in latents.items() if not name.startswith("bt_")}
    assert plain == {
        **{
            "seeds": "7",
            "prompt": "a\ncat ä",
            "negative_prompt": "bad",
            "height": "480",
            "width": "832",
            "video_seconds": "5",
        },
        **{
            "infer_steps": "50",
            "guidance_scale": "5.0",
            "latent_window_size": "9",
            "guidance_rescale": "0.0",
        },
        **{"sample_solver": "unipc", "fps": "16"},
    }
    assert made.items() <= latents.items()
    assert not plain.keys() & read_decoded_metadata(latents, {}, (), 16.0).keys()
    assert with_plain_keys({"bt_seeds": "N/A"}) == {"bt_seeds": "N/A"}


def test_the_known_names_without_prefix_are_read() -> None:
    assert seed_in({"seeds": "12"}) == 12
    assert frame_rate_in({"fps": "24"}) == 24.0
    assert seed_in({"bt_seeds": "3", "seeds": "12"}) == 3


@pytest.mark.parametrize(
    ("text", "seed"), [("9007199254740993", 9007199254740993), ("-5", -5), ("N/A", 0), ("nan", 0), ("1.5", 0)]
)
def test_a_seed_is_read_to_the_last_digit(text: str, seed: int) -> None:
    assert seed_in({"bt_seeds": text}) == seed
    assert seed_in({}) == 0


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
    request = replace(REQUEST, asked=replace(ASKED, prompt=prompt), negative_prompt=negative)
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

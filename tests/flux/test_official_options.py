"""The image guides' command line for FLUX.1, in the words of flux_generate_image.py."""

from pathlib import Path

import pytest
from PIL import Image

import flux_minimal_inference
from flux.official_options import generation_words, read_minimal
from modules.errors import OptionError
from tests.tiny.flux import write_tiny_flux


def words_of(*argv: str) -> dict[str, str | None]:
    """Option -> its value; None for a switch."""
    words = generation_words(read_minimal("", ["--ckpt_path", "flux1-dev.safetensors", *argv]))
    return {option: value or None for option, _, value in (word.partition("=") for word in words)}


def test_the_guides_defaults_are_put_into_our_words() -> None:
    words = words_of()

    assert words["--prompt"] == "A photo of a cat"
    assert words["--guidance_scale"] == "1.0"
    assert words["--embedded_cfg_scale"] == "3.5"
    assert words["--dit_dtype"] == words["--text_encoder_dtype"] == words["--vae_dtype"] == "bfloat16"
    assert "--seed" not in words
    assert "--infer_steps" not in words  # those of the model


def test_sizes_are_rounded_up_to_whole_tokens() -> None:
    words = generation_words(read_minimal("", ["--ckpt_path", "x", "--width", "1000", "--height", "17"]))

    size = words.index("--image_size")
    assert words[size + 1 : size + 3] == ["32", "1008"]


def test_dtypes_of_8_bits_are_ways_to_keep_weights() -> None:
    words = words_of("--flux_dtype", "fp8_e4m3fn", "--t5xxl_dtype", "fp8", "--clip_l_dtype", "float16")

    assert words["--dit_dtype"] == "bfloat16"
    assert words["--text_encoder_dtype"] == "float16"
    assert {"--fp8", "--fp8_t5"} <= words.keys()
    assert "--fp8" in words_of("--dtype", "float8_e4m3fn")


def test_loras_have_their_strengths() -> None:
    words = generation_words(
        read_minimal("", ["--ckpt_path", "x", "--lora_weights", "a;b.safetensors;0.5", "c"])
    )

    start = words.index("--lora_weight")
    assert words[start : start + 6] == [
        "--lora_weight",
        "a;b.safetensors",
        "c",
        "--lora_multiplier",
        "0.5",
        "1",
    ]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lora_weights", "a;much"], "PATH;STRENGTH"),
        (["--clip_l_dtype", "float16", "--t5xxl_dtype", "float32"], "one dtype"),
        (["--ae_dtype", "fp8"], "--ae_dtype fp8"),
        (["--width", "0"], "--width 0"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(argv: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        words_of(*argv)


def test_options_of_a_line_hold_for_the_next_until_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models = write_tiny_flux(tmp_path / "models")
    lines = iter(
        ["a cat --w 17 --h 16 --s 1 --d 4", "a dog --m 0.5", "a fox --n bad --c 2 --d 6", "", "a hare"]
    )
    monkeypatch.setattr("generation.run.line_reader", lambda *said: lambda: next(lines))
    files = {"--ckpt_path": models.dit, "--clip_l": models.clip_l, "--t5xxl": models.t5xxl, "--ae": models.ae}
    words = [word for option, path in files.items() for word in (option, str(path))]

    flux_minimal_inference.main(
        [*words, "--dtype", "float32", "--output_dir", str(tmp_path / "out"), "--interactive"]
    )

    made = sorted((tmp_path / "out").glob("*.png"))
    texts = [Image.open(path).info for path in made]
    assert [text["bt_prompt"] for text in texts] == ["a cat", "a fox"]  # there is no LoRA to have a strength
    assert {text["bt_width"] for text in texts} == {"32"}
    assert [text["bt_seeds"] for text in texts] == ["4", "6"]
    assert [text["bt_guidance_scale"] for text in texts] == ["1.0", "2.0"]
    assert "--m 0.5: there are 0 LoRAs" in caplog.text
    assert next(lines) == "a hare"

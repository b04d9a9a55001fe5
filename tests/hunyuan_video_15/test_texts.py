"""The texts of HunyuanVideo 1.5: the release's template, and what ByT5 gets of a prompt."""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.hunyuan_video1_5 import pipeline_hunyuan_video1_5 as theirs

from hunyuan_video_15.text_encoders import (
    QWEN_SETTINGS,
    SYSTEM,
    QuotedTextEncoder,
    make_glyph_text,
)
from protocols.requests import Prompt
from tests.tiny.hunyuan_encoders import save
from tests.tiny.hunyuan_image import GLYPH_DIM, byt5_state


def test_the_template_is_the_release_s_with_its_runs_of_blanks() -> None:
    given = inspect.signature(theirs.HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters

    assert given["system_message"].default == SYSTEM
    assert SYSTEM.count(" " * 9) == 5
    assert given["crop_start"].default == QWEN_SETTINGS.num_dropped_tokens
    assert given["tokenizer_max_length"].default == QWEN_SETTINGS.max_length
    assert QWEN_SETTINGS.states == (-1 - given["num_hidden_layers_to_skip"].default,)
    assert QWEN_SETTINGS.template.endswith("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
    assert QWEN_SETTINGS.empty_prompt_text == " "


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        'a sign that says "hello"',
        '"one" and \u201ctwo\u201d, then "one" and "three"',
        'an empty ""',
        "it is 'not' quoted, and \u2018neither\u2019 is this",
        '"over\ntwo lines"',
        '\u201ca"b\u201dc"',
    ],
)
def test_quoted_texts_are_those_of_diffusers(prompt: str) -> None:
    assert make_glyph_text(prompt) == theirs.extract_glyph_texts(prompt)


def test_rows_of_byt5_are_the_bytes_and_none_without_quotes(tmp_path: Path) -> None:
    encoder = QuotedTextEncoder(save(tmp_path / "byt5.safetensors", byt5_state()), torch.float32)
    encoder.load(torch.device("cpu"))
    long = f'"{"x" * 400}"'

    found = [one["byt5_embed"] for one in encoder.encode([Prompt(text) for text in ("a", '"hi"', long)])]

    assert [tuple(one.shape) for one in found if isinstance(one, torch.Tensor)] == [
        (0, GLYPH_DIM),
        (len('Text "hi". ') + 1, GLYPH_DIM),
        (256, GLYPH_DIM),
    ]
    assert encoder.token_counter()(long).tokens == len(f"Text {long}. ") + 1

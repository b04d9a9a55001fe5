"""FramePack's text encoders against transformers, in every layout of their files."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from encoders.text_encoder import FileTextEncoder
from frame_pack.family import family_for_generation
from frame_pack.options import FramePackGenerationOptions
from frame_pack.text_encoders import TEXT_ROWS, FramePackClip, FramePackLlama
from hunyuan_model.text_encoders import VIDEO_TEMPLATE, PromptTemplate, template_of
from modules.contract.requests import Prompt
from modules.options import read_options
from modules.parser import add_options
from tests.frame_pack.texts_there import KEPT_TOKENS, TextsThere, template_there
from tests.tiny.hunyuan_encoders import (
    CLIP_DIM,
    LLM_DIM,
    write_text_encoders,
)

CPU = torch.device("cpu")
LONG = "the rabbit runs through tall grass " * 60
PROMPTS = (
    "a rabbit in the grass, 1024 x 576",
    "",
    "\n  The SUN rises — über den Hügeln {}; don't   blink\t",
    "日本 🐇",
    LONG,
)
SYSTEMS = (
    "Describe the picture in one word.",
    "",
    "Name {} and {0} first;\n\nthen <|eot_id|> 日本",
    "Describe the grass. " * 90,  # longer than what is kept of a prompt
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    write_text_encoders(folder)
    return folder


@pytest.fixture(scope="module")
def there(folder: Path) -> TextsThere:
    return TextsThere(folder)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def rounded(request: pytest.FixtureRequest, folder: Path) -> TextsThere:
    """In each dtype that one can choose."""
    return TextsThere(folder, request.param)


def encoded(encoder: FileTextEncoder, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    encoder.load(CPU)
    return [dict(found) for found in encoder.encode([Prompt(text) for text in prompts])]  # type: ignore[arg-type]


def assert_text(found: dict[str, Tensor], states: Tensor) -> None:
    """The states first, zeros behind them, and the mask says where they end.

    Equal to the last bit: these are the same operations in the same order, over as many tokens.
    """
    rows, mask = found["llama_vec"], found["llama_attention_mask"]
    assert rows.shape == (TEXT_ROWS, LLM_DIM)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.arange(512) < len(states))
    torch.testing.assert_close(rows[: len(states)], states, rtol=0, atol=0)
    assert not rows[len(states) :].any()


def test_states_are_those_of_the_prompts_own_tokens(folder: Path, rounded: TextsThere) -> None:
    counts = set()
    for prompt, found in zip(PROMPTS, encoded(FramePackLlama(folder, rounded.dtype), PROMPTS), strict=True):
        assert_text(found, rounded.llama_vec(prompt))
        counts.add(int(found["llama_attention_mask"].sum()))
    assert min(counts) == 1  # the end of the empty prompt
    assert max(counts) == KEPT_TOKENS  # of the one that is too long


def test_clips_vector_is_its_pooled_state(folder: Path, rounded: TextsThere) -> None:
    prompts = [*PROMPTS, "a rabbit <|endoftext|> and a dog"]
    for prompt, found in zip(prompts, encoded(FramePackClip(folder, rounded.dtype), prompts), strict=True):
        assert found["clip_l_pooler"].shape == (CLIP_DIM,)
        torch.testing.assert_close(found["clip_l_pooler"], rounded.clip_l_pooler(prompt), rtol=0, atol=0)


@pytest.mark.parametrize("system", SYSTEMS, ids=range(len(SYSTEMS)))
def test_a_system_prompt_of_ones_own_is_told_and_cut_off(
    folder: Path, there: TextsThere, system: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    usual = encoded(FramePackLlama(folder, torch.float32), PROMPTS)
    own = encoded(FramePackLlama(folder, torch.float32, template=PromptTemplate(system)), PROMPTS)
    for prompt, found, before in zip(PROMPTS, own, usual, strict=True):
        assert_text(found, there.llama_vec(prompt, system))
        # the prompt's tokens are the same
        assert torch.equal(found["llama_attention_mask"], before["llama_attention_mask"])
        # but they come after other words
        assert not torch.allclose(found["llama_vec"], before["llama_vec"], rtol=0.1)
    counted = len(there.tokenizer(template_there(system)[0]).input_ids)
    assert f"system prompt: {system} ({counted} tokens before the prompt" in caplog.text
    assert "cut in the wrong place" not in caplog.text


def test_the_usual_system_prompt_given_as_ones_own_changes_nothing(folder: Path) -> None:
    usual = FramePackLlama(folder)
    own = FramePackLlama(folder, template=PromptTemplate(VIDEO_TEMPLATE.system))
    assert own.identity == usual.identity
    for found, expected in zip(encoded(own, PROMPTS), encoded(usual, PROMPTS), strict=True):
        assert torch.equal(found["llama_vec"], expected["llama_vec"])


@pytest.mark.parametrize("told", [None, "Describe.", ""])
def test_the_option_of_the_generation_script_reaches_the_language_model(
    folder: Path, told: str | None
) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, FramePackGenerationOptions)
    more = [] if told is None else ["--custom_system_prompt", told]
    args = parser.parse_args(["--text_encoder1", str(folder), "--text_encoder2", str(folder), *more])
    llama, clip = family_for_generation(read_options(FramePackGenerationOptions, args)).text_encoders()
    assert llama.identity == FramePackLlama(folder, template=template_of(told)).identity
    assert clip.identity == FramePackClip(folder).identity


# file layouts: each gives the two paths

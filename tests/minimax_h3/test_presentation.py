"""What the text encoder of MiniMax-H3 sees of keyframes and references, against diffusers."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.encoders import (
    MiniMaxH3FL2VATextEncoderStep,
    MiniMaxH3Ref2VATextEncoderStep,
)
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import MiniMaxH3ModularPipeline
from diffusers.modular_pipelines.minimax_h3.references import (
    MiniMaxH3AudioReference,
    MiniMaxH3ImageReference,
    MiniMaxH3VideoReference,
)
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from PIL import Image
from torch import Tensor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from minimax_h3.files import H3_USE, KEY, TAGS, H3TextEncoder
from minimax_h3.presentation import (
    PRESENTED_AUDIO,
    present_clip,
    present_image,
    present_keyframes,
    sample_clip_frames,
)
from minimax_h3.vision import RELEASED, Limits, read_preprocessing, resized_sides
from modules.errors import CheckpointError, MediaError
from protocols.requests import Prompt
from tests.tiny.minimax_h3 import TheirProcessor, TinyH3, text_encoder, their_tokenizer, write_tiny_h3

EXACT = 1e-4  # of states of up to 30, float32, through 50 layers
PROMPT = "a cat purrs\nloudly"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    return write_tiny_h3(tmp_path_factory.mktemp("h3"))


@pytest.fixture(scope="module")
def encoder(files: TinyH3) -> H3TextEncoder:
    loaded = H3TextEncoder(H3_USE, files.text_encoder, torch.float32, files.tokenizer)
    loaded.load(torch.device("cpu"))
    return loaded


def pixels(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)


def image(frame: Tensor) -> Image.Image:
    return Image.fromarray(frame.numpy())


def theirs(step: Any, files: TinyH3, **values: Any) -> tuple[Tensor, Tensor]:
    """Their states, L C, and tags of tokens."""
    tokenizer = their_tokenizer(files)
    pipe = step.init_pipeline()
    pipe.update_components(
        text_encoder=text_encoder(), tokenizer=tokenizer, processor=TheirProcessor(tokenizer)
    )
    assert isinstance(pipe, MiniMaxH3ModularPipeline)
    state = PipelineState()
    for name, value in {"prompt": PROMPT, **values}.items():
        state.set(name, value)
    _, state = step(pipe, state)
    return state.get("prompt_embeds")[0], state.get("text_token_tags")


def assert_same(conditions: Any, expected: tuple[Tensor, Tensor]) -> None:
    assert conditions[TAGS][0].tolist() == expected[1].tolist()
    torch.testing.assert_close(conditions[KEY][0], expected[0], atol=EXACT, rtol=EXACT)


def test_keyframes_are_presented_as_by_diffusers(files: TinyH3, encoder: H3TextEncoder) -> None:
    """Small ones are enlarged for the encoder."""
    frames = [pixels(64, 96, seed=number) for number in range(2)]
    expected = theirs(MiniMaxH3FL2VATextEncoderStep(), files, keyframes=[*map(image, frames)])

    (conditions,) = encoder.encode([Prompt(PROMPT, media_before_text=present_keyframes(frames))])

    assert_same(conditions, expected)
    assert expected[1].tolist().count(0) == 2 * (2 + 7 * 10)


def test_references_are_presented_as_by_diffusers(files: TinyH3, encoder: H3TextEncoder) -> None:
    """A picture, a sound, a clip with sound whose last pair is one frame twice, and a silent clip."""
    picture, clip, silent = pixels(256, 320), pixels(29, 64, 96, seed=1), pixels(60, 64, 64, seed=2)
    audio = torch.zeros(2, 100)
    references = [
        MiniMaxH3ImageReference(image(picture)),
        MiniMaxH3AudioReference(audio),
        MiniMaxH3VideoReference(clip.numpy(), audio=audio),
        MiniMaxH3VideoReference(silent.numpy()),
    ]
    expected = theirs(MiniMaxH3Ref2VATextEncoderStep(), files, normalized_references=references)
    presented = (
        present_image(picture),
        PRESENTED_AUDIO,
        present_clip(clip, has_audio=True),
        present_clip(silent),
    )

    conditions, plain = encoder.encode([Prompt(PROMPT, media_before_text=presented), Prompt(PROMPT)])

    assert_same(conditions, expected)
    assert len(plain[KEY][0]) == expected[1].tolist()[::-1].index(0)  # the prompt alone
    assert plain[TAGS][0].tolist() == [1] * len(plain[KEY][0])


def test_times_are_means_of_pairs() -> None:
    """29 frames at 24 a second: three at 2 a second, of which the last is repeated."""
    assert sample_clip_frames(29, 2) == ((0, 12, 24), (0.25, 1.0))
    with pytest.raises(MediaError, match="needs 13"):
        sample_clip_frames(12, 2)


@pytest.mark.parametrize("frames", [2, 3, 30])
@pytest.mark.parametrize("sides", [(768, 1344), (32, 32), (20, 70), (2048, 32)])
def test_frames_are_resized_as_by_transformers(frames: int, sides: tuple[int, int]) -> None:
    limits = RELEASED.clips
    expected = smart_resize(
        frames, *sides, factor=32, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels
    )
    assert resized_sides(frames, sides, limits, 32, 2) == expected


def test_preprocessor_files_are_obeyed(tmp_path: Path) -> None:
    """Each by its own name, or both in one file as transformers 5 writes them."""
    sizes = {"shortest_edge": 1024, "longest_edge": 4096}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": sizes, "image_mean": [0.1] * 3}))
    both = {"video_processor": {"min_pixels": 9, "cap_pixels_per_frame": True, "max_video_tokens": 5}}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))

    found = read_preprocessing([tmp_path / "none", tmp_path])

    assert found.images == Limits(1024, 4096, {"image_mean": [0.1] * 3})
    assert found.clips == Limits(9, RELEASED.clips.max_pixels, max_tokens_per_frame=5)
    assert read_preprocessing([]) == RELEASED


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{", '{"size": 4}', '{"size": {"shortest_edge": "9"}}', '{"image_std": [0, 1, 1]}'),
        '{"size": {"shortest_edge": 1000000000, "longest_edge": 2000000000}}',  # to which any is enlarged
    ],
)
def test_a_damaged_preprocessor_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="settings of a preprocessor"):
        read_preprocessing([tmp_path])


def test_the_file_next_to_the_tokenizer_counts(files: TinyH3, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((files.tokenizer / "tokenizer.json").read_bytes())
    (folder / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 1024}}')
    encoder = H3TextEncoder(H3_USE, files.text_encoder, torch.float32, folder)
    assert encoder.preprocessing().images.min_pixels == 1024


def test_a_prompt_may_not_hold_the_token_of_a_picture(encoder: H3TextEncoder) -> None:
    presented = present_keyframes([pixels(32, 32)])
    with pytest.raises(MediaError, match="Remove it"):
        encoder.encode([Prompt("a <|video_pad|>", media_before_text=presented)])


def test_too_many_tokens_are_refused(encoder: H3TextEncoder) -> None:
    """Before the network runs."""
    long = Prompt("a," * 20000, media_before_text=present_keyframes([pixels(32, 32)]))
    with pytest.raises(MediaError, match="at most 32768 are allowed"):
        encoder.encode([long])


def test_equal_pictures_are_equal_prompts() -> None:
    first, second = pixels(32, 32), pixels(32, 32, seed=1)
    assert present_image(first) == present_image(first.clone()) != present_image(second)
    assert present_clip(first[None]) != present_clip(first[None], has_audio=True)


def test_weights_count_for_the_prompt_alone(encoder: H3TextEncoder) -> None:
    presented = present_keyframes([pixels(256, 256)])
    plain, weighted_states_key = encoder.encode(
        [
            Prompt("a cat", media_before_text=presented),
            Prompt("a cat", ((2, 5, 2.0),), media_before_text=presented),
        ]
    )
    changed = (plain[KEY][0] != weighted_states_key[KEY][0]).any(dim=1)
    assert changed.any()
    assert not changed[: int((plain[TAGS][0] == 0).nonzero().max()) + 1].any()
    assert numpy.isfinite(weighted_states_key[KEY][0].numpy()).all()

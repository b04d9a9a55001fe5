"""States of texts are those of transformers' Qwen3.5, behind the released template."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from checkpoints.opening import open_checkpoint
from contract.requests import Prompt
from encoders.language_encoder import LanguageModelEncoder
from encoders.language_models import QWEN3_VL, QWEN35, load_language_model, read_language_model
from modules.errors import CheckpointError
from moss_image.files import KEY, MOST_TOKENS, TEXT_USE
from tests.tiny.language_models import layouts, qwen3_vl, qwen35, qwen_tokenizer, write_model
from tests.tiny.moss_image import write_text_encoder

CPU = torch.device("cpu")
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("texts") / "text_encoder")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> LanguageModelEncoder:
    loaded = LanguageModelEncoder(TEXT_USE, folder, torch.float32)
    loaded.load(CPU)
    return loaded


def states_of(encoder: LanguageModelEncoder, *prompts: Prompt) -> list[Tensor]:
    return [conditions[KEY][0] for conditions in encoder.encode(prompts)]


@torch.no_grad()
def states_there(text: str) -> Tensor:
    ids = torch.tensor([qwen_tokenizer().encode(text, add_special_tokens=False).ids])
    states: Tensor = qwen35().model(input_ids=ids).last_hidden_state[0]
    return states


@pytest.mark.parametrize("prompt", ["a cat on the grass", "", "  a cat,\nred  "])
def test_states_are_the_normed_ones_of_all_tokens_of_the_template(
    encoder: LanguageModelEncoder, prompt: str
) -> None:
    """White space around a prompt is left out; an empty prompt has the template alone."""
    (states,) = states_of(encoder, Prompt(prompt))

    expected = states_there(f"{BEFORE}{prompt.strip()}{AFTER}")
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


def test_the_template_thinks_and_has_no_system_turn(encoder: LanguageModelEncoder) -> None:
    """Other templates give other states."""
    (states,) = states_of(encoder, Prompt("a cat"))
    for before, after in (
        (f"<|im_start|>system\n<|im_end|>\n{BEFORE}", AFTER),
        (BEFORE, f"{AFTER}\n</think>\n\n"),
        (BEFORE, "<|im_end|>\n<|im_start|>assistant\n"),
    ):
        assert len(states_there(f"{before}a cat{after}")) != len(states)


def test_texts_of_one_call_equal_each_by_itself(encoder: LanguageModelEncoder) -> None:
    prompts = [Prompt("a cat"), Prompt("a small rabbit runs through the grass")]
    together = states_of(encoder, *prompts)
    alone = [states_of(encoder, prompt)[0] for prompt in prompts]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_a_prompt_that_is_too_long_loses_its_end(encoder: LanguageModelEncoder) -> None:
    """As released: the template behind it is cut off, too."""
    rows: list[list[int]] = []

    def compute(*inputs: object) -> list[dict[str, Tensor | list[Tensor]]]:
        rows.extend(inputs[2])  # type: ignore[arg-type]
        return [{KEY: [torch.zeros(1, 1)]}]

    written = encoder.write(Prompt("cat " * MOST_TOKENS))
    encoder.encode_written([written], compute)

    (row,) = rows
    whole = qwen_tokenizer().encode(written.text, add_special_tokens=False).ids
    assert row == whole[:MOST_TOKENS]


def test_spans_follow_a_prompt_whose_white_space_is_left_out(encoder: LanguageModelEncoder) -> None:
    written = encoder.write(Prompt("  a cat", spans=((4, 7, 2.0),)))
    (first, last, _), text = written.spans[0], written.prompt
    assert text[first:last] == "cat"


@torch.no_grad()
def test_pictures_stand_in_front_of_the_prompt_as_in_transformers(
    encoder: LanguageModelEncoder, tmp_path: Path
) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    drawn = np.random.default_rng(3).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in drawn]
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    (states,) = states_of(encoder, Prompt("a cat", pictures=tuple(paths)))

    model = qwen35()
    vision = model.config.vision_config
    cut = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=32 * 32,
        max_pixels=384 * 384,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    inputs = cut(images=pictures, return_tensors="pt")
    places = 64 * 96 // (vision.patch_size * vision.spatial_merge_size) ** 2
    shown = "".join(
        f"Picture {number}: <|vision_start|>{'<|image_pad|>' * places}<|vision_end|>" for number in (1, 2)
    )
    ids = qwen_tokenizer().encode(f"{BEFORE}{shown}a cat{AFTER}", add_special_tokens=False).ids
    tokens = torch.tensor([ids])
    expected = model.model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        mm_token_type_ids=(tokens == model.config.image_token_id).int(),
        **inputs,
    ).last_hidden_state[0]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", sorted(layouts(qwen35())))
def test_every_layout_of_files_is_read(tmp_path: Path, layout: str) -> None:
    mtp = {"mtp.fc.weight": torch.ones(2, 2)}  # of the layer that predicts several tokens
    path = write_model(tmp_path / "model.safetensors", qwen35(), layout, mtp)

    network = load_language_model(path, QWEN35, CPU, torch.bfloat16)

    exponents = network.get_parameter("layers.0.linear_attn.A_log")
    assert exponents.dtype == torch.float32  # in 16 bits they would be rounded
    assert network.get_parameter("layers.0.mlp.up_proj.weight").dtype == torch.bfloat16
    assert torch.equal(exponents, qwen35().model.language_model.layers[0].linear_attn.A_log.float())


def test_other_language_models_are_told_apart(tmp_path: Path) -> None:
    for name, there, asked in (("a", qwen35(), QWEN3_VL), ("b", qwen3_vl(), QWEN35)):
        (tmp_path / name).mkdir()
        path = write_model(tmp_path / name / "model.safetensors", there)
        with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r"is not|not "):
            read_language_model(checkpoint, asked)

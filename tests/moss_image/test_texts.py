"""States of texts are those of transformers' Qwen3.5, behind the released template."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from checkpoints.opening import open_checkpoint
from encoders.language_encoder import LanguageModelEncoder
from encoders.language_models import (
    QWEN3_VL,
    QWEN35,
    load_language_model,
    read_language_model,
)
from encoders.picture_prompts import load_vision_tower
from modules.errors import CheckpointError
from moss_image.files import ENCODER_SETTINGS, KEY, MAX_TOKENS
from protocols.requests import Prompt
from tests.faults.messages import succeed_here
from tests.manifests import tensor_list, write_hollow
from tests.tiny.language_models import layouts, qwen3_vl, qwen35, qwen_tokenizer, write_model
from tests.tiny.moss_image import write_text_encoder

CPU = torch.device("cpu")
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("texts") / "text_encoder")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> LanguageModelEncoder:
    loaded = LanguageModelEncoder(ENCODER_SETTINGS, folder, torch.float32)
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


@pytest.mark.parametrize(
    "change",
    [{"pre_norm": True}, {"states": (-2,)}, {"states": (3,)}, {"thinks": False}, {"strips_prompt": False}],
    ids=str,
)
def test_other_states_and_texts_are_told_from_those(
    folder: Path, encoder: LanguageModelEncoder, change: dict[str, Any]
) -> None:
    """Before the norm, a layer earlier, without thinking, with white space: each would be seen."""
    if "thinks" in change:
        change = {"template_suffix": "<|im_end|>\n<|im_start|>assistant\n"}
    other = LanguageModelEncoder(replace(ENCODER_SETTINGS, **change), folder, torch.float32)
    other.load(CPU)

    (states,), (right,) = states_of(other, Prompt(" a cat ")), states_of(encoder, Prompt(" a cat "))

    assert states.shape != right.shape or (states - right).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "minimum"),
    [({}, 0.0), ({"partial_rotary_factor": 0.5}, 1e-5), ({"theta": 1e6}, 1e-5)],
    ids=str,
)
def test_a_file_without_its_configuration_rotates_as_released(
    tmp_path: Path, encoder: LanguageModelEncoder, change: dict[str, Any], minimum: float
) -> None:
    """As ComfyUI's files are. Other facts about the model would give other states."""
    folder = write_text_encoder(tmp_path)
    (folder / "config.json").unlink()
    other = LanguageModelEncoder(
        replace(ENCODER_SETTINGS, model=replace(QWEN35, **change)), folder, torch.float32
    )
    other.load(CPU)
    (states,), (right,) = states_of(other, Prompt("a cat")), states_of(encoder, Prompt("a cat"))
    difference = float((states - right).abs().max())
    assert difference > minimum if change else difference == 0


def test_the_released_file_fits_at_full_size(tmp_path: Path) -> None:
    """Loading raises for every tensor that is left over; the numbers are the released configuration's."""
    tensors, meta = tensor_list("moss-image-text-encoder"), torch.device("meta")
    more = {"lm_head.weight": ("BF16", (248320, 4096)), "mtp.fc.weight": ("BF16", (4096, 8192))}
    path = write_hollow(tmp_path / "model.safetensors", tensors | more)

    network: Any = load_language_model(path, QWEN35, meta, torch.bfloat16)
    tower: Any = load_vision_tower(path, QWEN35, meta, torch.bfloat16)

    assert sum(weight.numel() for weight in network.parameters()) == 7_936_684_544
    assert sum(weight.numel() for weight in tower.parameters()) == 456_010_480
    config = network.config
    full = [index for index, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == list(range(3, 32, 4))
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 4, 256)
    assert (config.linear_num_key_heads, config.linear_num_value_heads) == (16, 32)
    assert (config.linear_key_head_dim, config.linear_value_head_dim) == (128, 128)
    rope = config.rope_parameters
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (1e7, 0.25)
    assert list(rope["mrope_section"]) == [11, 11, 10]
    assert (tower.config.depth, tower.config.num_heads, tower.config.patch_size) == (27, 16, 16)


@pytest.mark.parametrize("form", ["convrot", "int8"])
def test_a_text_encoder_in_8_bits_is_read(tmp_path: Path, encoder: LanguageModelEncoder, form: str) -> None:
    folder = write_text_encoder(tmp_path / "text_encoder")
    plain, small = folder / "model.safetensors", folder / "small.safetensors"
    succeed_here("tools/quantise.py", plain, "--form", form, "--output", small, folder=tmp_path)
    plain.unlink()
    in_8_bits = LanguageModelEncoder(ENCODER_SETTINGS, small, torch.float32)
    in_8_bits.load(CPU)

    (states,), (right,) = states_of(in_8_bits, Prompt("a cat")), states_of(encoder, Prompt("a cat"))

    assert 1e-4 < (states - right).norm() / right.norm() < 0.2


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

    templated = encoder.apply_template(Prompt("cat " * MAX_TOKENS))
    encoder.encode_templated([templated], compute)

    (row,) = rows
    full = qwen_tokenizer().encode(templated.text, add_special_tokens=False).ids
    assert row == full[:MAX_TOKENS]


def test_spans_follow_a_prompt_whose_white_space_is_left_out(encoder: LanguageModelEncoder) -> None:
    templated = encoder.apply_template(Prompt("  a cat", weighted_spans=((4, 7, 2.0),)))
    (first, last, _), text = templated.spans[0], templated.prompt
    assert text[first:last] == "cat"


@torch.no_grad()
def test_pictures_stand_in_front_of_the_prompt_as_in_transformers(
    encoder: LanguageModelEncoder, tmp_path: Path
) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    drawn = np.random.default_rng(3).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in drawn]
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    (states,) = states_of(encoder, Prompt("a cat", images=tuple(paths)))

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
    inputs = cut(images=images, return_tensors="pt")
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

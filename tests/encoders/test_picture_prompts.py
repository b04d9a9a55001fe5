"""Pictures in prompts against the whole Qwen2.5-VL of transformers: patches, places, states, bad pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from encoders.language_encoder import LanguageModelEncoder, LanguageUse
from encoders.picture_prompts import PictureUse, load_vision_tower, place_tokens, read_pictures, read_rgb
from generation.memory import META, rehearsing
from modules.contract.requests import Prompt
from modules.errors import CheckpointError, MediaError
from tests.encoders.test_language_models import QWEN_IMAGE, TOLERANCE, assert_close
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import (
    config_json,
    layouts,
    qwen3,
    qwen25_vl,
    write_model,
    write_qwen_tokenizer,
)

CPU = torch.device("cpu")
PICTURES = PictureUse("Picture {number}: <|vision_start|>{tokens}<|vision_end|>", most=200 * 200)
USE = replace(QWEN_IMAGE, pictures=PICTURES)
SIZES = ((90, 140), (57, 60), (400, 300), (28, 28))


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]


def processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(min_pixels=PICTURES.fewest, max_pixels=PICTURES.most)


def expected(model: Any, encoder: LanguageModelEncoder, prompt: str, shown: list[Tensor]) -> Tensor:
    """The normed last states of the whole network."""
    tokenizer = encoder._loaded.get()[1]
    inputs: dict[str, Any] = {}
    text = ""
    if shown:
        inputs = dict(processor()([Image.fromarray(one.numpy()) for one in shown], return_tensors="pt"))
        counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
        text = "".join(PICTURES.write(index, count) for index, count in enumerate(counts, 1))
    ids = torch.tensor([tokenizer.read(f"{USE.before}{text}{prompt}{USE.after}").ids])
    kinds = (ids == tokenizer.number("<|image_pad|>")).int()
    with torch.no_grad():
        found = model(input_ids=ids, mm_token_type_ids=kinds, output_hidden_states=True, **inputs)
    states: Tensor = found.hidden_states[-1][0, encoder.count_dropped(tokenizer) :]
    return states


@pytest.fixture(scope="module")
def model() -> Any:
    return qwen25_vl()


def load(
    folder: Path, model: Any, use: LanguageUse = USE, layout: str = "transformers 4"
) -> LanguageModelEncoder:
    path = write_model(write_qwen_tokenizer(folder) / "model.safetensors", model, layout)
    made = LanguageModelEncoder(use, path, torch.float32)
    made.load(CPU)
    return made


@pytest.fixture
def encoder(model: Any, tmp_path: Path) -> LanguageModelEncoder:
    return load(tmp_path, model)


def pictured(folder: Path, text: str, shown: list[Tensor]) -> Prompt:
    """A prompt whose pictures are files below the folder."""
    paths = tuple(folder / f"{index}_{picture.shape}.png" for index, picture in enumerate(shown))
    for path, picture in zip(paths, shown, strict=True):
        Image.fromarray(picture.numpy()).save(path)
    return Prompt(text, pictures=paths)


def encode(encoder: LanguageModelEncoder, *shown: tuple[str, list[Tensor]]) -> list[Tensor]:
    with torch.inference_mode():
        found = encoder.encode([pictured(encoder.path.parent, *one) for one in shown])
    return [one["vl_embed"][0] for one in found]


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 4 * TOLERANCE * theirs.abs().max()  # a second network before it


@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5", "old multimodal", "bare"])
def test_states_are_those_of_the_whole_network(layout: str, model: Any, tmp_path: Path) -> None:
    encoder = load(tmp_path, model, layout=layout)
    shown = pictures(*SIZES)
    prompts = [("make it red", shown), ("a rabbit", shown[:1]), ("none at all", []), ("", shown[1:3])]

    for (text, own), ours in zip(prompts, encode(encoder, *prompts), strict=True):
        assert_near(ours, expected(model, encoder, text, own))


def test_frequencies_are_divided_as_the_configuration_says(tmp_path: Path) -> None:
    model, shown = qwen25_vl(mrope_section=[5, 2, 1]), pictures(*SIZES[:2])
    encoder = load(tmp_path, model)
    (ours,) = encode(encoder, ("a rabbit", shown))
    assert_near(ours, expected(model, encoder, "a rabbit", shown))


def test_prompts_together_are_each_alone(encoder: LanguageModelEncoder) -> None:
    shown = pictures(*SIZES)
    prompts = [(f"{index} rabbits", shown[: index % 4]) for index in range(10)]
    for one, together in zip(prompts, encode(encoder, *prompts), strict=True):
        assert_close(together, encode(encoder, one)[0])


def test_pictures_change_the_identity(encoder: LanguageModelEncoder) -> None:
    without = LanguageModelEncoder(QWEN_IMAGE, encoder.path, torch.float32)
    assert dict(without.identity) != dict(encoder.identity)


def test_pictures_do_not_count_towards_the_most(encoder: LanguageModelEncoder) -> None:
    shown = pictures((196, 196), (196, 196))
    long = "rabbit grass " * 100
    text, pictured = encode(encoder, (long, []), (long, shown))
    assert len(text) == USE.most
    assert len(pictured) == USE.most + 2 * 49


def test_patches_are_those_of_the_released_processor(encoder: LanguageModelEncoder) -> None:
    shown = pictures(*SIZES)
    ours = read_pictures(encoder.network.get_submodule("visual"), shown, PICTURES)
    theirs = processor()([Image.fromarray(one.numpy()) for one in shown], return_tensors="pt")
    assert torch.equal(ours.patches, theirs["pixel_values"])
    assert (2 * torch.tensor(ours.sides)).tolist() == theirs["image_grid_thw"][:, 1:].tolist()


def test_words_behind_a_picture_stand_behind_its_longer_side() -> None:
    found = place_tokens([5, 9, 9, 9, 9, 9, 9, 9, 9, 5, 5], [(2, 3), (2, 1)], token=9)
    assert found.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 4, 6, 7],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7],
        [0, 1, 2, 3, 1, 2, 3, 4, 4, 6, 7],
    ]


def test_what_cannot_be_shown_is_refused(encoder: LanguageModelEncoder, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="1x300 is too long"):
        encode(encoder, ("a", pictures((300, 1))))
    with pytest.raises(MediaError, match=r"<\|image_pad\|> stands for a picture"):
        encode(encoder, ("a <|image_pad|>", pictures((60, 60))))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"broken\.png"):
        encoder.encode([Prompt("a", pictures=(tmp_path / "broken.png",))])


def test_a_prompt_without_pictures_may_name_their_token_beside_one_with_pictures(
    encoder: LanguageModelEncoder,
) -> None:
    named = ("a <|image_pad|> rabbit", [])

    shown, together = encode(encoder, ("a", pictures((1, 1))), named)

    assert len(shown) > len(encode(encoder, ("a", []))[0])
    assert_close(together, encode(encoder, named)[0])


def test_the_family_says_how_and_how_many_pictures_are_shown(model: Any, tmp_path: Path) -> None:
    half = replace(PICTURES, read=lambda path, size: read_rgb(path, size)[::2, ::2].contiguous(), shown=1)
    encoder = load(tmp_path, model, replace(USE, pictures=half))
    shown = pictures((180, 120), (90, 60))
    (ours,) = encode(encoder, ("a rabbit", shown))
    assert_near(ours, expected(model, encoder, "a rabbit", [shown[0][::2, ::2].contiguous()]))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("visual.patch_embed.proj.weight", None, "has no vision tower"),
        ("visual.merger.mlp.2.weight", None, "visual tower|incomplete"),
        ("visual.blocks.1.attn.qkv.weight", None, "missing: blocks.1.attn.qkv.weight"),
        ("visual.patch_embed.proj.weight", torch.ones(80, 3, 2, 14, 13), "not that of Qwen2.5-VL"),
        ("visual.merger.mlp.0.weight", torch.ones(320, 300), "not that of Qwen2.5-VL"),
        ("visual.merger.mlp.0.bias", torch.ones(3), "the file has 3, 320 is needed"),
        ("visual.surplus", torch.ones(3), "unexpected: surplus"),
    ],
)
def test_a_vision_tower_that_does_not_fit_is_one_message(
    name: str, tensor: Tensor | None, message: str, model: Any, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.safetensors", model, change={name: tensor})
    with pytest.raises(CheckpointError, match=message):
        load_vision_tower(path, USE.model, CPU, torch.float32)


@pytest.mark.parametrize(
    "told", [{"num_heads": 3}, {"num_heads": True}, {"window_size": 0}, {"fullatt_block_indexes": [-1]}]
)
def test_a_configuration_without_sense_is_refused(told: dict[str, Any], model: Any, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.safetensors", model)
    config = config_json(model)
    config["vision_config"] |= told
    path.with_name("config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="not that of Qwen2.5-VL"):
        load_vision_tower(path, USE.model, CPU, torch.float32)


def test_without_a_configuration_the_tower_is_the_released_one(model: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", layouts(model)["comfy"])
    tower: Any = load_vision_tower(path, USE.model, torch.device("meta"), torch.bfloat16)
    config = tower.config
    assert (config.num_heads, config.window_size, list(config.fullatt_block_indexes)) == (1, 112, [])
    with pytest.raises(CheckpointError, match="has no vision tower"):
        load_vision_tower(write_model(tmp_path / "qwen3.safetensors", qwen3()), USE.model, CPU, torch.float32)


def test_a_memory_plan_rehearses_prompts_with_pictures(encoder: LanguageModelEncoder, tmp_path: Path) -> None:
    planned = LanguageModelEncoder(USE, encoder.path, torch.float32)
    planned.load(META)
    prompt = pictured(tmp_path, "a rabbit", pictures(*SIZES[:2]))
    with rehearsing(planned) as ledger:
        (found,) = planned.encode([prompt])
    (real,) = encoder.encode([prompt])
    assert found["vl_embed"][0].shape == real["vl_embed"][0].shape
    assert ledger.peaks

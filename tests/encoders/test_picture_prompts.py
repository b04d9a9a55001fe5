"""Pictures in prompts against the whole Qwen2.5-VL and Qwen3-VL of transformers: patches, places, states, bad
pictures.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from encoders.language_encoder import LanguageEncoderSettings, LanguageModelEncoder
from encoders.language_models import QWEN3_VL
from encoders.picture_prompts import (
    ImagePromptFormat,
    image_position_ids,
    load_vision_tower,
    read_images,
    read_rgb,
    read_within,
)
from generation.memory import META, rehearsing
from modules.errors import CheckpointError, MediaError
from protocols.requests import Prompt
from tests.encoders.test_language_models import QWEN_IMAGE, STACKED, TOLERANCE, assert_close
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import (
    config_json,
    layouts,
    qwen3,
    qwen3_vl,
    qwen25_vl,
    write_model,
    write_qwen_tokenizer,
)

CPU = torch.device("cpu")
IMAGES = ImagePromptFormat("Picture {number}: <|vision_start|>{tokens}<|vision_end|>", max_pixels=200 * 200)
USE = replace(QWEN_IMAGE, image_format=IMAGES)
DEEP = replace(STACKED, states_key="vl_embed", image_format=IMAGES)
SIZES = ((90, 140), (57, 60), (400, 300), (28, 28))


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]


def use_of(model: Any) -> LanguageEncoderSettings:
    return USE if model.config.model_type == "qwen2_5_vl" else DEEP


def processor(use: LanguageEncoderSettings) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    gray = {"patch_size": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    own = gray if use.model is QWEN3_VL else {}
    return Qwen2VLImageProcessorPil(min_pixels=IMAGES.min_pixels, max_pixels=IMAGES.max_pixels, **own)


def expected(model: Any, encoder: LanguageModelEncoder, prompt: str, shown: list[Tensor]) -> Tensor:
    """The states of the whole network that are read."""
    tokenizer, use = encoder._loaded.get()[1], encoder.settings
    inputs: dict[str, Any] = {}
    text = ""
    if shown:
        inputs = dict(processor(use)([Image.fromarray(one.numpy()) for one in shown], return_tensors="pt"))
        counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
        text = "".join(IMAGES.write(index, count) for index, count in enumerate(counts, 1))
    ids = torch.tensor([tokenizer.read(f"{use.template_prefix}{text}{prompt}{use.template_suffix}").ids])
    kinds = (ids == tokenizer.token_to_id("<|image_pad|>")).int()
    with torch.no_grad():
        found = model(input_ids=ids, mm_token_type_ids=kinds, output_hidden_states=True, **inputs)
    states = [
        found.hidden_states[index][0, encoder.count_template_tokens(tokenizer) :]
        for index in use.state_indices
    ]
    return torch.stack(states, 1) if use.stacked_states else states[0]


@pytest.fixture(scope="module", params=[qwen25_vl, qwen3_vl], ids=["qwen25_vl", "qwen3_vl"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


def load(
    folder: Path, model: Any, use: LanguageEncoderSettings | None = None, layout: str = "transformers 4"
) -> LanguageModelEncoder:
    path = write_model(write_qwen_tokenizer(folder) / "model.safetensors", model, layout)
    made = LanguageModelEncoder(use or use_of(model), path, torch.float32)
    made.load(CPU)
    return made


@pytest.fixture
def encoder(model: Any, tmp_path: Path) -> LanguageModelEncoder:
    return load(tmp_path, model)


def pictured(folder: Path, text: str, shown: list[Tensor]) -> Prompt:
    """A prompt whose pictures are files below the folder."""
    paths = tuple(folder / f"{index}_{image.shape}.png" for index, image in enumerate(shown))
    for path, image in zip(paths, shown, strict=True):
        Image.fromarray(image.numpy()).save(path)
    return Prompt(text, images=paths)


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


def test_features_are_added_behind_the_first_layers_and_before_the_norm(tmp_path: Path) -> None:
    model, shown = qwen3_vl(3), pictures(*SIZES[:2])
    encoder = load(tmp_path, model, replace(DEEP, stacked_states=(1, 2, -1)))
    (ours,) = encode(encoder, ("a rabbit", shown))
    assert_near(ours, expected(model, encoder, "a rabbit", shown))


def test_a_picture_is_reduced_in_its_shape_and_never_enlarged(tmp_path: Path) -> None:
    large, small = pictures((600, 900), (40, 50))
    paths = pictured(tmp_path, "", [large, small]).images
    reduced = read_within(paths[0], area=384 * 384)
    theirs = Image.fromarray(large.numpy()).resize((470, 314), Image.Resampling.BICUBIC)
    assert torch.equal(reduced, torch.from_numpy(np.array(theirs)))
    assert torch.equal(read_within(paths[1], area=384 * 384), small)
    (long,) = pictured(tmp_path, "", pictures((4, 60000))).images
    assert read_within(long, area=384 * 384).shape == (28, 47030, 3)


@pytest.mark.slow_cases("qwen3_vl")
def test_prompts_together_are_each_alone(encoder: LanguageModelEncoder) -> None:
    shown = pictures(*SIZES)
    prompts = [(f"{index} rabbits", shown[: index % 4]) for index in range(10)]
    for one, together in zip(prompts, encode(encoder, *prompts), strict=True):
        assert_close(together, encode(encoder, one)[0])


def test_pictures_change_the_identity(encoder: LanguageModelEncoder) -> None:
    without = LanguageModelEncoder(replace(encoder.settings, image_format=None), encoder.path, torch.float32)
    assert dict(without.identity) != dict(encoder.identity)


def test_pictures_do_not_count_towards_the_most(encoder: LanguageModelEncoder) -> None:
    shown = pictures((196, 196), (196, 196))  # 7 x 7 tokens of 28 pixels, or 6 x 6 of 32
    long = "rabbit grass " * 100
    text, pictured = encode(encoder, (long, []), (long, shown))
    assert len(text) == USE.max_length
    assert len(pictured) == USE.max_length + 2 * (36 if encoder.settings.stacked_states else 49)


def test_patches_are_those_of_the_released_processor(encoder: LanguageModelEncoder) -> None:
    shown = pictures(*SIZES)
    ours = read_images(encoder.network.get_submodule("visual"), shown, IMAGES)
    theirs = processor(encoder.settings)([Image.fromarray(one.numpy()) for one in shown], return_tensors="pt")
    assert torch.equal(ours.patches, theirs["pixel_values"])
    assert (2 * torch.tensor(ours.token_grids)).tolist() == theirs["image_grid_thw"][:, 1:].tolist()


def test_words_behind_a_picture_stand_behind_its_longer_side() -> None:
    found = image_position_ids([5, 9, 9, 9, 9, 9, 9, 9, 9, 5, 5], [(2, 3), (2, 1)], token=9)
    assert found.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 4, 6, 7],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7],
        [0, 1, 2, 3, 1, 2, 3, 4, 4, 6, 7],
    ]


def test_what_cannot_be_shown_is_refused(encoder: LanguageModelEncoder, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="1x300 is too long"):
        encode(encoder, ("a", pictures((300, 1))))
    with pytest.raises(MediaError, match=r"<\|image_pad\|> stands for an image"):
        encode(encoder, ("a <|image_pad|>", pictures((60, 60))))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(MediaError, match=r"broken\.png"):
        encoder.encode([Prompt("a", images=(tmp_path / "broken.png",))])


def test_a_prompt_without_pictures_may_name_their_token_beside_one_with_pictures(
    encoder: LanguageModelEncoder,
) -> None:
    named = ("a <|image_pad|> rabbit", [])

    shown, together = encode(encoder, ("a", pictures((1, 1))), named)

    assert len(shown) > len(encode(encoder, ("a", []))[0])
    assert_close(together, encode(encoder, named)[0])


def test_the_family_says_how_and_how_many_pictures_are_shown(model: Any, tmp_path: Path) -> None:
    half = replace(IMAGES, read=lambda path, size: read_rgb(path, size)[::2, ::2].contiguous(), max_images=1)
    encoder = load(tmp_path, model, replace(use_of(model), image_format=half))
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
        ("visual.pos_embed.weight", torch.ones(24, 64), "not that of Qwen3-VL"),
        ("visual.merger.linear_fc1.weight", torch.ones(256, 250), "not that of Qwen3-VL"),
        ("visual.deepstack_merger_list.3.norm.bias", torch.ones(256), "not that of Qwen3-VL"),
        ("visual.deepstack_merger_list.1.norm.bias", None, "missing: deepstack_merger_list.1.norm.bias"),
    ],
)
def test_a_vision_tower_that_does_not_fit_is_one_message(
    name: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    is_deep = "Qwen3" in message or "deepstack" in name
    path = write_model(
        tmp_path / "model.safetensors", qwen3_vl() if is_deep else qwen25_vl(), change={name: tensor}
    )
    with pytest.raises(CheckpointError, match=message):
        load_vision_tower(path, (DEEP if is_deep else USE).model, CPU, torch.float32)


TOLD: list[dict[str, Any]] = [{"num_heads": 3}, {"num_heads": True}, {"window_size": 0}]
DEEP_TOLD = [{"deepstack_visual_indexes": layers} for layers in ([0, 2, 4], [0, 0, 2], [0, 2], "0, 2, 3")]


@pytest.mark.parametrize("told", [*TOLD, {"fullatt_block_indexes": [-1]}, *DEEP_TOLD])
def test_a_configuration_without_sense_is_refused(told: dict[str, Any], tmp_path: Path) -> None:
    model = qwen3_vl() if told in DEEP_TOLD else qwen25_vl()
    path = write_model(tmp_path / "model.safetensors", model)
    config = config_json(model)
    config["vision_config"] |= told
    path.with_name("config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"not that of Qwen.*-VL. Pass .* with its config.json"):
        load_vision_tower(path, use_of(model).model, CPU, torch.float32)


def test_without_a_configuration_the_tower_is_the_released_one(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", layouts(qwen25_vl())["comfy"])
    tower: Any = load_vision_tower(path, USE.model, torch.device("meta"), torch.bfloat16)
    config = tower.config
    assert (config.num_heads, config.window_size, list(config.fullatt_block_indexes)) == (1, 112, [])
    with pytest.raises(CheckpointError, match="has no vision tower"):
        load_vision_tower(write_model(tmp_path / "qwen3.safetensors", qwen3()), USE.model, CPU, torch.float32)


@pytest.mark.slow_cases("qwen3_vl")
def test_a_memory_plan_rehearses_prompts_with_pictures(encoder: LanguageModelEncoder, tmp_path: Path) -> None:
    planned = LanguageModelEncoder(encoder.settings, encoder.path, torch.float32)
    planned.load(META)
    prompt = pictured(tmp_path, "a rabbit", pictures(*SIZES[:2]))
    with rehearsing(planned) as ledger:
        (found,) = planned.encode([prompt])
    (real,) = encoder.encode([prompt])
    assert found["vl_embed"][0].shape == real["vl_embed"][0].shape
    assert ledger.peaks

"""CLIP-L as FLUX uses it; tests/hunyuan_model has its files, its tokenizers and HunyuanVideo's use."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from encoders.clip_checkpoints import ClipTextConfig
from encoders.clip_l import ClipTextEncoder
from encoders.clip_layers import ClipText, ClipVision, load_clip_vision
from hunyuan_model.text_encoders import LlavaTextEncoder
from modules.errors import CheckpointError
from protocols.family import can_learn
from protocols.requests import Prompt
from tests.golden_cases import make_weights, read_case
from tests.tiny.hunyuan_encoders import save
from tests.tiny.picture_encoders import write_clip_l

CPU = torch.device("cpu")


def test_ids_and_pooled_states_equal_those_recorded(tmp_path: Path) -> None:
    case, tensors = read_case("flux_text")
    save(tmp_path / "clip_l.safetensors", make_weights("clip-l", case["models"]["clip_l"]["weights"]))
    (tmp_path / "tokenizer.json").write_text(json.dumps(case["tokenizers"]["clip_l"]), encoding="utf-8")
    encoder = ClipTextEncoder(tmp_path / "clip_l.safetensors", torch.float32)
    encoder.load(CPU)

    found = encoder.encode([Prompt(text) for text in case["prompts"]])

    tokenizer = encoder._loaded.get()[1]
    for index, text in enumerate(case["prompts"]):
        row = tokenizer.read(text).cut(77).ids
        assert [*row, *row[-1:] * (77 - len(row))] == tensors["clip_ids"][index].tolist()
        assert found[index].keys() == encoder.keys == {"l_pooled"}
        torch.testing.assert_close(found[index]["l_pooled"], tensors["clip_pooled"][index], atol=2e-4, rtol=0)


def test_gradients_reach_what_learns_in_the_first_layer(tmp_path: Path) -> None:
    encoder = ClipTextEncoder(write_clip_l(tmp_path), torch.float32)
    assert can_learn(encoder)
    assert not can_learn(LlavaTextEncoder(tmp_path))
    encoder.load(CPU)
    network = encoder.network
    (layers,) = network.spec.blocks(network).values()
    linear = [part for part in nn.ModuleList(layers).modules() if isinstance(part, nn.Linear)]
    assert len(linear) == 6 * len(layers)  # 72 in CLIP-L
    extra = torch.zeros(linear[0].out_features, requires_grad=True)
    linear[0].register_forward_hook(lambda _module, _given, out: out + extra)
    encoder.encode([Prompt("a rabbit")])[0]["l_pooled"].square().sum().backward()  # type: ignore[union-attr]
    assert extra.grad is not None
    assert extra.grad.abs().max() > 0


def test_messages_name_what_is_needed_and_its_option(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", {"text_model.final_layer_norm.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"is not a CLIP image encoder(.|\n)*Pass a tower to --x"):
        load(path)
    path = save(tmp_path / "other.safetensors", {"a.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"is not a CLIP text encoder(.|\n)*to --clip_l"):
        dict(ClipTextEncoder(path).identity)


LAYERS, VOCABULARY, END = 3, 90, 88
IDS = torch.tensor([[87, 5, 6, 7, END, END, END], [87, 9, END, 0, 0, 0, 0]])  # padded like CLIP-L, OpenCLIP
ENDS = torch.tensor([4, 2])


def towers(activation: str) -> tuple[ClipText, CLIPTextModelWithProjection]:
    """Ours and that of transformers, with the same weights."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 32, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "eos_token_id": END, "bos_token_id": 87, "pad_token_id": 0}
    config = CLIPTextConfig(**sizes, **tokens, num_hidden_layers=LAYERS, hidden_act=activation)
    theirs = CLIPTextModelWithProjection(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = ClipText(ClipTextConfig(VOCABULARY, 77, 64, 128, 2, LAYERS, activation))
    ours.load_state_dict(
        {
            name.removeprefix("text_model."): tensor
            for name, tensor in theirs.state_dict().items()
            if not name.endswith(("position_ids", "text_projection.weight"))
        }
    )
    return ours.eval(), theirs


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_states_and_pooled_states_are_those_of_transformers(activation: str) -> None:
    ours, theirs = towers(activation)
    expected = theirs(IDS, output_hidden_states=True)
    norm = theirs.text_model.final_layer_norm
    for layer in range(1, LAYERS + 1):
        state = expected.hidden_states[-layer]
        found, pooled = ours.states(IDS, layer, ends=ENDS)
        assert pooled is not None
        torch.testing.assert_close(found, state, atol=1e-5, rtol=0)
        projected = pooled @ theirs.text_projection.weight.T
        torch.testing.assert_close(projected, expected.text_embeds, atol=1e-5, rtol=0)
        normed, none = ours.states(IDS, layer, final_norm=True)
        assert none is None
        torch.testing.assert_close(normed, norm(state), atol=1e-5, rtol=0)
        assert torch.equal(pooled, ours(IDS, ENDS))


@torch.no_grad()
def test_layers_behind_the_wanted_one_run_only_for_the_pooled_state() -> None:
    ours, _ = towers("gelu")
    for layer in (0, LAYERS + 1):
        with pytest.raises(ValueError, match=f"layer {layer} "):
            ours.states(IDS, layer)
    runs: list[int] = []
    for index, layer in enumerate(ours.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    ours.states(IDS, 2)
    assert runs == [0, 1]
    ours.states(IDS, 2, ends=ENDS)
    assert runs == [0, 1, 0, 1, 2]


def write_tower(
    folder: Path, activation: str = "gelu", projection: int = 32
) -> tuple[Path, CLIPVisionModelWithProjection]:
    """A tiny tower as a folder, and transformers' model of it."""
    torch.manual_seed(6)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "projection_dim": projection,
        "num_attention_heads": 4,
    }
    pixels = {"image_size": 28, "patch_size": 14}
    config = CLIPVisionConfig(**sizes, **pixels, num_hidden_layers=2, hidden_act=activation)
    model = CLIPVisionModelWithProjection(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder, model


def load(path: Path) -> ClipVision:
    return load_clip_vision(path, CPU, torch.float32, "--x", "a tower")


def noise(width: int, height: int) -> Image.Image:
    pixels = numpy.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_vectors_are_those_of_transformers(tmp_path: Path, activation: str) -> None:
    folder, theirs = write_tower(tmp_path, activation)
    ours, images = load(folder), [noise(60, 40), noise(28, 95)]
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = CLIPImageProcessorPil(**size, do_convert_rgb=True)
    pixels = torch.stack([torch.as_tensor(processor(image)["pixel_values"][0]) for image in images])
    torch.testing.assert_close(ours.prepare(images), pixels, atol=1e-5, rtol=0)
    expected = theirs(pixel_values=pixels).image_embeds
    torch.testing.assert_close(ours.encode(images), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(60, 40), (28, 95), (20, 20)])
def test_pixels_are_prepared_as_pictures_are(tmp_path: Path, size: tuple[int, int]) -> None:
    """But for the roundings of pictures, and so that gradients flow."""
    tower = load(write_tower(tmp_path)[0])
    image = noise(*size).point(lambda value: 64 + value // 2)  # Pillow cuts off what overshoots on the way
    pixels = (torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None] / 255).requires_grad_()
    prepared = tower.prepare_pixels(pixels)
    torch.testing.assert_close(prepared, tower.prepare([image]), atol=0.02, rtol=0)
    prepared.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().max() > 0


def test_a_file_with_both_towers_gives_the_same(tmp_path: Path) -> None:
    folder, theirs = write_tower(tmp_path / "alone")
    beside = {"text_model.final_layer_norm.weight": torch.ones(2), "logit_scale": torch.tensor(2.0)}
    save(tmp_path / "both" / "model.safetensors", {**theirs.state_dict(), **beside})
    config = {"model_type": "clip", "vision_config": json.loads((folder / "config.json").read_text("utf-8"))}
    (tmp_path / "both" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    first, second = (load(path).encode([noise(30, 30)]) for path in (folder, tmp_path / "both"))
    assert torch.equal(first, second)

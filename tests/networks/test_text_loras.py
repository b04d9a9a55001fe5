"""LoRAs for text encoders: into the loaded networks when generating, and from what a training saves."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from encoders.clip_l import ClipTextEncoder
from modules.checkpoints.opening import open_checkpoint
from modules.contract.requests import Prompt
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.loading import LoraUse, read_lora
from networks.lora_network import OwnNetwork
from networks.metadata import describe_lora, save_network
from networks.text_loras import TextLoras
from tests.flux.making import tiny_model
from tests.tiny.loras import make_lora
from tests.tiny.picture_encoders import write_clip_l

CPU = torch.device("cpu")
PROMPT = [Prompt("a cat")]


def encoder(folder: Path) -> ClipTextEncoder:
    clip = ClipTextEncoder(write_clip_l(folder), torch.float32)
    clip.load(CPU)
    return clip


def pooled(clip: ClipTextEncoder) -> Tensor:
    with torch.no_grad():
        (conditions,) = clip.encode(PROMPT)
    value = conditions["l_pooled"]
    assert isinstance(value, Tensor)
    return value


def trained(clip: ClipTextEncoder, path: Path, dit: nn.Module | None) -> OwnNetwork:
    """A LoRA with random factors in the encoder (and the DiT), saved."""
    texts = {clip.lora_prefix: clip.network}
    network: OwnNetwork = make_lora("lora_flux", 2, 2.0, texts=texts, dit=dit)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_network(network, path, None, {"ss_base_model_version": "flux"})
    return network


@pytest.mark.parametrize("with_dit", [False, True])
def test_texts_are_encoded_as_in_training(tmp_path: Path, with_dit: bool) -> None:
    clip = encoder(tmp_path / "clip")
    plain = pooled(clip)
    network = trained(clip, tmp_path / "lora.safetensors", tiny_model("dev") if with_dit else None)
    network.attach()
    expected = pooled(clip)
    lora = read_lora(tmp_path / "lora.safetensors", with_texts=True)
    fresh = encoder(tmp_path / "clip")

    loras = TextLoras([LoraUse(lora)])
    for _ in range(2):  # a kept encoder comes again
        loras.add_to(fresh)

    assert float((expected - plain).abs().max()) > 1e-2
    torch.testing.assert_close(pooled(fresh), expected, rtol=1e-4, atol=1e-5)
    half = encoder(tmp_path / "clip")
    TextLoras([LoraUse(lora, 0.0)]).add_to(half)
    torch.testing.assert_close(pooled(half), plain)


def test_a_lora_for_encoders_alone_leaves_the_dit_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(encoder(tmp_path / "clip"), tmp_path / "lora.safetensors", None)
    patch = LoraPatch([LoraUse(read_lora(tmp_path / "lora.safetensors", with_texts=True))])
    weights = tiny_model("dev").state_dict()

    with caplog.at_level(logging.WARNING):
        changed = {name: patch(name, weight) for name, weight in weights.items()}
        patch.check()

    assert all(torch.equal(changed[name], weight) for name, weight in weights.items())
    assert caplog.text == ""


def test_a_file_for_encoders_is_described(tmp_path: Path) -> None:
    trained(encoder(tmp_path / "clip"), tmp_path / "lora.safetensors", None)

    with open_checkpoint(tmp_path / "lora.safetensors") as checkpoint:
        words = describe_lora(checkpoint)

    assert words is not None
    assert "of them in text encoders" in words
    assert words.startswith("a LoRA for flux")


def test_parts_for_encoders_that_a_model_does_not_have_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = encoder(tmp_path / "clip")
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 4), f"{name}.lora_up.weight": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "lora.safetensors")
    loras = TextLoras([LoraUse(read_lora(tmp_path / "lora.safetensors", with_texts=True))])

    with caplog.at_level(logging.WARNING):
        loras.tell_unused([clip])

    assert "2 tensors change a text encoder that this model does not have" in caplog.text


def in_transformers(folder: Path) -> CLIPTextModel:
    weights = {n.removeprefix("text_model."): t for n, t in load_file(write_clip_l(folder)).items()}
    layer = weights["encoder.layers.0.mlp.fc1.weight"]
    rows, width = weights["embeddings.token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=len(layer),
        num_hidden_layers=len([name for name in weights if name.endswith("fc1.weight")]),
        num_attention_heads=width // 64,
        bos_token_id=rows - 2,
        eos_token_id=rows - 1,
    )
    model = CLIPTextModel(config)
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def test_a_converted_lora_encodes_texts_in_diffusers_as_here(tmp_path: Path) -> None:
    clip, theirs = encoder(tmp_path / "clip"), in_transformers(tmp_path / "theirs")
    texts = {clip.lora_prefix: clip.network}
    network: OwnNetwork = make_lora("lora_flux", 2, 1.0, texts=texts, dit=None)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_network(network, tmp_path / "lora.safetensors", None, {"ss_base_model_version": "flux"})
    convert_file(tmp_path / "lora.safetensors", tmp_path / "there.safetensors", "diffusers", "flux")
    ids = torch.tensor([[5, 9, 2, 11, 7]])
    plain = theirs(ids).last_hidden_state

    state = FluxLoraLoaderMixin.lora_state_dict(str(tmp_path / "there.safetensors"))
    FluxLoraLoaderMixin.load_lora_into_text_encoder(
        state, network_alphas=None, text_encoder=theirs, prefix="text_encoder"
    )

    TextLoras([LoraUse(read_lora(tmp_path / "lora.safetensors", with_texts=True))]).add_to(clip)
    merged = in_transformers(tmp_path / "again")
    merged.load_state_dict(dict(clip.network.state_dict()))
    found, expected = theirs(ids).last_hidden_state, merged(ids).last_hidden_state
    assert float((found - plain).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

"""A converted LoRA for CLIP-L, loaded by diffusers' pipelines."""

from pathlib import Path

import torch
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from networks.convert import convert_file
from networks.loading import LoraUse, read_lora
from networks.lora_network import OwnNetwork
from networks.metadata import save_network
from networks.text_loras import TextLoras
from tests.networks.test_text_loras import encoder
from tests.tiny.loras import make_lora
from tests.tiny.picture_encoders import write_clip_l


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

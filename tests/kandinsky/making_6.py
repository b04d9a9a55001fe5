"""A tiny Kandinsky 6, its inputs, and diffusers' network with the same weights."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Kandinsky6Transformer3DModel
from torch import Tensor

from kandinsky.configs import Kandinsky6Config
from kandinsky.model_6 import Kandinsky6Model, Velocities
from tests.tiny.dit_files import frozen
from tests.tiny.kandinsky_6 import CONFIG, tiny_state, to_diffusers

LENGTHS = (17, 5)  # real tokens of each text
AUDIO_LATENTS = 9


def tiny_model(seed: int = 0, config: Kandinsky6Config = CONFIG) -> Kandinsky6Model:
    """Our network with the weights of `tiny_state`."""
    return frozen(Kandinsky6Model(config), tiny_state(seed))


def in_diffusers(
    state: Mapping[str, Tensor], config: Kandinsky6Config = CONFIG, **settings: Any
) -> Kandinsky6Transformer3DModel:
    """diffusers' network with these weights, under our names. settings: others than the release's."""
    dit = Kandinsky6Transformer3DModel(
        **{
            "in_text_dim": config.text_dim,
            "in_text_dim2": config.pooled_dim,
            "time_dim": config.video.time_dim,
            "model_dim": config.video.dim,
            "ff_dim": config.video.ffn_dim,
            "num_text_blocks": config.text_layers,
            "num_visual_blocks": config.num_layers,
            "axes_dims": config.rotary_widths,
            "in_audio_dim": config.audio_channels,
            "out_audio_dim": config.audio_channels,
            "model_dim_a": config.audio.dim,
            "time_dim_a": config.audio.time_dim,
            "ff_dim_a": config.audio.ffn_dim,
            "audio_freqs_scaling": 0.144,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
            "visual_token_type_num_embeddings": config.num_token_types,
            **settings,
        }
    )
    dit.load_state_dict(to_diffusers(state))
    return dit.eval()


def tiny_inputs(
    batch: int = 2, frames: int = 3, rows: int = 4, columns: int = 6, *, image: bool = False
) -> dict[str, Any]:
    """Inputs of our network, with texts of unequal lengths."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor(LENGTHS[:batch])
    longest = int(lengths.max())
    inputs = {
        "noisy": torch.randn(batch, CONFIG.out_channels, frames, rows, columns, generator=generator),
        "timesteps": torch.tensor([964.3, 121.7])[:batch],
        "text": torch.randn(batch, longest, CONFIG.text_dim, generator=generator),
        "text_mask": torch.arange(longest) < lengths[:, None],
        "pooled": torch.randn(batch, CONFIG.pooled_dim, generator=generator),
        "audio": torch.randn(batch, CONFIG.audio_channels, AUDIO_LATENTS, 1, generator=generator),
        "position_scale": 2.0,
    }
    if image:
        shape = (batch, CONFIG.out_channels, 1, rows, columns)
        inputs["image"] = torch.randn(shape, generator=generator)
    return inputs


def predict_with(dit: Kandinsky6Transformer3DModel, inputs: Mapping[str, Any]) -> Velocities:
    """What diffusers' network makes of the inputs of ours, with a mask for padded texts."""
    x = inputs["noisy"].permute(0, 2, 3, 4, 1)
    batch, frames, rows, columns, _ = x.shape
    mask = torch.zeros_like(x[..., :1])
    image, audio = inputs.get("image"), inputs.get("audio")
    more = {}
    if image is not None:
        x = torch.cat([x, image.permute(0, 2, 3, 4, 1)], dim=1)
        mask = torch.zeros_like(x[..., :1])
        mask[:, -1] = 1
        types = torch.zeros(batch, frames + 1, dtype=torch.long)
        types[:, -1] = 1
        places = torch.cat([torch.arange(frames), torch.zeros(1, dtype=torch.long)])
        sides = (torch.arange(rows // 2), torch.arange(columns // 2))
        more = {"visual_token_type_ids": types, "visual_rope_pos": (places, *sides)}
    output = dit(
        hidden_states=torch.cat([x, torch.zeros_like(x), mask], dim=-1),
        encoder_hidden_states=inputs["text"],
        # over the queries too: a mask of B T is not one of B 1 1 T there
        encoder_attention_mask=inputs["text_mask"][:, None, None],
        timestep=inputs["timesteps"],
        pooled_projections=inputs["pooled"],
        audio_hidden_states=None if audio is None else audio[..., 0].transpose(1, 2),
        **more,
    )
    video = output.sample.permute(0, 4, 1, 2, 3)[:, :, :frames]
    sound = output.audio_sample
    return Velocities(video, None if sound is None else sound.transpose(1, 2).unsqueeze(3))

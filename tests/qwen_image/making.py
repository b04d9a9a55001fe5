"""A tiny Qwen-Image, its inputs, and diffusers' network with the same weights."""

from collections.abc import Sequence

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from qwen_image.model import QwenImageModel
from tests.tiny.qwen_image import CONFIG, tiny_state


def in_diffusers(
    state: dict[str, Tensor],
    clean_references: bool = False,
    layered: bool = False,
    num_layers: int = CONFIG.num_layers,
) -> QwenImageTransformer2DModel:
    """diffusers' network with these weights, of the size of CONFIG but for the number of its blocks."""
    width = CONFIG.dim // CONFIG.num_heads
    dit = QwenImageTransformer2DModel(
        in_channels=4 * CONFIG.channels,
        out_channels=CONFIG.channels,
        num_layers=num_layers,
        attention_head_dim=width,
        num_attention_heads=CONFIG.num_heads,
        joint_attention_dim=CONFIG.text_dim,
        axes_dims_rope=(width // 8, 7 * width // 16, 7 * width // 16),
        zero_cond_t=clean_references,
        use_additional_t_cond=layered,
        use_layer3d_rope=layered,
    )
    dit.load_state_dict(state)
    return dit.eval()


def tiny_model() -> QwenImageModel:
    """Our network with the weights of `tiny_state`."""
    model = QwenImageModel(CONFIG)
    model.load_state_dict(tiny_state())
    return model.eval()


def tiny_inputs(batch: int = 2, rows: int = 5, columns: int = 7, text: int = 9) -> dict[str, Tensor]:
    """Inputs of our network; each text is two tokens shorter than the one before it."""
    generator = torch.Generator().manual_seed(7)
    lengths = text - 2 * torch.arange(batch)
    return {
        "noisy": torch.randn(batch, CONFIG.channels, 1, 2 * rows, 2 * columns, generator=generator),
        "timesteps": torch.linspace(900.0, 130.0, batch),
        "text": torch.randn(batch, text, CONFIG.text_dim, generator=generator),
        "text_mask": torch.arange(text) < lengths[:, None],
    }


def pack(latents: Tensor) -> Tensor:
    """Tokens B L 4Z of B Z 1 H W, as diffusers takes them."""
    batch, channels, _, height, width = latents.shape
    cut = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def predict_with(
    dit: QwenImageTransformer2DModel, given: dict[str, Tensor], references: Sequence[Tensor] = ()
) -> Tensor:
    """The velocity B L 4Z that diffusers' network makes of the inputs of ours."""
    images = (given["noisy"], *references)
    tokens = [pack(one) for one in images]
    found = dit(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=given["text"],
        encoder_hidden_states_mask=given["text_mask"],
        timestep=given["timesteps"] / 1000,
        img_shapes=[[(1, one.shape[-2] // 2, one.shape[-1] // 2) for one in images]] * len(given["noisy"]),
        return_dict=False,
    )[0]
    assert isinstance(found, Tensor)
    return found[:, : tokens[0].shape[1]]

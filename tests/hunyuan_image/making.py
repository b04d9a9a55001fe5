"""HunyuanImage networks for the tests: recorded ones, and the tiny one in diffusers."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_image.configs import HunyuanImageConfig
from hunyuan_image.model import HunyuanImageModel
from tests.golden_cases import make_weights, read_case
from tests.tiny.dit_files import frozen
from tests.tiny.hunyuan_image import CONFIG, diffusers_state, tiny_state


@cache
def golden_model() -> HunyuanImageModel:
    """The recorded transformer."""
    case, _ = read_case("hunyuan_image_dit")
    sizes = case["config"]
    model = HunyuanImageModel(
        HunyuanImageConfig(
            dim=sizes["hidden_size"],
            ffn_dim=sizes["hidden_size"] * sizes["mlp_width_ratio"],
            num_heads=sizes["heads_num"],
            double_blocks=sizes["mm_double_blocks_depth"],
            single_blocks=sizes["mm_single_blocks_depth"],
            refiner_blocks=sizes["refiner_depth"],
            refiner_ffn_dim=sizes["hidden_size"] * sizes["mlp_width_ratio"],
            in_dim=sizes["in_channels"],
            out_dim=sizes["out_channels"],
            text_dim=sizes["text_states_dim"],
            glyph_dim=sizes["byt5_dim"],
            glyph_hidden=(sizes["byt5_hidden"],) * 2,
        )
    )
    return frozen(model, make_weights(case["weights_model_key"], case["weights"], case["salt"]))


@cache
def in_diffusers() -> nn.Module:
    """The tiny transformer as diffusers' class."""
    return fill_diffusers(tiny_state())


def fill_diffusers(state: Mapping[str, Tensor]) -> nn.Module:
    """diffusers' class with the weights of a tiny transformer, by their published names."""
    from diffusers import HunyuanImageTransformer2DModel

    with torch.device("meta"):
        model = HunyuanImageTransformer2DModel(
            in_channels=CONFIG.in_dim,
            out_channels=CONFIG.out_dim,
            num_attention_heads=CONFIG.num_heads,
            attention_head_dim=CONFIG.dim // CONFIG.num_heads,
            num_layers=CONFIG.double_blocks,
            num_single_layers=CONFIG.single_blocks,
            num_refiner_layers=CONFIG.refiner_blocks,
            text_embed_dim=CONFIG.text_dim,
            text_embed_2_dim=CONFIG.glyph_dim,
            rope_axes_dim=(CONFIG.dim // CONFIG.num_heads // 2,) * 2,
        )
        # the class has a fixed width here
        second = model.context_embedder_2
        first, then = CONFIG.glyph_hidden
        second.linear_1 = nn.Linear(CONFIG.glyph_dim, first)
        second.linear_2 = nn.Linear(first, then)
        second.linear_3 = nn.Linear(then, CONFIG.dim)
    model.load_state_dict(diffusers_state(state), assign=True)
    return model.eval().requires_grad_(False)


def run_there(model: nn.Module, inputs: dict[str, Tensor], learns: bool = False) -> Tensor:
    """What diffusers' class predicts from arguments of ours. learns: with gradients."""
    with torch.set_grad_enabled(learns):
        out: Any = model(
            hidden_states=inputs["noisy"],
            timestep=inputs["timesteps"],
            encoder_hidden_states=inputs["text"],
            encoder_attention_mask=inputs["text_mask"],
            encoder_hidden_states_2=inputs["glyphs"],
            encoder_attention_mask_2=inputs["glyph_mask"],
            return_dict=False,
        )[0]
    return out

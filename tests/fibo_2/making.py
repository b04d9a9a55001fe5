"""Tiny networks of Fibo 2.0 with inputs, and the class of diffusers with the same weights."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import BriaFibo2Pipeline, BriaFibo2Transformer2DModel
from einops import rearrange
from torch import Tensor

from fibo_2.configs import PLACES, STATES
from fibo_2.model import Fibo2Model
from tests.tiny.dit_files import frozen
from tests.tiny.fibo_2 import CONFIG, tiny_state
from tests.tiny.language_models import qwen3_vl, qwen_tokenizer

LENGTHS = (600, 300)  # real tokens of each text, of which 12 and 10 gist tokens are made
TIMES = (643.0, 121.0)


def tiny_model() -> Fibo2Model:
    return frozen(Fibo2Model(CONFIG), tiny_state())


def in_diffusers(state: Mapping[str, Tensor]) -> Any:
    """diffusers' network with these weights, of the size of CONFIG."""
    network = BriaFibo2Transformer2DModel(
        dim=CONFIG.dim,
        n_layers=CONFIG.num_layers,
        n_refiner_layers=CONFIG.noise_refiner_layers,
        n_heads=CONFIG.num_heads,
        cap_feat_dim=CONFIG.text_dim,
        injection_layer_ids=CONFIG.injections,
        perceiver_num_layers=CONFIG.perceiver_layers,
        min_num_gist_tokens=CONFIG.max_gist // 2,
        max_num_gist_tokens=CONFIG.max_gist,
        gist_step=CONFIG.max_gist // 8,
        axes_dims=CONFIG.rotary_widths,
    )
    return frozen(network, state)


def tiny_inputs(batch: int = 2) -> dict[str, Any]:
    """Inputs of samples whose texts have different lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = LENGTHS[:batch]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {
        "noisy": torch.randn(batch, CONFIG.in_dim, 1, 3, 5, generator=generator),
        "timesteps": torch.tensor(TIMES[:batch]),
        "text": torch.randn(batch, max(lengths), len(STATES), CONFIG.state_dim, generator=generator),
        "text_mask": mask,
    }


def draw_references(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = ((2, 4), (3, 3))
    return [torch.randn(batch, CONFIG.in_dim, 1, *size, generator=generator) for size in sizes]


def unpack(latents: Tensor) -> Tensor:
    """Latents as diffusers has them, B 32 2h 2w, of ours, B 128 1 h w."""
    return rearrange(latents, "b (z ph pw) 1 h w -> b z (h ph) (w pw)", ph=2, pw=2)


@torch.no_grad()
def predict_there(inputs: dict[str, Any], references: list[Tensor]) -> Tensor:
    """The velocity by diffusers' class with the weights of `tiny_state`."""
    return predict_with(in_diffusers(tiny_state()), inputs, references)


def predict_with(dit: Any, inputs: dict[str, Any], references: list[Tensor]) -> Tensor:
    """The velocity that diffusers' network makes of the inputs of ours, as ours has it."""
    text = inputs["text"]
    count = 1 + len(CONFIG.injections)
    bundles = [torch.cat([text[:, :, place] for place in places], dim=-1) for places in PLACES[:count]]
    mask = inputs["text_mask"]
    velocity = dit(
        unpack(inputs["noisy"]),
        inputs["timesteps"] / 1000,
        torch.stack(bundles, dim=1),
        None if mask.all() else mask,
        context_latents=[unpack(one) for one in references] or None,
        return_dict=False,
    )[0]
    return rearrange(velocity, "b z (h ph) (w pw) -> b (z ph pw) 1 h w", ph=2, pw=2)


class Inputs(dict[str, Tensor]):
    """What a processor returns."""

    def to(self, device: Any) -> "Inputs":
        return self

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


def read_there(text: list[str], **_: Any) -> Inputs:
    """Stand in for the processor, for one text without pictures."""
    ids = torch.tensor([qwen_tokenizer().encode(text[0], add_special_tokens=False).ids])
    return Inputs(input_ids=ids, attention_mask=torch.ones_like(ids))


@torch.no_grad()
def bundles_there(text: str) -> Tensor:
    """The states of a text by diffusers' pipeline with transformers' encoder: bundles T 3W."""
    network = qwen3_vl(layers=STATES[-1] + 1)
    bundles, _ = BriaFibo2Pipeline._get_qwen_prompt_embeds(
        network, read_there, text, device=torch.device("cpu")
    )
    found: Tensor = bundles[0]
    return found

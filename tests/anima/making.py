"""A tiny Anima, its inputs, and diffusers' networks with the same weights."""

import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from torch import Tensor

from anima.model import AnimaModel
from tests.tiny.anima import CONFIG, T5_VOCABULARY, adapter_of, in_diffusers_names, tiny_state
from tests.tiny.dit_files import frozen

ADAPTER = CONFIG.adapter
assert ADAPTER is not None


def _resize(mask: Tensor, size: list[int], **_: Any) -> Tensor:
    return functional.interpolate(mask, size, mode="nearest")


if not hasattr(transformer_cosmos, "transforms"):  # of torchvision, which resizes the mask of zeros
    nearest = types.SimpleNamespace(NEAREST="nearest")
    transformer_cosmos.transforms = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=_resize), InterpolationMode=nearest
    )


def transformer_in_diffusers(state: Mapping[str, Tensor], layers: int = CONFIG.num_layers) -> Any:
    """diffusers' transformer with these weights, of the size of CONFIG."""
    theirs = CosmosTransformer3DModel(
        in_channels=CONFIG.channels,
        out_channels=CONFIG.channels,
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_width,
        num_layers=layers,
        mlp_ratio=CONFIG.ffn_dim / CONFIG.dim,
        text_embed_dim=CONFIG.context_dim,
        adaln_lora_dim=CONFIG.modulation_dim,
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=True,
        extra_pos_embed_type=None,
    )
    return frozen(theirs, in_diffusers_names(state))


def conditioner_in_diffusers(state: Mapping[str, Tensor]) -> Any:
    """diffusers' adapter with these weights, of the size of CONFIG."""
    theirs = AnimaTextConditioner(
        source_dim=ADAPTER.text_dim,
        target_dim=ADAPTER.dim,
        model_dim=ADAPTER.dim,
        num_layers=ADAPTER.num_layers,
        num_attention_heads=ADAPTER.num_heads,
        mlp_ratio=ADAPTER.ffn_dim / ADAPTER.dim,
        target_vocab_size=T5_VOCABULARY,
    )
    return frozen(theirs, adapter_of(state))


def tiny_model(seed: int = 0) -> AnimaModel:
    """Our network with the weights of `tiny_state`."""
    return frozen(AnimaModel(CONFIG), tiny_state(seed))


def tiny_inputs(batch: int = 2, rows: int = 5, columns: int = 7) -> dict[str, Tensor]:
    """Inputs of our network; texts have unequal numbers of states and tokens, the last one no state."""
    generator = torch.Generator().manual_seed(7)
    states_mask = torch.arange(9) < torch.tensor([9, 4, 0][:batch])[:, None]
    weights = (torch.arange(11) < torch.tensor([7, 11, 1][:batch])[:, None]).to(torch.int64)
    ids = torch.randint(2, T5_VOCABULARY, (batch, 11), generator=generator)
    return {
        "noisy": torch.randn(batch, CONFIG.channels, 1, 2 * rows, 2 * columns, generator=generator),
        "sigmas": torch.linspace(0.9, 0.13, batch),
        "states": torch.randn(batch, 9, ADAPTER.text_dim, generator=generator) * states_mask[..., None],
        "states_mask": states_mask.to(torch.int64),
        "ids": ids * weights,
        "weights": weights,
    }


def text_in_diffusers(conditioner: Any, given: Mapping[str, Tensor]) -> Tensor:
    """The rows that diffusers' adapter makes of the inputs of our network: B 512 C."""
    found: Tensor = conditioner(
        source_hidden_states=given["states"],
        target_input_ids=given["ids"],
        target_attention_mask=given["weights"],
        source_attention_mask=given["states_mask"],
    )
    return found


def predict_in_diffusers(dit: Any, noisy: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
    """The velocity B Z 1 H W that diffusers' transformer makes, sample by sample: its mask is for one."""
    found = []
    for sample in range(len(noisy)):
        mask = noisy.new_zeros(1, 1, 8 * noisy.shape[-2], 8 * noisy.shape[-1])
        one = dit(
            hidden_states=noisy[sample : sample + 1],
            timestep=sigmas[sample : sample + 1],
            encoder_hidden_states=text[sample : sample + 1],
            padding_mask=mask,
            return_dict=False,
        )[0]
        found.append(one)
    return torch.cat(found)

"""A tiny FLUX 3, its inputs, and diffusers' network and modular pipeline with the same weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux3Transformer2DModel
from diffusers.modular_pipelines.flux3 import Flux3AutoBlocks, Flux3DistilledAutoBlocks
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flux_3.model import Flux3Model
from tests.flux_2.making import autoencoder_in_diffusers
from tests.tiny.dit_files import TinyModel
from tests.tiny.flux_3 import CONFIG, TEXT_LAYERS, in_diffusers_names, tiny_state
from tests.tiny.language_models import QWEN3_TEMPLATE, qwen3_vl


def in_diffusers(state: Mapping[str, Tensor]) -> Flux3Transformer2DModel:
    """diffusers' network with these weights, of the size of CONFIG."""
    width = CONFIG.head_width
    dit = Flux3Transformer2DModel(
        in_channels=CONFIG.channels,
        cond_in_channels=CONFIG.channels,
        num_layers=CONFIG.mode_blocks,
        num_single_layers=CONFIG.joint_blocks,
        attention_head_dim=width,
        num_attention_heads=CONFIG.num_heads,
        joint_attention_dim=CONFIG.text_dim,
        timestep_channels=CONFIG.freq_dim,
        axes_dims_rope=(width // 4,) * 4,
        flow_map="ref_time_in.in_layer.weight" in state,
    )
    dit.load_state_dict(in_diffusers_names(state))
    return dit.eval()


def tiny_model(seed: int = 0, is_flow_map: bool = False) -> Flux3Model:
    """Our network with the weights of `tiny_state`."""
    from dataclasses import replace

    model = Flux3Model(replace(CONFIG, is_flow_map=is_flow_map))
    model.load_state_dict(tiny_state(seed, is_flow_map=is_flow_map))
    return model.eval()


def tiny_inputs(
    batch: int = 2, rows: int = 3, columns: int = 5, text: int = 9, is_flow_map: bool = False
) -> dict[str, Tensor]:
    """Inputs of our network; all tokens of texts are real, as padding counts."""
    generator = torch.Generator().manual_seed(7)
    inputs = {
        "noisy": torch.randn(batch, CONFIG.channels, 1, rows, columns, generator=generator),
        "timesteps": torch.linspace(900.0, 130.0, batch),
        "text": torch.randn(batch, text, CONFIG.text_dim, generator=generator),
        "text_mask": torch.ones(batch, text, dtype=torch.bool),
    }
    if is_flow_map:
        inputs["next_timesteps"] = inputs["timesteps"] - 100
    return inputs


def places_of(latents: Tensor, last: int = 0) -> Tensor:
    """The places of a picture's tokens, L 4: 0, half the row, half the column, `last`."""
    rows, columns = latents.shape[-2:]
    axes = (
        torch.zeros(1),
        0.5 * torch.arange(rows),
        0.5 * torch.arange(columns),
        torch.full((1,), float(last)),
    )
    return torch.cartesian_prod(*axes)


def predict_with(
    dit: Flux3Transformer2DModel, inputs: Mapping[str, Tensor], references: Sequence[Tensor] = ()
) -> Tensor:
    """The velocity B Z 1 H W that diffusers' network makes of the inputs of ours."""
    noisy, text = inputs["noisy"], inputs["text"]
    place = torch.zeros(text.shape[1], 4)
    place[:, 3] = torch.arange(text.shape[1])
    more: dict[str, Any] = {}
    if references:
        more["image_cond_hidden_states"] = torch.cat(
            [latents.flatten(2).transpose(1, 2) for latents in references], dim=1
        )
        more["image_cond_ids"] = torch.cat(
            [places_of(latents, -number) for number, latents in enumerate(references, 1)]
        )
    if "next_timesteps" in inputs:
        more["target_timestep"] = inputs["next_timesteps"] / 1000
    velocity = dit(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        encoder_hidden_states=text,
        timestep=inputs["timesteps"] / 1000,
        img_ids=places_of(noisy),
        txt_ids=place,
        return_dict=False,
        **more,
    )[0]
    made: Tensor = velocity.transpose(1, 2).unflatten(2, (1, *noisy.shape[-2:]))
    return made


class Processor:
    """What the pipeline uses of Qwen3-VL's processor."""

    def __init__(self, files: TinyModel) -> None:
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(files.text_encoder / "tokenizer.json"),
            pad_token="<|endoftext|>",
            padding_side="right",
        )
        self.tokenizer.chat_template = QWEN3_TEMPLATE

    def apply_chat_template(self, messages: Any, **settings: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, **settings)


def pipeline(files: TinyModel, is_distilled: bool = False) -> Any:
    """diffusers' modular pipeline with the weights of tiny files; prompts are encoded as they are."""
    blocks = Flux3DistilledAutoBlocks() if is_distilled else Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = blocks.init_pipeline()
    pipe.update_components(
        text_encoder=qwen3_vl(TEXT_LAYERS),
        tokenizer=Processor(files),
        vae=autoencoder_in_diffusers(load_file(files.vae)),
        transformer=in_diffusers(load_file(files.dit)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""A tiny Ideogram 4, its inputs, and diffusers' networks and pipeline with the same weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ideogram4.configs import STATES, Ideogram4Config
from ideogram4.model import Ideogram4Model
from ideogram4.names import IDEOGRAM_4
from networks.lora_format import LoraFormat
from networks.names.layouts import KNOWN
from tests.flux_2.making import autoencoder_in_diffusers
from tests.tiny.dit_files import TinyModel, frozen
from tests.tiny.ideogram4 import CONFIG, SECOND_NAME, in_diffusers_names, tiny_state
from tests.tiny.language_models import QWEN3_TEMPLATE, qwen3_vl
from tests.tiny.loras import make_lora

LENGTHS = (17, 5)  # real tokens of each text


def tiny_model(seed: int = 0) -> Ideogram4Model:
    """Our network with the weights of `tiny_state`."""
    return frozen(Ideogram4Model(CONFIG), tiny_state(seed))


def in_diffusers(state: Mapping[str, Tensor], config: Ideogram4Config = CONFIG) -> Any:
    """diffusers' network with these weights."""
    time = config.head_width // 2 - 2 * config.section
    network = Ideogram4Transformer2DModel(
        in_channels=config.in_dim,
        num_layers=config.num_layers,
        attention_head_dim=config.head_width,
        num_attention_heads=config.num_heads,
        intermediate_size=config.ffn_dim,
        adaln_dim=config.time_dim,
        llm_features_dim=config.text_dim,
        mrope_section=(time, config.section, config.section),
    )
    return frozen(network, in_diffusers_names(state))


def tiny_inputs(batch: int = 2, rows: int = 3, columns: int = 5) -> dict[str, Tensor]:
    """Inputs of our network, with texts of unequal lengths."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor(LENGTHS[:batch])
    longest = int(lengths.max())
    return {
        "noisy": torch.randn(batch, CONFIG.in_dim, 1, rows, columns, generator=generator),
        "times": torch.tensor([0.036, 0.878])[:batch],
        "text": torch.randn(batch, longest, CONFIG.text_dim, generator=generator),
        "text_mask": torch.arange(longest) < lengths[:, None],
    }


def predict_with(dit: Any, given: Mapping[str, Tensor]) -> Tensor:
    """What diffusers' network makes of the inputs of ours, B Z 1 H W; each sample alone."""
    rows, columns = given["noisy"].shape[-2:]
    directions = []
    for index in range(len(given["noisy"])):
        image = given["noisy"][index : index + 1].flatten(2).transpose(1, 2)
        num_text = int(given["text_mask"][index].sum())
        text = given["text"][index : index + 1, :num_text]
        places = Ideogram4Pipeline._prepare_ids([num_text], rows, columns, num_text, torch.device("cpu"))
        (direction,) = dit(
            torch.cat([image.new_zeros(1, num_text, image.shape[-1]), image], dim=1),
            given["times"][index : index + 1],
            torch.cat([text, text.new_zeros(1, image.shape[1], text.shape[-1])], dim=1),
            *places,
            return_dict=False,
        )
        directions.append(direction[:, num_text:])
    return torch.cat(directions).transpose(1, 2).unflatten(2, (1, rows, columns))


class OfOneText(PreTrainedTokenizerFast):
    """The tokenizer, whose chat template gets the text alone."""

    def apply_chat_template(self, messages: Any, **named: Any) -> Any:
        plain = [{**message, "content": message["content"][0]["text"]} for message in messages]
        return super().apply_chat_template(plain, chat_template=QWEN3_TEMPLATE, **named)


def pipeline(files: TinyModel) -> Ideogram4Pipeline:
    """diffusers' pipeline with the two networks of `write_tiny_ideogram4`."""
    second = files.dit.with_name(SECOND_NAME)
    pipe = Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder_in_diffusers(load_file(files.vae)),
        text_encoder=qwen3_vl(layers=STATES[-1]).model,
        tokenizer=OfOneText(tokenizer_file=str(files.text_encoder / "tokenizer.json")),
        transformer=in_diffusers(load_file(files.dit)),
        unconditional_transformer=in_diffusers(load_file(second)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def states_there(pipe: Ideogram4Pipeline, text: str) -> Tensor:
    """The states of a text by the pipeline, L n*W."""
    length = 300
    with torch.no_grad():
        states, *_ = pipe.encode_prompt(text, 1, 1, length, torch.device("cpu"))
    rows: Tensor = states[0, :length]
    return rows[rows.abs().sum(dim=-1) > 0]


def files_in(folder: Path) -> tuple[str, str]:
    """The options of the second network."""
    return "--unconditional_dit", str(folder / SECOND_NAME)


class ReadsText(nn.Module):
    """diffusers' network, which always reads one text; `embeds` are its states, 1 L n*W."""

    def __init__(self, network: Any, embeds: Tensor) -> None:
        super().__init__()
        self.network = network
        self.embeds = embeds
        # what the pipeline asks of a network
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, hidden_states: Tensor, timestep: Tensor, **named: Any) -> tuple[Tensor]:
        """Predict the image's tokens, 1 L C, behind the text's."""
        num_text, image = self.embeds.shape[1], hidden_states
        rows, columns = (named["position_ids"][0, -1] - named["position_ids"][0, 0] + 1)[1:].tolist()
        places = Ideogram4Pipeline._prepare_ids([num_text], rows, columns, num_text, image.device)
        (direction,) = self.network(
            torch.cat([image.new_zeros(1, num_text, image.shape[-1]), image], dim=1),
            timestep,
            torch.cat([self.embeds, self.embeds.new_zeros(1, image.shape[1], self.embeds.shape[-1])], dim=1),
            *places,
            return_dict=False,
        )
        return (direction[:, num_text:],)


def write_lora(path: Path, rank: int = 4, alpha: float = 2.0) -> Path:
    """Write a LoRA of the tiny network with random factors, with the names of most trainers. Returns it."""
    network = make_lora("lora_ideogram4", rank, alpha, tiny_model())
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    LoraFormat(KNOWN, IDEOGRAM_4).save(network, path, None, {"ss_base_model_version": IDEOGRAM_4.name})
    return path

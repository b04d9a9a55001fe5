"""diffusers' pipeline of Qwen-Image-2.1 with tiny files, and its processor without torchvision."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen_image_21.model import QwenImage21Model
from tests.tiny.dit_files import TinyModel
from tests.tiny.language_models import qwen3_vl
from tests.tiny.qwen_image_21 import CONFIG, HEAD_WIDTH, HEADS, tiny_state
from tests.tiny.qwen_image_21_vae import vae_config, vae_settings

SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
# of the release's scheduler_config.json
SCHEDULER: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "shift": 1.0,
}


class Processor:
    """What `Qwen3VLProcessor` does for the pipeline; that class needs torchvision."""

    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer / "tokenizer.json"), pad_token="<|endoftext|>", padding_side="left"
        )
        self.images = Qwen2VLImageProcessorPil(
            patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=1, max_pixels=1 << 40
        )
        self.image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def apply_chat_template(self, messages: Any, **asked: Any) -> list[list[int]]:
        assert messages[0]["content"][0]["text"] in SYSTEM
        return [self.tokenizer(SYSTEM)["input_ids"]]

    def __call__(self, text: Sequence[str], images: Sequence[Image.Image] = (), **asked: Any) -> BatchFeature:
        inputs: dict[str, Any] = {}
        counts: list[int] = []
        if images:
            inputs = dict(self.images(images=list(images), return_tensors="pt"))
            counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
        spelled = []
        for prompt in text:
            first, *rest = prompt.split("<|image_pad|>")
            spelled.append(first + "".join("<|image_pad|>" * counts.pop(0) + part for part in rest))
        inputs |= dict(self.tokenizer(spelled, padding=True, padding_side="left", return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_token).long()
        return BatchFeature(inputs)


def in_diffusers(state: Mapping[str, Tensor]) -> QwenImage21Transformer2DModel:
    """diffusers' network with these weights, of the size of CONFIG."""
    dit = QwenImage21Transformer2DModel(
        in_channels=CONFIG.channels,
        out_channels=CONFIG.channels,
        num_layers=CONFIG.num_layers,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        context_in_dim=CONFIG.text_dim,
        axes_dims_rope=CONFIG.axes,
    )
    dit.load_state_dict(dict(state))
    return dit.eval()


def vae_in_diffusers(path: Path) -> AutoencoderKLQwenImage21:
    """diffusers' VAE with the weights of a file."""
    settings = {name: value for name, value in vae_settings(vae_config()).items() if name != "_class_name"}
    vae = AutoencoderKLQwenImage21(**settings)
    state = load_file(path)
    vae.load_state_dict(state)
    return vae.eval()


def pipeline(files: TinyModel, levels: Sequence[float] | None = None) -> QwenImage21Pipeline:
    """The whole pipeline. levels: `sample_sigmas`."""
    pipe = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae_in_diffusers(files.vae),
        text_encoder=qwen3_vl(),
        processor=Processor(files.text_encoder),
        transformer=in_diffusers(load_file(files.dit)),
        sample_sigmas=None if levels is None else list(levels),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(
    files: TinyModel,
    prompt: str = "a cat on a mat",
    size: tuple[int, int] = (64, 96),
    steps: int = 4,
    seed: int = 7,
    levels: Sequence[float] | None = None,
    **asked: Any,
) -> Tensor:
    """The latents 1 Z 1 h w that diffusers makes. size: height and width."""
    height, width = size
    made = pipeline(files, levels)(
        prompt=prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **asked,
    ).images
    return made.transpose(1, 2).reshape(1, CONFIG.channels, 1, height // 16, width // 16)


def tiny_model(seed: int = 0) -> QwenImage21Model:
    """Our network with the weights of `tiny_state`."""
    model = QwenImage21Model(CONFIG)
    model.load_state_dict(tiny_state(seed))
    return model.eval()


def tiny_inputs(
    batch: int = 2, grid: tuple[int, int] = (4, 6), text: int = 9, slots: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Inputs of our network; each text is two tokens shorter than the one before it."""
    generator = torch.Generator().manual_seed(7)
    lengths = text - 2 * torch.arange(batch)
    return {
        "noisy": torch.randn(batch, CONFIG.channels, 1, *grid, generator=generator),
        "timesteps": torch.linspace(900.0, 130.0, batch),
        "text": torch.randn(batch, text, CONFIG.text_dim, generator=generator),
        "text_mask": torch.arange(text) < lengths[:, None],
        "slots": torch.tensor(slots, dtype=torch.int64).expand(batch, -1),
    }


def predict_with(dit: Any, given: Mapping[str, Tensor], references: Sequence[Tensor] = ()) -> Tensor:
    """The velocity of diffusers' network, B Z 1 h w, each sample by itself. given: inputs of ours.

    The states of pictures' tokens, which the network replaces, are zeros.
    """
    found = []
    for index, noisy in enumerate(given["noisy"].split(1)):
        words = given["text"][index][given["text_mask"][index].bool()]
        pieces, is_image = [], []
        shapes = []
        start = 0
        for slot, latents in zip(given["slots"][index].tolist(), references, strict=True):
            height, width = latents.shape[-2:]
            count = height * width // 4
            shapes.append((1, height, width))
            pieces += [words[start:slot], words.new_zeros(count, words.shape[1])]
            is_image += [False] * (slot - start) + [True] * count
            start = slot
        pieces.append(words[start:])
        height, width = noisy.shape[-2:]
        is_image += [False] * (len(words) - start) + [True] * (height * width // 4)
        images = [latents[index : index + 1] for latents in references]
        tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in (*images, noisy)], dim=1)
        output = dit(
            hidden_states=tokens,
            encoder_hidden_states=torch.cat(pieces)[None],
            timestep=given["timesteps"][index : index + 1] / 1000,
            img_shapes=[[*shapes, (1, height, width)]],
            img_mask=torch.tensor([is_image]),
            return_dict=False,
        )[0]
        velocity = output[:, -height * width :]
        found.append(velocity.transpose(1, 2).reshape(noisy.shape))
    return torch.cat(found)

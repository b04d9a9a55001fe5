"""Anima's modular pipeline of diffusers with the weights of tiny files, in float32 on the CPU."""

import types
from collections.abc import Callable
from typing import Any

from diffusers import AnimaAutoBlocks, FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.anima.making import conditioner_in_diffusers, transformer_in_diffusers
from tests.parity.pipelines import qwen_image_vae
from tests.tiny.anima import TinyAnima
from tests.tiny.language_models import qwen3


class AnimaThere:
    """The pipeline, called as the others are. change: of its parts, which have a mistake then."""

    def __init__(self, files: TinyAnima, change: Callable[[Any], object] = lambda pipe: None) -> None:
        state = load_file(files.dit)
        pipe = AnimaAutoBlocks().init_pipeline()
        qwen_tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(files.text_encoder / "tokenizer.json"), pad_token="<|endoftext|>"
        )
        t5_tokenizer = PreTrainedTokenizerFast.from_pretrained(files.dit.parent / "t5_tokenizer")
        pipe.update_components(
            text_encoder=qwen3().model,
            tokenizer=qwen_tokenizer,
            t5_tokenizer=t5_tokenizer,
            text_conditioner=conditioner_in_diffusers(state),
            transformer=transformer_in_diffusers(state),
            vae=qwen_image_vae(files.vae),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        pipe.set_progress_bar_config(disable=True)
        change(pipe)
        self.pipe = pipe

    @property
    def vae(self) -> Any:
        return self.pipe.vae

    @property
    def transformer(self) -> nn.Module:
        found: nn.Module = self.pipe.transformer
        return found

    def register_modules(self) -> None:
        """Nothing: the table registers no modules of this pipeline."""

    def __call__(self, guidance_scale: float = 4.0, **given: Any) -> Any:
        self.pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
        given |= {"output_type": "pt"}  # of the decoded picture, which is made too
        return types.SimpleNamespace(images=self.pipe(**given).get("latents"))

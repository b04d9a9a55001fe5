"""Pipelines of PyPI's diffusers that make pictures, with the weights of tiny files, in float32 on the CPU."""

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ErnieImagePipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    Krea2Pipeline,
    Lumina2Pipeline,
    QwenImagePipeline,
    ZImagePipeline,
)
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CLIPTokenizer, Gemma2Model, PreTrainedTokenizerFast

import tests.ernie_image.making as ernie_image_making
import tests.flux.making as flux_making
import tests.flux_2.making as flux_2_making
import tests.krea2.making as krea2_making
import tests.lumina.making as lumina_making
import tests.qwen_image.making as qwen_image_making
import tests.z_image.making as z_image_making
from encoders.autoencoder import SCALE, SHIFT
from krea2.configs import STATES
from tests.encoders.test_autoencoder import diffusers_autoencoder
from tests.encoders.their_t5 import their_t5
from tests.parity.hunyuan import load_clip
from tests.parity.hunyuan_image import language_model
from tests.tiny import picture_encoders
from tests.tiny.dit_files import TinyModel
from tests.tiny.flux import TinyFlux
from tests.tiny.flux_2 import TEXT_LAYERS, TinyFlux2
from tests.tiny.hunyuan_encoders import clip_config_json
from tests.tiny.language_models import QWEN3_TEMPLATE, mistral3, qwen3, qwen3_vl
from tests.tiny.lumina import GEMMA, TinyLumina, gemma_state
from tests.tiny.wan_encoders import vae_diffusers_tensors

# of the release's scheduler_config.json
FLUX_2_SCHEDULER = {"use_dynamic_shifting": True, "time_shift_type": "exponential", "max_shift": 1.15}
MISTRAL_TEMPLATE = """<s>{%- for message in messages %}
    {%- set text = message.content[0].text %}
    {%- set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}
    {{- '[' + mark + ']' + text + '[/' + mark + ']' }}
{%- endfor %}"""


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transformer_of(models: TinyFlux, kind: str) -> nn.Module:
    """diffusers' transformer of the same weights.

    Chroma's pipeline gives it the mask as numbers, which attention adds, so that nothing is left out: mended.
    """
    made = flux_making.in_diffusers(kind, load_file(models.dit))
    if kind == "chroma":
        made.register_forward_pre_hook(
            lambda _, args, given: (args, given | {"attention_mask": given["attention_mask"].bool()}),
            with_kwargs=True,
        )
    return made


def clip_of(models: TinyFlux) -> nn.Module:
    """transformers' CLIP of the same weights, in a folder with the configuration of the released one."""
    assert models.clip_l is not None
    folder = models.clip_l.parent / "clip of transformers"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(clip_config_json()), encoding="utf-8")
    shutil.copy(models.clip_l, folder / "model.safetensors")
    return load_clip(folder)


def flux(models: TinyFlux, kind: str) -> Any:
    """FLUX.1's or Chroma's."""
    text_encoder = their_t5(picture_encoders.t5xxl_config(), picture_encoders.t5xxl_tensors())
    vae = diffusers_autoencoder()
    vae.register_to_config(scaling_factor=SCALE, shift_factor=SHIFT)
    dynamic = {} if kind == "schnell" else {"use_dynamic_shifting": True}
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if kind == "schnell" else 3.0,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        **dynamic,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models.t5xxl.parent / "t5xxl")
    parts = {"scheduler": scheduler, "vae": vae, "transformer": transformer_of(models, kind)}
    if kind == "chroma":
        return quiet(ChromaPipeline(**parts, text_encoder=text_encoder, tokenizer=tokenizer))
    made = FluxPipeline(
        **parts,
        text_encoder=clip_of(models),
        tokenizer=CLIPTokenizer.from_pretrained(models.dit.parent / "clip_l", model_max_length=77),
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
    )
    return quiet(made)


def flux_2(files: TinyFlux2, is_distilled: bool = False) -> Any:
    is_dev = files.version == "dev"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<pad>" if is_dev else "<|endoftext|>",
        padding_side="left" if is_dev else "right",
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE if is_dev else QWEN3_TEMPLATE
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**FLUX_2_SCHEDULER),
        "vae": flux_2_making.autoencoder_in_diffusers(load_file(files.vae)),
        "text_encoder": mistral3(TEXT_LAYERS["dev"]) if is_dev else qwen3(TEXT_LAYERS["klein"]),
        "tokenizer": tokenizer,
        "transformer": flux_2_making.in_diffusers(load_file(files.dit)),
    }
    pipe = Flux2Pipeline(**parts) if is_dev else Flux2KleinPipeline(**parts, is_distilled=is_distilled)
    return quiet(pipe)


def ernie_image(files: TinyModel) -> ErnieImagePipeline:
    """Without the prompt enhancer."""
    pipe = ErnieImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=flux_2_making.autoencoder_in_diffusers(load_file(files.vae)),
        text_encoder=ernie_image_making.text_encoder_there(),
        tokenizer=begin_with_bos(
            PreTrainedTokenizerFast(
                tokenizer_file=str(files.text_encoder / "tokenizer.json"), bos_token="<s>"
            )
        ),
        transformer=ernie_image_making.in_diffusers(load_file(files.dit)),
    )
    return quiet(pipe)


def begin_with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, which puts its begin token before a text, as the released one."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def lumina(files: TinyLumina) -> Lumina2Pipeline:
    config = {
        "vocab_size": GEMMA.vocabulary,
        "hidden_size": GEMMA.dim,
        "intermediate_size": GEMMA.ffn_dim,
        "num_hidden_layers": GEMMA.num_layers,
        "num_attention_heads": GEMMA.num_heads,
        "num_key_value_heads": GEMMA.num_kv_heads,
        "head_dim": GEMMA.head_width,
        "query_pre_attn_scalar": GEMMA.settings["query_pre_attn_scalar"],
        "attn_implementation": "eager",
    }
    text_encoder = Gemma2Model(Gemma2Model.config_class(**config)).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in gemma_state().items()}
    text_encoder.load_state_dict(state)
    vae = diffusers_autoencoder()
    vae.register_to_config(scaling_factor=SCALE, shift_factor=SHIFT)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.gemma2 / "tokenizer.json"), pad_token="<pad>", bos_token="<bos>"
    )
    pipe = Lumina2Pipeline(
        transformer=lumina_making.in_diffusers(load_file(files.dit)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    return quiet(pipe)


def z_image(files: TinyModel) -> ZImagePipeline:
    vae = diffusers_autoencoder()
    vae.register_to_config(scaling_factor=SCALE, shift_factor=SHIFT)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<|endoftext|>",
        padding_side="right",
        chat_template=QWEN3_TEMPLATE,
    )
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=qwen3(),
        tokenizer=tokenizer,
        transformer=z_image_making.in_diffusers(load_file(files.dit)),
    )
    return quiet(pipe)


def qwen_image_vae(path: Path, colors: int = 3) -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(base_dim=8, input_channels=colors)
    vae.load_state_dict(vae_diffusers_tensors(load_file(path)))
    return vae.eval()


def qwen_image(files: TinyModel, scheduler: FlowMatchEulerDiscreteScheduler) -> QwenImagePipeline:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<|endoftext|>",
        padding_side="right",
    )
    pipe = QwenImagePipeline(
        scheduler=scheduler,
        vae=qwen_image_vae(files.vae),
        text_encoder=language_model(files.text_encoder),
        tokenizer=tokenizer,
        transformer=qwen_image_making.in_diffusers(load_file(files.dit)),
    )
    return quiet(pipe)


def krea2(files: TinyModel, is_distilled: bool = False) -> Krea2Pipeline:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<|endoftext|>",
        padding_side="right",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=6400,
    )
    pipe = Krea2Pipeline(
        scheduler=scheduler,
        vae=qwen_image_vae(files.vae),
        text_encoder=qwen3_vl(STATES[-1] + 1).model,
        tokenizer=tokenizer,
        transformer=krea2_making.in_diffusers(load_file(files.dit)),
        is_distilled=is_distilled,
    )
    # of the tiny tokenizer
    pipe.prompt_template_encode_num_suffix_tokens = len(
        tokenizer.tokenize(pipe.prompt_template_encode_suffix)
    )
    return quiet(pipe)

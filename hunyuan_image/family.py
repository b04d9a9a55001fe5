"""HunyuanImage-2.1, described for the shared loops."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encoders.pictures import ImageModelFamily, image_defaults
from hunyuan_image.configs import DIT, HUNYUAN_IMAGE, LATENT, NOISE
from hunyuan_image.files import HunyuanImageFiles
from hunyuan_image.names import LORA
from hunyuan_image.options import (
    NAME,
    RELEASED_GUIDANCE,
    HunyuanImageGenerationOptions,
    HunyuanImageLatentCachingOptions,
    HunyuanImageTextCachingOptions,
    HunyuanImageTrainingOptions,
    ProjectedGuidanceOptions,
)
from hunyuan_image.text_encoders import QWEN_USE, GlyphTextEncoder, find_quoted_texts
from modules.options import NO_OPTIONS
from protocols.data import (
    Batch,
    Conditions,
    LatentSpec,
    MediaEncoders,
    SamplingDefaults,
    name_texts,
)
from protocols.family import DitSpec, Family, NoiseSpec
from protocols.requests import (
    Prepared,
    Request,
)
from protocols.rules import (
    GuidanceRules,
    ModelRelease,
    Projection,
)
from protocols.steps import NO_OVERRIDES, Overrides

TEXT_KEYS = QWEN_USE.keys | GlyphTextEncoder.keys
# argument of the network -> name in caches
CACHE_KEY_BY_ARGUMENT = {
    "text": "vlm_embed",
    "text_mask": "vlm_mask",
    "glyphs": "byt5_embed",
    "glyph_mask": "byt5_mask",
}
FLOW_SHIFT = 5.0  # default
GENERATION = image_defaults(50, 3.5, 2048, FLOW_SHIFT, noise_on_cpu=True)
# settings of adaptive projected guidance, as released
APG_SCALE, APG_MOMENTUM, APG_NORM = 10.0, -0.5, 10.0


@dataclass(frozen=True)
class HunyuanImage(ImageModelFamily):
    """Description of HunyuanImage-2.1 for one run, built by the `family_for_...` functions below."""

    files: HunyuanImageFiles
    projection: ProjectedGuidanceOptions = RELEASED_GUIDANCE
    options: Any = NO_OPTIONS  # set only in training

    name: str = field(default="hunyuan_image", init=False)
    model_metadata: ClassVar = {
        "architecture": "hunyuan-image-2.1",
        "implementation": "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1",
        "model_type": "hunyuan_image",
        "base_model_version": "hunyuan-image-2.1",
    }
    cache_tag: str = field(default="hi", init=False)
    noise_dtype: torch.dtype | None = field(default=torch.bfloat16, init=False)  # as released
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=HUNYUAN_IMAGE, init=False)
    text_keys: frozenset[str] = field(default=TEXT_KEYS, init=False)
    display_name: str = field(default=NAME, init=False)
    defaults: SamplingDefaults = field(default=GENERATION, init=False)

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the captions' states from both encoders.

        Raises CacheError if they are missing or do not fit.
        """
        remedy = "hunyuan_image_cache_text_encoder_outputs.py"
        batch.check(dict.fromkeys(sorted(CACHE_KEY_BY_ARGUMENT.values()), remedy), "the transformer")
        config = self.files.dit_header().config
        widths = {"vlm_embed": config.text_dim, "byt5_embed": config.glyph_dim}
        batch.check_widths(widths, self.files.dit_path, f"{remedy} and the text encoders of {NAME}")
        return {name: batch.tensors[name] for name in CACHE_KEY_BY_ARGUMENT.values()}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C H W float32, at timesteps rounded to whole numbers.

        The model was trained on integer timesteps.

        `cond` contains:
            vlm_embed, vlm_mask: States of the language model, T D for each sample, and their mask, T.
            byt5_embed, byt5_mask: States of the glyph encoder, B G E, and their mask, B G.
        """
        name_inputs = partial(name_texts, names=CACHE_KEY_BY_ARGUMENT, device=noisy.device)
        velocity = dit(
            noisy.squeeze(2),
            timesteps.float().trunc(),
            **name_inputs(cond),
            overrides=overrides.rename_nag(name_inputs),
        )
        return velocity.unsqueeze(2)

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request, with adaptive projected guidance (APG) after the first steps.

        A prompt with quoted text, which the image shows, has more steps with plain guidance.
        """
        prepared = self.resolve_image(request, FLOW_SHIFT)
        options = self.projection
        draws_text = bool(find_quoted_texts(request.prompt))
        projection = Projection(
            after_step=options.apg_start_step_ocr if draws_text else options.apg_start_step_general,
            scale=APG_SCALE,
            momentum=APG_MOMENTUM,
            norm_limit=APG_NORM,
            rescale=options.guidance_rescale_apg,
        )
        return replace(prepared, rules=GuidanceRules(projection=projection))

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Scale latents to the VAE's range, and yield their image."""
        yield encoders.vae.decode(latents / LATENT.scale)


def family_for_latent_caching(options: HunyuanImageLatentCachingOptions) -> HunyuanImage:
    """Build the model description for hunyuan_image_cache_latents.py, which needs only the VAE."""
    return HunyuanImage(HunyuanImageFiles().add_vae_options(options.vae))


def family_for_text_caching(options: HunyuanImageTextCachingOptions) -> HunyuanImage:
    """Build the model description for hunyuan_image_cache_text_encoder_outputs.py: only text encoders."""
    return HunyuanImage(HunyuanImageFiles().add_text(options.text))


def family_for_training(options: HunyuanImageTrainingOptions) -> HunyuanImage:
    """Build the model description for hunyuan_image_train_network.py."""
    files = HunyuanImageFiles(dit_option="--pretrained_model_name_or_path").add_dit(
        options.dit, options.dit_dtype
    )
    files = files.add_vae_options(options.vae).add_text(options.text)
    return HunyuanImage(files, options=options)


def family_for_generation(options: HunyuanImageGenerationOptions) -> HunyuanImage:
    """Build the model description for hunyuan_image_generate_image.py."""
    files = HunyuanImageFiles().add_dit(options.dit, options.dit_dtype)
    files = files.add_vae_options(options.vae).add_text(options.text)
    return HunyuanImage(files, options.projection)


_: type[Family] = HunyuanImage

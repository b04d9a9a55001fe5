"""Z-Image, described for the shared loops."""

import logging
import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from encoders.autoencoder import SCALE, SHIFT
from encoders.files import judge_distillation
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelFiles, qwen3_chat, qwen_tokenizer
from encoders.language_models import QWEN3
from encoders.pictures import AutoencoderFiles, ImageModelFamily, image_defaults
from lumina.family import guidance_rules
from lumina.options import EXTRAS
from modules.attention.attend import BACKENDS
from modules.errors import OptionError
from modules.options import NO_OPTIONS
from protocols.data import (
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    SamplingDefaults,
    name_text_and_mask,
)
from protocols.family import Abilities, DitSpec, Family, NoiseSpec
from protocols.few_steps import GUIDED, FewSteps, make_transfer_target
from protocols.loading import Placement
from protocols.requests import Prepared, Request
from protocols.rules import ModelRelease
from protocols.steps import NO_OVERRIDES, Overrides
from z_image.configs import DIT, LATENT, NOISE, Z_IMAGE
from z_image.files import DIT_OPTION, FORMAT
from z_image.names import LORA
from z_image.options import (
    CFG_TRUNC_RATIO,
    NAME,
    RENORM_CFG,
    ZImageGenerationOptions,
    ZImageLatentCachingOptions,
    ZImageModelOptions,
    ZImageTextCachingOptions,
    ZImageTrainingOptions,
)

if TYPE_CHECKING:
    from protocols.workflows import ComfyModel

TEXT_STATES_KEY = "llm_embed"
_BEFORE, _AFTER = qwen3_chat(thinks=True)
Z_IMAGE_USE = LanguageEncoderSettings(
    name="llm",
    states_key=TEXT_STATES_KEY,
    model=QWEN3,
    source=qwen_tokenizer("--text_encoder_tokenizer", "Tongyi-MAI/Z-Image-Turbo"),
    max_length=512,  # including the template's tokens
    template_prefix=_BEFORE,
    template_suffix=_AFTER,
    states=(-2,),
    batch_size=1,  # so that a state does not depend on other prompts, to the last bit
)


FLOW_SHIFT = 3.0  # default
MUSUBI_EULER = "euler-thousandth"  # Euler's steps, at the noise levels of musubi-tuner
# defaults for a transformer whose name does not show its release: those of musubi-tuner
DEFAULTS = image_defaults(25, 0.0, 1024, FLOW_SHIFT, solver=MUSUBI_EULER, extras=tuple(EXTRAS))
# of the releases, which names tell apart: tensors do not. Source: the model cards
TURBO = replace(DEFAULTS, steps=8)
BASE = replace(DEFAULTS, steps=28, guidance_scale=4.0)
BASE_NAME_PATTERN = r"(^|--)z[-_ ]?image([-_](base|bf16|fp16|fp32|fp8\w*))*$"
logger = logging.getLogger(__name__)

# timesteps per unit of noise; the model takes the fraction of data, 1 - timestep / NUM_TRAIN_TIMESTEPS
NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class ZImageFiles(AutoencoderFiles, LanguageModelFiles):
    """Model files of a run: the transformer, FLUX.1's autoencoder and Qwen3."""

    dit_option: str = DIT_OPTION

    format: ClassVar = FORMAT
    vae_option: ClassVar[str] = "--vae"

    @property
    def encoder_settings(self) -> LanguageEncoderSettings:
        """Return the prompt template of the language model, and which hidden states are the conditions."""
        return Z_IMAGE_USE


@dataclass(frozen=True)
class ZImage(ImageModelFamily):
    """Description of Z-Image for one run, built by the `family_for_...` functions below."""

    files: ZImageFiles
    options: Any = NO_OPTIONS  # set only in training
    attends_in_float32: bool = False
    even_steps: bool = False  # the noise levels of diffusers

    name: str = field(default="z_image", init=False)
    model_metadata: ClassVar = {
        "architecture": "Z-Image",
        "resolution": "1024x1024",
        "implementation": "https://github.com/Tongyi-MAI/Z-Image",
        "model_type": "z_image",
    }
    few_steps: ClassVar = FewSteps(
        base="the base (z_image_bf16.safetensors)",
        also="Turbo",
        adapter="the file of ostris/zimage_turbo_training_adapter",
        targets=(GUIDED, make_transfer_target("the base", "z_image_bf16.safetensors")),
        distilled_words="zit",
    )
    abilities: ClassVar = Abilities(detects_few_steps=True, has_comfy_nodes=True)
    cache_tag: str = field(default="zi", init=False)
    noise_dtype: torch.dtype | None = field(default=torch.float32, init=False)  # as released
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=Z_IMAGE, init=False)
    text_keys: frozenset[str] = field(default=Z_IMAGE_USE.keys, init=False)
    display_name: str = field(default=NAME, init=False)

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the release's default sampling settings; the file or repository name shows the release."""
        dit = self.files.dit
        if dit is None:
            return DEFAULTS
        verdict = judge_distillation(self.few_steps, dit)
        if verdict is not None and verdict.is_distilled:
            return TURBO
        repository = dit.absolute().parts[-5:] if "transformer" in dit.parts[-2:] else ()
        names = [dit.name.removesuffix(".safetensors"), *repository]
        is_base = any(re.search(BASE_NAME_PATTERN, name, re.IGNORECASE) for name in names)
        return BASE if is_base else DEFAULTS

    # encoding

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return each image's cache entry: a posterior sample before shift and scale, float32."""
        scaled = []
        for entries in super().encode_media(encoders, media):
            latents = [entry.tensors["latents"] / SCALE + SHIFT for entry in entries]
            scaled.append([CacheEntry({"latents": image}) for image in latents])
        return scaled

    # the network

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer. Raises OptionError if an attention package cannot compute in float32."""
        if self.attends_in_float32:
            backend = BACKENDS[placement.attention.mode]
            if backend.dtypes is not None:
                raise OptionError(
                    f"--use_32bit_attention: {backend.name} computes in 16 bits only. Use torch's own "
                    "attention, or omit the option"
                )
            placement = replace(placement, attention=replace(placement.attention, in_float32=True))
        return super().load_dit(placement, expert)

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the text states; raise CacheError if they are missing or have another width."""
        remedy = "zimage_cache_text_encoder_outputs.py"
        batch.check({TEXT_STATES_KEY: remedy}, "the transformer")
        width = self.files.dit_header().config.text_dim
        batch.check_widths({TEXT_STATES_KEY: width}, self.files.dit_path, f"{remedy} and Qwen3 (4B)")
        return {TEXT_STATES_KEY: batch.tensors[TEXT_STATES_KEY]}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, noise minus data, B C 1 H W float32.

        The network predicts data minus noise, and its time runs from 0 (noise) to 1. The condition is
        llm_embed, T D for each sample.
        """
        # text states and mask, by the names of the network's arguments
        name_inputs = partial(
            name_text_and_mask, argument="caption", name=TEXT_STATES_KEY, device=noisy.device
        )
        data_minus_noise = dit(
            noisy.squeeze(2),
            1 - timesteps.float() / NUM_TRAIN_TIMESTEPS,
            **name_inputs(cond),
            overrides=overrides.rename_nag(name_inputs),
        )
        return -data_minus_noise.unsqueeze(2)

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Fill in a request's unset fields; a guidance scale of 0 or below turns guidance off.

        The options cfg_trunc_ratio and renorm_cfg end guidance early and limit its norm.
        """
        prepared = self.resolve_image(request, FLOW_SHIFT)
        lowest_scale = min(prepared.guidance_scale)
        if lowest_scale < 0:
            logger.warning(
                "--guidance_scale %g (--l in a prompt line): 0 turns guidance off here, and so does anything "
                "below 0",
                lowest_scale,
            )
        extra = request.extra
        rules = guidance_rules(extra, CFG_TRUNC_RATIO, RENORM_CFG)
        return replace(
            prepared,
            solver=self._find_solver(prepared.solver),
            guidance_scale=tuple(max(scale, 0.0) for scale in prepared.guidance_scale),
            rules=replace(rules, neutral_scale=0.0),
            extra_metadata={
                "cfg_trunc_ratio": extra.get("cfg_trunc_ratio", str(CFG_TRUNC_RATIO)),
                "renorm_cfg": extra.get("renorm_cfg", str(RENORM_CFG)),
            },
        )

    def _find_solver(self, solver: str) -> str:
        """Return the solver to use: of Euler's two, which differ in noise levels, the one of --even_steps."""
        # With --even_steps, the noise levels are those of diffusers; without it, those of musubi-tuner.
        if solver not in {"euler", MUSUBI_EULER}:
            return solver
        return "euler" if self.even_steps else MUSUBI_EULER

    def comfy_model(self) -> "ComfyModel":
        """Return the ComfyUI settings of the model, for workflows."""
        from z_image.workflow import Z_IMAGE_NODES  # only with --save_workflow

        return Z_IMAGE_NODES

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode an image in model space, multiplied by the scale that cached latents lack."""
        return super().encode_source(encoders, frames, seed) / LATENT.scale


def family_for_latent_caching(options: ZImageLatentCachingOptions) -> ZImage:
    """Build the model description for zimage_cache_latents.py, which needs only the VAE."""
    return ZImage(ZImageFiles().add_vae(options.vae))


def family_for_text_caching(options: ZImageTextCachingOptions) -> ZImage:
    """Build the model description for zimage_cache_text_encoder_outputs.py: only the text encoder."""
    return ZImage(ZImageFiles().add_text(options.text))


def family_for_training(options: ZImageTrainingOptions) -> ZImage:
    """Build the model description for zimage_train_network.py and zimage_train.py."""
    return ZImage(_make_files(options), options, options.use_32bit_attention)


def family_for_generation(options: ZImageGenerationOptions) -> ZImage:
    """Build the model description for zimage_generate_image.py."""
    return ZImage(_make_files(options), NO_OPTIONS, options.use_32bit_attention, options.even_steps)


def _make_files(options: ZImageModelOptions) -> ZImageFiles:
    return ZImageFiles().add_dit(options.dit, options.dit_dtype).add_vae(options.vae).add_text(options.text)


_: type[Family] = ZImage

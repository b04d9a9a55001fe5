"""Lumina-Image-2.0, described for the shared loops."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from encoders.pictures import ImageModelFamily, image_defaults
from lumina.configs import DIT, LATENT, LUMINA_2, NOISE
from lumina.files import LuminaFiles
from lumina.names import LORA
from lumina.options import (
    CFG_TRUNC_RATIO,
    EXTRAS,
    RENORM_CFG,
    LuminaGenerationOptions,
    LuminaLatentCachingOptions,
    LuminaTextCachingOptions,
    LuminaTrainingOptions,
    check_renorm,
    check_trunc_ratio,
)
from lumina.text_encoder import GemmaTextEncoder
from modules.errors import OptionError
from modules.options import NO_OPTIONS
from protocols.data import (
    Batch,
    Conditions,
    LatentSpec,
    SamplingDefaults,
    name_texts,
)
from protocols.family import DitSpec, Family, NoiseSpec
from protocols.requests import (
    Prepared,
    Prompt,
    Request,
)
from protocols.rules import (
    GuidanceRules,
    ModelRelease,
)
from protocols.steps import NO_OVERRIDES, Overrides

NAME = "Lumina-Image-2.0"
TEXT_KEYS = GemmaTextEncoder.keys
CACHE_KEY_BY_ARGUMENT = {"caption": "hidden_state", "caption_mask": "attention_mask"}
FLOW_SHIFT = 6.0  # default
EULER_AS_TRAINED = "euler-trained"  # Euler's steps, at the noise levels of the release
DEFAULTS = image_defaults(36, 3.5, 1024, FLOW_SHIFT, solver=EULER_AS_TRAINED, extras=tuple(EXTRAS))
# timesteps per unit of noise; the model takes the fraction of data, 1 - timestep / NUM_TRAIN_TIMESTEPS
NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Lumina(ImageModelFamily):
    """Description of Lumina-Image-2.0 for one run, built by the `family_for_...` functions below."""

    files: LuminaFiles
    options: Any = NO_OPTIONS  # set only in training

    name: str = field(default="lumina", init=False)
    model_metadata: ClassVar = {
        "architecture": "lumina-2",
        "implementation": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
        "model_type": "lumina",
        "base_model_version": "lumina2",
    }
    cache_tag: str = field(default="lumina", init=False)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    defaults: SamplingDefaults = field(default=DEFAULTS, init=False)
    release: ModelRelease = field(default=LUMINA_2, init=False)
    text_keys: frozenset[str] = field(default=TEXT_KEYS, init=False)
    display_name: str = field(default=NAME, init=False)

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the captions' states and masks; raise CacheError if they are missing or do not fit."""
        remedy = "lumina_cache_text_encoder_outputs.py"
        batch.check(dict.fromkeys(sorted(CACHE_KEY_BY_ARGUMENT.values()), remedy), "the transformer")
        width = self.files.dit_header().config.text_dim
        batch.check_widths({"hidden_state": width}, self.files.dit_path, f"{remedy} and Gemma 2 (2B)")
        return {name: batch.tensor(name) for name in CACHE_KEY_BY_ARGUMENT.values()}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, noise minus data, B C 1 H W float32.

        The network predicts data minus noise, and its time runs from 0 (noise) to 1.

        `cond` contains the states of the language model as hidden_state, B T D, and their mask as
        attention_mask, B T.
        """
        name_inputs = partial(name_texts, names=CACHE_KEY_BY_ARGUMENT, device=noisy.device)
        data_minus_noise = dit(
            noisy.squeeze(2),
            1 - timesteps.float() / NUM_TRAIN_TIMESTEPS,
            **name_inputs(cond),
            overrides=overrides.rename_nag(name_inputs),
        )
        return -data_minus_noise.unsqueeze(2)

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Fill in a request's unset fields, and set Lumina's guidance limits and its solver.

        Negative and empty prompts get no system prompt.
        """
        prepared = self.resolve_image(request, FLOW_SHIFT)
        prompts = prepared.prompts[0]
        # `is_negative` leaves the system prompt out, in the empty prompt too
        prompts = replace(
            prompts,
            negative=Prompt(prepared.negative_prompt, is_negative=True),
            blank=Prompt("", is_negative=True),
            nag=None if prompts.nag is None else replace(prompts.nag, is_negative=True),
        )
        return replace(
            prepared,
            prompts={0: prompts},
            solver=EULER_AS_TRAINED if prepared.solver == "euler" else prepared.solver,
            rules=guidance_rules(request.extra, CFG_TRUNC_RATIO, RENORM_CFG),
            extra_metadata={
                "cfg_trunc_ratio": request.extra.get("cfg_trunc_ratio", str(CFG_TRUNC_RATIO)),
                "renorm_cfg": request.extra.get("renorm_cfg", str(RENORM_CFG)),
            },
        )


def guidance_rules(extra: Mapping[str, str], default_ratio: float, default_limit: float) -> GuidanceRules:
    """Return the guidance rules of a request; raise OptionError for invalid settings."""
    try:
        ratio = float(extra.get("cfg_trunc_ratio", default_ratio))
        limit = float(extra.get("renorm_cfg", default_limit))
    except ValueError as error:
        raise OptionError(f"--cfg_trunc_ratio or --renorm_cfg: {error}. Use numbers") from None
    check_trunc_ratio(ratio, "--cfg_trunc_ratio (--ctr in a prompt line)")
    check_renorm(limit, "--renorm_cfg (--rcfg in a prompt line)")
    return GuidanceRules(max_signal=ratio if ratio < 1 else None, norm_limit=limit or None)


def family_for_latent_caching(options: LuminaLatentCachingOptions) -> Lumina:
    """Build the model description for lumina_cache_latents.py, which needs only the VAE."""
    return Lumina(LuminaFiles().add_vae(options.vae))


def family_for_text_caching(options: LuminaTextCachingOptions) -> Lumina:
    """Build the model description for lumina_cache_text_encoder_outputs.py: only the text encoder."""
    return Lumina(LuminaFiles().add_text(options.text))


def family_for_training(options: LuminaTrainingOptions) -> Lumina:
    """Build the model description for lumina_train_network.py."""
    return Lumina(_make_files(options), options)


def family_for_generation(options: LuminaGenerationOptions) -> Lumina:
    """Build the model description for lumina_generate_image.py."""
    in_negative = options.add_system_prompt_to_negative_prompt
    return Lumina(replace(_make_files(options), system_prompt_in_negative=in_negative))


def _make_files(options: LuminaTrainingOptions | LuminaGenerationOptions) -> LuminaFiles:
    return LuminaFiles().add_dit(options.dit, options.dit_dtype).add_vae(options.vae).add_text(options.text)


_: type[Family] = Lumina

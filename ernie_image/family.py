"""ERNIE-Image, base and Turbo, described for the shared loops."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from encoders import pictures
from encoders.files import judge_distillation
from ernie_image import options as own
from ernie_image.configs import DIT, LATENT, NOISE, RELEASE
from ernie_image.files import ENCODER_SETTINGS, TEXT_STATES_KEY, ErnieImageFiles
from ernie_image.names import LORA
from ernie_image.options import NAME, SHIFT, SIDE
from modules.options import NO_OPTIONS
from protocols.data import Batch, Conditions, LatentSpec, SamplingDefaults, name_text_and_mask
from protocols.family import Abilities, DitSpec, Family, NoiseSpec
from protocols.few_steps import GUIDED, FewSteps, make_transfer_target
from protocols.requests import Prepared, Request
from protocols.rules import ModelRelease
from protocols.steps import NO_OVERRIDES, Overrides

TEXTS_AGAIN = "ernie_image_cache_text_encoder_outputs.py"
BASE = pictures.image_defaults(own.STEPS, own.GUIDANCE, SIDE, flow_shift=SHIFT)
TURBO = pictures.image_defaults(own.TURBO_STEPS, own.TURBO_GUIDANCE, SIDE, flow_shift=SHIFT)


@dataclass(frozen=True)
class ErnieImage(pictures.ImageModelFamily):
    """Description of ERNIE-Image for one run, built by the `family_for_...` functions below."""

    files: ErnieImageFiles
    options: Any = NO_OPTIONS  # set only in training

    draws_latents: ClassVar[bool] = False
    few_steps: ClassVar = FewSteps(
        base="the base (ernie-image.safetensors)",
        also="Turbo",
        adapter="",
        targets=(GUIDED, make_transfer_target("the base", "ernie-image.safetensors")),
    )
    abilities: ClassVar = Abilities(detects_few_steps=True)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=RELEASE, init=False)
    text_keys: frozenset[str] = field(default=ENCODER_SETTINGS.keys, init=False)
    display_name: str = field(default=NAME, init=False)
    name: str = field(default="ernie_image", init=False)
    cache_tag: str = field(default="ernie", init=False)
    model_metadata: ClassVar = {
        "architecture": "ERNIE-Image",
        "resolution": f"{SIDE}x{SIDE}",
        "implementation": "https://github.com/baidu/ERNIE-Image",
        "model_type": "ernie_image",
    }

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the default steps and guidance of the release, which names tell apart."""
        if self.files.dit is None:
            return BASE
        verdict = judge_distillation(self.few_steps, self.files.dit)
        return TURBO if verdict is not None and verdict.is_distilled else BASE

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the text states; raise CacheError if they are missing or have another width."""
        batch.check({TEXT_STATES_KEY: TEXTS_AGAIN}, "the transformer")
        width = self.files.dit_header().config.text_dim
        remedy = f"{TEXTS_AGAIN} and Ministral 3 (3B)"
        batch.check_widths({TEXT_STATES_KEY: width}, self.files.dit_path, remedy)
        return {TEXT_STATES_KEY: batch.tensors[TEXT_STATES_KEY]}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C 1 H W float32.

        The condition is ministral3_embed: states of the language model, T D for each sample.
        """
        # text states and mask, by the names of the network's arguments
        name_inputs = partial(name_text_and_mask, argument="text", name=TEXT_STATES_KEY, device=noisy.device)
        velocity: Tensor = dit(
            noisy,
            timesteps.float(),
            **name_inputs(cond),
            overrides=overrides.rename_nag(name_inputs),
        )
        return velocity

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request; without a negative prompt, guidance leads away from the empty text."""
        return self.resolve_image(request, SHIFT)


def family_for_latent_caching(options: own.ErnieImageLatentCachingOptions) -> ErnieImage:
    """Build the model description for ernie_image_cache_latents.py, which needs only the VAE."""
    return ErnieImage(ErnieImageFiles().add_vae(options.vae.file))


def family_for_text_caching(options: own.ErnieImageTextCachingOptions) -> ErnieImage:
    """Build the model description for ernie_image_cache_text_encoder_outputs.py: only the text encoder."""
    return ErnieImage(ErnieImageFiles().add_text(options.text))


def family_for_training(options: own.ErnieImageTrainingOptions) -> ErnieImage:
    """Build the model description for ernie_image_train_network.py and ernie_image_train.py."""
    return ErnieImage(_make_files(options), options)


def family_for_generation(options: own.ErnieImageGenerationOptions) -> ErnieImage:
    """Build the model description for ernie_image_generate_image.py."""
    return ErnieImage(_make_files(options))


def _make_files(options: own.ErnieImageModelOptions) -> ErnieImageFiles:
    files = ErnieImageFiles().add_dit(options.dit, options.dit_dtype)
    return files.add_vae(options.vae.file).add_text(options.text)


_: type[Family] = ErnieImage

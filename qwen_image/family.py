"""Qwen-Image, described for the shared loops."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from encoders.pictures import ModelOfPictures, picture_defaults
from modules.contract.data import (
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    SamplingDefaults,
    name_text_and_mask,
)
from modules.contract.family import (
    DitSpec,
    Family,
    NoiseSource,
    NoiseSpec,
    TextEncoder,
    count_picture_tokens,
)
from modules.contract.requests import Prepared, Request
from modules.contract.rules import IMAGE, LATENTS, GuidanceRules, ModelRelease, SourceRules
from modules.contract.steps import NO_TWEAKS, EncodedPrompts, Section, Tweaks
from modules.flow.schedule import size_shift
from modules.media.pixels import byte_clips
from modules.options import NO_OPTIONS
from modules.speed_options import VAE_TILE
from qwen_image.configs import DIT, LATENT, NOISE, PATCH, QWEN_IMAGE
from qwen_image.files import QwenImageFiles, files_of
from qwen_image.options import (
    NAME,
    QwenImageGenerationOptions,
    QwenImageLatentCachingOptions,
    QwenImageTextCachingOptions,
    QwenImageTrainingOptions,
)
from qwen_image.text_encoder import KEY, QWEN_USE

NEGATIVE = " "  # if nothing is said, as released
SOLVER = "euler-terminal"  # Euler's steps, at the noise levels of the release
DEFAULTS = picture_defaults(25, 4.0, 1328)
# how far the schedule is shifted, by the number of tokens of a picture: exp(mu), mu on a line through these.
# Source: the release's scheduler
FEW, MANY = (256, 0.5), (8192, 0.9)


@dataclass(frozen=True)
class QwenImage(ModelOfPictures):
    """Description of Qwen-Image for one run, built by the `family_for_...` functions below."""

    files: QwenImageFiles
    options: Any = NO_OPTIONS  # of a training

    name: str = field(default="qwen_image", init=False)
    cache_tag: str = field(default="qi", init=False)
    lora_module: str = field(default="networks.lora_qwen_image", init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    defaults: SamplingDefaults = field(default=DEFAULTS, init=False)
    release: ModelRelease = field(default=QWEN_IMAGE, init=False)
    text_keys: frozenset[str] = field(default=QWEN_USE.keys, init=False)
    called: str = field(default=NAME, init=False)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Name of this model in saved files."""
        names = {
            "architecture": "qwen-image",
            "implementation": "https://github.com/QwenLM/Qwen-Image",
            "model_type": "qwen_image",
        }
        return self.metadata_of(names)

    # encoding

    def text_encoders(self) -> Sequence[TextEncoder]:
        """Return Qwen2.5-VL's language model; its file is opened when it is loaded."""
        return [self.files.qwen()]

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return the cache entry of each picture: normalised means, in the VAE's dtype."""
        vae, entries = encoders.vae, []
        for part in media.split_for(vae.device):
            latents = vae.encode(byte_clips(part.frames)).to(vae.dtype)
            entries += [[CacheEntry({"latents": latent.clone()})] for latent in latents]
        return entries

    # the network

    def block_counts(self) -> tuple[int, ...]:
        """Return the number of blocks; the file's header says it."""
        return (self.files.dit_header().config.num_layers,)

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions for training: the captions' states."""
        remedy = "qwen_image_cache_text_encoder_outputs.py"
        batch.check({KEY: remedy}, "the transformer")
        width = self.files.dit_header().config.text_dim
        batch.check_widths({KEY: width}, self.files.dit_path, f"{remedy} and Qwen2.5-VL (7B)")
        return {KEY: batch.tensors[KEY]}

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor:
        """Predict the velocity, B C 1 H W in float32.

        cond: vl_embed, T D of each sample.
        """
        velocity: Tensor = dit(
            noisy,
            timesteps.float(),
            **name_text_and_mask(cond, "text", KEY, noisy.device),
            tweaks=tweaks.rename_away(lambda text: name_text_and_mask(text, "text", KEY, noisy.device)),
        )
        return velocity

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Fill open fields of the request, cut the size to whole patches, check files. Nothing is loaded.

        Without a flow shift the noise levels are the release's, which follow the size; one that is given is a
        plain shift. Raises OptionError if a size cannot be made, CheckpointError if a file is missing or of
        another kind.
        """
        prepared = self.settle_picture(request, 1.0, NEGATIVE)
        prepared = replace(prepared, rules=GuidanceRules(token_side=PATCH))
        if request.flow_shift is not None:
            return prepared
        solver = SOLVER if prepared.solver == "euler" else prepared.solver
        tokens = count_picture_tokens(LATENT.shape(1, prepared.height, prepared.width))
        return replace(prepared, flow_shift=size_shift(tokens, FEW, MANY), solver=solver)

    @property
    def source(self) -> SourceRules:
        """Return the rules for starts of denoising."""
        return SourceRules((IMAGE, LATENTS), NAME, False, frozenset({"qwen_image"}))

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode a picture, 1 1 H W 3 uint8, in model space, 1 C 1 h w. Nothing is drawn."""
        latents: Tensor = encoders.vae.encode(byte_clips(frames))
        return latents

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the one section for the denoising loop.

        Noise is drawn in the transformer's dtype, as released.
        """
        dtype = self.files.compute_dtype() or torch.float32
        drawn = noise.draw(LATENT.shape(1, prepared.height, prepared.width), dtype)
        return (yield prompts[0].section(drawn.float(), inputs.get(0)))

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Decode to pixels B 3 1 H W in -1..1."""
        yield from encoders.vae.decode(latents)


def family_for_latent_caching(options: QwenImageLatentCachingOptions) -> QwenImage:
    """Describe the family for qwen_image_cache_latents.py."""
    return QwenImage(QwenImageFiles().add_vae(options.vae.file))


def family_for_text_caching(options: QwenImageTextCachingOptions) -> QwenImage:
    """Describe the family for qwen_image_cache_text_encoder_outputs.py."""
    return QwenImage(QwenImageFiles().add_text(options.text))


def family_for_training(options: QwenImageTrainingOptions) -> QwenImage:
    """Describe the family for qwen_image_train_network.py."""
    return QwenImage(files_of(options), options=options)


def family_for_generation(options: QwenImageGenerationOptions) -> QwenImage:
    """Describe the family for qwen_image_generate_image.py."""
    files = files_of(options)
    if options.vae_enable_tiling and files.vae_tile is None:
        files = replace(files, vae_tile=VAE_TILE)
    return QwenImage(files)


_: type[Family] = QwenImage

"""FLUX.1 Kontext, described for the shared loops: FLUX.1 dev whose tokens are followed by a reference's."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from checkpoints.dits import DitHeader
from encoders.clip_l import CLIP_L
from encoders.pictures import GUIDANCE, get_references, image_defaults
from encoders.t5 import USE
from flux.configs import DEV, FLUX_DEV, PATCH, FluxConfig
from flux.family import Flux
from flux.files import NAMES, FluxFiles
from flux.kontext.options import GUIDANCE as DEFAULT_GUIDANCE
from flux.kontext.options import (
    NAME,
    KontextGenerationOptions,
    KontextLatentCachingOptions,
    KontextTextCachingOptions,
    KontextTextOptions,
    KontextTrainingOptions,
)
from flux.spec import FLUX_DIT, LATENT
from modules.devices import select_compute_dtype
from modules.errors import OptionError
from modules.media.buckets import Size, select_image_bucket
from modules.media.pixels import byte_clips
from modules.media.reading import read_image, resize_frame
from modules.speed_options import text_form
from protocols import data
from protocols.family import DitSpec, Family, NoiseSpec, count_image_tokens
from protocols.requests import Prepared
from protocols.rules import ModelRelease, ReferenceRules

LATENTS_AGAIN = "flux_kontext_cache_latents.py"
TEXTS_AGAIN = "flux_kontext_cache_text_encoder_outputs.py"
CLIP = replace(
    CLIP_L,
    pooled_key="clip_l_pooler",
    description="text encoder 2",
    option="--text_encoder2",
    tokenizer=replace(CLIP_L.tokenizer, option="--text_encoder2_tokenizer"),
)
T5 = replace(
    USE,
    states_key="t5_vec",
    mask_key=None,
    kind=replace(USE.kind, option="--text_encoder1"),
    tokenizer=replace(USE.tokenizer, option="--text_encoder1_tokenizer"),
)
# width and height of the images that the model was trained with. Source: the released code of Kontext
_WIDE = ((1568, 672), (1504, 688), (1456, 720), (1392, 752))
_NEARLY_SQUARE = ((1328, 800), (1248, 832), (1184, 880), (1104, 944))
_FLAT: tuple[Size, ...] = (*_WIDE, *_NEARLY_SQUARE)
TRAINED_SIZES: tuple[Size, ...] = (*((h, w) for w, h in _FLAT), (1024, 1024), *reversed(_FLAT))
KONTEXT_DEV = replace(FLUX_DEV, repositories=("black-forest-labs/FLUX.1-Kontext-dev",))
# a LoRA leaves out modulations unless they are asked for, as musubi-tuner's
KONTEXT_DIT = replace(FLUX_DIT, lora_exclude=("img_mod", "txt_mod", "modulation"))
# --discrete_flow_shift is for --timestep_sampling shift
KONTEXT_NOISE = NoiseSpec(count_tokens=count_image_tokens)
KONTEXT_LATENT = replace(LATENT, npz=None, flat_in_caches=True)
GENERATION = image_defaults(25, 1.0, 256, embedded_guidance=DEFAULT_GUIDANCE)


@dataclass(frozen=True)
class KontextFiles(FluxFiles):
    """Files of a run of FLUX.1 Kontext, numbered as in musubi-tuner: T5 is text encoder 1, CLIP-L is 2."""

    dit_option: str = "--dit"

    vae_option: ClassVar[str] = "--vae"
    clip_settings: ClassVar = CLIP
    t5_settings: ClassVar = T5

    def add_encoders(self, options: KontextTextOptions) -> "KontextFiles":
        """Return a copy with the text encoders' paths and settings from `options`."""
        return replace(
            self,
            t5xxl=options.text_encoder1,
            t5xxl_tokenizer=options.text_encoder1_tokenizer,
            clip_l=options.text_encoder2,
            clip_l_tokenizer=options.text_encoder2_tokenizer,
            text_dtype=select_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            t5_form=text_form(options),
        )

    def dit_header(self) -> DitHeader[FluxConfig]:
        """Read dimensions, dialect and dtype of the file. Raises OptionError if it is not FLUX.1 dev."""
        header = super().dit_header()
        if header.config.kind != DEV:
            raise OptionError(
                f"--dit {self.dit_path} is {NAMES[header.config.kind]}; {NAME} is a FLUX.1 dev transformer. "
                "Pass flux1-kontext-dev.safetensors, or use flux_train_network.py and flux_generate_image.py"
            )
        return header


@dataclass(frozen=True)
class Kontext(Flux):
    """Description of FLUX.1 Kontext for one run, built by the `family_for_...` functions below.

    Its files cannot be distinguished from files of FLUX.1 dev.
    """

    files: KontextFiles
    trained_guidance: float = 1.0
    noise_dtype: torch.dtype | None = torch.float32  # whatever the transformer's, as musubi-tuner
    # to the nearest of TRAINED_SIZES; else a reference keeps its own size
    resizes_references: bool = True

    name: str = field(default="flux_kontext", init=False)
    cache_tag: str = field(default="fk", init=False)
    display_name: str = field(default=NAME, init=False)
    noise: NoiseSpec = field(default=KONTEXT_NOISE, init=False)
    latent: data.LatentSpec = field(default=KONTEXT_LATENT, init=False)
    dit: DitSpec = field(default=KONTEXT_DIT, init=False)
    release: ModelRelease = field(default=KONTEXT_DEV, init=False)
    text_keys: frozenset[str] = field(default=T5.keys | CLIP.keys, init=False)
    defaults: data.SamplingDefaults = field(default=GENERATION, init=False)

    @property
    def references(self) -> ReferenceRules:
        """Return the rules for references: one image, which is edited."""
        return ReferenceRules(max_references=1, edits_images=True)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return FLUX.1's metadata, with Kontext's architecture and task."""
        kontext = {"base_model_version": "flux_kontext", "model_type": "flux_kontext", "task": "kontext"}
        # the architecture as musubi-tuner writes it for Kontext, which differs from its spelling for FLUX.1
        return {**super().metadata, **kontext, "architecture": "Flux.1-dev"}

    # encoding

    def encode_media(
        self, encoders: data.MediaEncoders, media: data.MediaBatch
    ) -> list[list[data.CacheEntry]]:
        """Return each image's cache entry: a posterior sample, and the mean of its reference."""
        entries = super().encode_media(encoders, media)
        for reference in media.control:
            means = encoders.vae.encode(byte_clips(reference))
            entries = [
                [replace(entry, tensors={**entry.tensors, data.CONTROL: mean.clone()})]
                for (entry,), mean in zip(entries, means, strict=True)
            ]
        return entries

    # the network

    def batch_conditions(self, latents: Tensor, batch: data.Batch) -> data.Conditions:
        """Return a batch's conditions: text, guidance (B) and, for edits, a reference."""
        batch.check(dict.fromkeys(sorted(self.text_keys), TEXTS_AGAIN), "the transformer")
        config = self.files.dit_header().config
        widths = {T5.states_key: config.text_dim, CLIP.pooled_key: config.pooled_dim}
        batch.check_widths(widths, self.files.dit_path, f"{TEXTS_AGAIN} and the text encoders of FLUX.1")
        texts: dict[str, Tensor | list[Tensor]] = {name: batch.tensor(name) for name in self.text_keys}
        texts[GUIDANCE] = torch.full((len(latents),), self.trained_guidance)
        return {**texts, **get_references(batch, self.latent.channels, PATCH, LATENTS_AGAIN)}

    @property
    def _text_inputs(self) -> Mapping[str, str]:
        return {"t5": T5.states_key, "pooled": CLIP.pooled_key}

    # generation

    def request_conditions(
        self, encoders: data.MediaEncoders, prepared: Prepared
    ) -> Mapping[int, data.Conditions]:
        """Encode the reference to its posterior mean `latents_control`, 1 C 1 h w."""
        conditions: dict[str, Tensor | list[Tensor]] = {}
        for path in prepared.request.control_images:
            conditions[data.CONTROL] = encoders.vae.encode(byte_clips(self._read_reference(path)))
        return {0: conditions}

    def _read_reference(self, path: Path) -> Tensor:
        """Return a reference image as 1 1 H W 3 uint8, stretched to a trained size or cropped."""
        # Cropping removes pixels on the right and at the bottom only, so that no pixel is shifted. Source:
        # the released code of Kontext (stretching), musubi-tuner (cropping).

        frame = read_image(path)
        height, width = frame.shape[:2]
        if self.resizes_references:
            size = select_image_bucket((width, height), TRAINED_SIZES)
            frame = resize_frame(frame, size, "none" if size == (width, height) else "lanczos")
        else:
            step = self.references.step
            # round both sides down to a multiple of the VAE's step
            frame = frame[: height // step * step, : width // step * step]
        return torch.from_numpy(frame[None, None].copy())


def family_for_latent_caching(options: KontextLatentCachingOptions) -> Kontext:
    """Build the model description for flux_kontext_cache_latents.py, which needs only the VAE."""
    return Kontext(KontextFiles().add_vae(options.vae.file))


def family_for_text_caching(options: KontextTextCachingOptions) -> Kontext:
    """Build the model description for flux_kontext_cache_text_encoder_outputs.py: only text encoders."""
    return Kontext(KontextFiles().add_encoders(options.text))


def family_for_training(options: KontextTrainingOptions) -> Kontext:
    """Build the model description for flux_kontext_train_network.py."""
    return Kontext(
        _make_files(options),
        trained_guidance=options.embedded_guidance,
        options=options,
        resizes_references=not options.no_resize_control,
    )


def family_for_generation(options: KontextGenerationOptions) -> Kontext:
    """Build the model description for flux_kontext_generate_image.py."""
    return Kontext(_make_files(options), resizes_references=not options.no_resize_control)


def _make_files(options: KontextTrainingOptions | KontextGenerationOptions) -> KontextFiles:
    files = KontextFiles().add_dit(options.dit, options.dit_dtype)
    return files.add_vae(options.vae.file).add_encoders(options.text)


_: type[Family] = Kontext

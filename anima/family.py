"""Anima, described for the shared loops."""

import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from anima.configs import ANIMA as RELEASE
from anima.configs import DIT, FEW_STEPS, LATENT, NOISE
from anima.files import AnimaFiles
from anima.names import LORA, SOURCE_BLOCKS
from anima.options import (
    FLOW_SHIFT,
    GUIDANCE_SCALE,
    NAME,
    STEPS,
    AnimaFullTrainingOptions,
    AnimaGenerationOptions,
    AnimaLatentCachingOptions,
    AnimaLearningOptions,
    AnimaLlliteTrainingOptions,
    AnimaTextCachingOptions,
)
from anima.text_encoder import IDS, MASK, STATES, WEIGHTS, check_tokens
from checkpoints.dits import with_dtype
from encoders import control_pictures
from encoders.pictures import ImageModelFamily, encode_images, image_defaults
from modules.control_codes import shorten
from modules.devices import send
from modules.media.pixels import to_pixels
from modules.options import NO_OPTIONS
from protocols.data import (
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
)
from protocols.family import Abilities, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.family_networks import CustomNetwork
from protocols.few_steps import FewSteps
from protocols.loading import Placement
from protocols.requests import Prepared, Request
from protocols.rules import ModelRelease
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

logger = logging.getLogger(__name__)

TEXTS_AGAIN = "anima_cache_text_encoder_outputs.py"
# arguments of the network -> names in caches; masks stay on the host, which reads them
INPUTS = {"states": STATES, "states_mask": MASK, "ids": IDS, "weights": WEIGHTS}
ON_HOST = {"states_mask", "weights"}
LLLITE, CONTROL_IMAGE = "--lllite_weights", "--control_image"
UNIT = 1000  # timesteps per unit of noise; the model takes the fraction of noise
DEFAULTS = image_defaults(STEPS, GUIDANCE_SCALE, 1024, FLOW_SHIFT)


@dataclass(frozen=True)
class Anima(ImageModelFamily):
    """Description of Anima for one run, built by the `family_for_...` functions below."""

    files: AnimaFiles
    options: Any = NO_OPTIONS  # set for training runs only
    # the network that a training run makes instead of a LoRA; it takes control images
    custom_network: CustomNetwork | None = None
    stores_controls: bool = False  # latents are cached together with the control images of a table
    lora_module: str = LORA[0].network_module

    name: str = field(default="anima", init=False)
    model_metadata: ClassVar = {
        "architecture": "anima-preview",
        "implementation": "https://huggingface.co/circlestone-labs/Anima",
        "model_type": "anima",
        "base_model_version": "anima",
    }
    few_steps: ClassVar[FewSteps] = FEW_STEPS
    abilities: ClassVar = Abilities(detects_few_steps=True, has_part_rates=True, has_custom_network=True)
    draws_latents: ClassVar[bool] = False
    vae_takes_clips: ClassVar[bool] = True
    cache_tag: str = field(default="anima", init=False)
    noise_dtype: torch.dtype | None = field(default=torch.float32, init=False)  # as in diffusers
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = NOISE  # with random masks in a training run of a ControlNet-LLLite for inpainting
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=RELEASE, init=False)
    text_keys: frozenset[str] = field(default=frozenset(INPUTS.values()), init=False)
    display_name: str = field(default=NAME, init=False)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the model's metadata, with its number of blocks, which LoRA names do not always show."""
        blocks = {} if self.files.dit is None else {SOURCE_BLOCKS[0]: str(*self.block_counts())}
        return self.add_file_names({**self.model_metadata, **blocks})

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the default settings; a ControlNet-LLLite in training adds its strength and mask."""
        if self.custom_network is None:
            return DEFAULTS
        mask = (control_pictures.MASK_PATH,) if self.takes_mask else ()
        return replace(DEFAULTS, extras=("control_multiplier", *mask))

    @property
    def takes_mask(self) -> bool:
        """Return whether the ControlNet-LLLite being trained also takes a mask."""
        return self.noise.change_conditions is not None

    # encoding

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has control images without a ControlNet-LLLite, or vice versa."""
        if self.custom_network is not None:
            table = control_pictures.check_controls(table, self.custom_network.label)
        super().check_table(replace(table, has_control=False) if self.stores_controls else table)

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Encode images; return the normalized means of the VAE's posterior, in the VAE's dtype."""
        vae = encoders.vae
        images = replace(media, control=())
        entries = encode_images(
            images, vae.device, lambda frames: vae.encode(to_pixels(frames)).to(vae.dtype)
        )
        return control_pictures.add_controls(entries, media) if media.control else entries

    # the network

    @property
    def part_rates(self) -> Mapping[str, float]:
        """Return the learning rates of parts of the model; {} except for full fine-tuning."""
        return self.options.part_rates if isinstance(self.options, AnimaFullTrainingOptions) else {}

    def file_beside(self, dit: Path) -> Path | None:
        """Return the adapter's separate file; None if the transformer's file contains the adapter."""
        return self.files.adapter_path

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer with its adapter. --dit_dtype applies if the caller sets no dtype."""
        (path,) = self.dit_files
        placement = with_dtype(placement, self.files.dit_dtype)
        network: nn.Module = self.files.format.load(path, placement, second_file=self.files.adapter_path)
        if isinstance(self.options, AnimaGenerationOptions) and self.options.lllite_weights is not None:
            # generation attaches a trained ControlNet-LLLite; training builds its own
            from anima.lllite import load_lllite  # only with its file

            load_lllite(
                self.options.lllite_weights,
                LLLITE,
                dit=network,
                device=placement.device,
                dtype=cast(torch.dtype, network.compute_dtype),
                multiplier=self.options.lllite_multiplier,
            )
        return network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return text states, T5 tokens and controls; CacheError or CheckpointError if they do not fit."""
        batch.check(dict.fromkeys(sorted(INPUTS.values()), TEXTS_AGAIN), "the transformer")
        adapter = self.files.adapter_config()
        remedy = f"{TEXTS_AGAIN} and Qwen3 (0.6B)"
        batch.check_widths({STATES: adapter.text_dim}, self.files.dit_path, remedy)
        check_tokens(batch.tensor(IDS), adapter.vocabulary, self.files.dit_path)
        conditions = {name: batch.tensor(name) for name in INPUTS.values()}
        if self.custom_network is not None:
            conditions |= control_pictures.make_control_conditions(
                batch, latents, LATENT.stride[1], self.custom_network.label
            )
            if control_pictures.CONTROL_MASK in batch.tensors:  # drawn at each step, not cached
                conditions[control_pictures.CONTROL_MASK] = batch.tensor(control_pictures.CONTROL_MASK)
        return conditions

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C 1 H W float32.

        `cond` contains:
            prompt_embeds, attn_mask: States of the language model, B S D, and their mask, B S.
            t5_input_ids, t5_attn_mask: Token ids of T5 and their mask, B T.
        """
        # a ControlNet-LLLite, attached to the transformer, embeds its images before the call
        attached = getattr(dit, "attached_control", None)
        if attached is not None:
            controls, strength = control_pictures.control_in(cond, noisy.device, torch.float32)
            attached.lllite.embed_control(controls, strength, control_pictures.mask_in(cond, noisy.device))
        velocity: Tensor = dit(
            noisy,
            timesteps.float() / UNIT,
            **_name_texts(cond, noisy.device),
            overrides=overrides.rename_nag(lambda text: _name_texts(text, noisy.device)),
        )
        return velocity

    # generation

    def keep_media(self, request: Request, model_name: str) -> Request:
        """Return the request without unused media; only ControlNet-LLLite training uses a control image."""
        is_controlled = self.custom_network is not None
        return control_pictures.keep_control(
            request, super().keep_media, model_name, takes_control=is_controlled
        )

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Return a ControlNet-LLLite's control image, and its mask, as pixels.

        Samples during training take them from the request, generation from the options.
        """
        if self.custom_network is not None:
            return {0: self._read_sample_controls(prepared)}
        if not isinstance(self.options, AnimaGenerationOptions) or self.options.control_image is None:
            return {0: {}}
        size = prepared.width, prepared.height
        controls = control_pictures.read_control(self.options.control_image, *size, strength=1.0)
        if self.options.mask_image is not None:
            controls |= control_pictures.read_control_mask(self.options.mask_image, *size)
        return {0: controls}

    def _read_sample_controls(self, prepared: Prepared) -> dict[str, Tensor]:
        """Return a training sample's control image, and its mask, drawn from its seed if it has none."""
        controls = control_pictures.sample_controls(prepared)
        if not controls or not self.takes_mask:
            return controls
        size = prepared.width, prepared.height
        mask = prepared.request.extra.get(control_pictures.MASK_PATH)
        if mask is not None:
            return controls | control_pictures.read_control_mask(Path(mask), *size)
        logger.info(
            "%r has no mask (%s): its seed draws one",
            shorten(prepared.request.prompt, 60),
            control_pictures.MASK,
        )
        return controls | control_pictures.draw_control_mask(*size, seed=prepared.seed)

    def prepare(self, request: Request) -> Prepared:
        """Fill in a request's missing size, flow shift and guidance."""
        return self.resolve_image(request, FLOW_SHIFT)

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only run of the denoising loop, after checking the prompt's T5 ids for the adapter."""
        vocabulary = self.files.adapter_config().vocabulary
        ids = prompts[0].positive[IDS]
        assert isinstance(ids, Tensor)
        check_tokens(ids, vocabulary, self.files.dit_path)
        return (yield from super().sections(prepared, prompts, inputs, noise))


def _name_texts(conditions: Conditions, device: torch.device) -> dict[str, Tensor]:
    """Return the text conditions as keyword arguments for the network, on the device where needed."""
    arguments = {}
    for argument, name in INPUTS.items():
        value = conditions[name]
        assert isinstance(value, Tensor)
        arguments[argument] = value if argument in ON_HOST else send(value, device)
    return arguments


def family_for_latent_caching(options: AnimaLatentCachingOptions) -> Anima:
    """Return the family for anima_cache_latents.py, which requires only the VAE."""
    return Anima(AnimaFiles().add_vae(options.vae.file), stores_controls=True)


def family_for_text_caching(options: AnimaTextCachingOptions) -> Anima:
    """Return the family for anima_cache_text_encoder_outputs.py, which requires only the text encoder."""
    return Anima(AnimaFiles().add_texts(options.qwen3, options.text))


def family_for_training(options: AnimaLearningOptions) -> Anima:
    """Return the family for Anima's training runs; warn if full training changes the adapter."""
    if isinstance(options, AnimaFullTrainingOptions) and options.llm_adapter_lr is None:
        logger.warning(
            "the adapter is trained too, which the authors of %s advise against. Pass --llm_adapter_lr 0 to "
            "keep it unchanged",
            NAME,
        )
    model = Anima(_make_files(options, options.qwen3), options)
    if isinstance(options, AnimaLlliteTrainingOptions):
        from anima.lllite import MODULE, describe_lllite, draw_masks  # only to train one

        if options.lllite_cond_in_channels > 3:  # a mask channel, drawn in each step, follows the image
            model = replace(model, noise=replace(NOISE, change_conditions=draw_masks))
        return replace(model, custom_network=describe_lllite(options), lora_module=MODULE)
    return model


def family_for_generation(options: AnimaGenerationOptions) -> Anima:
    """Return the family for anima_generate_image.py."""
    if options.lllite_weights is not None and options.control_image is not None:
        from anima.lllite import check_file, check_mask  # only with its file

        file = check_file(options.lllite_weights, LLLITE)
        control_pictures.check_control(CONTROL_IMAGE, options.control_image)
        check_mask(options.lllite_weights, file.config, options.mask_image)
    return Anima(_make_files(options, options.text_encoder), options)


def _make_files(
    options: AnimaLearningOptions | AnimaGenerationOptions, text_encoder: Path | None
) -> AnimaFiles:
    files = AnimaFiles(adapter=options.llm_adapter_path).add_dit(options.dit, options.dit_dtype)
    return files.add_vae(options.vae.file).add_texts(text_encoder, options.text)


_: type[Family] = Anima

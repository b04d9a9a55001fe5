"""FLUX.1 and Chroma, described for the shared loops."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from encoders import control_pictures
from encoders.pictures import (
    GUIDANCE,
    ImageModelFamily,
    guidance_in,
    image_defaults,
    references_in,
)
from flux import configs
from flux.files import FluxFiles
from flux.model import FluxModel, unpack
from flux.names import LORA
from flux.options import CHROMA as SAYS_CHROMA
from flux.options import (
    CONTROL_NET,
    DEFAULT_GUIDANCE,
    FluxControlNetTrainingOptions,
    FluxGenerationOptions,
    FluxLatentCachingOptions,
    FluxLearningOptions,
    FluxTextCachingOptions,
)
from flux.spec import LATENT, NOISE, count_tokens, dit_spec, size_shift
from modules.errors import CacheError, DatasetError, OptionError
from modules.media.pixels import byte_clips
from modules.options import NO_OPTIONS
from protocols import requests
from protocols.data import (
    CONTROL,
    CONTROL_PIXELS,
    CONTROL_STRENGTH,
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
    name_texts,
)
from protocols.family import Abilities, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.family_networks import CustomNetwork
from protocols.few_steps import UNDOING, FewSteps
from protocols.loading import Placement
from protocols.rules import ModelRelease
from protocols.steps import NO_OVERRIDES, Overrides

if TYPE_CHECKING:
    from protocols.workflows import ComfyModel

logger = logging.getLogger(__name__)

TEXTS_AGAIN = "flux_cache_text_encoder_outputs.py"
POOLED, STATES, MASK = "l_pooled", "t5_out", "t5_attn_mask"  # names in caches
NAME = "FLUX.1 or Chroma"  # in messages
CHROMA_SCALE = 4.0  # default guidance scale of Chroma; FLUX.1 is distilled and needs none
CLIP_L_WIDTH = 768  # width of its pooled text


@dataclass(frozen=True)
class Flux(ImageModelFamily):
    """Description of FLUX.1 or Chroma for one run, built by the `family_for_...` functions below.

    The transformer's file shows whether it is dev, schnell or Chroma.
    """

    files: FluxFiles
    trained_guidance: float = DEFAULT_GUIDANCE  # what training feeds the model's guidance input
    # without a negative prompt it is empty; False, as in the guides' command: then there is no guidance
    negative_is_empty: bool = True
    noise_dtype: torch.dtype | None = None
    options: Any = NO_OPTIONS  # set for training runs and generations
    controlnet: Path | None = None  # next to the transformer, frozen; cached latents are made for it
    # what a training makes in place of a LoRA, which sees the control images
    custom_network: CustomNetwork | None = None
    stores_controls: bool = False  # latents are cached together with the control images of a table
    lora_module: str = LORA[0].network_module

    name: str = field(default="flux", init=False)
    cache_tag: str = field(default="flux", init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    display_name: str = field(default=NAME, init=False)
    abilities: ClassVar = Abilities(detects_few_steps=True, has_custom_network=True, has_comfy_nodes=True)
    few_steps: ClassVar = FewSteps(
        base="FLUX.1 dev (for Chroma on Chroma1-HD)",
        also="the distilled model",
        adapter=f"{UNDOING}, for schnell that of ostris/FLUX.1-schnell-training-adapter",
        distilled_words="flash",
    )

    def few_steps_evidence(self) -> str | None:
        """Return why the transformer counts as distilled to few steps, like schnell, or None."""
        if self.files.kind == configs.SCHNELL:
            return f"{self.files.dit_path} is FLUX.1 schnell"
        return super().few_steps_evidence()

    @property
    def latent(self) -> LatentSpec:
        """Latent space, with npz text caches that record whether T5's attention left out the padding.

        These caches always have a pooled text, which is zeros if the model takes none.
        """
        assert LATENT.npz is not None
        zeros = {**LATENT.npz.zeros, **({} if self.files.has_pooled else {POOLED: ("", CLIP_L_WIDTH)})}
        constants = {"apply_t5_attn_mask": self.files.uses_mask}
        return replace(LATENT, npz=replace(LATENT.npz, constants=constants, zeros=zeros))

    @property
    def dit(self) -> DitSpec:
        """Return the transformer's module names, and whether a ControlNet adds to its blocks."""
        has_additions = self.controlnet is not None or self.custom_network is not None
        return replace(dit_spec(self.files.kind), has_additions=has_additions)

    @property
    def text_keys(self) -> frozenset[str]:
        """Return the cache keys of T5's states and mask and, except for Chroma, of CLIP-L's pooled state."""
        return frozenset({STATES, MASK, POOLED} if self.files.has_pooled else {STATES, MASK})

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the default steps and guidance of dev, schnell or Chroma."""
        kind = self.files.kind
        scale = CHROMA_SCALE if kind == configs.CHROMA else 1.0
        default = image_defaults(
            configs.STEPS[kind], scale, 1024, embedded_guidance=configs.EMBEDDED_GUIDANCE[kind]
        )
        return default if self.custom_network is None else replace(default, extras=("control_multiplier",))

    @property
    def release(self) -> ModelRelease:
        """Return the released model that corresponds to this kind of transformer."""
        return configs.RELEASES[self.files.kind]

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the metadata that name the model in saved files: FLUX.1 with its task, or Chroma."""
        kind = self.files.kind
        names = {
            "architecture": configs.ARCHITECTURES[kind],
            "base_model_version": configs.BASE_VERSIONS[kind],
        }
        if kind == configs.CHROMA:
            names["implementation"] = "https://huggingface.co/lodestones/Chroma1-HD"
            names["model_type"] = "chroma"
        else:
            names["implementation"] = "https://github.com/black-forest-labs/flux"
            names["model_type"] = "flux"
            names["task"] = kind
        return self.add_file_names(names)

    # a ControlNet

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has clips, or if its control images do not fit the options.

        Control images are for a ControlNet or, with Kontext, references. A ControlNet requires them.
        """
        if self.custom_network is not None:
            table = control_pictures.check_controls(table, self.custom_network.label)
        with_control = self.controlnet is not None or self.stores_controls
        if table.has_control and not with_control and self.references is None:
            raise DatasetError(
                f"{table.name}: the table has control images, but no ControlNet uses them. Pass "
                f"{CONTROL_NET} (to cache for flux_train_control_net.py: --control_pictures), or remove them."
            )
        if self.controlnet is not None and not table.has_control:
            raise DatasetError(
                f"{table.name}: {CONTROL_NET} needs control images. Set "
                f"control_directory, or omit {CONTROL_NET}."
            )
        # the check for every family rejects control images, which are allowed here
        if with_control:
            table = replace(table, has_control=False)
        super().check_table(table)

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return the cache entry of each image.

        For a ControlNet, an entry also has `latents_control`, the latents of the control image.
        """
        entries = super().encode_media(encoders, media)
        with_control = self.controlnet is not None or self.custom_network is not None or self.stores_controls
        if not with_control or not media.control:
            return entries
        if len(media.control) > 1:
            raise DatasetError(
                f"{media.table.name}: {len(media.control)} control images each, but a ControlNet uses one"
            )
        # encode the control images as if they were the targets, without their alpha
        control = replace(media, frames=media.control[0][..., :3], control=())
        control_entries = super().encode_media(encoders, control)
        joined = []  # entries with their control's latents
        for (entry,), (control_entry,) in zip(entries, control_entries, strict=True):
            tensors = {**entry.tensors, CONTROL: control_entry.tensors["latents"]}
            joined.append([replace(entry, tensors=tensors)])
        return joined

    def check_named_files(self) -> None:
        """Check every file that an option names, and that the ControlNet fits. Loads nothing."""
        super().check_named_files()
        self._check_controlnet()

    def check_files(self, media: bool) -> None:
        """Check the files that a generation needs, and that the ControlNet fits. Loads nothing."""
        super().check_files(media)
        self._check_controlnet()

    def _check_controlnet(self) -> None:
        if self.controlnet is not None and self.files.dit is not None:
            from flux.control_net import read_settings  # diffusers is slow to import

            read_settings(self.controlnet, self.files.dit_header().config)

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer, and a frozen ControlNet next to it."""
        dit = super().load_dit(placement, expert)
        if self.controlnet is not None:
            from flux.control_net import load_control_net

            assert isinstance(dit, FluxModel)
            dit.controlnet = load_control_net(
                self.controlnet, dit.config, placement.device, dit.compute_dtype
            )
        return dit

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions of a training batch: text states, guidance (B) and control latents.

        Raises CacheError if a cached tensor is missing or does not fit the transformer, or if T5 encoded
        the captions with different settings.
        """
        control = self._read_control(latents, batch)
        batch.check(dict.fromkeys(sorted(self.text_keys), TEXTS_AGAIN), "the transformer")
        config = self.files.dit_header().config
        widths = {STATES: config.text_dim}
        if self.files.has_pooled:
            widths[POOLED] = config.pooled_dim
        batch.check_widths(widths, self.files.dit_path, f"{TEXTS_AGAIN} and the text encoders of FLUX.1")
        # Raise CacheError if cached T5 states are too long, or their mask differs from the one needed
        # Raise CacheError if caches were encoded with another setting for masking T5's padding
        uses_mask = self.files.uses_mask
        for record in batch.cache_origins:
            mask = record.encoder.get("t5_mask")
            if mask not in (None, "used" if uses_mask else "not used"):  # None: cached by another program
                option = configs.CHROMA if self.files.kind == configs.CHROMA else "--apply_t5_attn_mask"
                own_setting = f"for {option}" if uses_mask else "without --apply_t5_attn_mask"
                raise CacheError(
                    f"{record.path}: T5's padding mask was {mask} when it was written, but this training is "
                    f"{own_setting}. Cache again with {TEXTS_AGAIN} and the same --model_type and "
                    "--apply_t5_attn_mask."
                )
        batch_size, length = batch.tensor(STATES).shape[:2]
        if batch.tensor(MASK).shape != (batch_size, length):
            raise CacheError(
                f"{batch.keys[0]}: {MASK} and {STATES} in its cache differ in length. Cache again "
                f"with {TEXTS_AGAIN}."
            )
        maximum = self.files.t5_tokens
        if length > maximum:
            raise CacheError(
                f"{batch.keys[0]}: its text has {length} tokens of T5, this transformer was trained "
                f"with {maximum}. Cache again with {TEXTS_AGAIN} --t5xxl_max_token_length {maximum}, or "
                f"train with --t5xxl_max_token_length {length}."
            )
        conditions = {name: batch.tensor(name) for name in self.text_keys}
        # Chroma is made for guidance 0
        guidance = 0.0 if self.files.kind == configs.CHROMA else self.trained_guidance
        return {**conditions, **control, GUIDANCE: torch.full((len(latents),), guidance)}

    def _read_control(self, latents: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return a batch's control latents; {} without a ControlNet."""
        # for messages: which network reads the control latents, and how to cache them
        if self.custom_network is not None:
            consumer, remedy = self.custom_network.label, "flux_cache_latents.py --control_pictures"
        elif self.controlnet is not None:
            consumer, remedy = CONTROL_NET, f"flux_cache_latents.py and {CONTROL_NET}, of a control image"
        else:
            if CONTROL in batch.tensors:
                _warn_of_unused_control()
            return {}
        batch.check({CONTROL: remedy}, consumer)
        control = batch.tensor(CONTROL)
        if control.shape != latents.shape:
            raise CacheError(
                f"{batch.keys[0]}: {CONTROL} in its cache and its image differ in size. Cache "
                "again with flux_cache_latents.py."
            )
        return {CONTROL: control}

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
            t5_out, t5_attn_mask: States of T5, B T D, and their mask, B T.
            l_pooled: State of CLIP-L, B E.
            guidance: B.
            latents_control: Clean latents of a control image or, for Kontext, of an image to edit.
        """
        device = noisy.device
        images = references_in(cond, device)
        # one image input serves as control image or, for Kontext, as references
        is_control = bool(images) and (self.controlnet is not None or self.custom_network is not None)
        return dit(
            noisy,
            timesteps.float(),
            **name_texts(cond, self._text_inputs, device),
            guidance=guidance_in(cond, device),
            overrides=overrides.rename_nag(lambda text: name_texts(text, self._text_inputs, device)),
            references=() if is_control else images,
            control=images[0] if is_control else None,
            control_strength=control_pictures.strength_in(cond),
        )

    # generation

    def keep_media(self, request: requests.Request, model_name: str) -> requests.Request:
        """Return the request without unused media; a ControlNet in training uses the control image."""
        is_controlled = self.custom_network is not None
        return control_pictures.keep_control(
            request, super().keep_media, model_name, takes_control=is_controlled
        )

    def needs_media(self, prepared: requests.Prepared) -> bool:
        """Return whether the request has a control image or starts from an image."""
        takes_control = prepared.request.control_path is not None or self._control_image is not None
        return takes_control or super().needs_media(prepared)

    def request_conditions(
        self, encoders: MediaEncoders, prepared: requests.Prepared
    ) -> Mapping[int, Conditions]:
        """Encode the control image: return its latents (1 Z 1 h w, posterior mean) and strength by name.

        Without a ControlNet, return the conditions of plain FLUX.1.
        """
        # samples during the training of a ControlNet; otherwise a loaded ControlNet
        if self.custom_network is not None:
            control = control_pictures.sample_controls(prepared)
        elif self._control_image is not None:
            size = prepared.width, prepared.height
            strength = self.options.control_multiplier
            control = control_pictures.read_control(self._control_image, *size, strength=strength)
        else:
            return super().request_conditions(encoders, prepared)
        if not control:
            return {0: {}}
        frames = rearrange(control[CONTROL_PIXELS], "b c h w -> b 1 h w c")
        latents = encoders.vae.encode(byte_clips(frames))
        return {0: {CONTROL: latents, CONTROL_STRENGTH: control[CONTROL_STRENGTH]}}

    @property
    def _control_image(self) -> Path | None:
        """Return the control image of a generation; None without one."""
        return self.options.control_image if isinstance(self.options, FluxGenerationOptions) else None

    def prepare(self, request: requests.Request) -> requests.Prepared:
        """Fill in a request's size, guidance and flow shift; warn about settings that have no effect.

        Only FLUX.1 dev has an input for guidance.
        """
        self.files.check(("dit",))
        kind = self.files.kind
        request = self.keep_media(request, str(self.files.dit_path))
        if request.second_prompt is not None and not self.files.has_pooled:
            logger.warning("--prompt_2 is ignored because Chroma has no second text encoder")
        default = self.defaults
        if kind != configs.DEV:
            guidance = request.embedded_guidance
            if guidance not in (None, self.defaults.embedded_guidance, DEFAULT_GUIDANCE):
                reason = "is made for 0" if self.files.kind == configs.CHROMA else "has no input for it"
                logger.warning(
                    "the embedded guidance %g (--embedded_cfg_scale) is ignored because %s %s",
                    guidance,
                    self.files.dit_path,
                    reason,
                )
            request = replace(request, embedded_guidance=None)
        width, height, _ = requests.get_size(request, default)
        size = (width, height, 1)
        requests.check_size(size, LATENT)
        flow_shift = request.flow_shift
        if flow_shift is None:
            flow_shift = 1.0 if kind == configs.SCHNELL else size_shift(count_tokens(height, width))
        negative = "" if self.negative_is_empty else None
        return requests.resolve_request(request, default, size, flow_shift, default_negative=negative)

    def comfy_model(self) -> "ComfyModel":
        """Return FLUX.1's ComfyUI workflow settings; raise OptionError for Chroma and edit models."""
        if self.references is not None or self.files.kind == configs.CHROMA:
            raise OptionError(f"of {self.display_name}, only those of FLUX.1 dev and schnell are known here")
        from flux.workflow import FLUX as FLUX_NODES  # only with --save_workflow

        return FLUX_NODES

    def draw_noise(self, prepared: requests.Prepared, noise: NoiseSource) -> Tensor:
        """Draw an image's noise in token order, 1 C 1 h w float32."""
        _, channels, _, height, width = LATENT.shape(1, prepared.height, prepared.width)
        rows, columns = height // 2, width // 2
        drawn = noise.draw((1, rows * columns, 4 * channels), self._noise_dtype)
        return unpack(drawn.float(), rows, columns)

    @property
    def _text_inputs(self) -> Mapping[str, str]:
        """Return the cache keys of the network's text arguments; without a mask, padding counts as text."""
        inputs = {"t5": STATES}
        if self.files.has_pooled:
            inputs["pooled"] = POOLED
        if self.files.uses_mask:
            inputs["t5_mask"] = MASK
        return inputs


@cache
def _warn_of_unused_control() -> None:
    logger.warning("%s in caches is not used, because %s is not given", CONTROL, CONTROL_NET)


def family_for_latent_caching(options: FluxLatentCachingOptions) -> Flux:
    """Build the model description for flux_cache_latents.py, which needs only the VAE."""
    files = FluxFiles().add_vae(options.vae)
    return Flux(files, controlnet=options.controlnet, stores_controls=options.control_pictures)


def family_for_text_caching(options: FluxTextCachingOptions) -> Flux:
    """Build the model description for flux_cache_text_encoder_outputs.py: only the text encoder."""
    return Flux(FluxFiles(says_chroma=options.model_type == SAYS_CHROMA).add_text(options.text))


def family_for_training(options: FluxLearningOptions) -> Flux:
    """Build the model description for FLUX's training scripts, including the one for ControlNets."""
    model = Flux(_make_files(options), trained_guidance=options.embedded_guidance, options=options)
    if isinstance(options, FluxControlNetTrainingOptions):
        from flux.control_net_learning import MODULE, describe_control_net  # only to train one

        made = describe_control_net(options, model.files)
        return replace(model, custom_network=made, lora_module=MODULE)
    return replace(model, controlnet=options.controlnet)


def family_for_generation(options: FluxGenerationOptions) -> Flux:
    """Build the model description for flux_generate_image.py."""
    if options.control_image is not None:
        control_pictures.check_control("--control_image", options.control_image)
    return Flux(_make_files(options), options=options, controlnet=options.controlnet)


def _make_files(options: FluxLearningOptions | FluxGenerationOptions) -> FluxFiles:
    files = FluxFiles(says_chroma=options.model_type == SAYS_CHROMA).add_dit(options.dit, options.dit_dtype)
    return files.add_vae(options.vae).add_text(options.text)


_: type[Family] = Flux

"""Stable Diffusion 1.x, 2.x and XL, described for the shared loops.

Images equal those of gen_img.py, which has more options. Networks and samplers are diffusers'.
"""
# Letters: B images, L tokens, C width, h w latent size

import logging
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from checkpoints.shards import SavedForm
from encoders import control_pictures
from encoders.new_words import NewWord
from encoders.pictures import ImageModelFamily, image_defaults
from modules.console import quiet
from modules.devices import get_compute_dtype, select_compute_dtype
from modules.errors import CacheError, OptionError
from modules.media.pixels import byte_clips
from modules.options import NO_OPTIONS
from protocols.bundled_embeddings import WordsByFile
from protocols.data import (
    SIZES,
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
    send_tensor,
)
from protocols.family import Abilities, DitSpec, Family, NoiseSource, NoiseSpec, TextEncoder
from protocols.family_networks import CustomNetwork
from protocols.few_steps import FewSteps
from protocols.full_model import CheckpointWriter, LearningParts
from protocols.loading import Placement
from protocols.new_tokens import WordToLearn
from protocols.requests import Prepared, Prompts, Request
from protocols.rules import ModelRelease, NpzFormat
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section
from stable_diffusion.beside_unet import UnetControl
from stable_diffusion.contract import SD1, SD2, SDXL, ModelKind
from stable_diffusion.files import ModelType
from stable_diffusion.generation_options import StableDiffusionGenerationOptions
from stable_diffusion.inpainting import (
    INPAINTING,
    MASK_PATH,
    find_kept_source,
    make_inputs,
    read_image_and_mask,
    set_image_to_repaint,
)
from stable_diffusion.noise import make_noise_spec, read_noise_changes
from stable_diffusion.samplers import ScaledSolver, begin_sampling, check_sampling, is_guided, make_scheduler
from stable_diffusion.sampling_options import SAMPLERS, check_sampler_steps
from stable_diffusion.textual_inversion import (
    XTI_OPTION,
    LearnedWord,
    check_words,
    merge_lora_words,
    read_lora_words,
)
from stable_diffusion.tokenizers import CHUNK_SIZE
from stable_diffusion.towers import (
    POOLED,
    STATES,
    STATES_1,
    STATES_2,
    LazyTextEncoder,
    TextEncoderTraining,
    make_encoders,
)
from stable_diffusion.training_files import (
    FULL_BY,
    GENERATED_BY,
    TRAINED_BY,
    TrainingFiles,
    UnetInput,
    number_blocks,
    unet_parts,
    unet_spec,
)
from stable_diffusion.training_options import (
    DEFAULT_SAMPLER,
    GUIDANCE_SCALE,
    STEPS,
    LatentCachingOptions,
    StableDiffusionTrainingOptions,
    TextCachingOptions,
)
from stable_diffusion.whole_files import make_writer
from stable_diffusion.whole_folders import make_folder_writer

if TYPE_CHECKING:
    from protocols.workflows import ComfyModel

logger = logging.getLogger(__name__)

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}  # values of --mixed_precision; float32 otherwise
SD1_AND_SD2, ONLY_SDXL = (SD1, SD2), (SDXL,)  # kinds that a script trains
_SDXL_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"  # in metadata
LARGE_SD2 = 768  # default sides for the 2.x model that predicts v

# suffixes of a kind's cache files and npz files
_TAGS = {SD1: "sd", SD2: "sd", SDXL: "sdxl"}
_STEPS = {SD1: 8, SD2: 8, SDXL: 32}  # sides of images are multiples of this
# least-squares fits from latents in model space to colors (R, G, B); common previewers use the same
_SD_PREVIEW_FACTORS = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
)
_SDXL_PREVIEW_FACTORS = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
)
_SDXL_PREVIEW_BIAS = (0.1084, -0.0175, -0.0011)

_RAIL = "CreativeML OpenRAIL-M"
RELEASES: Mapping[ModelKind, ModelRelease] = {
    SD1: ModelRelease(
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4"),
        _RAIL,
        "creativeml-openrail-m",
        "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
        covers_all=False,
    ),
    SD2: ModelRelease(
        ("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1-base"),
        "CreativeML OpenRAIL++-M",
        "openrail++",
        "https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL",
        covers_all=False,
    ),
    SDXL: ModelRelease(
        ("stabilityai/stable-diffusion-xl-base-1.0",),
        "CreativeML OpenRAIL++-M",
        "openrail++",
        "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
        covers_all=False,
    ),
}


def latent_spec(kind: ModelKind) -> LatentSpec:
    """Return the sizes and file names of latents for a kind of checkpoint."""
    tag = _TAGS[kind]
    text_cache_suffix = "_te_outputs" if kind is SDXL else f"_{tag}_te_outputs"
    return LatentSpec(
        channels=4,
        stride=(1, 8, 8),
        pixel_step=_STEPS[kind],
        frame_step=1,
        scale=kind.latent_scale,
        preview_factors=_SDXL_PREVIEW_FACTORS if kind is SDXL else _SD_PREVIEW_FACTORS,
        preview_bias=_SDXL_PREVIEW_BIAS if kind is SDXL else (0.0, 0.0, 0.0),
        npz=NpzFormat(f"_{tag}", text_cache_suffix, has_resolutions=False, reads_untagged_files=True),
        has_size_conditions=kind is SDXL,
    )


@dataclass(frozen=True)
class StableDiffusion(ImageModelFamily):
    """Stable Diffusion for one training, caching or generation run, built from a checkpoint."""

    files: TrainingFiles  # type: ignore[assignment]  # all networks are in one checkpoint
    noise: NoiseSpec = field(default_factory=lambda: make_noise_spec(False))
    max_chunks: int = 1  # number of 75-token chunks of each caption
    clip_skip: int | None = None
    sampler: str = DEFAULT_SAMPLER  # sampler for a training run's samples
    options: Any = NO_OPTIONS  # set for training runs only
    warns_if_cut: bool = False  # whether to warn if a prompt is cut off
    text_training: TextEncoderTraining | None = None  # set for full training only
    # the network that a training run makes instead of a LoRA; None for a LoRA
    custom_network: CustomNetwork | None = None
    # whether the U-Net also takes a mask and the masked image (`INPAINTING`)
    inpaints: bool = False
    stores_controls: bool = False  # whether latents are cached together with a table's control images
    lora_module: str = "networks.lora"
    lora_words: tuple[LearnedWord, ...] = ()  # words in the LoRA files of a generation

    few_steps: ClassVar[FewSteps] = FewSteps(adapter="", targets=())  # Turbo, Lightning, LCM and the like
    abilities: ClassVar[Abilities] = Abilities(
        has_text_encoders=True,
        trains_checkpoint=True,
        has_custom_network=True,
        inpaints=True,
        detects_few_steps=True,
        has_comfy_nodes=True,
    )

    @property
    def kind(self) -> ModelKind:
        """Kind of the checkpoint: 1.x, 2.x or XL."""
        return self.files.kind

    @property
    def name(self) -> str:
        """Name of the model kind (1.x, 2.x or XL) in metadata."""
        return self.kind.name

    @property
    def display_name(self) -> str:
        """Name of the model kind for messages."""
        return self.kind.title

    @property
    def cache_tag(self) -> str:
        """Tag that identifies the model in cache file names."""
        return _TAGS[self.kind]

    @property
    def latent(self) -> LatentSpec:
        """Shape and scale of the latents, and the names of their cache files."""
        return latent_spec(self.kind)

    @property
    def dit(self) -> DitSpec:
        """Module structure of the U-Net, for LoRAs, gradient checkpointing and compilation."""
        return unet_spec(self.files.unet_config)

    @property
    def defaults(self) -> SamplingDefaults:
        """Steps, guidance scale, size and sampler for requests that do not set them."""
        return image_defaults(
            STEPS,
            GUIDANCE_SCALE,
            self.kind.size,
            solver=self.sampler,
            solvers=SAMPLERS,
            noise_on_cpu=True,
            one_batch=True,
            extras=self._extras,
        )

    @property
    def _extras(self) -> tuple[str, ...]:
        """Names of request settings that this model adds."""
        if self.inpaints:
            return (MASK_PATH,)
        return () if self._control_network is None else ("control_multiplier",)

    @property
    def release(self) -> ModelRelease:
        """The published checkpoint that this family corresponds to."""
        return RELEASES[self.kind]

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of saved LoRAs, checkpoints and images: architecture, prediction type, file names."""
        predicts_v = self.noise.predicts_v
        if self.kind is SDXL:
            architecture = "stable-diffusion-xl-v1-base"
            version = "sdxl_base_v1-0"
        elif self.kind is SD2:
            architecture = "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"
            version = "sd_v2_v" if predicts_v else "sd_v2"
        else:
            architecture = "stable-diffusion-v1"
            version = "sd_v1"
        entries = {
            "architecture": architecture,
            "base_model_version": version,
            "implementation": _SDXL_IMPLEMENTATION if self.kind is SDXL else "diffusers",
            "prediction_type": "v" if predicts_v else "epsilon",
            "resolution": self._resolution,
        }
        if self.files.ckpt is not None:
            entries["sd_model_name"] = self.files.ckpt.name
        if self.files.vae is not None:
            entries["vae_name"] = self.files.vae.name
        # outputs record the model's name, which is needed to read their settings back from the file
        if self.options is NO_OPTIONS:
            return entries | {"model_type": self.kind.name}
        return entries | self._make_training_metadata

    @property
    def hashed_files(self) -> Mapping[str, Path]:
        """Files whose hashes are written to training metadata, by metadata key."""
        return self.files.hashed

    @property
    def _make_training_metadata(self) -> dict[str, str]:
        """Return metadata, under other trainers' keys, for values that do not correspond to one option."""
        values = {
            "ss_v2": str(self.kind is SD2),
            "ss_clip_skip": str(self.clip_skip),
            "ss_debiased_estimation": str(self.options.loss_weights.debiased_estimation_loss),
            # what was trained: an option or the checkpoint itself may have set these
            "ss_v_parameterization": str(self._trained_model_type.predicts_velocity),
            "ss_zero_terminal_snr": str(self._trained_model_type.zero_terminal_snr),
        }
        if self.clip_skip is not None:
            values["encoder_layer"] = str(self.clip_skip)
        return values

    @property
    def _resolution(self) -> str:
        """Training size for metadata: --resolution, or the published model's size."""
        typed = None if self.options is NO_OPTIONS else self.options.resolution
        sides = re.findall(r"\d+", typed or "")
        if not sides:
            is_large = self.kind is SD2 and self.noise.predicts_v
            sides = [str(LARGE_SD2 if is_large else self.kind.size)]
        return f"{sides[0]}x{sides[-1]}"

    # control images

    @property
    def _control_network(self) -> CustomNetwork | None:
        """Return the network in training that uses control images; None if there is none."""
        network = self.custom_network
        return None if network is None or network.in_text_encoders else network

    def check_table(self, table: MediaTable) -> None:
        """Raise an error if a dataset table has no control images although the trained network needs them."""
        if self._control_network is not None:
            table = control_pictures.check_controls(table, self._control_network.label)
        super().check_table(replace(table, has_control=False) if self.stores_controls else table)

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return the cache entry of each image, including its control image if it has one."""
        entries = super().encode_media(encoders, media)
        return control_pictures.add_controls(entries, media) if media.control else entries

    def keep_media(self, request: Request, model_name: str) -> Request:
        """Keep only the media that this model uses: the image to repaint, or the control image."""
        if self.inpaints:
            return set_image_to_repaint(request, super().keep_media, model_name)
        if MASK_PATH in request.extra and self.options is NO_OPTIONS:
            raise OptionError(
                f"--mask_path {request.extra[MASK_PATH]}: {self.files.path} is not an inpainting checkpoint. "
                "gen_img.py repaints with it; or pass an inpainting checkpoint"
            )
        is_controlled = self._control_network is not None
        return control_pictures.keep_control(
            request, super().keep_media, model_name, takes_control=is_controlled
        )

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Return the conditions from a request's images, for inpainting or a control network in training."""
        if self.inpaints:
            # Encode the image to repaint and its mask as conditions, like gen_img.py.
            generator = torch.Generator().manual_seed(prepared.seed)
            shape = self.latent.shape(1, prepared.height, prepared.width)
            source = find_kept_source(prepared.request)
            # skip the numbers drawn earlier, in `_begin_sampling`: the posterior of a source, and the start
            # noise
            for _ in range(2 if source is not None and source.needs_vae else 1):
                torch.randn(shape, generator=generator)
            pixels, mask = read_image_and_mask(prepared)
            masked = self.encode_masked(encoders, pixels, mask, generator)
            return {0: ({name: tensor[None] for name, tensor in masked.items()})}
        return {0: {} if self._control_network is None else control_pictures.sample_controls(prepared)}

    # inpainting

    def for_inpainting(self) -> "StableDiffusion":
        """Return the model with an inpainting U-Net; full fine-tuning adds the missing input channels."""
        takes = UnetInput.WIDENED if self.options.is_full else UnetInput.INPAINTING
        return replace(self, inpaints=True, files=replace(self.files, unet_input=takes))

    def encode_masked(
        self, encoders: MediaEncoders, pixels: Tensor, mask: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return an inpainting U-Net's additional channels: the mask and the masked image's latents, 5 1 h w.

        Args:
            encoders: The loaded VAE.
            pixels: The image, 1 C H W, -1..1.
            mask: Mask, H W; nonzero pixels are repainted.
            generator: Random generator to sample the posterior with.
        """
        return {INPAINTING: make_inputs(encoders.vae, pixels, mask.float(), generator, self.latent)}

    def needs_media(self, prepared: Prepared) -> bool:
        """Return whether a request must encode images before denoising, as for inpainting models."""
        return self.inpaints or super().needs_media(prepared)

    # files

    def check_files(self, media: bool) -> None:
        """Raise UserError if a model file is missing or is of an unsupported kind."""
        self.files.check()

    @property
    def has_dit_files(self) -> bool:
        """Return True: --ckpt is required, and it is the U-Net's file or contains it."""
        return True

    @property
    def dit_files(self) -> tuple[Path, ...]:
        """File with the U-Net: the checkpoint, or a file in its folder."""
        return (self.files.unet_path,)

    def block_counts(self) -> tuple[int, ...]:
        """Number of blocks in each part of the U-Net."""
        return tuple(count for _, count in unet_parts(self.files.unet_config))

    def compute_dtype(self, placement: Placement) -> torch.dtype:
        """Return the U-Net's compute dtype; a dtype set in `placement` takes precedence."""
        return self.files.unet_dtype(placement)

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the U-Net; `expert` is ignored, because one network handles all noise levels."""
        unet = self.files.load_unet(placement, self.dit)
        if self.text_training is not None and self.text_training.cross_attentions:
            from stable_diffusion.layer_texts import (
                split_context_by_layer,  # only for a word with vectors for each layer
            )

            split_context_by_layer(unet, tuple(self.text_training.cross_attentions.values()))
        return unet

    # texts

    def text_encoders(self) -> list[TextEncoder]:
        """Return the checkpoint's text encoders, one or two, which are loaded on first use."""
        encoders = make_encoders(
            self.files,
            self.max_chunks,
            self.clip_skip,
            text_training=self.text_training,
            lora_words=self.lora_words,
        )
        return [*encoders]

    @property
    def word_names(self) -> tuple[str, ...]:
        """Words that extend the text encoders' vocabulary."""
        new_word = None if self.text_training is None else self.text_training.word
        trained = () if new_word is None else (new_word.text,)
        return (*trained, *(word.text for word in self.lora_words))

    def with_words(self, files: WordsByFile, option: str) -> "StableDiffusion":
        """Return a copy of the model that knows the trained words in LoRA files.

        Args:
            files: Words by file.
            option: Option that names the files.

        Raises:
            CheckpointError: If vectors do not fit the text encoders.
        """
        words = merge_lora_words(self.lora_words, read_lora_words(files, option))
        with self.files.open_plan() as checkpoint_plan:
            widths = [text.load_plan.config.dim for text in checkpoint_plan.text_encoders]
        check_words(words, widths, self.kind)
        return replace(self, lora_words=words)

    def with_word_in_texts(self, word: WordToLearn) -> "StableDiffusion":
        """Return the model with embedding rows for a word to train in its text encoders."""
        assert self.text_training is not None  # every training run has it
        text_training = replace(self.text_training, word=NewWord(word.text, word.count))
        return replace(self, text_training=text_training)

    def word_network(self, word: WordToLearn) -> CustomNetwork:
        """Return the trainable network whose weights are a word's embedding vectors."""
        from stable_diffusion.inversion_learning import describe_inversion  # only to train one

        # only the text encoders matter, so any input channels of the U-Net will do
        return describe_inversion(word, replace(self.files, unet_input=UnetInput.ANY))

    @property
    def text_keys(self) -> frozenset[str]:
        """Names of the tensors that the text encoders produce."""
        return frozenset({STATES_1, STATES_2, POOLED} if self.kind is SDXL else {STATES})

    # a training run of all weights

    @property
    def learning_parts(self) -> LearningParts:
        """Learning rates of text encoders and U-Net blocks; number of steps with text encoder training."""
        options = self.options
        return LearningParts(options.text_rates, options.block_rates, options.text_steps)

    def reads_weight(self, text_encoder: str, weight: str) -> bool:
        """Whether the U-Net's text states depend on this weight; those of later layers are unused."""
        by_name = {encoder.name: encoder for encoder in self._token_counters}
        return by_name[text_encoder].reads_weight(weight)

    def checkpoint_bytes(self, dtype: torch.dtype | None) -> int:
        """Return the size of a full checkpoint, in bytes, if the trained weights are saved in `dtype`."""
        with quiet():
            infos = make_writer(self.files, {}, self._trained_model_type).list_infos(dtype)
        return sum(info.size_bytes for info in infos.values())

    def checkpoint_writer(
        self, networks: Mapping[str, nn.Module], as_folder: bool, shard_bytes: int
    ) -> CheckpointWriter:
        """Return a writer that saves trained networks as a single file or in diffusers' layout."""
        if self.files.vae is not None:
            logger.info(
                "Saved checkpoints keep the VAE of %s; that of --vae is only used for latents and samples.",
                self.files.path,
            )
        if not as_folder:
            return make_writer(self.files, networks, self._trained_model_type)
        return make_folder_writer(self.files, networks, self._trained_model_type, SavedForm(shard_bytes))

    @property
    def _trained_model_type(self) -> ModelType:
        """Return the kind and prediction type of the trained model, from the checkpoint and the options."""
        predicts_v = self.noise.predicts_v
        return ModelType(self.kind, predicts_v, predicts_v and self.noise.table[-1] == 1)

    @property
    def is_single_file(self) -> bool:
        """Whether the checkpoint is a single file rather than a folder."""
        return not self.files.path.is_dir()

    @property
    def keeps_shapes(self) -> bool:
        """Whether training keeps the U-Net's number of input channels; False if inpainting adds some."""
        return not self.inpaints or replace(self.files, unet_input=UnetInput.ANY).inpaints

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the U-Net's conditions in training: text states B L C, and for SDXL pooled state and sizes.

        Raises:
            CacheError: If text states were made for a different length or by other text encoders.
        """
        remedy = "the script that caches texts"
        batch.check(dict.fromkeys(sorted(self.text_keys), remedy), "the U-Net")
        conditions = {name: batch.tensor(name) for name in sorted(self.text_keys)}
        text_states = [conditions[name] for name in sorted(self.text_keys - {POOLED})]
        # Raise CacheError unless the text states, B L C each, together have the U-Net's context width
        item = batch.keys[0]
        width = sum(states.shape[-1] for states in text_states)  # the U-Net takes them concatenated
        expected = int(self.files.unet_config.get("cross_attention_dim", 1280))
        if width != expected:
            raise CacheError(
                f"{item}: its text states have width {width}, but the U-Net of {self.files.path} takes "
                f"width {expected}: they were made with a different checkpoint. Cache texts again."
            )
        self._check_text_length(text_states, batch.keys[0])
        if self.kind is SDXL:
            conditions[SIZES] = batch.tensor(SIZES)
        if self.inpaints:
            conditions[INPAINTING] = batch.tensor(INPAINTING)
        if self._control_network is not None:
            conditions |= control_pictures.make_control_conditions(
                batch, latents, self.latent.stride[1], self._control_network.label
            )
        return conditions

    def _check_text_length(self, text_states: Sequence[Tensor], item: str) -> None:
        """Raise CacheError if an item's text states, B L C, were cached with another --max_token_length."""
        max_length = CHUNK_SIZE * self.max_chunks + 2  # with start and end token
        # cached texts are padded to whole chunks; a trained text encoder may leave them shorter
        are_padded = self.text_training is None or self.text_training.pads_captions
        # a word with vectors per cross-attention has one copy of the states for each, concatenated
        num_copies = 1 if self.text_training is None else max(len(self.text_training.cross_attentions), 1)
        for states in text_states:
            length = states.shape[1] // num_copies
            if length > max_length or (are_padded and length < max_length):
                raise CacheError(
                    f"{item}: its text has {length} states, but this training uses {max_length}. Cache "
                    "texts again with the same --max_token_length, or change it here."
                )

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Call diffusers' U-Net; return predicted noise or v, B 4 1 h w.

        Conditions: text states B L C of each encoder; for SDXL also the pooled state B C and sizes B 6.
        """
        device = noisy.device
        dtype = get_compute_dtype(dit)
        state_names = sorted(self.text_keys - {POOLED})
        text_states = torch.cat([send_tensor(cond, name, device).to(dtype) for name in state_names], dim=-1)
        added_conditions: dict[str, Tensor] | None = None
        if self.kind is SDXL:
            pooled = send_tensor(cond, POOLED, device).to(dtype)
            # float32, because bf16 only has multiples of 8 above 1024; the U-Net rounds the embedded sizes
            added_conditions = {"text_embeds": pooled, "time_ids": send_tensor(cond, SIZES, device).float()}
        sample = noisy.squeeze(2)
        if INPAINTING in cond:  # the mask and the masked image, as additional channels
            sample = torch.cat([sample, send_tensor(cond, INPAINTING, device).to(sample).squeeze(2)], dim=1)
        arguments: dict[str, Any] = {
            "sample": sample.to(dtype),
            "timestep": timesteps,
            "encoder_hidden_states": text_states,
            "added_cond_kwargs": added_conditions,
        }
        # a ControlNet or LLLite in training converts control images to additional arguments
        control: UnetControl | None = getattr(dit, "control", None)
        if control is not None:
            control_images, strength = control_pictures.control_in(cond, device, dtype)
            arguments |= control.compute_arguments(control_images, strength, arguments)
        (output,) = dit(**arguments, return_dict=False)
        result: Tensor = output.unsqueeze(2)
        return result

    # for generations: the images of gen_img.py

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request to the values of one image; prompts are parsed as in gen_img.py.

        Raises:
            OptionError: If the sampler does not support this number of steps.
            CheckpointError: If the checkpoint cannot be used.
            DownloadError: If a text needs several chunks, and the tokenizer that splits it is missing.
        """
        prepared = self.resolve_image(request, flow_shift=1.0)  # 1, because these models have no shift
        if request.source is None:
            # a training run's samples are prompt lines, which only have the short name
            option_name = "--steps (--s in a prompt line)" if self.options is NO_OPTIONS else "--s"
            check_sampler_steps(option_name, prepared.solver, prepared.steps)
        else:
            # with an input image, the sampler's own timesteps decide at which step denoising starts
            timesteps = self._begin_sampling(prepared).solver.step_timesteps
            prepared = replace(prepared, timesteps=timesteps)
        (scale,) = prepared.guidance_scale
        uses_negative = is_guided(scale, negative_scale=None)
        if not uses_negative:
            prepared = replace(prepared, guidance_scale=(1.0,))
        padded_prompts = {
            section: self._set_num_chunks(prompts, uses_negative)
            for section, prompts in prepared.prompts.items()
        }
        return replace(prepared, prompts=padded_prompts)

    def comfy_model(self) -> "ComfyModel":
        """Return the settings of ComfyUI nodes that run the checkpoint, for --save_workflow.

        Raises OptionError for a folder, an inpainting model, or a run that trains a network of its own.
        """
        if self.inpaints or self.custom_network is not None:
            raise OptionError("only workflows for LoRAs of text-to-image checkpoints can be written")
        if not self.is_single_file:
            raise OptionError(f"it only loads checkpoints in one file, and {self.files.path} is a folder")
        from stable_diffusion.workflow import describe_checkpoint  # only with --save_workflow

        model_type = self._trained_model_type
        return describe_checkpoint(
            "" if self.files.vae is None else self.files.vae.name,
            self.clip_skip,
            predicts_velocity=model_type.predicts_velocity,
            zero_terminal_snr=model_type.zero_terminal_snr,
        )

    def _set_num_chunks(self, prompts: Prompts, uses_negative: bool) -> Prompts:
        """Pad both prompts to the longer one's number of 75-token chunks."""
        # `Prompt.max_chunks` also makes the text encoders parse `(weight:1.2)` as gen_img.py does.
        counted_texts = [prompts.positive.text]
        if uses_negative and prompts.negative is not None:
            counted_texts.append(prompts.negative.text)
        num_chunks = 1
        if self.max_chunks > 1 or self.warns_if_cut:  # else texts are truncated silently
            num_chunks = max(
                encoder.count_chunks(text) for encoder in self._token_counters for text in counted_texts
            )
        negative = prompts.negative
        if negative is not None:
            negative = replace(negative, max_chunks=num_chunks)
        positive = replace(prompts.positive, max_chunks=num_chunks)
        return replace(prompts, positive=positive, negative=negative)

    @cached_property
    def _token_counters(self) -> list[LazyTextEncoder]:
        """Return text encoders for counting tokens; only their tokenizers are loaded."""
        return make_encoders(
            self.files,
            self.max_chunks,
            self.clip_skip,
            warns_if_cut=self.warns_if_cut,
            lora_words=self.lora_words,
        )

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode an image, 1 1 H W 3 uint8, to latents in model space, 1 4 1 h w.

        The posterior sample and then the noise come from the same seeded generator, as in gen_img.py.
        """
        generator = torch.Generator().manual_seed(seed)
        latents: Tensor = encoders.vae.encode(byte_clips(frames), [generator])
        return latents * self.latent.scale

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield an image's only section to the denoising loop; receive and return its denoised latents.

        Videos have several sections, images have only section 0. `noise` is not used, because the solver,
        which wraps a diffusers scheduler, draws its own noise on the CPU.
        """
        solver = self._begin_sampling(prepared)
        conditions = dict(inputs.get(0, {}))
        if self.kind is SDXL:
            height, width = prepared.height, prepared.width
            # original size, crop offset and target size
            conditions[SIZES] = torch.tensor([(height, width, 0, 0, height, width)], dtype=torch.float32)
        first_sample = solver.scaled_sample(0)  # the start noise, scaled for the U-Net's first call
        section = prompts[0].section(first_sample, conditions)
        denoised_latents = yield replace(section, solver=solver)
        return denoised_latents

    def _begin_sampling(self, prepared: Prepared) -> ScaledSolver:
        """Return the solver for an image, with start noise drawn from the image's seed."""
        # One generator draws in the order of gen_img.py: posterior of the source image, start noise,
        # posterior of the masked image, noise of the steps. The posteriors are sampled elsewhere with
        # generators of the same seed, so their random numbers are only skipped here.
        generator = torch.Generator().manual_seed(prepared.seed)
        _, channels, _, height, width = self.latent.shape(1, prepared.height, prepared.width)

        def draw() -> Tensor:
            return torch.randn(channels, height, width, generator=generator)

        source = prepared.request.source
        # repainting with strength 1 starts from pure noise
        starts_from_noise = (
            self.inpaints and source is not None and find_kept_source(prepared.request) is None
        )
        predicts_v = self.noise.predicts_v
        has_zero_snr = predicts_v and self.noise.table[-1] == 1
        scheduler = make_scheduler(prepared.solver, predicts_v, has_zero_snr)
        num_skipped = prepared.first_step if source is not None or self.inpaints else None
        solver = begin_sampling(scheduler, prepared.steps, [generator], num_skipped)
        if source is not None and source.needs_vae and not starts_from_noise:
            draw()  # skip the posterior that `encode_source` samples
        noise = draw()[None, :, None]
        if self.inpaints:
            draw()  # skip the posterior that `_encode_for_inpainting` samples
        return ScaledSolver(
            solver,
            noise * solver.noise_level,
            noise=noise,
            predicts_v=predicts_v,
            from_noise=starts_from_noise,
        )

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents in model space to pixels, B 3 1 H W, as a single chunk."""
        yield encoders.vae.decode(latents / self.latent.scale)


def family_for_latent_caching(kinds: tuple[ModelKind, ...], options: LatentCachingOptions) -> StableDiffusion:
    """Return the family for caching latents, which also caches control images."""
    return StableDiffusion(TrainingFiles(kinds, options.ckpt, options.vae), stores_controls=True)


def family_for_text_caching(
    kinds: tuple[ModelKind, ...], options: TextCachingOptions, clip_skip: int | None = None
) -> StableDiffusion:
    """Return the family for caching text encoder outputs."""
    dtype = select_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", torch.float32)
    assert dtype is not None
    files = TrainingFiles(kinds, options.ckpt, tokenizer_cache_dir=options.tokenizer_cache_dir, dtype=dtype)
    return StableDiffusion(files, max_chunks=options.num_chunks, clip_skip=clip_skip)


def family_for_training(
    kinds: tuple[ModelKind, ...],
    options: StableDiffusionTrainingOptions,
    v2: bool = False,
    clip_skip: int | None = None,
) -> StableDiffusion:
    """Return the model of a training run.

    Args:
        kinds: Kinds of checkpoints that the script accepts.
        options: Options of the run.
        v2: Whether --v2 declares a checkpoint of Stable Diffusion 2.
        clip_skip: Text encoder layer to take states from, counted from the end; None for the default.

    Raises:
        OptionError: If the options contradict the checkpoint.
    """
    files = TrainingFiles(
        kinds,
        options.ckpt,
        options.vae,
        tokenizer_cache_dir=options.tokenizer_cache_dir,
        v2=v2,
        v_parameterization=options.v_parameterization,
        dtype=PRECISIONS.get(options.mixed_precision, torch.float32),
        scripts=FULL_BY if options.is_full else TRAINED_BY,
        unet_input=UnetInput.LATENTS,
    )
    predicts_v = files.predicts_v
    check_prediction(options, predicts_v)
    noise = make_noise_spec(
        predicts_v,
        options.zero_terminal_snr or files.model_type.zero_terminal_snr,
        weights=options.loss_weights,
        vary=read_noise_changes(options.varied_noise),
    )
    learning_dtype = torch.bfloat16 if options.learns_in_bf16 else torch.float32
    _check_block_rates(options.block_rates, files)
    return StableDiffusion(
        files,
        noise,
        options.num_chunks,
        clip_skip,
        sampler=options.sample_sampler,
        options=options,
        # text encoders with a learning rate of 0 stay frozen
        text_training=TextEncoderTraining(
            {name: learning_dtype for name, rate in options.text_rates.items() if rate != 0},
            options.pads_captions,
        ),
    )


def with_inversion(model: StableDiffusion) -> StableDiffusion:
    """Return the model for textual inversion of the word in its options."""
    from stable_diffusion.inversion_learning import MODULE, with_templates_and_command  # only to train one

    network = with_templates_and_command(model.word_network(model.options.word), model.options)
    model = model.with_word_in_texts(model.options.word)
    return replace(model, custom_network=network, lora_module=MODULE)


def with_extended_inversion(model: StableDiffusion) -> StableDiffusion:
    """Return the model for training a word with vectors for each cross-attention of the U-Net."""
    from stable_diffusion.inversion_learning import (  # only to train one
        MODULE,
        describe_extended_inversion,
        with_templates_and_command,
    )
    from stable_diffusion.layer_texts import list_cross_attentions

    # only the text encoders and the layers matter, so any input channels of the U-Net will do
    files = replace(model.files, unet_input=UnetInput.ANY)
    with files.open_plan() as checkpoint_plan:
        cross_attentions = list_cross_attentions(checkpoint_plan.unet.sources)
    word = model.options.word
    network = describe_extended_inversion(word, files, list(cross_attentions))
    network = with_templates_and_command(network, model.options, XTI_OPTION)
    model = model.with_word_in_texts(word)
    assert model.text_training is not None  # every training run has it
    text_training = replace(model.text_training, cross_attentions=cross_attentions)
    return replace(model, text_training=text_training, custom_network=network, lora_module=MODULE)


def with_control_net(
    model: StableDiffusion, path: Path | None, new_layers_lr: float | None, gradient_checkpointing: bool
) -> StableDiffusion:
    """Return the model for training a ControlNet.

    Args:
        model: The model.
        path: File to start from; None copies the U-Net.
        new_layers_lr: Learning rate of layers that the U-Net does not have; None uses the common rate.
        gradient_checkpointing: Whether to use gradient checkpointing.
    """
    from stable_diffusion.control_net_learning import MODULE, describe_control_net  # only to train one

    network = describe_control_net(
        model.options,
        model.files,
        path=path,
        new_layers_lr=new_layers_lr,
        gradient_checkpointing=gradient_checkpointing,
    )
    return replace(model, custom_network=network, lora_module=MODULE)


def _check_block_rates(rates: Sequence[float], files: TrainingFiles) -> None:
    """Raise OptionError if the number of learning rates differs from the number of U-Net blocks."""
    numbered = number_blocks(files.unet_config) if rates else None
    if numbered is not None and len(rates) != numbered.count:
        sides = ", ".join(
            f"{count} of {name.partition('_')[0]}" for name, _, count in numbered.learning_rate_ranges
        )
        raise OptionError(
            f"--block_lr has {len(rates)} numbers, but the U-Net of {files.path} has {numbered.count} "
            f"blocks: pass one for its embeddings, {sides}, and one for its output"
        )


def family_for_generation(
    kinds: tuple[ModelKind, ...], options: StableDiffusionGenerationOptions
) -> StableDiffusion:
    """Return the Stable Diffusion model to generate with.

    Args:
        kinds: Kinds of checkpoints that the script accepts.
        options: Options of the command line.

    Raises:
        OptionError: If the options contradict the checkpoint.
    """
    dtype = torch.float32
    if options.fp16:
        dtype = torch.float16
    elif options.bf16:
        dtype = torch.bfloat16
    files = TrainingFiles(
        kinds,
        options.ckpt,
        options.vae,
        tokenizer_cache_dir=options.tokenizer_cache_dir,
        v_parameterization=options.v_parameterization,
        dtype=dtype,
        scripts=GENERATED_BY,
    )
    check_sampling(options.zero_terminal_snr, files.predicts_v)
    noise = make_noise_spec(files.predicts_v, options.zero_terminal_snr or files.model_type.zero_terminal_snr)
    return StableDiffusion(
        files,
        noise,
        max_chunks=options.max_embeddings_multiples or 1,
        clip_skip=options.clip_skip,
        warns_if_cut=True,  # warn about a prompt that is cut off
        inpaints=files.inpaints,
    )


def check_prediction(options: StableDiffusionTrainingOptions, predicts_v: bool) -> None:
    """Raise OptionError for loss weightings that do not fit the model's prediction type."""
    weights = options.loss_weights
    if weights.scale_v_pred_loss_like_noise_pred and not predicts_v:
        raise OptionError(
            "--scale_v_pred_loss_like_noise_pred is for models that predict v, but this one predicts noise. "
            "Omit it, or add --v_parameterization if the model was trained that way"
        )
    if weights.v_pred_like_loss and predicts_v:
        raise OptionError(
            f"--v_pred_like_loss {weights.v_pred_like_loss:g} is for models that predict noise, but this "
            "one predicts v. Omit it"
        )
    if options.zero_terminal_snr and not predicts_v:
        raise OptionError(
            "--zero_terminal_snr needs a model that predicts v: a model that predicts noise learns nothing "
            "from the last timestep, which is pure noise. Omit it, or add --v_parameterization if the "
            "model was trained that way"
        )


_: type[Family] = StableDiffusion

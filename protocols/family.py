"""The contract between a model family and the shared loops.

Fixed meanings: `noisy` is B C F H W in model space (images: F = 1). `sigmas` is the share of noise (B, 0..1);
`timesteps` is the model's input (B, float, about 1000 * sigma). `predict` returns the velocity `noise -
latents`, shaped like `noisy`. An image and its audio are one tensor, B N (`AudioVideoShapes`), with a
timestep each. A family is a frozen dataclass made by `family_for_training/caching/generation(options)` in
its `family.py`; no loop asks for its name.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn

from modules.integers import ceil_div
from protocols import rules
from protocols.data import (
    Audio,
    AudioSpec,
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    MomentsBatch,
    MomentsRules,
    SamplingDefaults,
)
from protocols.few_steps import FewSteps
from protocols.loading import BlockSharder, Placement
from protocols.requests import Prepared, Prompt, Request
from protocols.steps import NO_OVERRIDES, CleanTokens, EncodedPrompts, Overrides, Section

if TYPE_CHECKING:  # a generation fits no images to buckets
    from modules.media.buckets import Fit, Size


class CleanTokenRule(Protocol):
    """Rule by which training keeps some latents clean, in addition to first frames. Workers get a copy."""

    def draw(self, batch: Batch, generator: torch.Generator) -> CleanTokens | None:
        """Draw the clean latents of each sample; None if there are none.

        Raises:
            DatasetError: If all latents of a sample would be clean.
        """

    def always(self) -> "CleanTokenRule":
        """Return the rule with all probabilities set to 1, for measuring the largest memory use."""


@dataclass(frozen=True)
class NoiseSpec:
    """Noise conventions of a family; the defaults are those of the video families.

    Without `table`, the model is a rectified flow: noisy = (1 - sigma) latents + sigma noise, sigma from 0 to
    1. With `table`, it predicts noise in k-diffusion's form: noisy = latents + sigma noise, sigma from the
    table. In both cases `predict` returns the derivative of `noisy` by sigma: `noise - latents` or `noise`.

    With `keeps_variance`, noise is added as in DDPM: noisy = sqrt(1 - sigma^2) latents + sigma noise, sigma
    from the table, up to 1. `predict` returns the noise, or, with `predicts_v`,
    v = sqrt(1 - sigma^2) noise - sigma latents.
    """

    # the network's timestep in training is 1000 sigma + this, except with --timestep_sampling sigma
    training_offset: float = 1.0
    # sign of the velocity in the network's own output: -1 for latents - noise, which `predict` negates. It
    # matters only for --model_prediction_type, which mixes the output with other tensors
    output_sign: float = 1.0
    integer_timesteps: bool = False  # whether timesteps are truncated to integers
    table_is_shifted: bool = False  # --discrete_flow_shift shifts --timestep_sampling sigma too
    # shape of the latents (B C F H W, or B C T M of audio) -> number of tokens, for shifts that depend on
    # the size. It must be picklable, because workers receive it: no lambda
    count_tokens: Callable[[Sequence[int]], int] | None = None
    table: tuple[float, ...] = ()  # sigma of each of the 1000 timesteps, for a model that predicts noise
    keeps_variance: bool = False  # only with `table`: see above
    predicts_v: bool = False  # only with `keeps_variance`: `predict` returns v instead of the noise
    # factor on the loss of each of the 1000 timesteps; (): all are 1
    loss_factors: tuple[float, ...] = ()
    # for a model that predicts clean latents: the loss compares these instead of velocities, multiplied by
    # this factor, which undoes `LatentSpec.scale`; 0: velocities
    clean_loss_scale: float = 0.0
    # changes the noise of training before it is added: (noise, latents in model space, generator) -> noise,
    # all B C F H W; None: the noise is used as drawn. It must be picklable, because workers receive it
    vary_noise: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None = None
    # probability that a batch of clips trains with its first latent frame clean
    # (`Overrides.num_clean_frames`)
    first_frame_probability: float = 0.0
    clean_token_rule: CleanTokenRule | None = None  # which other latents stay clean in training; None: none
    shifted_logit: rules.ShiftedLogit | None = None  # settings of the sampler shifted_logit_normal
    cut_logit: rules.CutLogit | None = None  # settings of the sampler cut_logit_normal
    # time shift from the images' noise levels to their audio's; 1: they are the same
    audio_shift: float = 1.0
    # time shift applied after every sampler. Options and draws refer to levels before it, over which the
    # model's generations are evenly spaced
    base_shift: float = 1.0
    # changes the conditions of a training batch at each step: (conditions, `Batch.condition_set`,
    # generator) -> conditions. It must be picklable, because workers receive it: no lambda
    change_conditions: Callable[[Conditions, str, torch.Generator], Conditions] | None = None

    def signal_scale(self, sigmas: Tensor) -> Tensor:
        """Return the factor of the clean latents in `noisy`, shaped like `sigmas`, float32."""
        shares = 1 - sigmas.float()
        if self.keeps_variance:
            return (shares * (1 + sigmas.float())).sqrt()  # (1 - sigma)(1 + sigma) is more exact near sigma 1
        return torch.ones_like(shares) if self.table else shares

    def velocity(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Return the target of `predict`, shaped like `latents` and `noise`.

        Args:
            latents: Clean latents in model space, B C F H W.
            noise: Gaussian noise of the same shape.
            sigmas: Noise level of each item, B.
        """
        if self.predicts_v:
            rows = (-1, *([1] * (latents.ndim - 1)))
            shares = self.signal_scale(sigmas).view(rows)
            return shares * noise - sigmas.float().view(rows) * latents
        return noise if self.table else noise - latents


def count_image_tokens(shape: Sequence[int]) -> int:
    """Return the number of tokens of one latent frame, with patches of 2 x 2.

    Args:
        shape: Shape of the latents, B C F H W.
    """
    return (shape[-2] // 2) * (shape[-1] // 2)


# for the video families; as in other trainers, the shift does not depend on the length of a video
FLOW = NoiseSpec(count_tokens=count_image_tokens)


@dataclass(frozen=True)
class NumberedBlocks:
    """How block numbers in --network_args, which set ranks and learning rates per block, map to a network."""

    count: int  # how many numbers block_dims and the like have
    # argument with learning rates, its first block, number of blocks
    learning_rate_ranges: tuple[tuple[str, int, int], ...]
    path_prefixes: tuple[tuple[str, int], ...]  # prefix of a module's path, number of its block

    def number_of(self, path: str) -> int | None:
        """Return the block number of a module; None if the module is not in a block."""
        return next((number for start, number in self.path_prefixes if path.startswith(f"{start}.")), None)


@dataclass(frozen=True)
class DitSpec:
    """Names inside a DiT, for code that changes it from outside."""

    block_lists: tuple[str, ...]  # attribute names of the nn.ModuleLists that contain the blocks
    # the second of two lists, if its blocks process a second stream (`Hidden.control_tokens`). They are
    # spread evenly: each runs before the first block of its share of the other list
    side_list: str = ""
    has_additions: bool = False  # whether a ControlNet adds to all tokens (`Hidden.block_residuals`)
    fp8_exclude: tuple[str, ...] = ()  # parts of parameter names that are never stored in fp8
    # storage form -> parts of parameter names, for other forms with different exclusions
    form_exclude: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    # parts of module paths in blocks, with a leading ".", that get a LoRA only on request
    lora_exclude: tuple[str, ...] = ()
    # patterns of module paths in blocks; if there are any, only modules that match one get a LoRA
    lora_include: tuple[str, ...] = ()
    frozen_lists: tuple[str, ...] = ()  # those of `block_lists` whose modules never get a LoRA
    lora_lists: tuple[str, ...] = ()  # other parts of the network whose modules may get a LoRA
    # parts of module paths, with a leading ".", that get a LoRA only with conv_dim, that is, if convolutions
    # larger than 1 x 1 get one: the residual blocks of U-Nets
    conv_lora_modules: tuple[str, ...] = ()
    block_numbering: NumberedBlocks | None = None  # None: this model does not support block_dims and the like
    keep_float32: tuple[str, ...] = ()  # beginnings of names of parameters that are float32 in memory
    keep_float32_layers: tuple[str, ...] = ()  # parts of such names, for layers that every block has
    # attribute of a list of layers in blocks: with changing sizes, only these layers are compiled
    compiled_layers_attribute: str = ""
    # ending of the path of a layer in blocks -> number of equally high matrices fused in its weight
    num_fused_matrices: Mapping[str, int] = field(default_factory=dict, compare=False)
    # groups of modules with the same input, as endings of their paths: LoRAs multiply the input only once
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    # attribute of a list of layers in blocks: if it has several layers, each is checkpointed instead of the
    # block
    checkpointed_layers_attribute: str = ""
    further_blocks: tuple[str, ...] = ()  # other lists of blocks, such as those for the text alone
    # large layers that turn inputs into tokens, for --img_in_txt_in_offloading
    input_layers: tuple[str, ...] = ()
    # --blocks_to_swap -> number of swapped blocks in each list; None: no block can be swapped
    swap_counts: Callable[[int], tuple[int, ...]] | None = lambda blocks: (blocks,)
    # blocks of each list that stay on the device, as in other trainers; a list of two can still swap one
    num_unswapped: int = 1
    # methods of some blocks that process each token (axis 1 of the first input) independently
    token_wise_methods: tuple[str, ...] = ()
    # method of the first list's blocks: block input (x, tokens) -> input of its attention, B L C, which
    # TeaCache compares between steps; None: TeaCache is not supported
    modulated_input: str | None = None
    # polynomial from the relative change of that input to that of the output, highest power first; (): it
    # has to be calibrated first
    teacache_coefficients: tuple[float, ...] = ()

    def count_matrices(self, weight: str) -> int:
        """Return how many matrices a weight in a block contains.

        Args:
            weight: Name of the weight.
        """
        path = f".{weight.removesuffix('.weight')}"
        return next((count for ending, count in self.num_fused_matrices.items() if path.endswith(ending)), 1)

    def stays_float32(self, name: str) -> bool:
        """Return whether a parameter is float32 in memory, whatever the dtype of the network.

        Args:
            name: Name of the parameter.
        """
        return name.startswith(self.keep_float32) or any(part in name for part in self.keep_float32_layers)

    def blocks(self, dit: nn.Module) -> dict[str, list[nn.Module]]:
        """Return the blocks of a network, by the attribute name of their list."""
        return {name: list(dit.get_submodule(name).children()) for name in self.block_lists}

    def execution_order(self, counts: Sequence[int]) -> list[int]:
        """Return the indices of all blocks in the order in which they run.

        Indices count over all lists, in the order of `block_lists`; blocks of `side_list` are interleaved.

        Args:
            counts: Number of blocks in each list.
        """
        indices = list(range(sum(counts)))
        if not self.side_list:
            return indices
        num_main, num_side = counts
        interval = ceil_div(num_main, max(num_side, 1))  # main blocks per side block

        def sort_key(index: int) -> float:
            # side block k runs just before main block k * interval
            return index if index < num_main else (index - num_main) * interval - 0.5

        return sorted(indices, key=sort_key)

    def blocks_in_order(self, dit: nn.Module) -> list[nn.Module]:
        """Return all blocks of a network in the order in which they run."""
        lists = self.blocks(dit).values()
        blocks = [block for blocks_of_list in lists for block in blocks_of_list]
        return [
            blocks[place] for place in self.execution_order([len(blocks_of_list) for blocks_of_list in lists])
        ]


class NoiseSource(Protocol):
    """Source of random numbers for one request."""

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw Gaussian noise of a shape, continuing one generator made from seed, device and --cpu_noise."""


@dataclass(frozen=True)
class EncoderAbilities:
    """Flags for optional features of a text encoder."""

    trainable: bool = False  # the encoder is a `LearningEncoder`
    has_text_layers: bool = False  # the encoder is an `EncoderWithTextLayers`
    offloads_layers: bool = False  # the encoder is a `LayeredEncoder`
    shardable: bool = False  # the encoder is a `DividedEncoder`
    has_vision_tower: bool = False  # the encoder is a `SeeingEncoder`
    writes_cache_metadata: bool = False  # the encoder is a `MarkingEncoder`
    accepts_new_words: bool = False  # the encoder is an `encoders.new_words.WordEncoder`
    # the encoder also reads the clip of a caption (`Prompt.clip`), or the media of its row (`Prompt.media`):
    # a caption is encoded once per clip, and cached for one item of the clip
    encodes_clip: bool = False
    encodes_media: bool = False


class TextEncoder(Protocol):
    """One of a family's text encoders; loaded, used and freed one after the other."""

    @property
    def abilities(self) -> EncoderAbilities:
        """Features of this encoder beyond the protocol, known before it is loaded."""

    @property
    def name(self) -> str:
        """Name for messages and cache records, such as "t5"."""

    @property
    def keys(self) -> frozenset[str]:
        """Names of the tensors that `encode` returns."""

    @property
    def variable_length(self) -> frozenset[str]:
        """Names of the tensors whose length differs between prompts; caches store them as `varlen_{key}`."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything except the text that an output depends on, determined without loading the weights.

        Caches record the identity and are rebuilt when it changes.
        """

    def token_counter(self) -> rules.CountTokens:
        """Return a function that counts the tokens of a text. It loads no weights and downloads nothing.

        Raises:
            CheckpointError: If there is no tokenizer.
        """

    def load(self, device: torch.device) -> None:
        """Load the network onto `device`; if it is loaded already, move it there."""

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Encode prompts; return one entry per prompt, whose tensors have no batch dimension.

        A condition that is a list of tensors has one entry in its list.

        Raises:
            MediaError: If an image of a prompt cannot be read.
        """

    def free(self) -> None:
        """Release the memory of the network."""


class LearningEncoder(TextEncoder, Protocol):
    """A text encoder that can be trained with a LoRA: `encode` is differentiable if gradients are on."""

    @property
    def lora_prefix(self) -> str:
        """Prefix of this encoder's names in LoRA files, such as "lora_te1"."""

    @property
    def network(self) -> nn.Module:
        """The loaded network.

        A LoRA is applied to the blocks that the network's `DitSpec` names (`runtime.run_blocks.get_spec`).
        """


def can_learn(encoder: TextEncoder) -> TypeGuard[LearningEncoder]:
    """Return whether the encoder can be trained with a LoRA."""
    return encoder.abilities.trainable


class EncoderWithTextLayers(TextEncoder, Protocol):
    """A text encoder followed by layers that are stored in the transformer's file.

    LoRA files name these layers like the transformer's.
    """

    @property
    def text_layers(self) -> nn.Module:
        """The loaded layers that follow the encoder."""


def has_text_layers(encoder: TextEncoder) -> TypeGuard[EncoderWithTextLayers]:
    """Return whether the encoder is followed by layers from the transformer's file."""
    return encoder.abilities.has_text_layers


class LayeredEncoder(TextEncoder, Protocol):
    """A text encoder that keeps some layers in host memory if they do not all fit on a CUDA device."""

    def offloaded_bytes(self, free_bytes: int) -> int:
        """Return how many bytes of layers stay in host memory if the device has `free_bytes`."""


def is_layered(encoder: TextEncoder) -> TypeGuard[LayeredEncoder]:
    """Return whether the encoder can keep layers in host memory."""
    return encoder.abilities.offloads_layers


class DividedEncoder(TextEncoder, Protocol):
    """A text encoder whose blocks can be split over processes; all of them must encode the same texts."""

    blocks: BlockSharder | None  # set before `load`

    @property
    def network(self) -> nn.Module:
        """The loaded network. Its `spec` names its blocks."""


def can_divide(encoder: TextEncoder) -> TypeGuard[DividedEncoder]:
    """Return whether the encoder's blocks can be split over processes."""
    return encoder.abilities.shardable


class SeeingEncoder(TextEncoder, Protocol):
    """A text encoder that loads its vision tower only when the first prompt with images arrives."""

    def load_tower(self, device: torch.device) -> None:
        """Load the vision tower onto `device`, unless it is loaded already or this run never uses it."""


def can_see(encoder: TextEncoder) -> TypeGuard[SeeingEncoder]:
    """Return whether the encoder has a vision tower that it can load."""
    return encoder.abilities.has_vision_tower


class MarkingEncoder(TextEncoder, Protocol):
    """A text encoder that records the purpose of its caches in plain metadata, as other programs do."""

    def cache_metadata(self, caption: str, shown: Sequence[str]) -> Mapping[str, str]:
        """Return the metadata of a caption's cache.

        Args:
            caption: Text that was encoded.
            shown: Content hashes of the images and clips that were encoded with the text.
        """

    def check_metadata(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Check that a cache, from any program, was made for this encoder's purpose.

        Raises:
            CacheError: If the metadata names a different purpose.
        """


def has_cache_metadata(encoder: TextEncoder) -> TypeGuard[MarkingEncoder]:
    """Return whether the encoder records in a cache's metadata what the cache is for."""
    return encoder.abilities.writes_cache_metadata


@dataclass(frozen=True)
class Abilities:
    """Flags for features that only some families have."""

    trains_audio: bool = False  # the family is a `HearsAudio`: in some runs its clips can have audio
    takes_fps: bool = False  # the frame rate is an input of the model, in runs without audio too
    detects_few_steps: bool = False  # the family is a `KnowsFewSteps`
    # clips are read by their timestamps by default, as with source_fps = "auto"
    match_audio_schedule: bool = False
    takes_row_references: bool = False  # rows of lists may have `references` (`MediaBatch.row_references`)
    sampling_dit_option: str = ""  # option that names a separate, frozen transformer for training samples
    # makes the network of samples from the trained one and that of `sampling_dit_option`, which has the same
    # weights by name and shape; None: samples use the latter, or one after the other
    join_sample_networks: Callable[[nn.Module, nn.Module], nn.Module] | None = None
    trains_with_guides: bool = False  # clips are trained with images that guide them (`data.GUIDES`)
    references: str = ""  # for messages: the variant that takes references of clips, and how to select it
    views: tuple[str, ...] = ()  # additional conditions that a training run can use (`Batch.condition_set`)
    one_sample: str = ""  # why training batches have one sample: completes "batch_size 2: ..."
    reads_empty_prompt: bool = False  # the family is a `BringsEmptyText`
    has_part_rates: bool = False  # the family is a `RatesParts`
    # the checkpoint contains the text encoders, which a training run can then use
    has_text_encoders: bool = False
    trains_checkpoint: bool = False  # the family is a `protocols.full_model.TrainsCheckpoint`
    has_custom_network: bool = False  # the family is a `protocols.family_networks.HasCustomNetwork`
    inpaints: bool = False  # the family is an `Inpaints` of the training feature for inpainting
    adjusts_captions: bool = False  # the family is a `FitsCaptions`
    # it has `comfy_model`, see `HasComfyNodes` in training/features/workflow_nodes.py
    has_comfy_nodes: bool = False


class Described(Protocol):
    """What a family is: its names, abilities, latent space, network and defaults."""

    @property
    def abilities(self) -> Abilities:
        """Flags for optional features, which not every family has."""

    @property
    def name(self) -> str:
        """Name of the architecture in the metadata of caches and LoRA files, such as "wan"."""

    @property
    def cache_tag(self) -> str:
        """Suffix of the names of cache files, such as "wan"."""

    @property
    def latent(self) -> LatentSpec:
        """The latent space of the VAE."""

    @property
    def noise(self) -> NoiseSpec:
        """How training adds noise and numbers its timesteps."""

    @property
    def dit(self) -> DitSpec:
        """Names inside the network, for code that changes it from outside."""

    @property
    def defaults(self) -> SamplingDefaults:
        """Values of a request that does not set them: size, frames, steps, guidance."""

    @property
    def caching_switches(self) -> tuple[str, ...]:
        """Options of the caching script that this training run's checkpoint needs."""

    @property
    def teacher_only_conditions(self) -> tuple[str, ...]:
        """Conditions that only the teacher of a distillation gets: CAPTION, FIRST_FRAME or REFERENCE."""

    @property
    def options(self) -> Any:
        """The family's own option record; its fields declare which options a resumed run compares."""

    @property
    def release(self) -> rules.ModelRelease:
        """The released model, for the license and the model card of everything trained from it."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Values about the model for the metadata of saved files.

        - `architecture`, `implementation`, `prediction_type`, `encoder_layer`: for `modelspec.*`.
        - `resolution`: for `modelspec.*`, if it is not the default one of its kind of model.
        - `sd_model_name`, `sd_model_name_EXPERT`, `vae_name`, `model_type`: for `ss_*`.
        - `base_model_version`: the model's name in files, if it differs from `Family.name`.
        - `trained_for`: the model's use, if it has several that its files do not distinguish.
        - `modelspec.*`, `reference_*`, `audio_ref_*`: entries that programs need to load the file.
        - `file_model_type`: for `model_type` of whole models, without which some programs do not load them.
        - `ss_*`: entries that other trainers write.
        """

    @property
    def hashed_files(self) -> Mapping[str, Path]:
        """Files whose hashes a trained file records as `ss_NAME_hash`, by NAME: sd_model or vae."""


class Encodes(Protocol):
    """Encoding of texts and media: for caches, for generation and for training samples."""

    def check_named_files(self) -> None:
        """Check every file that an option names, whether this run needs it or not, without loading it.

        Raises:
            CheckpointError: If a file is missing or of the wrong kind.
        """

    def text_encoders(self) -> Sequence[TextEncoder]:
        """Return the text encoders, in the order in which they run."""

    @property
    def text_keys(self) -> frozenset[str]:
        """Names of all tensors that a complete text cache contains, from all text encoders."""

    @property
    def media_identity(self) -> Mapping[str, str]:
        """Everything that encoded media depend on, determined without loading the weights."""

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        """Load the VAE and, if `images` is set, the networks that encode images as conditions."""

    @property
    def references(self) -> rules.ReferenceRules | None:
        """Rules for the model's reference images; None if it uses none.

        Control media of a model without references are resized like the frames that they belong to.
        """

    def check_table(self, table: MediaTable) -> None:
        """Check that the items of a dataset table can be cached, without loading anything.

        Raises:
            DatasetError: If the model cannot use the items.
        """

    def sections_of(self, table: MediaTable, frames: int) -> int | None:
        """Return the number of cache files, one per section, of an item with this number of frames.

        Returns:
            None for a model without sections, whose items have one file.

        Raises:
            MediaError: If the item is too short for a section.
        """

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Encode a batch of media; return a list of at least one cache entry for each item."""

    @property
    def moments(self) -> MomentsRules:
        """Whether caches can be made from precomputed VAE moments, and which moments are needed."""

    def latents_from_moments(self, media: MomentsBatch) -> list[CacheEntry]:
        """Return what `encode_media` returns for clips with these moments, one entry each.

        No network is loaded.
        """


class Caches(Described, Encodes, Protocol):
    """What caching needs from a family."""


class KnowsFewSteps(Protocol):
    """A family that can tell whether a transformer was distilled to few steps."""

    @property
    def few_steps(self) -> FewSteps:
        """How a training run keeps a transformer distilled, and how many steps its samples take."""

    def few_steps_evidence(self) -> str | None:
        """Return how a file of this run shows that it was distilled to few steps; None if none does."""


def knows_few_steps(family: Described) -> TypeGuard[KnowsFewSteps]:
    """Return whether the family can tell whether its transformer was distilled to few steps."""
    return family.abilities.detects_few_steps


class BringsEmptyText(Protocol):
    """A family that can read the empty prompt's conditions from a file instead of from caches."""

    def empty_text(self) -> Mapping[str, Tensor]:
        """Read the conditions of the empty prompt for one sample, by the names that caches use.

        Returns:
            An empty mapping if no option names a file.

        Raises:
            CacheError: If the file is of the wrong kind.
        """


def brings_empty_text(family: Described) -> TypeGuard[BringsEmptyText]:
    """Return whether the family can read the empty prompt's conditions from a file."""
    return family.abilities.reads_empty_prompt


class RatesParts(Protocol):
    """A family with separate learning rates for parts of its network in full fine-tuning."""

    @property
    def part_rates(self) -> Mapping[str, float]:
        """Learning rates by part of a parameter's name; the first match applies, and a rate of 0 freezes.

        A parameter without a match has the training run's learning rate.
        """


def get_part_rates(family: Described) -> Mapping[str, float]:
    """Return the learning rates of parts of the network; {} if the family has none."""
    return cast("RatesParts", family).part_rates if family.abilities.has_part_rates else {}


class FitsCaptions(Protocol):
    """A family with JSON captions that may contain coordinates in their image."""

    def has_coordinates(self, caption: str) -> bool:
        """Return whether a caption is a JSON object that may contain coordinates in its image."""

    def find_caption_errors(self, caption: str, size: "Size") -> Sequence[str]:
        """Return one line for each error in a JSON caption.

        Args:
            caption: The caption.
            size: Width and height of its image.
        """

    def fit_caption(self, caption: str, size: "Size", fit: "Fit") -> str:
        """Return the caption with its coordinates converted from the original image to the bucket's crop."""


def fits_captions(family: Described) -> TypeGuard[FitsCaptions]:
    """Return whether captions of the family may contain pixel coordinates, which cropping changes."""
    return family.abilities.adjusts_captions


class HearsAudio(Protocol):
    """A family whose clips can have audio, which has latents of its own."""

    @property
    def audio(self) -> AudioSpec | None:
        """Format of the audio latents; None if this run has no audio."""

    @property
    def audio_learning(self) -> rules.AudioLearning:
        """Loss weights and noise levels of audio in training."""

    @property
    def audio_identity(self) -> Mapping[str, str]:
        """Everything that encoded audio depends on, determined without loading the weights."""

    def audio_networks(self, device: torch.device, decodes: bool) -> Any:
        """Load the networks that encode audio or, if `decodes` is set, those that decode its latents."""

    def encode_audio(self, networks: Any, samples: Tensor, frames: int, fps: float) -> Tensor:
        """Encode the audio of clips as latents in model space, B C T M.

        Args:
            networks: Result of `audio_networks`.
            samples: Amplitudes, B channels S, at `audio.rate` samples per second.
            frames: Number of frames of each clip.
            fps: Frames per second.
        """

    def decode_audio(self, networks: Any, latents: Tensor) -> Audio:
        """Decode the audio latents of one clip, 1 C T M, to its track."""


def trains_audio(family: Described) -> TypeGuard[HearsAudio]:
    """Return whether this run trains on clips with audio."""
    return get_audio_spec(family) is not None


def get_audio_spec(family: Described) -> AudioSpec | None:
    """Return the audio format of this run; None if the run has no audio."""
    return cast("HearsAudio", family).audio if family.abilities.trains_audio else None


class Passes(Protocol):
    """The network as the denoising loop uses it: one pass per call."""

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity of `noisy` in one pass of the network.

        Args:
            dit: Network that `load_dit` returned.
            noisy: Noisy latents in model space, B C F H W.
            timesteps: Timesteps as the model expects them, B; about 1000 * sigma.
            cond: Conditions by the names that caches use.
            overrides: Changes to this single call.

        Returns:
            `noise - latents`, shaped like `noisy`. A model that predicts noise returns the noise instead.
        """


class Predicts(Passes, Protocol):
    """The network, for training and for generation."""

    @property
    def lora_module(self) -> str:
        """Module that LoRA files record in `ss_network_module`, such as "networks.lora_wan"."""

    @property
    def experts(self) -> tuple[rules.Expert, ...]:
        """The networks that divide the noise levels, lowest first; ONE_EXPERT for a single network."""

    @property
    def has_dit_files(self) -> bool:
        """Whether options name a transformer; without one, `dit_files` raises, but `--check` still works."""

    @property
    def dit_files(self) -> tuple[Path, ...]:
        """The checkpoint of each expert."""

    def file_beside(self, dit: Path) -> Path | None:
        """Return a file with additional tensors for one of `dit_files`, such as a second stack of blocks."""

    def block_counts(self) -> tuple[int, ...]:
        """Return how many blocks each list of `DitSpec.block_lists` has; () if headers do not show it."""

    def compute_dtype(self, placement: Placement) -> torch.dtype:
        """Return the dtype in which the loaded network computes without autocast, from headers alone."""

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the network of an expert as `placement` specifies."""

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the network's conditions for a training batch, whose `latents` are in model space."""


class Generates(Protocol):
    """Generation around the network, from a request to pixels: for generation and for training samples."""

    def check_files(self, media: bool) -> None:
        """Check the files that a generation needs or that options name, without loading them.

        Args:
            media: Whether VAE and image encoder are needed too.

        Raises:
            OptionError: If the DiT or a text encoder is not given.
            CheckpointError: If a file is missing or of the wrong kind.
        """

    def prepare(self, request: Request) -> Prepared:
        """Resolve every size and number of a request, without loading anything.

        Raises:
            OptionError: If the model cannot do what the request asks for.
            CheckpointError: If a file is missing or of the wrong kind.
            MediaError: If an image cannot be read.
        """

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the images of a request as conditions, by the index of the section that they belong to."""

    def needs_media(self, prepared: Prepared) -> bool:
        """Return whether `request_conditions` needs the encoders."""

    @property
    def source(self) -> rules.SourceRules:
        """What denoising can start from instead of noise."""

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode the frames of a source video or image as latents 1 C f h w in model space.

        Args:
            encoders: Result of `media_encoders`.
            frames: Frames, 1 F H W 3 uint8, with F = 4n + 1.
            seed: Seed of the request, for a VAE that samples from its posterior.
        """

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the sections to denoise, and receive the latents of each; return the latents to decode.

        Args:
            prepared: The request with all values resolved.
            prompts: Encoded prompts by the index of the first section that uses them.
            inputs: Result of `request_conditions`.
            noise: Source of all noise of this request.
        """

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents to chunks of pixels, B C F H W in -1..1, in playing order."""


class Trains(Described, Predicts, Protocol):
    """What a training step needs from a family."""


class Family(Described, Encodes, Predicts, Generates, Protocol):
    """Everything that the loops may use of a model family. A loop declares only the parts that it uses."""

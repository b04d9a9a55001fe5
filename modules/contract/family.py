"""The contract between a model family and the shared loops.

Fixed meanings: `noisy` is B C F H W in model space (images: F = 1). `sigmas` is the share of noise (B, 0..1);
`timesteps` is the model's input (B, float, about 1000 * sigma). `predict` returns the velocity `noise -
latents`, shaped like `noisy`. A family is a frozen dataclass made by
`family_for_training/caching/generation(options)` in its `family.py`; no loop asks for its name.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from modules.contract.data import (
    Batch,
    CacheEntry,
    Conditions,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    MomentsBatch,
    MomentsRules,
)
from modules.contract.experts import ONE_EXPERT, Expert
from modules.contract.generation import NO_TWEAKS, EncodedPrompts, Prompt, Request, Section, Tweaks
from modules.contract.loading import Placement
from modules.contract.noise import NoiseSpec
from modules.contract.npz import NpzFormat
from modules.contract.prepared import Prepared
from modules.contract.release import ModelRelease
from modules.contract.source import SourceRules
from modules.contract.tokens import CountTokens


@dataclass(frozen=True)
class LatentSpec:
    """The latent space of a family's VAE and how cached latents become model-space latents: `cached * scale +
    shift`.
    """

    channels: int
    stride: tuple[int, int, int]  # frames, height, width
    pixel_step: int  # widths and heights are multiples of this
    frame_step: int  # frames are frame_step * n + 1
    scale: float = 1.0
    shift: float = 0.0
    preview_factors: tuple[tuple[float, float, float], ...] = ()  # channels x RGB, latent to colour
    preview_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    # clips are learned in sections, whose length is the model's: the dataset's fp_... keys count
    in_sections: bool = False
    npz: NpzFormat | None = None  # the caches of other trainers; None: there are none

    @property
    def is_of_pictures(self) -> bool:
        """Return whether time is not compressed: the model makes single pictures."""
        return self.stride[0] == 1

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """1 C F H W of the latents for a size in pixels."""
        return (
            1,
            self.channels,
            (frames - 1) // self.stride[0] + 1,
            height // self.stride[1],
            width // self.stride[2],
        )

    def to_model(self, cached: Tensor) -> Tensor:
        """Cached latents in model space, float32."""
        return cached.float() * self.scale + self.shift


@dataclass(frozen=True)
class DitSpec:
    """Names inside a DiT for code that acts on it from outside."""

    block_lists: tuple[str, ...]  # attribute names of the nn.ModuleLists that hold the blocks
    fp8_exclude: tuple[str, ...] = ()  # parts of parameter names never stored in fp8
    # parts of module paths in blocks on which a LoRA is put only if asked for
    lora_exclude: tuple[str, ...] = ()
    keep_float32: tuple[str, ...] = ()
    # what turns inputs into tokens, where large: for --img_in_txt_in_offloading
    input_layers: tuple[str, ...] = ()
    # --blocks_to_swap -> how many of each list
    swap_counts: Callable[[int], tuple[int, ...]] = lambda blocks: (blocks,)
    token_wise: tuple[
        str, ...
    ] = ()  # methods of blocks, those that have them, that treat each token (axis 1 of the first input) alone
    # method of the blocks of the first list: their input (x, tokens) -> what their attention gets, B L C;
    # what TeaCache compares between steps. None: the model has none
    modulated_input: str | None = None
    # from its relative change to that of the output, highest power first; (): calibrate first
    teacache_coefficients: tuple[float, ...] = ()

    def blocks(self, dit: nn.Module) -> dict[str, list[nn.Module]]:
        """Return the blocks of each list by its name, in the order in which they run."""
        return {name: list(dit.get_submodule(name).children()) for name in self.block_lists}


@dataclass(frozen=True)
class SamplingDefaults:
    """Defaults of generation and training samples."""

    steps: int
    fps: float
    guidance_scale: float
    embedded_guidance: float | None
    flow_shift: float | None  # None: the family finds it from the size, and training samples cannot change it
    solver: str
    width: int
    height: int
    frames: int
    noise_on_cpu: bool = False  # as released: the same on every device, whatever --cpu_noise says
    # guidance scales of experts that have one of their own, by name
    expert_guidance: Mapping[str, float] = field(default_factory=dict)
    experts: tuple[Expert, ...] = ONE_EXPERT  # that the model has, given or not, by their lowest timestep


class NoiseSource(Protocol):
    """Random numbers of one request; `draw` continues one generator made from seed, device and
    --cpu_noise.
    """

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor: ...


class TextEncoder(Protocol):
    """One of a family's text encoders; loaded, used and freed one after the other."""

    @property
    def name(self) -> str: ...  # "t5": for messages and cache records

    @property
    def keys(self) -> frozenset[str]: ...  # of what `encode` returns

    @property
    # keys whose length differs per prompt; stored as `varlen_{key}`
    def variable_length(self) -> frozenset[str]: ...

    @property
    # what an output depends on beside the text; found without loading the weights
    def identity(self) -> Mapping[str, str]: ...

    # loads the tokenizer only, and downloads nothing; CheckpointError if there is none
    def token_counter(self) -> CountTokens: ...

    def load(self, device: torch.device) -> None: ...  # one that is loaded already moves there

    def encode(
        self, prompts: Sequence[Prompt]
    ) -> list[Conditions]: ...  # one per prompt, without batch dimension (lists: one entry)

    def free(self) -> None: ...


class LearningEncoder(TextEncoder, Protocol):
    """A text encoder that a LoRA can be put into: `encode` is differentiable if gradients are on."""

    @property
    def lora_prefix(self) -> str: ...  # "lora_te1": of the names in LoRA files

    @property
    # once loaded; a LoRA goes into the blocks that its `DitSpec` names (`modules.run_blocks.spec_of`)
    def network(self) -> nn.Module: ...


def can_learn(encoder: TextEncoder) -> TypeGuard[LearningEncoder]:
    """Return whether a text encoder, loaded or not, is a `LearningEncoder`.

    `isinstance` would read its properties: `identity` opens files, `network` needs a loaded one.
    """
    return hasattr(encoder, "lora_prefix")


class Described(Protocol):
    """Description of a family: names, latent space, network, defaults."""

    @property
    def name(self) -> str: ...  # "wan": architecture in cache and LoRA metadata

    @property
    def latent(self) -> LatentSpec: ...

    @property
    def noise(self) -> NoiseSpec: ...

    @property
    def dit(self) -> DitSpec: ...

    @property
    def defaults(self) -> SamplingDefaults: ...

    @property
    def options(self) -> Any: ...  # the family's own option record; its facts say what resume compares

    @property
    def release(self) -> ModelRelease: ...  # for licence and card of what is trained from it

    @property
    # modelspec.architecture, ss_sd_model_name, bt_model_type, ... of saved files
    def metadata(self) -> Mapping[str, str]: ...


class Encodes(Protocol):
    """Texts and media encoded: for caches, for generation and for training samples."""

    @property
    def cache_tag(self) -> str: ...  # "wan": at the end of cache file names

    # raises if a file that an option names is missing or of another kind, needed or not; loads nothing
    def check_given_files(self) -> None: ...

    def text_encoders(self) -> Sequence[TextEncoder]: ...

    @property
    def text_keys(self) -> frozenset[str]: ...  # of all text encoders together: what a whole text cache holds

    @property
    # what encoded media depend on; found without loading the weights
    def media_identity(self) -> Mapping[str, str]: ...

    # images: what conditions need too
    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders: ...

    # DatasetError where its items cannot be cached; nothing is loaded
    def check_table(self, table: MediaTable) -> None: ...

    # cache files of an item of so many frames, one per section; None: one without; MediaError: too short
    def sections_of(self, table: MediaTable, frames: int) -> int | None: ...

    # per item at least one
    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]: ...

    @property
    def moments(self) -> MomentsRules: ...

    # what `encode_media` returns for clips with these moments, one file each; nothing is loaded
    def latents_from_moments(self, media: MomentsBatch) -> list[CacheEntry]: ...


class Passes(Protocol):
    """One pass of a network, as the denoising loop needs it."""

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor: ...


class Predicts(Passes, Protocol):
    """The network: for training and for generation."""

    @property
    def lora_module(self) -> str: ...  # "networks.lora_wan"

    @property
    # the networks that share the noise levels, lowest first; ONE_EXPERT for a single network
    def experts(self) -> tuple[Expert, ...]: ...

    @property
    def dit_files(self) -> tuple[Path, ...]: ...  # the checkpoint of each expert

    # blocks of each list of `DitSpec.block_lists`, from headers alone; () if these do not tell
    def block_counts(self) -> tuple[int, ...]: ...

    # of the loaded network without autocast; from headers alone
    def compute_dtype(self, placement: Placement) -> torch.dtype: ...

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module: ...

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions: ...  # latents in model space


class Generates(Protocol):
    """From a request to pixels, around the network: for generation and for training samples."""

    # raises if one of the DiT or text encoders is missing or wrong; media: VAE too
    def check_files(self, media: bool) -> None: ...

    def prepare(self, request: Request) -> Prepared: ...  # final sizes and numbers, or raises; nothing loaded

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]: ...

    # whether `request_conditions` needs the encoders at all
    def needs_media(self, prepared: Prepared) -> bool: ...

    @property
    def source(self) -> SourceRules: ...  # what denoising may start from

    # frames 1 F H W 3 uint8, F = 4n + 1 -> latents 1 C f h w in model space; seed: of the request
    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor: ...

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]: ...

    # B C F H W chunks in playing order, -1..1
    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]: ...


class Family(Described, Encodes, Predicts, Generates, Protocol):
    """All that the loops may ask of a model family. A loop names only the parts that it uses."""

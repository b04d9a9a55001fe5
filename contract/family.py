"""The contract between a model family and the shared loops.

Fixed meanings: `noisy` is B C F H W in model space (images: F = 1). `sigmas` is the share of noise (B, 0..1);
`timesteps` is the model's input (B, float, about 1000 * sigma). `predict` returns the velocity `noise -
latents`, shaped like `noisy`. A picture and its sound are one tensor, B N (`Joint`), with a timestep each. A
family is a frozen dataclass made by `family_for_training/caching/generation(options)` in its `family.py`; no
loop asks for its name.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn

from contract import rules
from contract.data import (
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
    Sound,
    SoundSpec,
)
from contract.few_steps import FewSteps
from contract.loading import BlockPlace, Placement
from contract.requests import Prepared, Prompt, Request
from contract.steps import NO_TWEAKS, EncodedPrompts, Section, Tweaks

if TYPE_CHECKING:  # a generation fits no pictures to buckets
    from modules.media.buckets import Fit, Size


@dataclass(frozen=True)
class NoiseSpec:
    """Noise conventions of a family; the defaults are those of the video families.

    Without a table the model is a rectified flow: noisy = (1 - sigma) latents + sigma noise, sigma from 0 to
    1. With one it predicts noise, in k-diffusion's form: noisy = latents + sigma noise, sigma from the table.
    In both, the velocity that `predict` returns is the derivative of `noisy` by sigma: `noise - latents`, or
    `noise`.

    With `keeps_variance` the mixture is that of DDPM: noisy = sqrt(1 - sigma^2) latents + sigma noise, sigma
    from the table, up to 1. `predict` returns the noise, or with `predicts_v` v = sqrt(1 - sigma^2) noise -
    sigma latents.
    """

    training_offset: float = 1.0  # training feeds 1000 sigma + this, except with --timestep_sampling sigma
    # sign of the velocity in the network's own output: -1 for latents - noise, which `predict` negates. It
    # matters only for --model_prediction_type, which mixes the output with other tensors
    output_sign: float = 1.0
    whole_timesteps: bool = False  # the timestep fed to the network is cut to a whole number
    table_is_shifted: bool = False  # --discrete_flow_shift shifts --timestep_sampling sigma too
    # shape of the latents, B C F H W or B C T M of sound -> number of tokens, for shifts that follow the
    # size. No lambda: workers receive it
    tokens: Callable[[Sequence[int]], int] | None = None
    table: tuple[float, ...] = ()  # the sigma of each of the 1000 timesteps, for a model that predicts noise
    keeps_variance: bool = False  # with a table: see above
    predicts_v: bool = False  # with `keeps_variance`: v in place of the noise
    # factor on the loss of each of the 1000 timesteps; (): all are 1
    loss_factors: tuple[float, ...] = ()
    # what training makes of its noise before it is mixed in, from the noise, the latents in model space (both
    # B C F H W) and a generator; None: nothing. No lambda: workers receive it
    vary: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None = None
    # probability that a batch of clips is trained with its first latent frame clean (`Tweaks.given_frames`)
    first_frame_probability: float = 0.0
    shifted_logit: rules.ShiftedLogit | None = None  # of the sampler with this name, for a model that has it
    cut_logit: rules.CutLogit | None = None  # likewise, of cut_logit_normal
    # by which the noise levels of a picture are shifted to those of its sound; 1: they are the same
    sound_shift: float = 1.0
    # a shift behind all samplers: options and draws count levels before it, which the model's generations
    # visit evenly
    base_shift: float = 1.0
    # what training makes of the further inputs of a batch (its tensors, by name), new at each step: from
    # them, what a teacher sees (`Batch.view`; "": there is none) and a generator. No lambda: workers get it
    vary_inputs: Callable[[Conditions, str, torch.Generator], Conditions] | None = None

    def data_shares(self, sigmas: Tensor) -> Tensor:
        """Return the factor of the latents in a mixture: shaped like `sigmas`, float32."""
        shares = 1 - sigmas.float()
        if self.keeps_variance:
            return (shares * (1 + sigmas.float())).sqrt()  # 1 - sigma^2 would round near 1
        return torch.ones_like(shares) if self.table else shares

    def velocity(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Return the target of `predict`: shaped like `latents` and `noise`, B C F H W. sigmas: B."""
        if self.predicts_v:
            rows = (-1, *([1] * (latents.ndim - 1)))
            shares = self.data_shares(sigmas).view(rows)
            return shares * noise - sigmas.float().view(rows) * latents
        return noise if self.table else noise - latents


def count_image_tokens(shape: Sequence[int]) -> int:
    """Return the tokens of one latent frame: its height and width are halved. shape: B C F H W."""
    return (shape[-2] // 2) * (shape[-1] // 2)


# of the video families; as in other tuners the length of a video does not count towards its shift
FLOW = NoiseSpec(tokens=count_image_tokens)


@dataclass(frozen=True)
class NumberedBlocks:
    """Blocks of a network, numbered as in the --network_args that set ranks and learning rates of blocks."""

    count: int  # of the numbers in block_dims and the like
    sides: tuple[tuple[str, int, int], ...]  # argument of rates, its first block, how many it has
    starts: tuple[tuple[str, int], ...]  # how the path of a module begins -> number of its block

    def number_of(self, path: str) -> int | None:
        """Return the number of a module's block; None if it belongs to no block."""
        return next((number for start, number in self.starts if path.startswith(f"{start}.")), None)


@dataclass(frozen=True)
class DitSpec:
    """Names inside a DiT for code that acts on it from outside."""

    block_lists: tuple[str, ...]  # attribute names of the nn.ModuleLists that hold the blocks
    # the last of two lists, if its blocks are those of a second stream (`Hidden.side`): each runs before the
    # first of an equal share of the other list's blocks
    side_list: str = ""
    has_additions: bool = False  # what a ControlNet next to it adds to all tokens (`Hidden.added`)
    fp8_exclude: tuple[str, ...] = ()  # parts of parameter names never stored in fp8
    # the same for other forms, by the form's name, if it differs
    form_exclude: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    # parts of module paths in blocks, with a "." in front, on which a LoRA is put only if asked for
    lora_exclude: tuple[str, ...] = ()
    # patterns of module paths in blocks; a LoRA is put on those that match one, if there are any
    lora_choice: tuple[str, ...] = ()
    lora_lists: tuple[str, ...] = ()  # further parts of the network that a LoRA may be put on
    # parts of module paths, with a "." in front, that get a LoRA only if convolutions larger than 1 x 1 get
    # one (conv_dim): of U-Nets, their residual blocks
    with_convolutions: tuple[str, ...] = ()
    numbered: NumberedBlocks | None = None  # None: block_dims and the like are not for this model
    keep_float32: tuple[str, ...] = ()
    # each size is compiled by itself: torch's compiler fails on convolutions of general sizes
    compiles_each_size: bool = False
    # endings of paths of layers in blocks whose weights hold several matrices of equal height -> how many
    fused: Mapping[str, int] = field(default_factory=dict, compare=False)
    further_blocks: tuple[str, ...] = ()  # lists of further blocks, such as those over the text alone
    # layers that turn inputs into tokens, if they are large: for --img_in_txt_in_offloading
    input_layers: tuple[str, ...] = ()
    # --blocks_to_swap -> how many of each list; None: no block of this network can be swapped
    swap_counts: Callable[[int], tuple[int, ...]] | None = lambda blocks: (blocks,)
    # blocks of each list that it cannot swap, as in the known tuners; a list of two can swap one all the same
    unswapped: int = 1
    # methods of blocks, those that have them, that treat each token (axis 1 of the first input) alone
    token_wise: tuple[str, ...] = ()
    # method of the blocks of the first list: their input (x, tokens) -> what their attention gets, B L C;
    # what TeaCache compares between steps. None: the model has none
    modulated_input: str | None = None
    # polynomial from that input's relative change to the output's, highest power first; (): calibrate first
    teacache_coefficients: tuple[float, ...] = ()

    def count_matrices(self, weight: str) -> int:
        """Return how many matrices a weight in a block holds. weight: its name."""
        path = f".{weight.removesuffix('.weight')}"
        return next((count for ending, count in self.fused.items() if path.endswith(ending)), 1)

    def blocks(self, dit: nn.Module) -> dict[str, list[nn.Module]]:
        return {name: list(dit.get_submodule(name).children()) for name in self.block_lists}

    def order(self, counts: Sequence[int]) -> list[int]:
        """Return the places of all blocks in the order in which they run. counts: of each list.

        Places are counted over all lists, in the order of `block_lists`.
        """
        places = list(range(sum(counts)))
        if not self.side_list:
            return places
        main, side = counts
        share = -(-main // max(side, 1))
        return sorted(places, key=lambda place: place if place < main else (place - main) * share - 0.5)

    def in_order(self, dit: nn.Module) -> list[nn.Module]:
        lists = self.blocks(dit).values()
        blocks = [block for blocks_of_list in lists for block in blocks_of_list]
        return [blocks[place] for place in self.order([len(blocks_of_list) for blocks_of_list in lists])]


class NoiseSource(Protocol):
    """Random numbers of one request; `draw` continues one generator made from seed, device and
    --cpu_noise.
    """

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor: ...


@dataclass(frozen=True)
class EncoderAbilities:
    """Abilities that only some text encoders have."""

    learn: bool = False  # it is a `LearningEncoder`
    have_side: bool = False  # an `EncoderWithSide`
    wait: bool = False  # a `LayeredEncoder`
    divide: bool = False  # a `DividedEncoder`
    see: bool = False  # a `SeeingEncoder`
    mark: bool = False  # a `MarkingEncoder`
    # it sees the frames of the clip that a caption belongs to (`Prompt.clip`), or the media of its row
    # (`Prompt.media`): a caption is encoded for each clip, and cached for one item of it
    see_clip: bool = False
    see_media: bool = False


class TextEncoder(Protocol):
    """One of a family's text encoders; loaded, used and freed one after the other."""

    @property
    def can(self) -> EncoderAbilities: ...  # known without loading

    @property
    def name(self) -> str: ...  # "t5": for messages and cache records

    @property
    def keys(self) -> frozenset[str]: ...  # of what `encode` returns

    @property
    # keys whose length differs per prompt; stored as `varlen_{key}`
    def variable_length(self) -> frozenset[str]: ...

    @property
    # what an output depends on in addition to the text; found without loading the weights
    def identity(self) -> Mapping[str, str]: ...

    # loads no weights, and downloads nothing; CheckpointError if there is no tokenizer
    def token_counter(self) -> rules.CountTokens: ...

    def load(self, device: torch.device) -> None: ...  # one that is loaded already moves there

    # one per prompt, without batch dimension (lists: one entry); MediaError if a picture cannot be read
    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]: ...

    def free(self) -> None: ...


class LearningEncoder(TextEncoder, Protocol):
    """A text encoder that a LoRA can be put into: `encode` is differentiable if gradients are on."""

    @property
    def lora_prefix(self) -> str: ...  # "lora_te1": of the names in LoRA files

    @property
    # once loaded; a LoRA goes into the blocks that its `DitSpec` names (`running.run_blocks.spec_of`)
    def network(self) -> nn.Module: ...


def can_learn(encoder: TextEncoder) -> TypeGuard[LearningEncoder]:
    return encoder.can.learn


class EncoderWithSide(TextEncoder, Protocol):
    """A text encoder followed by layers of the model's own file. LoRAs name these layers as the
    transformer's.
    """

    @property
    def text_side(self) -> nn.Module: ...  # these layers, once loaded


def has_text_side(encoder: TextEncoder) -> TypeGuard[EncoderWithSide]:
    return encoder.can.have_side


class LayeredEncoder(TextEncoder, Protocol):
    """A text encoder that keeps some layers in host memory if a CUDA device has no room for all."""

    def waiting_bytes(self, room: int) -> int: ...  # of these layers, with so many free bytes


def is_layered(encoder: TextEncoder) -> TypeGuard[LayeredEncoder]:
    return encoder.can.wait


class DividedEncoder(TextEncoder, Protocol):
    """A text encoder whose blocks can be split over processes, which then have to encode the same texts."""

    blocks: BlockPlace | None  # set before `load`

    @property
    def network(self) -> nn.Module: ...  # once loaded; its `spec` names its blocks


def can_divide(encoder: TextEncoder) -> TypeGuard[DividedEncoder]:
    return encoder.can.divide


class SeeingEncoder(TextEncoder, Protocol):
    """A text encoder that may load its vision tower with the first prompt that has pictures."""

    def load_tower(self, device: torch.device) -> None: ...  # onto it, unless it is loaded or never used


def can_see(encoder: TextEncoder) -> TypeGuard[SeeingEncoder]:
    return encoder.can.see


class MarkingEncoder(TextEncoder, Protocol):
    """A text encoder that marks its caches in plain metadata with their purpose, as other programs do."""

    # of a caption, and the content hashes of pictures and clips that were shown with it
    def cache_metadata(self, caption: str, shown: Sequence[str]) -> Mapping[str, str]: ...

    # CacheError for a cache, of any program, that is for something else
    def check_metadata(self, path: Path, metadata: Mapping[str, str]) -> None: ...


def can_mark(encoder: TextEncoder) -> TypeGuard[MarkingEncoder]:
    return encoder.can.mark


@dataclass(frozen=True)
class Abilities:
    """Abilities that only some families have."""

    hear: bool = False  # it is a `HearsSound`: its clips can have sound, in some runs
    rate: bool = False  # the frame rate is an input of the model, in runs without sound too
    tell_few_steps: bool = False  # it is a `KnowsFewSteps`
    keep_time: bool = False  # without source_fps, clips are read by their times, as with source_fps = "auto"
    show_media: bool = False  # rows of lists have `references` (`MediaBatch.shown`)
    sample_apart: str = ""  # its option of a transformer that makes samples of a training and does not learn
    references: str = ""  # which of its variants takes references of clips, and how to ask for it
    views: tuple[str, ...] = ()  # further conditions that it can have in a training (`Batch.view`)
    one_sample: str = ""  # why a batch of a training has one sample: completes "batch_size 2: ..."
    bring_empty: bool = False  # it is a `BringsEmptyText`
    rate_parts: bool = False  # it is a `RatesParts`
    bring_texts: bool = False  # its checkpoint has the text encoders too, so that a training knows them
    train_checkpoint: bool = False  # it is a `contract.whole.TrainsCheckpoint`
    make_network: bool = False  # it is a `contract.made_networks.MakesNetwork`
    take_words: bool = False  # it is a `contract.brought_words.TakesWords`
    learn_words: bool = False  # it is a `LearnsWords` of the feature embedding
    fit_captions: bool = False  # it is a `FitsCaptions`


class Described(Protocol):
    """What a family is: names, abilities, latent space, network, defaults."""

    @property
    def can(self) -> Abilities: ...

    @property
    def name(self) -> str: ...  # "wan": architecture in cache and LoRA metadata

    @property
    def cache_tag(self) -> str: ...  # "wan": at the end of cache file names

    @property
    def latent(self) -> LatentSpec: ...

    @property
    def noise(self) -> NoiseSpec: ...

    @property
    def dit(self) -> DitSpec: ...

    @property
    def defaults(self) -> SamplingDefaults: ...

    @property
    # options of the script that caches latents, which follow from the checkpoint of a training
    def caching_switches(self) -> tuple[str, ...]: ...

    @property
    # conditions that a teacher gets beyond those of the network in training: CAPTION, FIRST_FRAME, REFERENCE
    def fuller(self) -> tuple[str, ...]: ...

    @property
    def options(self) -> Any: ...  # the family's own option record; its facts say what resume compares

    @property
    def release(self) -> rules.ModelRelease: ...  # for licence and card of what is trained from it

    @property
    # modelspec.architecture, ss_sd_model_name, bt_model_type, ... of saved files
    def metadata(self) -> Mapping[str, str]: ...

    @property
    # whose hashes a trained file records, by the name in `ss_NAME_hash`: sd_model, vae
    def hashed_files(self) -> Mapping[str, Path]: ...


class Encodes(Protocol):
    """Encode texts and media: for caches, for generation and for training samples."""

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

    @property
    # None: control media, if it takes any, are fitted like the frames they belong to
    def references(self) -> rules.ReferenceRules | None: ...

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


class Caches(Described, Encodes, Protocol):
    """Functions that caching needs of a family."""


class KnowsFewSteps(Protocol):
    """A family that tells whether a transformer was distilled to few steps."""

    @property
    def few_steps(self) -> FewSteps: ...

    def why_few_steps(self) -> str | None: ...  # what says so of a file of this run; None: nothing does


def knows_few_steps(family: Described) -> TypeGuard[KnowsFewSteps]:
    return family.can.tell_few_steps


class BringsEmptyText(Protocol):
    """A family that may read what the empty prompt is for a training from a file, instead of from caches."""

    # of one sample, by the names in caches; {}: no option names a file. CacheError for another kind of file
    def empty_text(self) -> Mapping[str, Tensor]: ...


def brings_empty_text(family: Described) -> TypeGuard[BringsEmptyText]:
    return family.can.bring_empty


class RatesParts(Protocol):
    """A family with options for learning rates of parts of its network, if all weights are trained."""

    @property
    # what names of parameters contain -> rate, 0: frozen; the first that fits counts, none: the usual rate
    def part_rates(self) -> Mapping[str, float]: ...


def part_rates_of(family: Described) -> Mapping[str, float]:
    return cast("RatesParts", family).part_rates if family.can.rate_parts else {}


class FitsCaptions(Protocol):
    """A family some of whose captions are JSON objects, which may name places in their picture."""

    def names_places(self, caption: str) -> bool: ...  # whether it is such a caption

    # of a picture of that width and height: what is wrong with such a caption, a line each
    def find_caption_errors(self, caption: str, size: "Size") -> Sequence[str]: ...

    # with the places in the picture's bucket
    def fit_caption(self, caption: str, size: "Size", fit: "Fit") -> str: ...


def fits_captions(family: Described) -> TypeGuard[FitsCaptions]:
    return family.can.fit_captions


class HearsSound(Protocol):
    """A family whose clips can have sound, with latents of its own next to the picture's."""

    @property
    def sound(self) -> SoundSpec | None: ...  # None: this run is without

    @property
    def sound_learning(self) -> rules.SoundLearning: ...  # of a training

    @property
    # what encoded sound depends on; found without loading the weights
    def sound_identity(self) -> Mapping[str, str]: ...

    # to encode sound, or to decode latents of it
    def sound_networks(self, device: torch.device, decodes: bool) -> Any: ...

    # samples B channels S at `sound.rate` of a clip with so many frames -> latents B C T M, in model space
    def encode_sound(self, networks: Any, samples: Tensor, frames: int, fps: float) -> Tensor: ...

    # latents 1 C T M -> the track
    def decode_sound(self, networks: Any, latents: Tensor) -> Sound: ...


def hears_sound(family: Described) -> TypeGuard[HearsSound]:
    return sound_of(family) is not None


def sound_of(family: Described) -> SoundSpec | None:
    return cast("HearsSound", family).sound if family.can.hear else None


class Passes(Protocol):
    """The network as the denoising loop calls it, one pass at a time."""

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor: ...


class Predicts(Passes, Protocol):
    """The network: for training and for generation."""

    @property
    def lora_module(self) -> str: ...  # "networks.lora_wan"

    @property
    # the networks that share the noise levels, lowest first; ONE_EXPERT for a single network
    def experts(self) -> tuple[rules.Expert, ...]: ...

    @property
    def dit_files(self) -> tuple[Path, ...]: ...  # the checkpoint of each expert

    # a file with further tensors of one of `dit_files`, such as a second stack of blocks
    def file_beside(self, dit: Path) -> Path | None: ...

    # blocks of each list of `DitSpec.block_lists`, from headers alone; () if these do not tell
    def block_counts(self) -> tuple[int, ...]: ...

    # dtype that the loaded network computes in without autocast; from headers alone
    def compute_dtype(self, placement: Placement) -> torch.dtype: ...

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module: ...

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions: ...  # latents in model space


class Generates(Protocol):
    """From a request to pixels, around the network: for generation and for training samples."""

    # OptionError if the DiT or a text encoder is not given, CheckpointError if its file is missing or wrong;
    # media: those of VAE and image encoder too
    def check_files(self, media: bool) -> None: ...

    # final sizes and numbers; OptionError for a request that cannot be, CheckpointError for a missing or
    # wrong file, MediaError for a picture that cannot be read; nothing is loaded
    def prepare(self, request: Request) -> Prepared: ...

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]: ...

    # whether `request_conditions` needs the encoders at all
    def needs_media(self, prepared: Prepared) -> bool: ...

    @property
    def source(self) -> rules.SourceRules: ...  # what denoising may start from

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


class Trains(Described, Predicts, Protocol):
    """Functions that a training step needs of a family."""


class Family(Described, Encodes, Predicts, Generates, Protocol):
    """All that the loops may ask of a model family. A loop names only the parts that it uses."""

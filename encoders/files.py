"""Base classes for families with one transformer: `TransformerFiles` and `OneTransformer`.

The files of a family derive from the first class, the family itself from the second.
"""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from checkpoints.dits import DitFormat, DitHeader, select_dtype, with_dtype
from checkpoints.model_files import inside, read_once, require_file
from checkpoints.opening import fingerprint
from encoders.new_words import ModelWord, give_words
from modules.devices import dtype_name, select_compute_dtype
from modules.errors import CheckpointError, DatasetError
from modules.speed_options import VaeOptions
from protocols.data import (
    CAPTION,
    REFERENCE,
    CacheEntry,
    MediaEncoders,
    MediaTable,
    MomentsBatch,
    MomentsRules,
)
from protocols.family import Abilities, DitSpec, TextEncoder
from protocols.few_steps import FewSteps, Verdict
from protocols.loading import Placement
from protocols.rules import ONE_EXPERT, Expert, ReferenceRules

if TYPE_CHECKING:
    from protocols.bundled_embeddings import WordsByFile
    from protocols.family_networks import CustomNetwork
    from protocols.new_tokens import WordToLearn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransformerFiles(ABC):
    """Paths and dtypes of a transformer and a VAE, from the options.

    Path properties raise OptionError or CheckpointError if an option is not set or its file is missing.
    Encoders compute in their default dtype, or in float32 if the transformer does.
    """

    dit: Path | None = None
    dit_dtype: torch.dtype | None = None  # None: the dtype of the file
    dit_option: str = "--dit"
    vae: Path | None = None
    vae_dtype: torch.dtype | None = None
    vae_tile: int | None = None
    text_dtype: torch.dtype | None = None
    added_words: tuple[ModelWord, ...] = ()  # additional words of the text encoders

    format: ClassVar[DitFormat[Any, Any]]  # format of the transformer's file
    vae_option: ClassVar[str] = "--vae"
    vae_folder: ClassVar[str] = ""  # subfolder of the VAE in a release; "": releases have none
    default_text_dtype: ClassVar[torch.dtype] = torch.bfloat16  # dtype of the released encoders
    vae_default: ClassVar[torch.dtype | None] = None  # dtype of the released VAE; None: `default_text_dtype`

    def add_dit(self, dit: Path | None, dtype: str | None) -> Self:
        """Return a copy with the options of the transformer; `dtype` is the value of --dit_dtype."""
        return replace(self, dit=dit, dit_dtype=select_compute_dtype(dtype, "--dit_dtype", None))

    def add_vae(self, options: VaeOptions) -> Self:
        """Return a copy with the settings of the VAE options."""
        dtype = select_compute_dtype(options.vae_dtype, "--vae_dtype", None)
        return replace(self, vae=options.vae, vae_dtype=dtype, vae_tile=options.tile)

    @property
    def dit_path(self) -> Path:
        """Path of the transformer; raises an error if it is missing."""
        return require_file(self.dit, self.dit_option, "the transformer checkpoint")

    @property
    def vae_path(self) -> Path:
        """Path of the VAE, or of its subfolder in a release; raises an error if it is missing."""
        path = require_file(self.vae, self.vae_option, "it turns pixels into latents and back")
        return inside(path, self.vae_folder) if self.vae_folder else path

    def dit_header(self) -> DitHeader[Any]:
        """Return the header of the transformer's file; it is read only once."""
        return read_once(self.dit_path, self.format.read_header)

    def compute_dtype(self) -> torch.dtype | None:
        """Return --dit_dtype, or else the file's compute dtype; None if no transformer is given."""
        if self.dit_dtype or self.dit is None:
            return self.dit_dtype
        return self.dit_header().compute_dtype

    def encoder_dtype(self, chosen: torch.dtype | None, default: torch.dtype | None = None) -> torch.dtype:
        """Return an encoder's compute dtype.

        Args:
            chosen: Value of the encoder's option; None if it is not set.
            default: Dtype if the option is not set and the transformer is not in float32; None for the
                default dtype of encoders.
        """
        is_float32 = self.compute_dtype() == torch.float32
        if chosen:
            return chosen
        return torch.float32 if is_float32 else default or self.default_text_dtype

    @abstractmethod
    def load_vae(self, device: torch.device) -> Any:
        """Load the VAE."""

    def vae_identity(self) -> Mapping[str, str]:
        """Return fields of cache records: everything that latents depend on except the pixels."""
        dtype = dtype_name(self.encoder_dtype(self.vae_dtype, self.vae_default))
        return {"vae": fingerprint(self.vae_path), "vae_dtype": dtype, "tile": str(self.vae_tile)}

    @abstractmethod
    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not this model's VAE."""

    @abstractmethod
    def text_encoders(self) -> list[TextEncoder]:
        """Return the text encoders; their files are not opened until they are loaded."""

    @abstractmethod
    def check_texts(self, config: Any, needed: bool) -> None:
        """Check the text encoder files given by options; with `needed`, all of them must be given.

        `config` is the transformer's configuration; None if its option is not set.
        """

    def check(self, needed: Collection[str] = ()) -> None:
        """Check the files that options name, without loading them.

        Args:
            needed: Files whose options must be set: "dit", "vae", "texts".

        Raises:
            OptionError: If the option of a needed file is not set.
            CheckpointError: If a file is missing, or if its network is of a kind or size that the transformer
                cannot use.
        """
        config = self.dit_header().config if self.dit is not None or "dit" in needed else None
        if self.vae is not None or "vae" in needed:
            self.check_vae()
        self.check_texts(config, "texts" in needed)


# Returns the metadata of a checkpoint. One object for all calls, because `read_once` caches by function
_METADATA = attrgetter("metadata")


def judge_distillation(rule: FewSteps, dit: Path) -> Verdict | None:
    """Return the verdict whether a transformer was distilled to few steps, with the evidence.

    A missing or unreadable file is judged by its name alone, because other checks report it.
    """
    metadata: Mapping[str, str] = {}
    with contextlib.suppress(CheckpointError, OSError):
        metadata = read_once(dit, _METADATA)
    return rule.judge(dit, metadata)


class OneTransformer:
    """Base class of families with a single transformer; most properties come from their model files."""

    abilities: ClassVar[Abilities] = Abilities(detects_few_steps=True)
    model_metadata: ClassVar[
        Mapping[str, str]
    ] = {}  # metadata with the model's name, if it is always the same
    few_steps: ClassVar[FewSteps] = FewSteps()  # releases distilled to few steps

    if TYPE_CHECKING:  # a dataclass that inherits a property takes it as the default of its field

        @property
        def name(self) -> str:
            """Name of the family."""

        @property
        @abstractmethod
        def files(self) -> TransformerFiles:
            """Paths and dtypes of the family's model files."""

        @property
        @abstractmethod
        def dit(self) -> DitSpec:
            """Module structure of the transformer: names of its blocks and layers."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The family's metadata plus the names of the model files."""
        return self.add_file_names(self.model_metadata)

    @property
    def hashed_files(self) -> Mapping[str, Path]:
        """Return no files: these families record no file hashes in metadata."""
        return {}

    def text_encoders(self) -> Sequence[TextEncoder]:
        """Return the text encoders for the model files in `files`."""
        encoders = self.files.text_encoders()
        if self.files.added_words:
            give_words(encoders, self.files.added_words)
        return encoders

    @property
    def word_names(self) -> tuple[str, ...]:
        """Return the words that extend the text encoders' vocabulary."""
        return tuple(word.text for word in self.files.added_words)

    def with_words(self, files: "WordsByFile", option: str) -> Self:
        """Return a copy whose text encoders know the textual-inversion words of embedding files and LoRAs.

        If several files contain the same word, the first one is used, with a warning.

        Args:
            files: Words with their vectors, by file.
            option: Option that names the files, for messages.
        """
        known_words = {word.text.lower(): word for word in self.files.added_words}  # case does not matter
        for path, vectors_by_word in files.items():
            for text, vectors in vectors_by_word.items():
                word = ModelWord(text, content=vectors, source=path, option=option)
                known_word = known_words.setdefault(text.lower(), word)
                if known_word is not word:
                    logger.warning("%s: the word %s of %s is used instead.", path, text, known_word.source)
        return self._with_model_words([*known_words.values()])

    def with_word_in_texts(self, word: "WordToLearn") -> Self:
        """Return a copy whose text encoders have embedding rows for a word to train."""
        return self._with_model_words([*self.files.added_words, ModelWord(word.text, word.count)])

    def _with_model_words(self, words: Sequence[ModelWord]) -> Self:
        family: Any = self  # a dataclass, as all families are
        copy: Self = replace(family, files=replace(self.files, added_words=tuple(words)))
        return copy

    def word_network(self, word: "WordToLearn") -> "CustomNetwork":
        """Return a trainable network that consists of a word's embedding vectors."""
        from encoders.inversion import invert_encoders  # only to train one

        return invert_encoders(word, self.files.text_encoders())

    @property
    def caching_switches(self) -> tuple[str, ...]:
        """Return no additional caching options: caches do not depend on the checkpoint."""
        return ()

    @property
    def experts(self) -> tuple[Expert, ...]:
        """A single expert: one network for all noise levels."""
        return ONE_EXPERT

    @property
    def references(self) -> ReferenceRules | None:
        """Rules for reference images; None, the default, for models that take none."""
        return None

    @property
    def teacher_only_conditions(self) -> tuple[str, ...]:
        """Conditions that a teacher model gets even if training drops them: caption and references."""
        return (CAPTION,) if self.references is None else (CAPTION, REFERENCE)

    def few_steps_evidence(self) -> str | None:
        """Return the evidence that a transformer was distilled to few steps; None without evidence."""
        for path in self.dit_files:
            verdict = judge_distillation(self.few_steps, path)
            if verdict is not None and verdict.is_distilled:
                return f"{path}: {verdict.evidence}"
        return None

    def check_named_files(self) -> None:
        """Check all model files given by options; raise UserError if one is unusable."""
        self.files.check()

    @property
    def media_identity(self) -> Mapping[str, str]:
        """Fields of cache records: everything that encoded pixels depend on, i.e. the VAE."""
        return self.files.vae_identity()

    @property
    def moments(self) -> MomentsRules:
        """Rules for precomputed VAE moments; by default, they are rejected."""
        return MomentsRules(f"the model {self.name} is given clips alone. Omit load_tensors")

    def latents_from_moments(self, media: MomentsBatch) -> list[CacheEntry]:
        """Raise DatasetError: by default, caches cannot be made from moments."""
        raise DatasetError(f"load_tensors: {self.moments.rejection}.")

    def sections_of(self, table: MediaTable, frames: int) -> int | None:
        """Return None: items have one cache file, without sections."""
        return None

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        """Load the VAE; `images` is ignored because there is no image encoder."""
        return MediaEncoders(self.files.load_vae(device))

    @property
    def has_dit_files(self) -> bool:
        """Whether a transformer file is given."""
        return self.files.dit is not None

    @property
    def dit_files(self) -> tuple[Path, ...]:
        """The transformer's checkpoint, after its header has been checked."""
        self.files.dit_header()
        return (self.files.dit_path,)

    def file_beside(self, dit: Path) -> Path | None:
        """Return None: no second file is required."""
        return None

    def block_counts(self) -> tuple[int, ...]:
        """Return the number of layers, or of double and single blocks, read from the header."""
        config = self.files.dit_header().config
        if hasattr(config, "num_layers"):
            return (config.num_layers,)
        return config.double_blocks, config.single_blocks  # models like FLUX.1

    def compute_dtype(self, placement: Placement) -> torch.dtype:
        """Return the compute dtype: the placement's, else --dit_dtype, else that of the file's blocks."""
        return select_dtype(self.files.dit_header().block_dtype, with_dtype(placement, self.files.dit_dtype))

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer, in --dit_dtype unless the placement sets a dtype."""
        (path,) = self.dit_files
        network: nn.Module = self.files.format.load(path, with_dtype(placement, self.files.dit_dtype))
        # a release's spec may differ from the class's
        network.spec = self.dit  # type: ignore[assignment]
        return network

    def add_file_names(self, names: Mapping[str, str]) -> Mapping[str, str]:
        """Return `names` with the file names of the transformer and VAE added, if they are given."""
        metadata = dict(names)
        if self.files.dit is not None:
            metadata["sd_model_name"] = self.files.dit.name
        if self.files.vae is not None:
            metadata["vae_name"] = self.files.vae.name
        return metadata

    def check_files(self, media: bool) -> None:
        """Check the transformer and text encoders, with `media` also the VAE; their options must be set."""
        needed = ["dit", "texts"]
        if media:
            needed.append("vae")
        self.files.check(needed)

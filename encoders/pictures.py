"""What all families of picture models share: their files, their description, the colours of latents.

A family derives its files from `PictureFiles` and itself from `ModelOfPictures`, and adds what its network
takes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from encoders.autoencoder import autoencoder_identity, load_autoencoder, read_autoencoder_header
from encoders.tiles import posterior_generator
from modules.checkpoints.dits import DitFormat, DitHeader, choose_dtype, with_dtype
from modules.checkpoints.encoders import dtype_beside
from modules.checkpoints.model_files import read_once, require_file
from modules.contract.data import (
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
from modules.contract.loading import Placement
from modules.contract.requests import (
    NO_MEDIA,
    Prepared,
    Request,
    check_size,
    keep_usable_media,
    settle,
    size_of,
    whole_patches,
)
from modules.contract.rules import ONE_EXPERT, Expert
from modules.devices import choose_compute_dtype
from modules.errors import DatasetError
from modules.media.pixels import byte_clips
from modules.speed_options import VaeOptions

# Least squares fit of latents in model space to colours (R, G, B), which all known tools use
PREVIEW_FACTORS = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
PREVIEW_BIAS = (-0.0329, -0.0718, -0.0851)
NO_MOMENTS = MomentsRules(refusal="the model makes pictures, not clips")


@dataclass(frozen=True)
class PictureFiles:
    """Paths and dtypes of a transformer and of FLUX's autoencoder, as the options give them.

    The path properties raise OptionError or CheckpointError, naming the option. Encoders have the usual
    dtype, or float32 beside a float32 transformer.
    """

    dit: Path | None = None
    dit_dtype: torch.dtype | None = None  # None: as the file says
    dit_option: str = "--pretrained_model_name_or_path"
    vae: Path | None = None
    vae_dtype: torch.dtype | None = None
    vae_tile: int | None = None
    text_dtype: torch.dtype | None = None

    format: ClassVar[DitFormat[Any, Any]]  # of the transformer's file
    vae_option: ClassVar[str] = "--ae"
    usual: ClassVar[torch.dtype] = torch.bfloat16  # of encoders, as released

    def add_vae(self, options: VaeOptions) -> Self:
        """Return a copy with the options of the VAE."""
        dtype = choose_compute_dtype(options.vae_dtype, "--vae_dtype", None)
        return replace(self, vae=options.vae, vae_dtype=dtype, vae_tile=options.tile)

    @property
    def dit_path(self) -> Path:
        return require_file(self.dit, self.dit_option, "the transformer checkpoint")

    @property
    def vae_path(self) -> Path:
        return require_file(self.vae, self.vae_option, "it turns pixels into latents and back")

    def dit_header(self) -> DitHeader[Any]:
        """Read dimensions, dialect and dtype of the transformer file."""
        return read_once(self.dit_path, self.format.read_header)

    def compute_dtype(self) -> torch.dtype | None:
        """Return the transformer's compute dtype; None if there is no transformer."""
        return self.dit_dtype or (None if self.dit is None else self.dit_header().compute_dtype)

    def beside(self, chosen: torch.dtype | None, usual: torch.dtype | None = None) -> torch.dtype:
        """Return an encoder's dtype: `chosen`, else the usual one, or float32 if the transformer is."""
        return dtype_beside(chosen, self.compute_dtype(), usual or self.usual)

    def load_vae(self, device: torch.device) -> Any:
        """Load the VAE."""
        return load_autoencoder(self.vae_path, device, self.beside(self.vae_dtype), self.vae_tile)

    def vae_identity(self) -> Mapping[str, str]:
        """Return the facts that latents depend on besides the pixels."""
        return autoencoder_identity(self.vae_path, self.beside(self.vae_dtype), self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is no VAE of the model."""
        read_autoencoder_header(self.vae_path)

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check the text encoders that are given, or all if needed. config: of the transformer, or None."""
        raise NotImplementedError

    def check(self, needed: Collection[str] = ()) -> None:
        """Check the files that are given or needed ("dit", "vae", "texts"). Loads nothing.

        Raises OptionError if a needed one is not given, CheckpointError if a file is missing, or another kind
        or size of network than the transformer takes.
        """
        config = self.dit_header().config if self.dit is not None or "dit" in needed else None
        if self.vae is not None or "vae" in needed:
            self.check_vae()
        self.check_texts(config, "texts" in needed)


class ModelOfPictures(Protocol):
    """The part of a family that is the same for all models of pictures, which derive from it."""

    called: str  # in messages
    experts: tuple[Expert, ...] = ONE_EXPERT
    moments: MomentsRules = NO_MOMENTS

    if TYPE_CHECKING:  # a property would be taken as the default of a derived record's field

        @property
        def files(self) -> PictureFiles: ...

        @property
        def latent(self) -> LatentSpec: ...

        @property
        def defaults(self) -> SamplingDefaults: ...

    # encoding

    def check_given_files(self) -> None:
        """Check every file that an option names, needed or not. Loads nothing."""
        self.files.check()

    @property
    def media_identity(self) -> Mapping[str, str]:
        """Encoder and switches that cached latents depend on."""
        return self.files.vae_identity()

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        """Return the VAE."""
        return MediaEncoders(self.files.load_vae(device))

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has clips or control images."""
        if table.kind != "image":
            raise DatasetError(
                f"{table.name}: the table has clips, and {self.called} can only learn pictures. Give "
                "image_directory or image_jsonl_file, or train a video model."
            )
        if table.has_control:
            raise DatasetError(
                f"{table.name}: the table has control images, which {self.called} cannot take. Remove them."
            )

    def sections_of(self, table: MediaTable, frames: int) -> int | None:
        """Return None: a picture has one file."""
        return None

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return the cache entry of each picture: a posterior sample, seeded by its name, float32."""
        entries, vae = [], encoders.vae
        for part in media.split_for(vae.device):
            latents = vae.encode(byte_clips(part.frames), [posterior_generator(key) for key in part.keys])
            entries += [[CacheEntry({"latents": latent.clone()})] for latent in latents]
        return entries

    def latents_from_moments(self, media: MomentsBatch) -> list[CacheEntry]:
        """Not for pictures: `NO_MOMENTS` refuses them before."""
        raise AssertionError(NO_MOMENTS.refusal)

    # the network

    @property
    def dit_files(self) -> tuple[Path, ...]:
        """Path of the transformer's checkpoint, checked against the options."""
        self.files.dit_header()
        return (self.files.dit_path,)

    def block_counts(self) -> tuple[int, ...]:
        """Return the numbers of double and of single blocks; the file's header says them."""
        config = self.files.dit_header().config
        return config.double_blocks, config.single_blocks

    def compute_dtype(self, placement: Placement) -> torch.dtype:
        """Return the dtype that the transformer computes in without autocast; its file is not loaded."""
        return choose_dtype(self.files.dit_header().block_dtype, with_dtype(placement, self.files.dit_dtype))

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer. --dit_dtype applies if the caller sets no dtype."""
        (path,) = self.dit_files
        network: nn.Module = self.files.format.load(path, with_dtype(placement, self.files.dit_dtype))
        return network

    def metadata_of(self, names: Mapping[str, str]) -> Mapping[str, str]:
        """Return the names of a model in saved files, with those of its files."""
        files = {"sd_model_name": self.files.dit, "vae_name": self.files.vae}
        return {**names, **{key: path.name for key, path in files.items() if path is not None}}

    # generation

    def check_files(self, media: bool) -> None:
        """Check the files that every generation needs. media: also that of the VAE.

        Raises OptionError if one is not given or does not fit, CheckpointError if it is missing or of another
        kind.
        """
        self.files.check(("dit", "texts", *(("vae",) if media else ())))

    def settle_picture(self, request: Request, flow_shift: float) -> Prepared:
        """Fill open fields of a request for one picture, cut its size to whole patches, check files.

        flow_shift: where the request says none.
        """
        self.files.check()
        request = keep_usable_media(request, NO_MEDIA, f"{self.called} does not take it")
        width, height, _ = size_of(request, self.defaults)
        size = *whole_patches(width, height, self.latent), 1
        check_size(size, self.latent)
        shift = flow_shift if request.flow_shift is None else request.flow_shift
        return settle(request, self.defaults, size, shift, "")

    def needs_media(self, prepared: Prepared) -> bool:
        """Return False: no image must be encoded before denoising."""
        return False

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Return no conditions: there are those of texts only."""
        return {0: {}}

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode a picture, 1 1 H W 3 uint8, as a posterior sample in model space, 1 C 1 h w."""
        latents: Tensor = encoders.vae.encode(byte_clips(frames), [posterior_generator(seed)])
        return latents * self.latent.scale

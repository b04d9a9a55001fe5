"""References in the rows of a dataset: check them, and encode them for caches.

They are prepared like those of a request; see references.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from minimax_h3.audio import H3AudioVae
from minimax_h3.conditions import encode_condition, reference_key
from minimax_h3.options import FPS
from minimax_h3.presentation import AUDIO, IMAGE, VIDEO
from minimax_h3.reference_sound import read_reference_audio
from minimax_h3.references import (
    MAX_SECONDS,
    ClipSource,
    H3Reference,
    ImageSource,
    check_references,
    check_video_length,
    cut_to_vae_length,
    reference_clip,
    reference_image,
)
from minimax_h3.video_vae import H3VideoVae
from modules.errors import DatasetError, MediaError, OptionError, UserError
from modules.media.pixels import byte_clips
from modules.media.samples import track_info
from protocols.rules import ReferenceMedium


def make_reference(medium: ReferenceMedium) -> H3Reference:
    """Make a reference from a dataset row. A clip's audio is the row's audio file or its own track.

    Raises MediaError if the clip cannot be read.
    """
    audio = medium.audio_path
    has_own_audio = medium.kind == VIDEO and not medium.is_silent and not medium.path.is_dir()
    if audio is None and has_own_audio and track_info(medium.path) is not None:
        audio = medium.path
    return H3Reference(medium.kind, medium.path, audio)


def check_row_references(
    media: tuple[ReferenceMedium, ...], name: str, is_image: bool, any_length: bool
) -> None:
    """Raise DatasetError if a dataset row has no references, or some that the model cannot use.

    Args:
        media: The references.
        name: Name of the table, for messages.
        is_image: Whether the item is an image.
        any_length: Whether reference clips may have lengths for which the model was not trained.
    """
    if not media:
        raise DatasetError(
            f"{name}: a row has no references, which --task ref2va requires. Name them in `references`, "
            "or move the row to a separate list, for --task t2va"
        )
    # errors of these checks become errors that name the table
    with _name_table_in_errors(name):
        check_references([make_reference(medium) for medium in media])
        for medium in media:
            if medium.kind == VIDEO:
                check_video_length(medium.path, any_length)
    if is_image and any(medium.kind == AUDIO for medium in media):
        raise DatasetError(
            f"{name}: audio references have the length of the generated clip, but an image has no length. "
            "Omit them"
        )


@contextmanager
def _name_table_in_errors(name: str) -> Iterator[None]:
    """Convert OptionError and MediaError in the block to DatasetError with the table's name."""
    try:
        yield
    except (OptionError, MediaError) as error:
        raise DatasetError(f"{name}: {error}") from error


@dataclass(frozen=True)
class ReferenceSizes:
    """Short edges of references, and the step that all their edges are multiples of, in pixels."""

    image: int
    video: int
    step: int

    def get_reference_source(self, reference: H3Reference, frames: int) -> ImageSource | ClipSource | None:
        """Return where a reference's pixels come from; None for an audio reference.

        `frames` is the length of the generated clip; 1 for an image, for which reference clips keep their
        length. Raises OptionError for shapes that the model does not take.
        """
        if reference.kind == AUDIO:
            return None
        if reference.kind == IMAGE:
            return reference_image(reference.path, self.image, self.step)
        maximum = frames if frames > 1 else round(MAX_SECONDS * FPS)
        return reference_clip(reference.path, self.video, self.step, maximum)


def encode_references(
    vae: H3VideoVae,
    audio_vae: H3AudioVae,
    media: tuple[ReferenceMedium, ...],
    frames: int,
    sizes: ReferenceSizes,
) -> dict[str, Tensor]:
    """Encode the references of a dataset item to latents by name, each without a batch axis.

    `frames` is the length of the item's clip, `sizes` decides how references are resized. Raises MediaError
    if a reference cannot be read or used.
    """
    tensors = {}
    for index, medium in enumerate(media):
        reference = make_reference(medium)
        try:
            source = sizes.get_reference_source(reference, frames)
        except UserError as error:
            raise MediaError(str(error)) from error
        audio = reference.path if reference.kind == AUDIO else reference.audio
        if audio is not None:
            # a single image has no length that could limit the audio
            seconds = frames / FPS if frames > 1 else MAX_SECONDS
            samples = read_reference_audio(audio, seconds)
            tensors[reference_key(index, AUDIO)] = audio_vae.encode(samples)[0]
        if source is None:  # audio alone
            continue
        pixels = source.read()
        clip = pixels.unsqueeze(0) if isinstance(source, ImageSource) else cut_to_vae_length(pixels)
        latents = encode_condition(vae, byte_clips(clip.unsqueeze(0)))
        tensors[reference_key(index, reference.kind)] = latents[0]
    return tensors

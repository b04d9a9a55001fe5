"""Contents of MiniMax-H3's caches: latents of a clip or an image, its audio, and its conditions.

    latents                          24 f h w, a sample of the posterior, normalized
    latents_audio, audio_present     32 2 A, the mean of the posterior, of silence without audio; 1 or 0
    latents_first, latents_last      of fl2va: the first and the last frame, each encoded alone
    latents_ref_000_image, ...       of ref2va: see conditions.py
    one_frame_target_index, latents_control_000, one_frame_control_indices       of images

All are float32, except for indices. Names and metadata are those of other trainers' caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encoders.tiles import posterior_generator, sample_posterior
from minimax_h3.audio import CHANNELS
from minimax_h3.conditions import (
    CONTROL_INDICES,
    FIRST,
    LAST,
    LOG_VARIANCES,
    TARGET_INDEX,
    control_key,
    encode_condition,
)
from minimax_h3.files import H3Files
from minimax_h3.options import (
    FPS,
    MAX_FRAMES,
    MIN_FRAMES,
    NAME,
    H3LatentCachingOptions,
)
from minimax_h3.reference_options import IMAGE_EDGE, VIDEO_EDGE
from minimax_h3.video_vae import H3VideoVae
from modules.errors import DatasetError, MediaError
from modules.media.pixels import byte_clips
from protocols.data import AUDIO_PRESENT, INNER_AUDIO, CacheEntry, MediaBatch, MediaEncoders, MediaTable

# names of formats in musubi-tuner
FORMAT, ONE_FRAME_FORMAT = "minimax-h3-latent-v2", "minimax-h3-one-frame-v2"
REFERENCES = "ref2va"
KEYFRAMES = "fl2va"
TEXT_ALONE = "t2va"
SEED = 42  # as in musubi-tuner


@dataclass(frozen=True)
class H3Caching:
    """Settings of the latent caching script, which also encode a batch."""

    task: str
    seed: int
    any_length: bool
    one_frame: bool
    edges: tuple[int, int] = (IMAGE_EDGE, VIDEO_EDGE)  # short sides of references: images, clips

    @property
    def declared(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata that caches record about the run: its task and seed."""
        return ("task", self.task), ("cache_seed", str(self.seed))

    @property
    def identity(self) -> dict[str, str]:
        """Return the caching settings that latents depend on, apart from input files and VAEs."""
        identity = {**dict(self.declared), "one_frame": str(self.one_frame)}
        if self.task == REFERENCES:
            identity["reference_edges"] = " ".join(map(str, self.edges))
        return identity

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table does not fit the task."""
        if table.has_references:
            raise DatasetError(
                f"{table.name}: references of {NAME} are in `references` of the lines of a list. Omit "
                "reference_directory and reference_path"
            )
        self._check_control(table)
        if table.flips and self.task != TEXT_ALONE:
            raise DatasetError(
                f"{table.name}: flip_aug mirrors keyframes and references, but not what the text encoder "
                "sees of them. Omit it"
            )
        if self.task == REFERENCES:
            self._check_references(table)
        elif table.reference_media:
            raise DatasetError(
                f"{table.name}: its rows have references. Use --task {REFERENCES}, or omit them"
            )
        if table.kind == "video":
            lengths = table.target_frames or (table.max_frames or 0,)
            for frames in lengths:
                self._check_length(frames, table.name, DatasetError)

    def _check_control(self, table: MediaTable) -> None:
        if table.kind == "image" and self.task == KEYFRAMES:
            if not (self.one_frame and table.has_control):
                raise DatasetError(
                    f"{table.name}: --task {KEYFRAMES} generates images from control images. Set "
                    "control_directory, or control_path in a list, and --one_frame; for images without "
                    "control images use --task t2va"
                )
        elif table.has_control:
            raise DatasetError(
                f"{table.name}: only single images are generated from control images, with --task "
                f"{KEYFRAMES} --one_frame. Omit control media"
            )

    def _check_references(self, table: MediaTable) -> None:
        if not table.reference_media:
            raise DatasetError(
                f"{table.name}: --task {REFERENCES} generates clips from references. Name them in "
                "`references` in the lines of video_jsonl_file"
            )
        from minimax_h3.cached_references import check_row_references  # only of ref2va

        for media in table.reference_media:
            check_row_references(
                media,
                table.name,
                is_image=table.kind == "image",
                any_length=self.any_length,
            )

    def _check_length(self, frames: int, name: str, error: type[DatasetError] | type[MediaError]) -> None:
        """Raise `error` for a clip length outside of the model's training lengths."""
        if not self.any_length and not MIN_FRAMES <= frames <= MAX_FRAMES:
            raise error(
                f"{name}: clips of {frames} frames: {NAME} was trained with {MIN_FRAMES} to {MAX_FRAMES} "
                "frames, 5 to 15 seconds. Pass --allow_experimental_duration to take other lengths"
            )

    def check_span(self, table: MediaTable, frames: int) -> None:
        """Raise MediaError for a clip that would be cut to a length at which the model was not trained."""
        if table.kind == "video":
            self._check_length(frames, table.name, MediaError)

    def metadata(self, files: H3Files, media: MediaBatch) -> dict[str, str]:
        """Return the metadata of one item's cache file, under the keys that other trainers use too."""
        identity = files.vae_identity()
        (span,) = media.spans
        metadata = {
            **dict(self.declared),
            "cache_format": FORMAT,
            "crop_start_frame": str(span[0]),
            "video_vae_fingerprint": identity["vae"],
            "audio_vae_fingerprint": identity["audio_vae"],
        }
        if media.table.kind == "image":
            metadata["cache_format"] = ONE_FRAME_FORMAT
            metadata["one_frame"] = "1"
            metadata[TARGET_INDEX] = str(self._select_target_index(media))
        return metadata

    def encode(self, files: H3Files, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return each item's cache entry; raise MediaError if a reference cannot be read or used."""
        entries = []
        for number in range(len(media.keys)):
            item = media.item(number)
            # Encode the only dataset item in `media`; return the tensors to cache by name
            # `step` is the multiple to which sides of references are rounded.
            (key,) = item.keys
            num_frames = item.frames.shape[1]
            latents = encode_target(encoders.vae, byte_clips(item.frames), f"{self.seed} {key}")
            audio = torch.zeros(1, CHANNELS, 0) if item.audio is None else item.audio
            tensors = {
                "latents": latents[0],
                INNER_AUDIO: encoders.audio.encode_clip(audio, num_frames, FPS)[0],
                AUDIO_PRESENT: torch.tensor(float(any(item.has_audio))),
            }
            if item.table.kind == "image":
                tensors |= self._encode_control_images(encoders.vae, item)
            elif self.task == KEYFRAMES:
                tensors |= _encode_keyframes(encoders.vae, item.frames)
            if self.task == REFERENCES:
                from minimax_h3.cached_references import ReferenceSizes, encode_references  # only of ref2va

                image_edge, video_edge = self.edges
                sizes = ReferenceSizes(image_edge, video_edge, files.latent.pixel_step)
                (references,) = item.row_references
                tensors |= encode_references(
                    encoders.vae, encoders.audio, references, frames=num_frames, sizes=sizes
                )
            entries.append([CacheEntry(tensors, metadata=self.metadata(files, item))])
        return entries

    def _select_target_index(self, media: MediaBatch) -> int:
        """Return an image's time position, in frames at 24 per second."""
        return (media.table.target_index or 0) if self.one_frame else 0

    def _encode_control_images(self, vae: H3VideoVae, media: MediaBatch) -> dict[str, Tensor]:
        """Return an image's time position, and the latents and time positions of its control images."""
        tensors = {TARGET_INDEX: torch.tensor(self._select_target_index(media))}
        if not media.control:
            return tensors
        for index, control in enumerate(media.control):
            tensors[control_key(index)] = encode_condition(vae, byte_clips(control[..., :3]))[0]
        indices: Sequence[int] = media.table.clean_indices or (0,) * len(media.control)
        tensors[CONTROL_INDICES] = torch.tensor(indices)
        return tensors


def _encode_keyframes(vae: H3VideoVae, frames: Tensor) -> dict[str, Tensor]:
    """Encode the first and the last of the frames, 1 F H W C, each alone."""
    last = frames.shape[1] - 1
    tensors = {}
    for name, index in ((FIRST, 0), (LAST, last)):
        tensors[name] = encode_condition(vae, byte_clips(frames[:, index : index + 1]))[0]
    return tensors


def encode_target(vae: H3VideoVae, pixels: Tensor, seed: int | str) -> Tensor:
    """Encode a clip, 1 3 F H W, to a normalized posterior sample, 1 C f h w float32.

    `seed` seeds the sample: the name of a cached item, or a generation's seed.
    """
    moments = vae.encode_moments(pixels)
    return vae.normalize(sample_posterior(moments, [posterior_generator(seed)], LOG_VARIANCES))


def make_caching(options: H3LatentCachingOptions) -> H3Caching:
    """Return the latent caching settings that the options set."""
    return H3Caching(
        options.task or TEXT_ALONE,
        seed=SEED if options.cache_seed is None else options.cache_seed,
        any_length=options.allow_experimental_duration,
        one_frame=options.one_frame,
        edges=(options.reference_image_short_edge, options.reference_video_short_edge),
    )

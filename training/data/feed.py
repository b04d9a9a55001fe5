"""Prepare micro-batches early: read cache files, draw noise and timesteps, in workers if there are any.

All randomness in a micro-batch comes from CPU generators seeded by the run's seed and the micro-batch's
number in the run. So it does not depend on the device, the number of workers or processes, or anything done
before.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.synchronize import Event
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset.batches.checks import SameEncoders
from dataset.batches.items import OnTheFlyTables, TrainingItem
from dataset.batches.order import (
    BatchOrder,
    RunPosition,
    change_captions,
    select_captions,
    select_mirrored,
    should_drop_references,
)
from dataset.batches.reading import read_batch
from dataset.cache.records import CacheChecks
from dataset.cache.store import Stores
from modules.devices import pin
from modules.errors import UserError
from modules.seeds import derive_seed
from protocols.data import AUDIO_LATENTS, HAS_AUDIO, Batch, Conditions, LatentSpec
from protocols.family import FLOW, NoiseSpec
from protocols.rules import AUDIO_STREAM, IMAGE_STREAM, ONE_EXPERT, AudioLearning, Expert
from training.data.timesteps import Timesteps, draw, loss_weights, shift_audio_timesteps
from training.loss import NoisyAudio, NoisyBatch
from training.noise_options import NOTHING, SIGMA, TIMESTEP, TimestepOptions
from training.steps import StepPlan

Key = tuple[int, int]  # epoch, micro-batch in it
TIMESTEPS = "timesteps"  # name of the random stream that images draw their timesteps from
# with at most this many items in an epoch, workers are kept for the next epochs
PERSISTENT_WORKERS_MAX_ITEMS = 50_000
ALIGNMENT = 64  # bytes: enough for every dtype


class EncodesImages(Protocol):
    """Interface of an object that reads and encodes the uncached images of a batch."""

    def encode(self, items: Sequence[TrainingItem], *stream: int | str) -> dict[int, dict[str, Tensor]]:
        """Return the encoded tensors of uncached items by position in `items`; `stream` is the seed."""


@dataclass(frozen=True)
class BatchSources:
    """Sources of a run's batches: cached latents and captions, and encoders that run during training."""

    latent: LatentSpec
    encoders: SameEncoders = field(default_factory=SameEncoders)  # checks that one encoder made all caches
    stores: Stores = field(default_factory=Stores)
    tables: OnTheFlyTables = field(default_factory=dict)  # tables with a part that is not cached, by index
    image_encoder: EncodesImages | None = None  # None: all latents are cached
    # whether batches must be made in the training process, because workers have no encoder or memory caches
    must_stay_in_process: bool = False
    # the empty prompt for one sample; empty if it comes from caches
    empty_text: Mapping[str, Tensor] = field(default_factory=dict)

    def read(
        self,
        items: Sequence[TrainingItem],
        checks: CacheChecks,
        seed_parts: Sequence[int | str],
        captions: Sequence[int] | None = None,
        flips: Sequence[bool] = (),
        undropped: Sequence[int] = (),
        reads_empty: bool = False,
        reads_rejected: bool = False,
    ) -> Batch:
        """Read the caches of a batch, and encode its uncached images.

        Args:
            items: Items of the batch.
            checks: Checks of the cache files.
            seed_parts: Parts of the seed of random numbers.
            captions: Index of each item's caption, or EMPTY for the empty prompt; None for the first ones.
            flips: Which items are mirrored; () for none.
            undropped: Indices of the captions before dropout, which a teacher also reads; () for none.
            reads_empty: Whether to read the empty prompt too.
            reads_rejected: Whether to read the latents of rejected clips too.

        Raises:
            CacheError: If a cache cannot be used.
            MediaError: If an image that is encoded now cannot be read.
            DatasetError: If the size of an image has changed since the items were listed.
        """
        encoded_images = {} if self.image_encoder is None else self.image_encoder.encode(items, *seed_parts)
        # images that were just encoded are already flipped
        cache_flips = [flip and index not in encoded_images for index, flip in enumerate(flips)]
        batch = read_batch(
            items,
            self.latent,
            self.encoders.commands,
            checks=checks,
            captions=captions,
            stores=self.stores,
            flips=cache_flips,
            undropped=undropped,
            encoded=encoded_images,
            reads_empty=reads_empty and not self.empty_text,
            reads_rejected=reads_rejected,
        )
        if reads_empty and self.empty_text:
            empty: Conditions = {name: [text] * len(batch) for name, text in self.empty_text.items()}
            batch = replace(batch, empty_text=empty)
        return batch


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch whose tensors are packed into one byte tensor, to send it between processes.

    One tensor is faster, because the receiver opens a connection to the sender for each tensor.
    """

    meta_batch: NoisyBatch  # its tensors are on the meta device: dtypes and shapes
    packed_bytes: Tensor  # uint8; the tensors one after the other, each at a multiple of ALIGNMENT bytes

    @classmethod
    def of(cls, noisy_batch: NoisyBatch) -> "PackedBatch":
        """Copy all tensors of a micro-batch into one byte tensor, and record their shapes in `meta_batch`."""
        pieces: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            pieces.extend([flat, flat.new_zeros(-len(flat) % ALIGNMENT)])
            return torch.empty_like(tensor, device="meta")

        meta_batch = noisy_batch.moved(pack)
        return cls(meta_batch, torch.cat(pieces))

    def pin_memory(self) -> "PackedBatch":
        """Copy into page-locked memory, if the driver can lock some. The data loader calls this."""
        return PackedBatch(self.meta_batch, pin(self.packed_bytes))

    def unpacked(self) -> NoisyBatch:
        """Restore the micro-batch, whose tensors are views of `packed_bytes`."""
        start = 0

        def take_view(meta_batch: Tensor) -> Tensor:
            nonlocal start
            piece = self.packed_bytes[start : start + meta_batch.nbytes]
            start += meta_batch.nbytes + -meta_batch.nbytes % ALIGNMENT
            return piece.view(meta_batch.dtype).view(meta_batch.shape)

        return self.meta_batch.moved(take_view)


@dataclass(frozen=True)
class NoiseSampler:
    """Draw the noise and timesteps of each micro-batch from the run's seed."""

    timesteps: TimestepOptions
    seed: int
    noise_spec: NoiseSpec = FLOW
    latent: LatentSpec | None = None  # used by `NoiseSpec.vary_noise` only
    experts: tuple[Expert, ...] = ONE_EXPERT
    # functions of shape, seed and number of a micro-batch that return noise for the input alone
    perturbations: Sequence[Callable[[torch.Size, int, int], Tensor]] = ()
    weighted_by: str = TIMESTEP  # timestep or sigma: what --weighting_scheme computes the loss weight from
    audio: AudioLearning | None = None  # None: the family has no sound
    # functions of this object and a drawn micro-batch that return the micro-batch to use instead
    batch_hooks: Sequence[Callable[["NoiseSampler", NoisyBatch], NoisyBatch]] = ()
    condition_set: str = ""  # additional conditions of a feature, as `Batch.condition_set`
    caption_choices: Sequence[str] = ()  # replace captions: one is drawn for each sample

    def add_noise(self, batch: Batch, number: int, first_sample: int) -> NoisyBatch:
        """Return micro-batch `number` of the run with its noise, timesteps, loss weights and conditions.

        1. Draw the noise and the timesteps, and the number of first frames that stay clean.
        2. Draw changes of the conditions.
        3. Add the noise and the timesteps of audio, and the latents that stay clean; run the features' hooks.

        Args:
            batch: The batch.
            number: Index of the micro-batch in the run.
            first_sample: Number of samples that the run has seen before.
        """
        shape = batch.tensor("latents").shape
        noise = torch.randn(shape, generator=seed_generator(self.seed, "noise", number))
        if self.noise_spec.vary_noise is not None:
            # such as by a noise offset
            assert self.latent is not None  # set for every family that varies its noise
            latents = self.latent.to_model(batch.tensor("latents"))
            noise = self.noise_spec.vary_noise(
                noise, latents, seed_generator(self.seed, "varied noise", number)
            )
        times = self.draw(len(batch), number, first_sample, shape)
        num_clean_frames = 0
        if self.noise_spec.first_frame_probability:
            num_clean_frames = draw_num_clean_frames(
                self.noise_spec, shape[2], self.seed, "given frames", number
            )
        noisy_batch = NoisyBatch(
            batch=self._change_conditions(batch, number),
            noise=noise,
            sigmas=times.sigmas,
            timesteps=times.timesteps,
            weights=self._weigh(batch, times),
            num_clean_frames=num_clean_frames,
            expert=times.expert,
            perturbation=functools.reduce(
                torch.add, (draw(shape, self.seed, number) for draw in self.perturbations)
            )
            if self.perturbations
            else None,
            number=number,
            levels=tuple(times.levels.tolist()),
        )
        if self.audio is not None:
            # the names of the streams are part of what a seed reproduces
            noisy_batch = add_audio(
                noisy_batch,
                self.audio,
                times=times,
                noise_spec=self.noise_spec,
                generator=seed_generator(self.seed, "sound", number),
                draw_own_times=functools.partial(
                    self.draw, len(batch), number, first_sample, stream="sound timesteps"
                ),
                weigh=functools.partial(self._weigh, batch),
            )
        if self.noise_spec.clean_token_rule is not None:  # some latents stay clean, as conditions
            generator = seed_generator(self.seed, "given tokens", number)
            clean_tokens = self.noise_spec.clean_token_rule.draw(noisy_batch.batch, generator)
            noisy_batch = replace(noisy_batch, clean_tokens=clean_tokens)
        for change_batch in self.batch_hooks:
            noisy_batch = change_batch(self, noisy_batch)
        return noisy_batch

    def _change_conditions(self, batch: Batch, number: int) -> Batch:
        """Return the batch with captions or conditions that are drawn at random for each micro-batch."""
        if self.caption_choices:
            rng = random.Random(derive_seed(self.seed, "sentences", number))
            captions = tuple(rng.choice(self.caption_choices) for _ in batch.captions)
            batch = replace(batch, captions=captions)
        if self.noise_spec.change_conditions is not None:
            generator = seed_generator(self.seed, "varied inputs", number)
            tensors = self.noise_spec.change_conditions(batch.tensors, self.condition_set, generator)
            batch = replace(batch, tensors=tensors)
        return batch

    def _weigh(self, batch: Batch, times: Timesteps) -> Tensor:
        """Return the loss weight of each sample, a tensor of shape B."""
        weights = torch.ones(len(batch))
        if self.weighted_by != NOTHING:
            weights = loss_weights(self.timesteps, times, exact_sigmas=self.weighted_by == SIGMA)
        if self.noise_spec.loss_factors:
            weights = weights * torch.tensor(self.noise_spec.loss_factors)[times.timesteps.long()]
        return weights * torch.tensor(batch.loss_weights) if batch.loss_weights else weights

    def draw(
        self, count: int, number: int, first_sample: int, shape: Sequence[int], stream: str = TIMESTEPS
    ) -> Timesteps:
        """Draw the timesteps of one micro-batch.

        Args:
            count: Number of samples in the micro-batch.
            number: Index of the micro-batch in the run; it seeds the generator.
            first_sample: Index in the run of the micro-batch's first sample, for samplers that spread
                timesteps evenly over consecutive samples.
            shape: Shape of the latents, for shifts that depend on the size.
            stream: Name of the random stream; other streams get independent numbers.
        """
        generator = seed_generator(self.seed, stream, number)
        # streams that shared the intervals of --num_timestep_buckets would not be independent
        seed = self.seed if stream == TIMESTEPS else derive_seed(self.seed, stream)
        return draw(
            self.timesteps,
            count,
            generator,
            seed=seed,
            first_sample=first_sample,
            noise_spec=self.noise_spec,
            shape=shape,
            experts=self.experts,
        )


def add_audio(
    noisy_batch: NoisyBatch,
    learning: AudioLearning,
    *,
    times: Timesteps,
    noise_spec: NoiseSpec,
    generator: torch.Generator,
    draw_own_times: Callable[[Sequence[int]], Timesteps],
    weigh: Callable[[Timesteps], Tensor],
) -> NoisyBatch:
    """Return a micro-batch with its noisy audio, and with the loss weights of its two streams.

    A stream that stays clean has no noise and no loss. Training and validation both use this function, so
    that they measure the same task.

    Args:
        noisy_batch: The micro-batch, whose weights are those of images alone.
        learning: Weights of the two streams, and the stream that stays clean.
        times: Timesteps of the images.
        noise_spec: Noise conventions of the family.
        generator: Generator of the audio's noise.
        draw_own_times: Returns the timesteps of audio that has its own, given the shape of the audio latents.
        weigh: Returns the loss weights of samples at these timesteps, before the weight of the stream.
    """
    batch = noisy_batch.batch
    zeros = torch.zeros(len(batch))
    audio = None
    latents, has_sound = batch.tensors.get(AUDIO_LATENTS), batch.tensors.get(HAS_AUDIO)
    if isinstance(latents, Tensor) and isinstance(has_sound, Tensor):
        noise = torch.randn(latents.shape, generator=generator)
        audio = NoisyAudio(noise, sigmas=zeros, timesteps=zeros, weights=zeros)
        if learning.clean_stream != AUDIO_STREAM:
            if learning.has_own_times:
                audio_times = draw_own_times(latents.shape)
            else:
                audio_times = shift_audio_timesteps(times, noise_spec)
            audio = NoisyAudio(
                noise=noise,
                sigmas=audio_times.sigmas,
                timesteps=audio_times.timesteps,
                weights=learning.audio_weight * weigh(audio_times) * has_sound,
                levels=tuple(audio_times.levels.tolist()),
            )
    if learning.clean_stream == IMAGE_STREAM:
        levels = tuple(zeros.tolist())
        return replace(noisy_batch, audio=audio, weights=zeros, sigmas=zeros, timesteps=zeros, levels=levels)
    return replace(noisy_batch, audio=audio, weights=learning.image_weight * noisy_batch.weights)


def draw_num_clean_frames(spec: NoiseSpec, frames: int, *stream: int | str) -> int:
    """Return the number of latent frames at the start of a batch that stay clean: 1 or 0.

    Args:
        spec: Noise conventions of the family.
        frames: Number of latent frames; the frame of a single image never stays clean.
        stream: Parts of the seed.
    """
    if frames == 1 or not spec.first_frame_probability:
        return 0
    return int(torch.rand((), generator=seed_generator(*stream)).item() < spec.first_frame_probability)


def seed_generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of the given parts, such as a seed, a name and an index."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass
class Feed:
    """Yield the micro-batches of one process, in the order of the step plan.

    Worker processes get copies of this object, which is also a map-style dataset.
    """

    order: BatchOrder
    sources: BatchSources
    noise_sampler: NoiseSampler
    plan: StepPlan
    process: int = 0
    workers: int = 0  # requested number; at most one per CPU is used
    pin_memory: bool = False
    reads_undropped: bool = False  # dropped captions are read too, for passes that use them
    reads_empty: bool = False  # the empty prompt is read too, for targets that need it
    # by `DatasetTable.batch_group`; empty: all tables have the timesteps of the run
    table_times: Mapping[int, TimestepOptions] = field(default_factory=dict)
    reads_rejected: bool = False  # rejected latents of pairs are read too, for targets that need them
    checks: CacheChecks = field(default_factory=CacheChecks, init=False)  # results for the whole run

    def start(self, epoch: int, position: int) -> Generator[NoisyBatch]:
        """Yield all micro-batches from a position in an epoch to the end of the run.

        If epochs are short, workers are kept for all of them, because starting workers takes longer than an
        epoch. If epochs are long, workers end with each epoch, because each worker would need its own copy
        of the next epoch's order.
        """
        keeps_workers = self.order.num_items <= PERSISTENT_WORKERS_MAX_ITEMS
        epochs_per_start = max(self.plan.num_epochs, 1) if keeps_workers else 1
        max_workers = 0 if self.sources.must_stay_in_process else min(self.workers, os.cpu_count() or 1)
        for first_epoch in range(epoch, self.plan.num_epochs, epochs_per_start):
            first_position = position if first_epoch == epoch else 0
            keys = self.plan.keys(self.process, first_epoch, first_position, epochs_per_start)
            if max_workers:
                noisy_batches = self._read_in_workers(first_epoch, keys, max_workers)
            else:
                unpinned = map(self.read, keys)
                noisy_batches = (batch.moved(pin) if self.pin_memory else batch for batch in unpinned)
            with contextlib.closing(noisy_batches):
                for noisy_batch in noisy_batches:
                    if self.process == 0:  # one process warns; in shuffled epochs it gets items of all tables
                        self.sources.encoders.warn(noisy_batch.batch.cache_origins)
                    yield noisy_batch

    def _read_in_workers(
        self, first_epoch: int, keys: Iterator[Key], max_workers: int
    ) -> Generator[NoisyBatch]:
        """Yield batches that worker processes read, in the order of the keys; raise their errors here."""
        first_keys = [*itertools.islice(keys, max_workers)]
        num_workers = len(first_keys)  # no more workers than micro-batches
        if num_workers == 0:
            return
        self.order.epoch(first_epoch)  # computed here, so that workers inherit it
        workers_may_end = multiprocessing.Event()  # set once no more batches are needed
        loader: DataLoader[PackedBatch | UserError] = DataLoader(
            self,  # type: ignore[arg-type]  # anything with __getitem__ works
            batch_size=None,
            sampler=itertools.chain(first_keys, keys),
            num_workers=num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=functools.partial(_start_worker, workers_may_end),
        )
        try:
            for packed in loader:
                if isinstance(packed, UserError):  # see `__getitem__`
                    raise packed
                yield packed.unpacked()
        finally:
            workers_may_end.set()

    def __getitem__(self, key: Key) -> PackedBatch | UserError:
        """Return a micro-batch, or its UserError, of which DataLoader would re-raise only the text."""
        try:
            return PackedBatch.of(self.read(key))
        except UserError as error:
            return error

    def read(self, key: Key) -> NoisyBatch:
        """Read the micro-batch with this epoch and index, and add its noise and timesteps.

        Raises:
            CacheError: If a cache cannot be used; the message contains the caching command.
        """
        epoch, index = key
        number = epoch * self.order.num_batches + index  # of the micro-batch in the run
        items = self.order.epoch(epoch)[index]
        seed = self.noise_sampler.seed
        captions = select_captions(items, seed, number, epoch)
        flips: Sequence[bool] = ()
        if any(item.table.buckets.augmentation.flip for item in items):
            flips = select_mirrored(items, seed, number)
        undropped: Sequence[int] = ()  # the captions without dropout, for a teacher
        if self.reads_undropped:
            undropped = select_captions(items, seed, number, epoch, drops=False)
        batch = self.sources.read(
            items,
            checks=self.checks,
            seed_parts=(seed, number),
            captions=captions,
            flips=flips,
            undropped=undropped,
            reads_empty=self.reads_empty,
            reads_rejected=self.reads_rejected,
        )
        if items[0].table.references.reference_dropout_rate and should_drop_references(items, seed, number):
            batch = batch.without_references()
        if self.sources.tables:  # captions are encoded during training: shuffle and drop their tags now
            # The step of the run to which micro-batch `number` belongs
            step = self.plan.step_of(*key)
            position = RunPosition(self.noise_sampler.seed, number, step, self.plan.total_steps)
            batch = replace(batch, captions=change_captions(items, batch.captions, captions, position))
        noise_sampler, first_sample = self._get_noise_sampler(key)
        return noise_sampler.add_noise(batch, number, first_sample)

    def _get_noise_sampler(self, key: Key) -> tuple[NoiseSampler, int]:
        """Return the sampler for a micro-batch, and the number of samples drawn before it."""
        # If tables have their own timesteps, each group of tables has its own sampler and count.
        if not self.table_times:
            return self.noise_sampler, self.order.items_before(*key)
        epoch, index = key
        group = self.order.epoch(epoch)[index][0].table.batch_group
        noise_sampler = replace(self.noise_sampler, timesteps=self.table_times[group])
        return noise_sampler, self.order.group_items_before(epoch, index)

    def has_audio(self, key: Key) -> bool:
        """Return whether any clip of a micro-batch has audio, without reading files."""
        epoch, index = key
        return any(item.has_cached_audio for item in self.order.epoch(epoch)[index])

    def find_expert(self, key: Key) -> int:
        """Return the index of the expert that a micro-batch trains, without reading any file."""
        epoch, index = key
        if len(self.noise_sampler.experts) == 1:
            return 0
        number = epoch * self.order.num_batches + index
        items = self.order.epoch(epoch)[index]
        width, height, *frames = items[0].bucket
        shape = self.sources.latent.shape(frames[0] if frames else 1, height, width)
        noise_sampler, first_sample = self._get_noise_sampler(key)
        return noise_sampler.draw(len(items), number, first_sample, shape).expert


def _start_worker(workers_may_end: Event, _: int) -> None:
    """Ignore SIGINT and SIGTERM in a worker, because the main process first finishes its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "win32":
        signal.signal(signal.SIGBREAK, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if workers_may_end.is_set() else None)

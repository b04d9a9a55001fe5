"""Prepare micro-batches early: read cache files, draw noise and timesteps, in workers if there are any.

All that is random about a micro-batch comes from CPU generators seeded by the run's seed and the
micro-batch's number in the run. So it depends on no device, no number of workers or processes, and on nothing
that was done before.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.synchronize import Event
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset.batches.checks import SameEncoders
from dataset.batches.items import LiveTables, TrainingItem
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
from protocols.data import HAS_AUDIO, SOUND, Batch, Conditions, LatentSpec
from protocols.family import FLOW, NoiseSpec
from protocols.rules import AUDIO_STREAM, IMAGE_STREAM, ONE_EXPERT, AudioLearning, Expert
from training.data.timesteps import Timesteps, draw, loss_weights, times_of_audio
from training.loss import NoisyAudio, NoisyBatch
from training.noise_options import NOTHING, SIGMA, TIMESTEP, TimestepOptions
from training.steps import StepPlan

Key = tuple[int, int]  # epoch, micro-batch in it
MAX_KEPT = 50_000  # with at most so many items in an epoch, workers are kept for the next epochs
ALIGNMENT = 64  # bytes: enough for every dtype


class EncodesImages(Protocol):
    """Interface of an object that reads and encodes the images of a batch that are not cached."""

    def encode(self, items: Sequence[TrainingItem], *stream: int | str) -> dict[int, dict[str, Tensor]]:
        """Return the encoded tensors of items that are not cached, by position; `stream` is the seed."""


@dataclass(frozen=True)
class BatchSources:
    """Sources of a run's batches: cached latents and texts, and encoders that run during training."""

    latent: LatentSpec
    encoders: SameEncoders = field(default_factory=SameEncoders)  # checks that one encoder made all caches
    stores: Stores = field(default_factory=Stores)
    tables: LiveTables = field(default_factory=dict)  # tables with a part that is not cached, by index
    media: EncodesImages | None = None  # None: all latents are cached
    # whether batches must be made in the training process, because workers have no encoder or memory caches
    stays: bool = False
    # the empty prompt for one sample; empty if it comes from caches
    empty_text: Mapping[str, Tensor] = field(default_factory=dict)

    def read(
        self,
        items: Sequence[TrainingItem],
        checks: CacheChecks,
        stream: Sequence[int | str],
        captions: Sequence[int] | None = None,
        flips: Sequence[bool] = (),
        undropped: Sequence[int] = (),
        reads_empty: bool = False,
        reads_rejected: bool = False,
    ) -> Batch:
        """Read a batch; encode those of its images that are not cached.

        Args:
            items: Items of the batch.
            checks: Checks of the cache files.
            stream: Seed of the random numbers.
            captions: Index of each item's caption, or EMPTY for the empty prompt; None for the first ones.
            flips: Which items are mirrored; () for none.
            undropped: Indices of the captions before dropout, for a teacher, which reads these too.
            reads_empty: Whether to read the empty prompt too.
            reads_rejected: Whether to read the latents of rejected clips too.

        Raises:
            CacheError: If a cache cannot be used.
            MediaError: If an image that is encoded now cannot be read.
            DatasetError: If the size of an image has changed since the items were listed.
        """
        encoded = {} if self.media is None else self.media.encode(items, *stream)
        # items that were just encoded are already flipped
        flips_left = [flip and index not in encoded for index, flip in enumerate(flips)]
        batch = read_batch(
            items,
            self.latent,
            self.encoders.commands,
            checks=checks,
            captions=captions,
            stores=self.stores,
            flips=flips_left,
            undropped=undropped,
            encoded=encoded,
            reads_empty=reads_empty and not self.empty_text,
            reads_rejected=reads_rejected,
        )
        if reads_empty and self.empty_text:
            empty: Conditions = {name: [text] * len(batch) for name, text in self.empty_text.items()}
            batch = replace(batch, empty_text=empty)
        return batch


@dataclass(frozen=True)
class Packed:
    """A micro-batch whose tensors are packed into one byte tensor, to send it between processes.

    One tensor is faster, because the receiver opens a connection to the sender for each tensor.
    """

    outline: NoisyBatch  # its tensors are on the meta device: dtypes and shapes
    content: Tensor  # uint8; the tensors one after the other, each on a multiple of ALIGNMENT bytes

    @classmethod
    def of(cls, noisy_batch: NoisyBatch) -> "Packed":
        """Copy all tensors of a micro-batch into one byte tensor, and record their shapes in the outline."""
        pieces: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            pieces.extend([flat, flat.new_zeros(-len(flat) % ALIGNMENT)])
            return torch.empty_like(tensor, device="meta")

        outline = noisy_batch.moved(pack)
        return cls(outline, torch.cat(pieces))

    def pin_memory(self) -> "Packed":
        """Copy into page-locked memory, if the driver can lock some. The data loader calls this."""
        return Packed(self.outline, pin(self.content))

    def unpacked(self) -> NoisyBatch:
        """Restore the micro-batch. Its tensors are views of `content`."""
        start = 0

        def take_view(outline: Tensor) -> Tensor:
            nonlocal start
            piece = self.content[start : start + outline.nbytes]
            start += outline.nbytes + -outline.nbytes % ALIGNMENT
            return piece.view(outline.dtype).view(outline.shape)

        return self.outline.moved(take_view)


@dataclass(frozen=True)
class Randomness:
    """Settings for drawing the noise and timesteps of each micro-batch from the run's seed."""

    timesteps: TimestepOptions
    seed: int
    noise: NoiseSpec = FLOW
    latent: LatentSpec | None = None  # used by `NoiseSpec.vary` only
    experts: tuple[Expert, ...] = ONE_EXPERT
    # functions of shape, seed and number of a micro-batch that return additional noise of the input
    on_noise: Sequence[Callable[[torch.Size, int, int], Tensor]] = ()
    weighted_by: str = TIMESTEP  # timestep or sigma: what --weighting_scheme computes the loss weight from
    audio: AudioLearning | None = None  # None: the family has no sound
    # functions of this object and a drawn micro-batch that return the micro-batch to use instead
    on_batch: Sequence[Callable[["Randomness", NoisyBatch], NoisyBatch]] = ()
    view: str = ""  # additional conditions of a feature, as `Batch.view`
    sentences: Sequence[str] = ()  # replace captions: one is drawn for each sample

    def add(self, batch: Batch, number: int, first_sample: int) -> NoisyBatch:
        """Draw noise and timesteps for micro-batch `number` of the run.

        Args:
            batch: The batch.
            number: Index of the micro-batch in the run.
            first_sample: Number of samples that the run has seen before.
        """
        shape = batch.tensor("latents").shape
        noise = torch.randn(shape, generator=seed_generator(self.seed, "noise", number))
        if self.noise.vary is not None:  # the family changes the noise in its own way
            noise = self._vary(noise, batch, number)
        times = self.draw(len(batch), number, first_sample, shape)
        given_frames = 0
        if self.noise.first_frame_probability:
            given_frames = draw_given_frames(self.noise, shape[2], self.seed, "given frames", number)
        audio = None
        if self.audio is not None:
            audio = self._add_audio(self.audio, batch, times, number=number, first_sample=first_sample)
        weights = self._weigh(batch, times)
        if self.audio is not None:
            weights = self.audio.image_weight * weights
        if self.audio is not None and self.audio.given == IMAGE_STREAM:
            # only audio is trained: images are given clean, so that their sigmas and weights are 0
            weights = zeros = torch.zeros(len(batch))
            times = replace(times, sigmas=zeros, timesteps=zeros, levels=zeros)
        if self.sentences:  # they replace the captions
            batch = self._draw_captions(batch, number)
        if self.noise.vary_inputs is not None:  # the family changes conditions anew at each step
            batch = self._vary_inputs(batch, number)
        drawn = NoisyBatch(
            batch=batch,
            noise=noise,
            sigmas=times.sigmas,
            timesteps=times.timesteps,
            weights=weights,
            given_frames=given_frames,
            expert=times.expert,
            perturbation=self._perturb(shape, number) if self.on_noise else None,
            audio=audio,
            number=number,
            levels=tuple(times.levels.tolist()),
        )
        if self.noise.gives is not None:  # some latents stay clean, as conditions
            generator = seed_generator(self.seed, "given tokens", number)
            drawn = replace(drawn, given=self.noise.gives.draw(batch, generator))
        for change in self.on_batch:
            drawn = change(self, drawn)
        return drawn

    def _vary(self, noise: Tensor, batch: Batch, number: int) -> Tensor:
        """Return the noise as modified for training, for example by an offset."""
        assert self.noise.vary is not None  # checked by the caller
        assert self.latent is not None  # set for every family that varies its noise
        latents = self.latent.to_model(batch.tensor("latents"))
        return self.noise.vary(noise, latents, seed_generator(self.seed, "varied noise", number))

    def _draw_captions(self, batch: Batch, number: int) -> Batch:
        """Return the batch with each caption replaced by a randomly drawn sentence."""
        stream = random.Random(derive_seed(self.seed, "sentences", number))
        return replace(batch, captions=tuple(stream.choice(self.sentences) for _ in batch.captions))

    def _vary_inputs(self, batch: Batch, number: int) -> Batch:
        """Return the batch with its additional inputs randomly changed by `NoiseSpec.vary_inputs`."""
        assert self.noise.vary_inputs is not None  # checked by the caller
        generator = seed_generator(self.seed, "varied inputs", number)
        return replace(batch, tensors=self.noise.vary_inputs(batch.tensors, self.view, generator))

    def _add_audio(
        self, learning: AudioLearning, batch: Batch, times: Timesteps, *, number: int, first_sample: int
    ) -> NoisyAudio | None:
        """Draw the noise of a batch's audio, and its timesteps if they differ; None if no sample has audio.

        Args:
            learning: What the run learns of sound, with its weight in the loss.
            batch: The batch.
            times: Timesteps of the images.
            number: Index of the micro-batch in the run.
            first_sample: Number of samples that the run has seen before.
        """
        latents, has_sound = batch.tensors.get(SOUND), batch.tensors.get(HAS_AUDIO)
        if not isinstance(latents, Tensor) or not isinstance(has_sound, Tensor):
            return None
        noise = torch.randn(latents.shape, generator=seed_generator(self.seed, "sound", number))
        if learning.given == AUDIO_STREAM:  # clean, and not learned
            zeros = torch.zeros(len(batch))
            return NoisyAudio(noise, sigmas=zeros, timesteps=zeros, weights=zeros)
        if learning.has_own_times:
            times = self.draw(len(batch), number, first_sample, shape=latents.shape, stream="sound timesteps")
        else:
            times = times_of_audio(times, self.noise)
        weights = learning.audio_weight * self._weigh(batch, times) * has_sound
        return NoisyAudio(
            noise=noise,
            sigmas=times.sigmas,
            timesteps=times.timesteps,
            weights=weights,
            levels=tuple(times.levels.tolist()),
        )

    def _perturb(self, shape: torch.Size, number: int) -> Tensor:
        """Draw the noise that features add to the input, summed over all features."""
        return functools.reduce(torch.add, (draw(shape, self.seed, number) for draw in self.on_noise))

    def _weigh(self, batch: Batch, times: Timesteps) -> Tensor:
        """Return the weight of each sample's loss, B."""
        weights = torch.ones(len(batch))
        if self.weighted_by != NOTHING:
            weights = loss_weights(self.timesteps, times, exactly=self.weighted_by == SIGMA)
        if self.noise.loss_factors:
            weights = weights * torch.tensor(self.noise.loss_factors)[times.timesteps.long()]
        return weights * torch.tensor(batch.loss_weights) if batch.loss_weights else weights

    def draw(
        self, count: int, number: int, first_sample: int, shape: Sequence[int], stream: str = "timesteps"
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
        return draw(
            self.timesteps,
            count,
            generator,
            seed=self.seed,
            first_sample=first_sample,
            noise=self.noise,
            shape=shape,
            experts=self.experts,
        )


def draw_given_frames(spec: NoiseSpec, frames: int, *stream: int | str) -> int:
    """Return the number of latent frames at the start of a batch that stay clean: 1 or 0.

    Args:
        spec: Noise conventions of the family.
        frames: Number of latent frames; the frame of a single image never stays clean.
        stream: Seed of the draw.
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
    randomness: Randomness
    plan: StepPlan
    process: int = 0
    workers: int = 0  # requested number; at most one per CPU is used
    pin_memory: bool = False
    reads_dropped: bool = False  # dropped captions are read too, for passes that use them
    reads_empty: bool = False  # the empty prompt is read too, for targets that need it
    # by `DatasetTable.batch_group`; empty: all tables have the timesteps of the run
    table_times: Mapping[int, TimestepOptions] = field(default_factory=dict)
    reads_rejected: bool = False  # rejected latents of pairs are read too, for targets that need them
    checks: CacheChecks = field(default_factory=CacheChecks, init=False)  # results for the whole run

    def start(self, epoch: int, position: int) -> Generator[NoisyBatch]:
        """Yield all micro-batches from a position in an epoch to the end of the run.

        If epochs are short, workers are kept over all of them, because starting workers takes longer than an
        epoch. If epochs are long, workers end with each epoch, because every worker would hold its own copy
        of the next order.
        """
        epochs_per_start = self.plan.num_epochs if self.order.num_items <= MAX_KEPT else 1
        # workers cannot read sources with an encoder, or caches in memory, of this process
        max_workers = 0 if self.sources.stays else min(self.workers, os.cpu_count() or 1)
        for first_epoch in range(epoch, self.plan.num_epochs, max(epochs_per_start, 1)):
            first_position = position if first_epoch == epoch else 0
            keys = self.plan.keys(self.process, first_epoch, first_position, epochs_per_start)
            first_keys = [*itertools.islice(keys, max_workers)]  # no more workers than micro-batches
            if first_keys:
                self.order.epoch(first_epoch)  # computed here, so that workers inherit it
                read = self._from_workers(itertools.chain(first_keys, keys), len(first_keys))
            else:
                batches = map(self.read, keys)
                read = (batch.moved(pin) if self.pin_memory else batch for batch in batches)
            with contextlib.closing(read):
                for noisy_batch in read:
                    if self.process == 0:  # one process warns; in shuffled epochs it gets items of all tables
                        self.sources.encoders.warn(noisy_batch.batch.made_by)
                    yield noisy_batch

    def _from_workers(self, keys: Iterable[Key], workers: int) -> Generator[NoisyBatch]:
        """Yield batches that worker processes read, in the order of the keys; raise their errors here."""
        ending = multiprocessing.Event()  # tells the workers that no more batches are wanted
        loader: DataLoader[Packed | UserError] = DataLoader(
            self,  # type: ignore[arg-type]  # anything with __getitem__ serves
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            pin_memory=self.pin_memory,
            worker_init_fn=functools.partial(_start_worker, ending),
        )
        try:
            for packed in loader:
                if isinstance(packed, UserError):  # returned, as torch re-raises errors only as text
                    raise packed
                yield packed.unpacked()
        finally:
            ending.set()

    def __getitem__(self, key: Key) -> Packed | UserError:
        """Return a micro-batch or its error, because DataLoader re-raises a worker's error only as text."""
        try:
            return Packed.of(self.read(key))
        except UserError as error:
            return error

    def read(self, key: Key) -> NoisyBatch:
        """Read the micro-batch of an epoch and an index, and add its noise and timesteps.

        Raises:
            CacheError: If a cache cannot be used; the message contains the caching command.
        """
        epoch, index = key
        number = epoch * self.order.num_batches + index
        items = self.order.epoch(epoch)[index]
        seed, plan = self.randomness.seed, self.plan
        captions = select_captions(items, seed, number, epoch)
        flips: Sequence[bool] = ()
        if any(item.table.augmentation.flip for item in items):
            flips = select_mirrored(items, seed, number)
        undropped: Sequence[int] = ()
        if self.reads_dropped:
            undropped = select_captions(items, seed, number, epoch, drops=False)
        batch = self.sources.read(
            items,
            checks=self.checks,
            stream=(seed, number),
            captions=captions,
            flips=flips,
            undropped=undropped,
            reads_empty=self.reads_empty,
            reads_rejected=self.reads_rejected,
        )
        if items[0].table.reference_dropout_rate and should_drop_references(items, seed, number):
            batch = batch.without_references()
        # tables with live captions: these are shuffled and dropped here, in a way that depends on the step
        if self.sources.tables:
            # the first micro-batch of this one's group: both belong to the same optimizer step
            step = plan.steps_until(epoch, index - index % plan.group_size)
            place = RunPosition(seed, number, step, plan.total_steps)
            batch = replace(batch, captions=change_captions(items, batch.captions, captions, place))
        randomness, first_sample = self._make_randomness(key)
        return randomness.add(batch, number, first_sample)

    def _make_randomness(self, key: Key) -> tuple[Randomness, int]:
        """Return the random settings of a micro-batch, and the number of samples drawn before it.

        If tables have their own timesteps, samples are counted separately for each group of tables.
        """
        if not self.table_times:
            return self.randomness, self.order.items_before(*key)
        epoch, index = key
        group = self.order.epoch(epoch)[index][0].table.batch_group
        randomness = replace(self.randomness, timesteps=self.table_times[group])
        return randomness, self.order.group_items_before(epoch, index)

    def has_sound(self, key: Key) -> bool:
        """Return whether any clip of a micro-batch has audio, without reading files."""
        epoch, index = key
        return any(item.has_cached_audio for item in self.order.epoch(epoch)[index])

    def expert_of(self, key: Key) -> int:
        """Return the index of the expert that a micro-batch trains, without reading any file."""
        epoch, index = key
        if len(self.randomness.experts) == 1:
            return 0
        number = epoch * self.order.num_batches + index
        items = self.order.epoch(epoch)[index]
        width, height, *frames = items[0].bucket
        shape = self.sources.latent.shape(frames[0] if frames else 1, height, width)
        randomness, first_sample = self._make_randomness(key)
        return randomness.draw(len(items), number, first_sample, shape).expert


def _start_worker(ending: Event, _: int) -> None:
    """Ignore SIGINT and SIGTERM in a worker, because the main process first finishes its step.

    Args:
        ending: Event that is set when the workers are not needed any more; SIGTERM then ends them.
        _: Index of the worker, unused.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "win32":
        signal.signal(signal.SIGBREAK, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.is_set() else None)

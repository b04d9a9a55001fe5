"""Plan the memory of a training run: rehearse a step of its largest batch to count device and host memory."""

import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from checkpoints.stored.forms import rehearsed
from dataset.batches.finding import with_reference_sizes
from dataset.batches.items import TrainingItem
from dataset.batches.order import repeat_items
from dataset.cache.records import CacheChecks
from dataset.table import DatasetTable
from modules.console import quiet
from modules.devices import format_gib
from modules.options import override_options
from protocols.data import LatentSpec
from protocols.family import Described, Family, Trains
from protocols.rules import AudioLearning
from runtime.options import SwapOptions
from runtime.planning import dry_run as dry
from runtime.planning import memory_plan
from runtime.planning.device_memory import DeviceMemory, MemoryWatch, device_memory_to_plan, free_host_memory
from training.data.feed import BatchSources, NoiseSampler
from training.data.live import LiveTextEncoders
from training.experts import choose_placement
from training.features.contract import EMPTY_PROMPT, REJECTED_ONES
from training.learner import find_network_spec
from training.loss import NoisyBatch
from training.options import TrainingOptions
from training.plan import TrainingPlan
from training.planning.rehearsal import STEP, rehearse
from training.processes import reduce_max

logger = logging.getLogger(__name__)

MAX_BATCH = 16  # largest batch that --plan proposes: larger ones need another learning rate
COMPILED = "Compiled blocks usually need less than planned here."
META = torch.device("meta")
SECOND_TRANSFORMER = "second transformer"
Shape = tuple[int, ...]  # shape of latents without their channels: B F H W


@dataclass(frozen=True)
class MemoryPrediction:
    """Predicted memory of a training step without swapped blocks, and the effect of swapping blocks."""

    options: TrainingOptions
    batch_description: str  # size of the images or clips, and their number
    num_elements: int  # elements in the latents of the batch
    shape: Shape  # shape of these latents
    phase_peaks: Mapping[str, dry.BytesByKind]  # bytes on the device by kind, at each part of a step
    host_activation_bytes: int  # bytes of activations in host memory
    weight_dtypes: str  # dtypes of the weights, as text
    swaps: Sequence[memory_plan.OffloadedWeights]  # by --blocks_to_swap, from 0 to the maximum
    block_weights: tuple[memory_plan.BlockWeights, ...]
    workspace: memory_plan.MemoryPart
    host_optimizer_bytes: int = 0  # bytes of the optimizer's states in host memory
    host_average_bytes: int = 0  # bytes of a whole model's average in host memory
    num_further_dits: int = 0  # trained transformers, each like the one that was rehearsed
    # model of samples, if it has transformers that only samples use, and the bytes of these
    sampling: Family | None = None
    sample_only_bytes: int = 0
    live_encoders: LiveTextEncoders | None = None  # encoded in each step
    network: str = "LoRA"  # name of the trained network

    def phase(self, blocks: int) -> memory_plan.Phase:
        """Return the peak memory of a step by part, with `blocks` swapped blocks."""
        offloaded = self.swaps[blocks]
        # the phase of the step with the most memory, and its bytes by kind, such as weights and gradients
        phase_name, peak_bytes = dry.find_peak_phase(self.phase_peaks)
        notes = {
            dry.WEIGHTS: self.weight_dtypes + offloaded.describe(blocks, "to pass through"),
            dry.TEMPORARY: phase_name,
        }
        if self.host_activation_bytes:
            notes[dry.ACTIVATIONS] = "the rest waits in host memory"
        parts = [
            *memory_plan.list_memory_parts(
                peak_bytes, offloaded, notes, self.host_activation_bytes, self.network
            )
        ]
        parts += self._list_other_models(peak_bytes, offloaded)
        parts += self._list_host_parts()
        return memory_plan.Phase(f"training step, {self.batch_description}", (*parts, self.workspace))

    def _list_other_models(
        self, peak_bytes: dry.BytesByKind, offloaded: memory_plan.OffloadedWeights
    ) -> list[memory_plan.MemoryPart]:
        """Return the memory of the transformers that were not simulated, and of training their LoRAs."""
        dit_bytes = peak_bytes.get(dry.WEIGHTS, 0)
        parts = []
        if self.joins_in_samples:
            note = "on the device only for samples"
            parts.append(memory_plan.MemoryPart(SECOND_TRANSFORMER, 0, self.sample_only_bytes, note))
        elif self.takes_turns:  # host memory contains all weights of each, even of the one on the device
            host = (1 + self.num_further_dits) * dit_bytes + self.sample_only_bytes - offloaded.host_bytes
            note = "they take turns on the device"
            parts.append(memory_plan.MemoryPart("further transformers", 0, host, note))
        elif self.num_further_dits > 0:
            device_bytes = self.num_further_dits * (dit_bytes - offloaded.saved_device_bytes)
            host = self.num_further_dits * offloaded.host_bytes
            parts.append(memory_plan.MemoryPart("further transformers", device_bytes, host))
        if self.num_further_dits > 0 and self.options.by_expert.lora_per_expert:
            # The memory of training the LoRAs of the other experts, each like the simulated one
            kinds = [dry.NETWORK, dry.OPTIMIZER]
            # a micro-batch trains one transformer, so only accumulated steps have gradients of both
            if self.options.loop.gradient_accumulation_steps > 1:
                kinds.append(dry.GRADIENTS)
            trained_bytes = self.num_further_dits * sum(peak_bytes.get(kind, 0) for kind in kinds)
            parts.append(memory_plan.MemoryPart("training of their LoRAs", trained_bytes))
        # models that features load, such as a teacher, are assumed to be as large as the trained transformer
        for model in self.options.features.further_models:
            device = dit_bytes - offloaded.saved_device_bytes
            parts.append(memory_plan.MemoryPart(f"{model.name}'s transformer", device, offloaded.host_bytes))
        return parts

    def _list_host_parts(self) -> list[memory_plan.MemoryPart]:
        """Return the host memory of offloaded optimizer states and of the averaged weights."""
        parts = []
        if self.host_optimizer_bytes:
            note = "those of one weight at a time are on the device"
            parts.append(
                memory_plan.MemoryPart("all states of the optimizer", 0, self.host_optimizer_bytes, note)
            )
        average = self.options.features.average
        if self.host_average_bytes and average is not None:
            name = f"average of the weights ({average.name})"
            parts.append(memory_plan.MemoryPart(name, 0, self.host_average_bytes))
        return parts

    @property
    def joins_in_samples(self) -> bool:
        """Whether a second transformer joins the trained one on the device for samples."""
        sampling = self.sampling
        if sampling is None or not self.sample_only_bytes:
            return False
        return sampling.abilities.join_sample_networks is not None

    @property
    def takes_turns(self) -> bool:
        """Whether only one DiT at a time is on the device, because of samples or an inactive expert."""
        if self.sample_only_bytes and not self.joins_in_samples:
            return True
        return self.num_further_dits > 0 and self.options.by_expert.offload_inactive_dit

    def scaled(self, share: float) -> "MemoryPrediction":
        """Return the prediction for a smaller or larger batch, with activations scaled by `share`."""
        phase_peaks: dict[str, dry.BytesByKind] = {}
        for phase, peak_bytes in self.phase_peaks.items():
            # memory of the optimizer step does not depend on the batch
            scaled_kinds = () if phase == STEP else (dry.ACTIVATIONS, dry.TEMPORARY, dry.BATCH)
            phase_peaks[phase] = {
                kind: round(size * share) if kind in scaled_kinds else size
                for kind, size in peak_bytes.items()
            }
        return replace(
            self, phase_peaks=phase_peaks, host_activation_bytes=round(self.host_activation_bytes * share)
        )

    def plan(self, blocks: int, remarks: Sequence[str] = ()) -> memory_plan.MemoryPlan:
        """Return the memory plan of a step with `blocks` swapped blocks."""
        phases = [self.phase(blocks)]
        if self.joins_in_samples:
            phases.append(self._joined_phase(blocks))
        return memory_plan.MemoryPlan(tuple(phases), tuple(remarks))

    def _joined_phase(self, blocks: int) -> memory_plan.Phase:
        """Return the memory of samples, when the second transformer is next to the trained one."""
        offloaded = self.swaps[blocks]
        _, peak_bytes = dry.find_peak_phase(self.phase_peaks)
        kinds = (dry.WEIGHTS, dry.TEXTS, dry.NETWORK, dry.OPTIMIZER)
        held = {kind: peak_bytes[kind] for kind in kinds if kind in peak_bytes}
        notes = {dry.WEIGHTS: self.weight_dtypes + offloaded.describe(blocks, "to pass through")}
        # as many of its blocks are swapped; their share of its weights is that of the trained one
        swapped = offloaded.saved_device_bytes / max(1, peak_bytes.get(dry.WEIGHTS, 0))
        second = round(self.sample_only_bytes * (1 - swapped))
        parts = [
            *memory_plan.list_memory_parts(held, offloaded, notes, network=self.network),
            memory_plan.MemoryPart(
                SECOND_TRANSFORMER, second, self.sample_only_bytes, "work on one block is not counted"
            ),
            *self._list_host_parts(),
        ]
        return memory_plan.Phase("samples by both transformers", (*parts, self.workspace))

    def device_bytes(self, blocks: int) -> int:
        """Return the device memory of a run with `blocks` swapped blocks, in bytes."""
        return self.plan(blocks).device

    @property
    def max_swapped_blocks(self) -> int:
        """Largest number of blocks that can be swapped."""
        return len(self.swaps) - 1

    @property
    def blocks(self) -> int:
        """Number of swapped blocks from --blocks_to_swap; 0 for auto."""
        swap = self.options.speed.swap
        return 0 if swap.is_auto else swap.number


def predict_memory(
    family: Trains,
    options: TrainingOptions,
    noisy_batch: NoisyBatch,
    device: torch.device,
    sampling: Family | None = None,
    live_encoders: LiveTextEncoders | None = None,
    watch: Callable[[nn.Module], dry.Extrapolate] = dry.extrapolate_on_one_device,
    tables: Sequence[DatasetTable] = (),
) -> MemoryPrediction:
    """Predict the memory of a training step by simulating it on tensors without storage.

    1. Load the transformer without values, and list the effect of swapping each number of blocks.
    2. Simulate the step, with the text encoders that run in it.
    3. Account for averages and optimizer states that are kept in host memory.

    8-bit matrix products are simulated as 16-bit products of the same weights. Errors while loading the model
    are raised as in a real run.

    Args:
        family: Model family of the run.
        options: Options of the run.
        noisy_batch: The batch, on the CPU.
        device: Device of the run; nothing is allocated on it.
        sampling: Model of samples, if an option names transformers that only samples use.
        live_encoders: Text encoders that are loaded during training; None for none.
        watch: `TokenCounter.watch` if several devices will share the step.
        tables: Tables of the dataset.
    """
    dit = _load_dit_without_values(family, options)
    # effects of swapping 0, 1, 2, ... blocks to host memory
    processes = memory_plan.sharing_processes(options.speed)
    swaps = memory_plan.predict_swaps(dit, family.dit, options.speed.swap, processes)
    weight_dtypes = memory_plan.format_dtype_sizes(dit)
    block_weights = memory_plan.weights_by_block(dit, family.dit)
    step = _simulate_step(
        family, options, dit, noisy_batch, live_encoders=live_encoders, watch=watch, tables=tables
    )
    phase_peaks, host_optimizer_bytes = _offload_states(options, step)
    count, _, *size = noisy_batch.noise.shape  # B C F H W
    shape: Shape = (count, *size)
    return MemoryPrediction(
        options=options,
        batch_description=describe_batch(family.latent, shape),
        num_elements=noisy_batch.noise.numel(),
        shape=shape,
        phase_peaks=phase_peaks,
        host_activation_bytes=step.host_activation_bytes,
        weight_dtypes=weight_dtypes,
        swaps=swaps,
        block_weights=block_weights,
        workspace=memory_plan.workspace(device, is_training=True),
        host_optimizer_bytes=host_optimizer_bytes,
        host_average_bytes=_count_average_bytes(options, step.trained_sizes),
        num_further_dits=len(family.experts) - 1,
        sampling=sampling,
        sample_only_bytes=_count_sample_only_bytes(family, options, sampling),
        live_encoders=live_encoders,
        network=_name_network(family, options),
    )


def _name_network(family: Trains, options: TrainingOptions) -> str:
    spec = find_network_spec(family, options.network, options.features.lora_replacement)
    if spec.custom is not None:
        return spec.custom.label
    return "model" if spec.lora_options is None else "LoRA"


class _SimulatedStep(NamedTuple):
    """Memory of a simulated training step, and the sizes of the weights that it trains."""

    phase_peaks: Mapping[str, dry.BytesByKind]  # bytes on the device by kind, at each part of the step
    host_activation_bytes: int
    trained_sizes: Sequence[int]  # elements of each trained weight


def _simulate_step(
    family: Trains,
    options: TrainingOptions,
    dit: nn.Module,
    noisy_batch: NoisyBatch,
    *,
    live_encoders: LiveTextEncoders | None,
    watch: Callable[[nn.Module], dry.Extrapolate],
    tables: Sequence[DatasetTable],
) -> _SimulatedStep:
    """Simulate a training step; its text encoders are loaded without values, and freed afterwards."""
    trained_networks = [dit]
    try:
        with quiet():
            if live_encoders is not None:
                for encoder in live_encoders.encoders:
                    encoder.load(META)
                trained_networks += [encoder.network for encoder in live_encoders.learning_encoders]
            phase_peaks, host_activation_bytes = rehearse(
                family, options, dit, noisy_batch, live_encoders=live_encoders, watch=watch, tables=tables
            )
            # The number of elements of each trained weight of the networks
            sizes: list[int] = []
            for network in trained_networks:
                sizes += [weight.numel() for weight in network.parameters() if weight.requires_grad]
            trained_sizes = sizes
    finally:
        if live_encoders is not None:
            live_encoders.free()
    return _SimulatedStep(phase_peaks, host_activation_bytes, trained_sizes)


def _count_average_bytes(options: TrainingOptions, trained_sizes: Sequence[int]) -> int:
    """Return the bytes of the averaged weights in host memory, where only a whole model's average is."""
    if options.full_dit is None or options.features.average is None:
        return 0
    return 4 * sum(trained_sizes)  # float32; frozen weights are not averaged


def _count_sample_only_bytes(family: Trains, options: TrainingOptions, sampling: Family | None) -> int:
    """Return the bytes of the transformers that only samples use; 0 if the run makes none."""
    if sampling is None or options.samples.sample_prompts is None:
        return 0
    count = 0
    for index, file in enumerate(sampling.dit_files):
        if file not in family.dit_files:
            dit = _load_dit_without_values(sampling, options, index, trained=False)
            count += sum(dry.round_up_bytes(weight.nbytes) for weight in dit.parameters())
    return count


def _load_dit_without_values(
    family: Trains, options: TrainingOptions, index: int = 0, trained: bool = True
) -> nn.Module:
    """Build the DiT of an expert on the meta device, where tensors have no values."""
    attention = replace(options.speed.attention.choice, mode="sdpa")  # whatever the kernel of the run
    quantization = rehearsed(options.speed.fp8.quantization)
    placement = replace(choose_placement(options, META, quantization, trained), attention=attention)
    with quiet():
        return family.load_dit(placement, index)


def _offload_states(
    options: TrainingOptions, step: _SimulatedStep
) -> tuple[Mapping[str, dry.BytesByKind], int]:
    """Return the peaks of a step with offloaded optimizer states, and the bytes of these states on the host.

    Without offloading, the peaks are those of the simulated step.
    """
    if options.full_dit is None or not options.full_dit.offloads_states:
        return step.phase_peaks, 0
    # states are on the device for one weight at a time, at most for the largest one
    largest_share = max(step.trained_sizes) / sum(step.trained_sizes)
    state_bytes = max(peak_bytes.get(dry.OPTIMIZER, 0) for peak_bytes in step.phase_peaks.values())
    on_device = round(state_bytes * largest_share)
    reduced_peaks = {}
    for phase, peak_bytes in step.phase_peaks.items():
        reduced_peaks[phase] = {**peak_bytes, dry.OPTIMIZER: on_device}
    return reduced_peaks, state_bytes


def largest_batch(items: Iterable[TrainingItem], latent_side: int = 8) -> tuple[TrainingItem, ...]:
    """Return the items of the batch with the most pixels, including references; prefer items with audio.

    Args:
        items: Items of the dataset.
        latent_side: Number of pixels on a side of the unit of `TrainingItem.reference_latent_sizes`.
    """
    batches = []
    for pool in repeat_items(list(items)).values():
        with_audio_first = sorted(pool, key=lambda item: not item.has_cached_audio)
        batches.append(with_audio_first[: with_audio_first[0].table.learning.batch_size])
    return tuple(max(batches, key=partial(_count_pixels, latent_side=latent_side)))


def _count_pixels(batch: Sequence[TrainingItem], latent_side: int) -> tuple[int, bool]:
    """Return a sort key for batches: pixels including references, then whether the batch has audio."""
    # height and width of each reference in turn, in units of `latent_side`
    sides = batch[0].reference_latent_sizes
    references = sum(map(operator.mul, sides[::2], sides[1::2]))
    return (prod(batch[0].bucket) + references * latent_side**2) * len(batch), batch[0].has_cached_audio


def read_largest(
    family: Described,
    options: TrainingOptions,
    items: Sequence[TrainingItem],
    sources: BatchSources,
) -> NoisyBatch:
    """Read the largest batch of a run and add noise as in training, to predict its memory.

    Raises:
        CacheError: If its caches cannot be used.
    """
    largest = largest_batch(with_reference_sizes(items, sources.stores), family.latent.stride[1])
    batch = sources.read(
        largest,
        checks=CacheChecks(),
        seed_parts=("largest",),
        reads_empty=EMPTY_PROMPT in options.features.needs,
        reads_rejected=REJECTED_ONES in options.features.needs,
    )
    # clean conditioning frames need a little more memory: if they can be drawn, the largest batch has some
    noise_spec = replace(
        family.noise, first_frame_probability=math.ceil(family.noise.first_frame_probability)
    )
    if noise_spec.clean_token_rule is not None:
        noise_spec = replace(noise_spec, clean_token_rule=noise_spec.clean_token_rule.always())
    noise_sampler = NoiseSampler(
        options.timesteps,
        seed=0,
        noise_spec=noise_spec,
        latent=family.latent,
        perturbations=options.features.on.noise,
        audio=AudioLearning(),
        condition_set=options.features.condition_set,
    )
    return noise_sampler.add_noise(batch, number=0, first_sample=0)  # as the first micro-batch of a run


def plan_one_card(
    family: Family,
    options: TrainingOptions,
    noisy_batch: NoisyBatch,
    *,
    device: torch.device,
    room: DeviceMemory | None,
    sampling: Family | None,
    live_encoders: LiveTextEncoders | None,
    tables: Sequence[DatasetTable],
) -> None:
    """Print how much memory a step of the run needs on a single GPU, and what would save memory.

    Nothing large is loaded, and no GPU is needed.

    Args:
        family: The model family.
        options: Options of the run.
        noisy_batch: Batch with noise and timesteps.
        device: Device of the run.
        room: Memory of the GPU; None if unknown.
        sampling: Model of samples, if an option names transformers that only samples use.
        live_encoders: Text encoders that are loaded.
        tables: Tables of the dataset.
    """
    prediction = predict_memory(
        family,
        options,
        noisy_batch,
        device=device,
        sampling=sampling,
        live_encoders=live_encoders,
        tables=tables,
    )
    compiled = [] if options.speed.compilation.choice is None else [COMPILED]

    def plan(blocks: int, remarks: Sequence[str]) -> memory_plan.MemoryPlan:
        phase = prediction.phase(blocks)
        host = free_host_memory()
        remarks = (*remarks, *compiled, *suggest_larger_batch(prediction, blocks, room))
        if prediction.takes_turns and host is not None and phase.host > host:
            # A warning that host memory is too small for transformers that alternate on the device
            remedy = "train one transformer at a time, and make no samples by both"
            if options.speed.fp8.quantization is None:
                remedy = f"--fp8_base --fp8_scaled halves that. Or {remedy}"
            remarks = (
                *remarks,
                (
                    f"The host has {format_gib(host)} GiB free, and {format_gib(phase.host)} are needed: "
                    f"{remedy}."
                ),
            )
        return prediction.plan(blocks, remarks)

    def suggest(known_room: DeviceMemory) -> list[str]:
        return suggest_changes(family, prediction, noisy_batch, room=known_room, device=device)

    memory_plan.print_plan(prediction, options.speed.swap, room, make_plan=plan, advice=suggest)


def suggest_larger_batch(prediction: MemoryPrediction, blocks: int, room: DeviceMemory | None) -> list[str]:
    """Return the largest batch that fits, as a line of `--plan`; nothing if the batch cannot be larger.

    Args:
        prediction: Prediction of the run's own largest batch.
        blocks: Number of swapped blocks.
        room: Available memory; None if unknown.
    """
    if room is None:
        return []
    count = prediction.shape[0]

    def needed(batch_size: int) -> int:
        return prediction.scaled(batch_size / count).device_bytes(blocks)

    batch_size = count
    while batch_size < MAX_BATCH and needed(batch_size + 1) <= room.usable:
        batch_size += 1
    if batch_size == count:
        return []
    return [
        f"batch_size {batch_size} in --dataset_config fits too, with {format_gib(needed(batch_size))} GiB: "
        "steps with small items spend less time waiting for the host"
    ]


def prepare_memory(plan: TrainingPlan) -> tuple[SwapOptions, MemoryWatch | None]:
    """Resolve --blocks_to_swap auto before anything is loaded, to the same number in all processes.

    A step is simulated (rehearsed) only if there is a CUDA device.

    Returns:
        The resolved options, and in the main process a watcher that compares the peak with the prediction.

    Raises:
        MemoryPlanError: If auto cannot be resolved.
    """
    options, accelerator = plan.options, plan.accelerator
    device = accelerator.device
    room = device_memory_to_plan(device)
    speed, prediction = memory_plan.resolve_swap(options.speed, room, partial(_rehearse_largest, plan))
    swap = speed.swap
    watch: MemoryWatch | None = None
    if room is not None and accelerator.is_main_process:
        watch = MemoryWatch(device)
        if prediction is not None:
            needed = prediction.device_bytes(swap.number)
            logger.info(
                "Predicted peak of the device: %s GiB; %s can be used. --plan shows the parts.",
                format_gib(needed),
                format_gib(room.usable),
            )
            watch = MemoryWatch(device, needed, prediction.num_elements)
    # each process has resolved auto for its own device, but all share the swapped weights in host memory
    if options.speed.swap.is_auto:
        swap = replace(swap, blocks_to_swap=reduce_max(swap.number, accelerator.num_processes, device))
    return swap, watch


def _rehearse_largest(plan: TrainingPlan) -> MemoryPrediction:
    """Predict the peak memory of a training step with the run's largest batch."""
    noisy_batch = read_largest(plan.family, plan.options, plan.training, plan.sources)
    return predict_memory(
        plan.family,
        plan.options,
        noisy_batch,
        plan.accelerator.device,
        sampling=plan.other_families.sampling,
        live_encoders=plan.live_encoders,
        tables=plan.config.datasets,
    )


def suggest_changes(
    family: Trains,
    prediction: MemoryPrediction,
    noisy_batch: NoisyBatch,
    room: DeviceMemory,
    device: torch.device,
) -> list[str]:
    """Return changes that make the run fit, cheapest first.

    Each line adds to the lines before it; the last one fits if any does. Options are changed first; if that
    is not enough, smaller items are suggested.
    """
    # predicts a step with changed options, by running it on tensors without storage
    rehearse_with = partial(
        predict_memory,
        family,
        noisy_batch=noisy_batch,
        device=device,
        sampling=prediction.sampling,
        live_encoders=prediction.live_encoders,
    )
    rehearsals = [
        (flags, partial(rehearse_with, changed_options))
        for flags, changed_options in list_memory_savings(prediction.options, prediction.num_further_dits)
    ]
    lines, too_large = memory_plan.advise(
        prediction,
        rehearsals,
        room.usable,
        swapped=prediction.blocks,
        can_swap=prediction.options.can_swap,
    )
    if too_large is None:
        return lines
    return [*lines, *suggest_smaller_items(family.latent, too_large, room)]


def list_memory_savings(
    options: TrainingOptions, num_further_dits: int = 0
) -> list[tuple[str, TrainingOptions]]:
    """Return unused options that save memory, ordered by how much they slow down training.

    Args:
        options: Options of the run.
        num_further_dits: Number of trained transformers apart from the first one.

    Returns:
        Pairs of an advised option and the run's options with it and all earlier ones applied.
    """
    loop = options.loop
    # only frozen weights can be stored in fp8
    can_quantize = options.full_dit is None and options.speed.fp8.quantization is None
    unused = {
        "--offload_inactive_dit": num_further_dits > 0 and not options.by_expert.offload_inactive_dit,
        "--gradient_checkpointing": not loop.gradient_checkpointing,
        "--fp8_base --fp8_scaled": can_quantize,
        "--gradient_checkpointing_cpu_offload": not loop.gradient_checkpointing_cpu_offload,
    }
    savings: list[tuple[str, TrainingOptions]] = []
    for flags, is_unused in unused.items():
        if is_unused:
            switched_on = {flag.removeprefix("--"): True for flag in flags.split()}
            with quiet():  # warnings about the options were already logged for the given ones
                options = override_options(options, switched_on)
            savings.append((flags, options))
    return savings


def suggest_smaller_items(latent: LatentSpec, too_large: MemoryPrediction, room: DeviceMemory) -> list[str]:
    """Return the first smaller batch, clip or image that fits, as a line of advice for `--plan`.

    Args:
        latent: Sizes that the family supports.
        too_large: The prediction with all other savings, which is still too large.
        room: Available memory.
    """
    can_swap = too_large.options.can_swap
    swapped_blocks = too_large.max_swapped_blocks if can_swap else too_large.blocks
    swap_flag = f" with --blocks_to_swap {swapped_blocks}" if can_swap else ""
    for key, value, shape in list_smaller_shapes(latent, too_large.shape):
        scale = prod(shape) / prod(too_large.shape)  # assumes memory proportional to the number of latents
        if too_large.scaled(scale).device_bytes(swapped_blocks) <= room.usable:
            return [f"{key} {value} in --dataset_config{swap_flag} fits ({describe_batch(latent, shape)})"]
    return ["no smaller batch, clip or image was found that fits"]


def list_smaller_shapes(latent: LatentSpec, shape: Shape) -> list[tuple[str, str, Shape]]:
    """Return smaller shapes in the order to try them: fewer samples, fewer frames, smaller images.

    Sections of a clip keep their length, because the model fixes it.

    Returns:
        Triples of a key of --dataset_config, its value, and the resulting shape B F H W of the latents.
    """
    batch_size, frames, height, width = shape
    _, height_stride, width_stride = latent.stride
    token_side = latent.pixel_step // width_stride  # sides of the latents are multiples of it
    shapes: list[tuple[str, str, Shape]] = []
    for smaller_batch in list_halves(batch_size):
        shapes.append(("batch_size", str(smaller_batch), (smaller_batch, frames, height, width)))
    min_frames = frames
    if not latent.in_sections:
        min_frames = 1  # smaller images are tried last, with the shortest clip
        shorter = [latent.lengths.fit(latent.count_frames(number)) for number in list_halves(frames)]
        for length in dict.fromkeys(shorter):
            shapes.append(("target_frames", str(length), (1, latent.count_latents(length), height, width)))
    for factor in (0.75, 0.5, 0.375, 0.25):
        smaller_height = token_side * max(1, round(height * factor / token_side))
        smaller_width = token_side * max(1, round(width * factor / token_side))
        resolution = f"[{width_stride * smaller_width}, {height_stride * smaller_height}]"
        shapes.append(("resolution", resolution, (1, min_frames, smaller_height, smaller_width)))
    return shapes


def list_halves(number: int) -> list[int]:
    """Halve a number repeatedly down to 1; return all halves."""
    halves = []
    while number > 1:
        number = (number + 1) // 2
        halves.append(number)
    return halves


def describe_batch(latent: LatentSpec, shape: Shape) -> str:
    """Describe the size of a batch in pixels and frames, from the shape of its latents."""
    count, frames, height, width = shape
    _, rows, columns = latent.stride
    return f"{width * columns}x{height * rows}, {latent.count_frames(frames)} frames, batch {count}"

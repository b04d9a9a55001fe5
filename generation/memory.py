"""Plan the memory of a generation: rehearse its phases one by one, each with its own networks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blissful_tuner.guidance import make_guidance, plan_steps
from blissful_tuner.step_cache import StepCaches
from blissful_tuner.taehv import check_taehv, decoding_bytes
from checkpoints.stored.forms import rehearsed
from generation.denoise import SeededNoise, iterate_sections, on_device, predictor
from generation.expert_memory import (
    SINGLE_EXPERT,
    ExpertSchedule,
    all_requests,
    find_largest,
    load_dit_with_unmerged_loras,
    make_expert_schedule,
)
from generation.loaded_networks import (
    NO_ENCODERS,
    encode_inputs,
    gather_encoded,
    list_prompts,
    needs_media,
    select_prompts,
)
from generation.options import GenerationOptions
from generation.request import Peaks
from generation.script_options import UNDECODED
from modules.console import quiet
from modules.devices import format_gib, get_compute_dtype
from modules.errors import MemoryPlanError, OptionError
from modules.options import override_options
from modules.private_torch import FakeTensor
from networks.apply import Change
from networks.gated_loras import add_stage_loras, get_stage_loras
from networks.unmerged_loras import add_unmerged
from protocols.data import Conditions
from protocols.family import Family, TextEncoder, can_divide, can_see, is_layered, trains_audio
from protocols.loading import Placement
from protocols.requests import Prepared, Prompt
from protocols.rules import Expert, noisiest
from protocols.steps import DitAt, EncodedPrompts, Section, Step
from runtime.planning import dry_run as dry
from runtime.planning import memory_plan
from runtime.planning.device_memory import DeviceMemory, free_host_memory
from runtime.run_blocks import get_spec

META = torch.device("meta")
MAX_TIMESTEP = 1000.0
# number of frames after which a VAE that decodes four frames at a time has reached its peak
DECODED = 13


@dataclass(frozen=True)
class PhasePrediction:
    """Predicted memory of a request: while denoising, depending on block swap, and in the other phases."""

    peaks_by_phase: Mapping[str, dry.BytesByKind]  # place in the step -> its peak
    swaps: Sequence[memory_plan.OffloadedWeights]  # the item at index n is the effect of --blocks_to_swap n
    weights: str  # description of the weights' dtypes
    # bytes and name of each network that runs between two steps
    work_between_steps: Sequence[tuple[int, str]]
    expert_schedule: ExpertSchedule
    cublas_workspace: memory_plan.MemoryPart  # other memory in use on the device
    phases_before: tuple[memory_plan.Phase, ...] = ()  # encoding of prompts and inputs
    phases_after: tuple[memory_plan.Phase, ...] = ()  # decoding

    @property
    def max_swapped_blocks(self) -> int:
        """Largest possible number of swapped transformer blocks."""
        return len(self.swaps) - 1

    def phase(self, count: int) -> memory_plan.Phase:
        """Return what uses the memory at the peak of denoising if `count` blocks are swapped."""
        swap = self.swaps[count]
        peak_name, bytes_by_kind = dry.find_peak_phase(self.peaks_by_phase)
        weights = bytes_by_kind[dry.WEIGHTS]
        work_between, work_name = max(self.work_between_steps, default=(0, ""))
        # between steps only the weights are in memory
        if work_between > sum(bytes_by_kind.values()) - weights:
            peak_name = work_name
            bytes_by_kind = {dry.WEIGHTS: weights, dry.TEMPORARY: work_between}
        note = self.weights + swap.describe(count, "of buffers")
        parts = memory_plan.list_memory_parts(
            bytes_by_kind, swap, {dry.WEIGHTS: note, dry.TEMPORARY: peak_name}
        )
        return memory_plan.Phase(
            "denoising", (*parts, *self.expert_schedule.list_idle_parts(weights, swap), self.cublas_workspace)
        )

    def plan(self, blocks: int, remarks: Sequence[str] = ()) -> memory_plan.MemoryPlan:
        """Return the memory plan of all phases with `blocks` swapped blocks."""
        return memory_plan.MemoryPlan(
            (*self.phases_before, self.phase(blocks), *self.phases_after), tuple(remarks)
        )

    def device_bytes(self, blocks: int) -> int:
        """Return the device memory while denoising, in bytes, with this number of swapped blocks."""
        return self.phase(blocks).device


def predict_request(
    family: Family,
    options: GenerationOptions,
    prepared: Prepared,
    device: torch.device,
    expert_schedule: ExpertSchedule | None = None,
    device_memory: DeviceMemory | None = None,
    watch: Callable[[nn.Module], dry.Extrapolate] = dry.extrapolate_on_one_device,
) -> PhasePrediction:
    """Predict the memory of all phases of a generation by running them on fake tensors.

    LoRAs that are merged while loading add nothing. Matrix products in 8 bits are counted as 16-bit
    products of the same weights. Loading raises the same errors as in a real run.

    Args:
        family: The model family.
        options: Options of the run.
        prepared: The request.
        device: Device of the run; nothing is allocated on it.
        expert_schedule: Order of the experts over the whole run; None computes it from this request alone.
        device_memory: Memory of the device; layers of text encoders that do not fit wait on the host.
        watch: Returns, for a network, the function that extrapolates from runs with few blocks to all;
            `TokenCounter.watch` if several devices share the step.
    """
    cublas_workspace = memory_plan.workspace(device, is_training=False)
    text_phases, encoded = predict_text_encoding(
        family, options, prepared, cublas_workspace=cublas_workspace, device_memory=device_memory
    )
    input_phases, inputs = _predict_input_encoding(family, prepared, cublas_workspace)
    expert_schedule = expert_schedule or make_expert_schedule(family, options, [prepared])
    denoising = predict_denoising(
        family,
        options,
        prepared,
        encoded=encoded,
        inputs=inputs,
        cublas_workspace=cublas_workspace,
        expert_schedule=expert_schedule,
        watch=watch,
    )
    decoding_phases = _predict_all_decoding(family, options, prepared, cublas_workspace)
    return replace(
        denoising, phases_before=(*text_phases, *input_phases), phases_after=tuple(decoding_phases)
    )


def _predict_input_encoding(
    family: Family, prepared: Prepared, cublas_workspace: memory_plan.MemoryPart
) -> tuple[list[memory_plan.Phase], Mapping[int, Conditions]]:
    """Predict the memory for encoding input images and video; also return the conditions, by section."""
    if not needs_media(family, prepared):
        return [], dict(encode_inputs(family, NO_ENCODERS, prepared))
    encoders = family.media_encoders(META)
    with rehearsing(encoders) as ledger:
        conditions = encode_inputs(family, encoders, prepared)
        phase = make_phase("images and videos", ledger, cublas_workspace)
    return [phase], {section: make_real_tensors(tensors) for section, tensors in conditions.items()}


def _predict_all_decoding(
    family: Family, options: GenerationOptions, prepared: Prepared, cublas_workspace: memory_plan.MemoryPart
) -> list[memory_plan.Phase]:
    """Predict the memory of decoding the audio and then the pixels, if the run writes them."""
    pixels: list[memory_plan.Phase] = []
    if options.output.output_type not in UNDECODED and not prepared.is_audio_alone:
        pixels.append(predict_decoding(family, prepared, cublas_workspace))
    audio: list[memory_plan.Phase] = []
    # sizes of image and audio latents
    audio_video = None if prepared.is_still else prepared.audio_video_shapes
    if audio_video is not None and trains_audio(family) and options.output.writes_audio:
        networks = family.audio_networks(META, decodes=True)
        with rehearsing(networks) as ledger:
            family.decode_audio(networks, torch.empty(1, *audio_video.audio))
            audio.append(make_phase("decoding sound", ledger, cublas_workspace))
    return [*audio, *pixels]


@contextmanager
def rehearsing(networks: object) -> Iterator[dry.Ledger]:
    """Run the `with` block as a dry run of these networks, and yield the record of its memory."""
    with dry.dry_run() as ledger, torch.no_grad():
        for network in dry.modules_in(networks):
            dry.allocate_empty_weights(network, ledger)
        yield ledger


def predict_text_encoding(
    family: Family,
    options: GenerationOptions,
    prepared: Prepared,
    cublas_workspace: memory_plan.MemoryPart,
    device_memory: DeviceMemory | None,
) -> tuple[list[memory_plan.Phase], Mapping[int, EncodedPrompts]]:
    """Predict the memory of each text encoder; also return the encoded prompts, as uninitialized tensors.

    An encoder's blocks may be split over the processes that share the transformer, or some layers may stay in
    host memory if they do not fit on the device.
    """
    prompts = select_prompts(prepared, options.guidance)
    phases: list[memory_plan.Phase] = []
    # encoder outputs by prompt
    outputs: dict[Prompt, dict[str, Tensor | list[Tensor]]] = {text: {} for text in list_prompts([prompts])}
    for encoder in family.text_encoders():
        encoder.load(META)
        if can_see(encoder) and any(text.images for text in outputs):
            encoder.load_tower(META)  # the image encoder; before the dry run, which must not load anything
        with rehearsing(encoder) as ledger:
            encoded = [encoder.encode([text])[0] for text in outputs]
            phase = make_phase(f"text encoder {encoder.name}", ledger, cublas_workspace)
        phases.append(_with_fewer_weights(phase, encoder, options, device_memory))
        for text, conditions in zip(outputs, encoded, strict=True):
            outputs[text].update(make_real_tensors(conditions))  # real tensors, which later dry runs accept
    return phases, gather_encoded(prompts, outputs)


def _with_fewer_weights(
    phase: memory_plan.Phase,
    encoder: TextEncoder,
    options: GenerationOptions,
    device_memory: DeviceMemory | None,
) -> memory_plan.Phase:
    """Subtract from a text encoder's phase the weights that are on other devices or in host memory."""
    weights = phase.parts[0]  # the first line of the plan
    processes = memory_plan.sharing_processes(options.speed)
    if processes > 1 and can_divide(encoder):
        network = encoder.network
        (offloaded,) = memory_plan.predict_swaps(network, get_spec(network), options.speed.swap, processes)
        note = offloaded.describe(0, "").removeprefix("; ")  # "; " separates it from a note before it
        weights = replace(weights, device=weights.device - offloaded.saved_device_bytes, note=note)
    elif device_memory is not None and phase.device > device_memory.usable and is_layered(encoder):
        host_bytes = encoder.offloaded_bytes(device_memory.usable)
        if host_bytes:
            on_device = weights.device - host_bytes
            weights = replace(weights, device=on_device, host=host_bytes, note="copied layer by layer")
    return memory_plan.Phase(phase.name, (weights, *phase.parts[1:]))


def predict_denoising(
    family: Family,
    options: GenerationOptions,
    prepared: Prepared,
    encoded: Mapping[int, EncodedPrompts],
    inputs: Mapping[int, Conditions],
    cublas_workspace: memory_plan.MemoryPart,
    expert_schedule: ExpertSchedule = SINGLE_EXPERT,
    watch: Callable[[nn.Module], dry.Extrapolate] = dry.extrapolate_on_one_device,
) -> PhasePrediction:
    """Predict the peak memory of denoising.

    1. Load the transformer on the meta device.
    2. Run the step that needs the most memory with a few blocks, and count the bytes of all tensors.
    3. Extrapolate to all blocks.

    Args:
        family: The model family.
        options: Options of the run.
        prepared: The request with all values resolved.
        encoded: Encoded prompts by section.
        inputs: Conditions from input media, by section.
        cublas_workspace: Other memory in use on the device.
        expert_schedule: Order of the experts over the run.
        watch: Returns, for a network, the function that extrapolates from runs with few blocks to all.
    """
    speed = options.speed
    sdpa = replace(speed.attention.choice, mode="sdpa")  # represents all kernels, some of which need a GPU
    placement = Placement(META, attention=sdpa, quantization=rehearsed(speed.fp8.quantization))
    dit, lora_changes = load_dit_with_unmerged_loras(family, options, placement)
    dit.eval().requires_grad_(False)
    weights = memory_plan.format_dtype_sizes(dit)
    processes = memory_plan.sharing_processes(speed)
    swaps = memory_plan.predict_swaps(dit, family.dit, speed.swap, processes)
    blocks = family.dit.blocks(dit)
    extrapolate = watch(dit)
    if prepared.stage_lora_strengths:
        add_stage_loras(dit)
    with rehearsing(dit) as ledger:
        dry.track_blocks(blocks, ledger)
        _place_loras(dit, lora_changes, prepared, ledger)
        noise = SeededNoise(0, dry.ACCELERATOR)
        sections = iterate_sections(family, prepared, prompts=encoded, inputs=inputs, noise=noise)
        section = on_device(next(sections), dry.ACCELERATOR)
        heaviest = _HeaviestStep(family, options, prepared, dit=dit, ledger=ledger, section=section)
        if section.overrides.section_cache is not None:
            # After this run, layers outside of the blocks have computed what they keep for all steps.
            # Otherwise only later runs would include these bytes, as if they belonged to one more block.
            heaviest.measure((1,) * len(blocks))  # one block of each list
        peaks_by_phase = extrapolate(heaviest.measure, tuple(map(len, blocks.values())))
    return PhasePrediction(
        peaks_by_phase=peaks_by_phase,
        swaps=swaps,
        weights=weights,
        work_between_steps=_list_work_between_steps(family, options, prepared),
        expert_schedule=expert_schedule,
        cublas_workspace=cublas_workspace,
    )


class _HeaviestStep:
    """The denoising step of a section that needs the most memory, for a dry run."""

    def __init__(
        self,
        family: Family,
        options: GenerationOptions,
        prepared: Prepared,
        *,
        dit: nn.Module,
        ledger: dry.Ledger,
        section: Section,
    ) -> None:
        """Find the heaviest step of a request, to be run on the first section."""
        self._family = family
        self._prepared = prepared
        self._dit = dit
        self._ledger = ledger
        self._section = section
        self._blocks = family.dit.blocks(dit)  # all blocks by list; the network is truncated to a few
        self._guidance = make_guidance(prepared, options.guidance, family.experts)
        self._step = heaviest_step(prepared, options, family.experts, section.noise)
        self._splits_passes = options.splits_guidance and not family.defaults.one_batch

    def measure(self, counts: dry.Counts) -> Mapping[str, dry.BytesByKind]:
        """Run the step with `counts` blocks in each block list; return the peak memory of each phase."""
        dry.truncate_blocks(self._dit, self._blocks, counts, self._ledger)
        overrides = self._section.overrides
        if overrides.section_cache is not None:
            overrides.section_cache.clear()  # its tensors belong to blocks of another run
        self._ledger.begin_phase("forward outside the blocks")
        self._ledger.forget_peaks()
        with _cached_dit(self._family, self._prepared, self._dit) as dit_at:
            predict_velocity = predictor(
                self._family,
                dit_at,
                self._step,
                split=self._splits_passes,
                all_passes=overrides,
                clean_streams=self._section.clean_streams,
            )
            with self._ledger.reading_unknown_as_one():  # a family may branch on the timestep's value
                self._guidance(self._step, predict_velocity, self._section)
        return dict(self._ledger.peaks)


def _place_loras(
    dit: nn.Module,
    lora_changes: Mapping[str, Sequence[Change]],
    prepared: Prepared,
    ledger: dry.Ledger,
) -> None:
    """Allocate the LoRAs of quantized layers and of the request's stages on the device, for a dry run."""
    if lora_changes:
        with ledger.allocating(dry.NETWORK):
            add_unmerged(dit, lora_changes, dry.ACCELERATOR, get_compute_dtype(dit))
    if prepared.stage_lora_strengths:
        with ledger.allocating(dry.ADAPTER):
            for loras, strength in zip(get_stage_loras(dit), prepared.stage_lora_strengths, strict=True):
                if strength:
                    loras.place_on(dry.ACCELERATOR, get_compute_dtype(dit))


def _cached_dit(family: Family, prepared: Prepared, dit: nn.Module) -> AbstractContextManager[DitAt]:
    """Return a context that yields a function from timestep to network, with a step cache if requested."""
    if prepared.request.step_cache is None:
        return nullcontext(lambda _: dit)
    return StepCaches(prepared, family.dit).section(lambda _: dit)


def _list_work_between_steps(
    family: Family, options: GenerationOptions, prepared: Prepared
) -> list[tuple[int, str]]:
    """Return (peak memory in bytes, name) of each network that runs between steps, from a dry run of each."""
    # Such networks decode previews, or make the input of the request's next stage.
    work_between_steps: list[tuple[int, str]] = []
    preview_vae = options.preview.preview_vae
    if preview_vae is not None:
        *_, height, width = family.latent.shape(1, prepared.height, prepared.width)
        decoder = check_taehv(preview_vae, family.latent)
        preview_bytes = decoding_bytes(decoder, torch.float16, height, width)
        work_between_steps.append((preview_bytes, "decoding a preview"))
    for load, input_shape in prepared.stage_start_networks:
        network = load(META)
        with rehearsing(network) as ledger:
            network(torch.empty(input_shape, dtype=get_compute_dtype(network), device=dry.ACCELERATOR))
        _, bytes_by_kind = dry.find_peak_phase(ledger.peaks)
        work_between_steps.append((sum(bytes_by_kind.values()), type(network).__name__))
    return work_between_steps


def heaviest_step(
    prepared: Prepared, options: GenerationOptions, experts: Sequence[Expert], noisy: Tensor
) -> Step:
    """Find the step that needs the most memory.

    This is the step with the most passes in one batch. Ties are broken by the total number of passes, then by
    the noisier expert, then by the earlier step.
    """
    sort_keys = []
    for expert, plans in zip(experts, plan_steps(prepared, options.guidance), strict=True):
        for step_index, plan in enumerate(plans):
            # the negative index prefers the first of equal steps
            sort_keys.append((plan.max_together, len(plan.passes), expert.min_timestep, -step_index))
    _, _, min_timestep, negative_index = max(sort_keys)
    # any timestep that selects the expert of this step
    is_noisiest = min_timestep == experts[noisiest(experts)].min_timestep
    timestep = MAX_TIMESTEP if is_noisiest else min_timestep
    return Step(
        -negative_index,
        prepared.num_steps,
        sigma=1.0,
        timestep=timestep,
        noisy=noisy,
        audio_sigma=None if prepared.audio_shift == 1 else 1.0,  # None: the same noise level as the image
    )


def predict_decoding(
    family: Family, prepared: Prepared, cublas_workspace: memory_plan.MemoryPart
) -> memory_plan.Phase:
    """Predict the memory of decoding from a dry run of `DECODED` frames, enough to reach the peak."""
    encoders = family.media_encoders(META, images=False)
    shape = family.latent.shape(prepared.frames, prepared.height, prepared.width)
    with rehearsing(encoders) as ledger:
        decoded = 0
        for chunk in family.decode(encoders, torch.empty(shape)):
            decoded += chunk.shape[2]
            if decoded >= DECODED:
                break
        return make_phase("decoding", ledger, cublas_workspace)


def make_phase(name: str, ledger: dry.Ledger, cublas_workspace: memory_plan.MemoryPart) -> memory_plan.Phase:
    """Return a phase of the memory plan: the peak that `ledger` recorded, plus cuBLAS's workspace."""
    bytes_by_kind: dry.BytesByKind = {}  # a tokenizer without a network allocates nothing on the device
    if ledger.peaks:
        _, bytes_by_kind = dry.find_peak_phase(ledger.peaks)
    weights = bytes_by_kind.get(dry.WEIGHTS, 0)
    work = sum(bytes_by_kind.values()) - weights
    parts = (
        memory_plan.MemoryPart("weights", weights),
        memory_plan.MemoryPart("work", work),
        cublas_workspace,
    )
    return memory_plan.Phase(name, parts)


def make_real_tensors(conditions: Conditions) -> Conditions:
    """Replace a dry run's fake tensors by real, uninitialized tensors, which later dry runs accept.

    Integer tensors are real already and keep their values.
    """

    def real(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor

    return {
        name: [real(tensor) for tensor in value] if isinstance(value, list) else real(value)
        for name, value in conditions.items()
    }


def plan_generation(
    family: Family, options: GenerationOptions, device: torch.device, device_memory: DeviceMemory | None
) -> None:
    """Print the memory plan of the largest request, without loading weights and without a GPU."""
    with quiet():
        prepared, prediction = predict_largest_request(
            family, options, all_requests(family, options), device=device, device_memory=device_memory
        )

    def plan(blocks: int, remarks: Sequence[str]) -> memory_plan.MemoryPlan:
        swap_plan = prediction.plan(blocks)
        denoising = prediction.phase(blocks)
        expert_warnings = prediction.expert_schedule.describe_fit(
            swap_plan, denoising, device_memory, free_host_memory()
        )
        return replace(swap_plan, remarks=(*remarks, *expert_warnings))

    def advise(device_memory: DeviceMemory) -> list[str]:
        return suggest_options(
            family, options, prepared, prediction=prediction, device_memory=device_memory, device=device
        )

    memory_plan.print_plan(prediction, options.speed.swap, device_memory, make_plan=plan, advice=advise)


def predict_largest_request(
    family: Family,
    options: GenerationOptions,
    requests: Sequence[Prepared],
    device: torch.device,
    device_memory: DeviceMemory | None = None,
) -> tuple[Prepared, PhasePrediction]:
    """Return the request (or one stage of it) that needs the most memory to denoise, and its prediction."""
    expert_schedule = make_expert_schedule(family, options, requests)
    predictions: list[tuple[Prepared, PhasePrediction]] = []
    for request in find_largest(family, requests):
        for stage in request.stages or (request,):
            prediction = predict_request(
                family,
                options,
                stage,
                device=device,
                expert_schedule=expert_schedule,
                device_memory=device_memory,
            )
            predictions.append((stage, prediction))
    # by the bytes on the device with 0 swapped blocks
    return max(predictions, key=lambda candidate: candidate[1].device_bytes(0))


def suggest_options(
    family: Family,
    options: GenerationOptions,
    prepared: Prepared,
    prediction: PhasePrediction,
    device_memory: DeviceMemory,
    device: torch.device,
) -> list[str]:
    """Suggest options with which all phases fit in GPU memory, cheapest first; they add up."""
    # Advice for each phase before or after denoising that does not fit into the `usable` memory
    lines: list[str] = []
    for phase in (*prediction.phases_before, *prediction.phases_after):
        if phase.device > device_memory.usable:
            remedy = REMEDIES.get(
                phase.name, "a smaller form of the text encoder, if --help has --text_encoder_form"
            )
            lines.append(f"{phase.name} needs {format_gib(phase.device)} GiB by itself: use {remedy}")
    if prediction.device_bytes(0) <= device_memory.usable:  # denoising fits without swapped blocks
        return lines
    speed = options.speed

    def in_fp8() -> PhasePrediction:
        fp8 = replace(options, speed=override_options(speed, {"fp8_scaled": True}))
        with quiet():
            return predict_request(
                family,
                fp8,
                prepared,
                device=device,
                expert_schedule=prediction.expert_schedule,
                device_memory=device_memory,
            )

    cheaper = [("--fp8_scaled", in_fp8)] if speed.fp8.quantization is None else []
    can_swap = not speed.modes.splits_weights
    changes, cheapest = memory_plan.advise(
        prediction, cheaper, device_memory.usable, can_swap=can_swap, phase=" while denoising"
    )
    lines += changes
    if cheapest is not None:
        maximum = cheapest.max_swapped_blocks
        limit = f"even --blocks_to_swap {maximum} leaves" if can_swap else "what is above leaves"
        lines.append(f"fewer frames or a smaller size: {limit} {format_gib(cheapest.device_bytes(maximum))}")
    return lines


REMEDIES = {
    "decoding": "tiles of the VAE, such as --vae_spatial_tile_sample_min_size 128",
    "images and videos": "tiles of the VAE",
}


def resolve_options(
    family: Family, options: GenerationOptions, device: torch.device, device_memory: DeviceMemory | None
) -> tuple[GenerationOptions, Peaks | None]:
    """Replace --blocks_to_swap auto by a number; return the options and the predicted peaks.

    Args:
        family: The model family.
        options: Options of the run.
        device: Device of the run.
        device_memory: Memory of a CUDA device; None on other devices, where no peaks are predicted.

    Returns:
        The options, and the predicted peaks; None if nothing was predicted.

    Raises:
        MemoryPlanError: If auto cannot be resolved.
    """
    requests: Sequence[Prepared] = ()  # empty: no prediction, such as for latents that are only decoded
    try:
        if device_memory is not None and not options.latent_path:
            requests = all_requests(family, options)
    except OptionError as error:
        if not options.interactive:
            raise
        # prompt lines may complete an incomplete command line, but `auto` needs a complete request now
        if options.speed.swap.is_auto:
            raise MemoryPlanError(
                "--blocks_to_swap auto with --interactive needs a complete request on the command line: "
                f"{error}\n"
                "  Add the missing options, or use a number of blocks."
            ) from error
        return options, None

    def predict_peaks() -> PhasePrediction:
        with quiet():
            _, prediction = predict_largest_request(
                family, options, requests, device=device, device_memory=device_memory
            )
        return prediction

    speed, prediction = memory_plan.resolve_swap(
        options.speed, device_memory if requests else None, predict_peaks
    )
    options = replace(options, speed=speed)
    if prediction is None:
        return options, None
    # `phases_after` follow denoising
    decoding = max((phase.device for phase in prediction.phases_after), default=0)
    return options, Peaks(prediction.plan(speed.swap.number).device, decoding)

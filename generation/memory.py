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
from generation.denoise import SeededNoise, on_device, predictor, sections_of
from generation.expert_memory import (
    ALONE,
    ExpertTurns,
    all_requests,
    find_largest,
    load_with_loras,
    order_turns,
)
from generation.loaded_networks import (
    NO_ENCODERS,
    encode_inputs,
    gather_encoded,
    needs_media,
    texts_of,
    wanted_texts,
)
from generation.options import GenerationOptions
from generation.request import Peaks
from generation.script_options import UNDECODED
from modules.console import quiet
from modules.devices import dtype_of, gib
from modules.errors import MemoryPlanError, OptionError
from modules.options import override_options
from modules.private_torch import FakeTensor
from networks.apply import Change
from networks.gated_loras import add_stage_loras, stage_loras_of
from networks.unmerged_loras import add_unmerged
from protocols.data import Conditions
from protocols.family import Family, TextEncoder, can_divide, can_see, is_layered, trains_audio
from protocols.loading import Placement
from protocols.requests import Prepared, Prompt
from protocols.rules import Expert, noisiest
from protocols.steps import DitAt, EncodedPrompts, Step
from runtime.planning import dry_run as dry
from runtime.planning import memory_plan
from runtime.planning.device_memory import Room, host_room
from runtime.run_blocks import spec_of

META = torch.device("meta")
FIRST_TIMESTEP = 1000.0
# number of frames after which a VAE that decodes four frames at a time has reached its peak
DECODED = 13


@dataclass(frozen=True)
class PhasePrediction:
    """Predicted memory of a request's denoising, of block swap's effect on it, and of other phases."""

    moments: Mapping[str, dry.Moment]  # place in the step -> its peak
    swaps: Sequence[memory_plan.Swapped]  # the item at index n is the effect of --blocks_to_swap n
    weights: str  # description of the weights' dtypes
    between: Sequence[tuple[int, str]]  # bytes and name of each network that runs between two steps
    turns: ExpertTurns
    extra: memory_plan.MemoryPart  # other memory in use on the device
    before: tuple[memory_plan.Phase, ...] = ()  # texts and inputs
    after: tuple[memory_plan.Phase, ...] = ()  # decoding

    @property
    def maximum(self) -> int:
        """Largest possible number of swapped blocks."""
        return len(self.swaps) - 1

    def phase(self, count: int) -> memory_plan.Phase:
        """Return the denoising phase with its peak memory for a number of swapped blocks."""
        swap = self.swaps[count]
        where, moment = dry.largest(self.moments)
        weights = moment[dry.WEIGHTS]
        work_between, name = max(self.between, default=(0, ""))
        if work_between > sum(moment.values()) - weights:  # between steps only the weights are in memory
            where = name
            moment = {dry.WEIGHTS: weights, dry.WORKING: work_between}
        note = self.weights + swap.words(count, "of buffers")
        parts = memory_plan.parts_of(moment, swap, {dry.WEIGHTS: note, dry.WORKING: where})
        return memory_plan.Phase("denoising", (*parts, *self.turns.parts(weights, swap), self.extra))

    def plan(self, blocks: int, remarks: Sequence[str] = ()) -> memory_plan.MemoryPlan:
        """Return the memory plan of all phases with a number of swapped blocks."""
        return memory_plan.MemoryPlan((*self.before, self.phase(blocks), *self.after), tuple(remarks))

    def device(self, blocks: int) -> int:
        """Return the device memory of denoising, in bytes, with this number of swapped blocks."""
        return self.phase(blocks).device


def predict(
    family: Family,
    options: GenerationOptions,
    prepared: Prepared,
    device: torch.device,
    turns: ExpertTurns | None = None,
    room: Room | None = None,
    watch: Callable[[nn.Module], dry.Extrapolate] = dry.plainly,
) -> PhasePrediction:
    """Run all phases of a generation on tensors without values, and measure their memory.

    Nothing is counted for LoRAs that are merged while loading. Products in 8 bits are counted as 16-bit
    products of the same weights. Loading raises the same errors as in a real run.

    Args:
        family: The model family.
        options: Options of the run.
        prepared: The request.
        device: Device of the run; nothing is allocated on it.
        turns: Order of the experts over the whole run; None computes that of this request alone.
        room: Memory of the device; layers of text encoders that do not fit wait on the host.
        watch: Returns, for a network, the function that extrapolates from runs with few blocks to all;
            `TokenCounter.watch` if several devices share the step.
    """
    extra = memory_plan.workspace(device, is_training=False)
    before, encoded = rehearse_texts(family, options, prepared, extra=extra, room=room)
    if needs_media(family, prepared):
        encoders = family.media_encoders(META)
        with rehearsing(encoders) as ledger:
            conditions = encode_inputs(family, encoders, prepared)
            before.append(make_phase("images and videos", ledger, extra))
        inputs = {section: make_solid(tensors) for section, tensors in conditions.items()}
    else:
        inputs = dict(encode_inputs(family, NO_ENCODERS, prepared))
    turns = turns or order_turns(family, options, [prepared])
    denoising = rehearse_denoising(
        family,
        options,
        prepared,
        encoded=encoded,
        inputs=inputs,
        extra=extra,
        turns=turns,
        watch=watch,
    )
    # after denoising: audio, which is decoded first, and pixels
    after: list[memory_plan.Phase] = []
    if options.output.output_type not in UNDECODED and not prepared.is_audio_alone:
        after.append(rehearse_decoding(family, prepared, extra))
    joint = None if prepared.is_still else prepared.joint
    if joint is not None and trains_audio(family) and options.output.writes_audio:
        networks = family.audio_networks(META, decodes=True)
        with rehearsing(networks) as ledger:
            family.decode_audio(networks, torch.empty(1, *joint.audio))
            after.insert(0, make_phase("decoding sound", ledger, extra))
    return replace(denoising, before=tuple(before), after=tuple(after))


@contextmanager
def rehearsing(networks: object) -> Iterator[dry.Ledger]:
    """Run the `with` block as a dry run with these networks, and measure its memory."""
    with dry.dry_run() as ledger, torch.no_grad():
        for network in dry.modules_in(networks):
            dry.place(network, ledger)
        yield ledger


def rehearse_texts(
    family: Family,
    options: GenerationOptions,
    prepared: Prepared,
    extra: memory_plan.MemoryPart,
    room: Room | None,
) -> tuple[list[memory_plan.Phase], Mapping[int, EncodedPrompts]]:
    """Predict the memory of each text encoder; also return the encoded prompts, as uninitialized tensors.

    An encoder's blocks may be split over the processes that share the transformer, or some layers may stay in
    host memory if they do not fit on the device.
    """
    prompts = wanted_texts(prepared, options.guidance)
    phases: list[memory_plan.Phase] = []
    outputs: dict[Prompt, dict[str, Tensor | list[Tensor]]] = {text: {} for text in texts_of([prompts])}
    for encoder in family.text_encoders():
        encoder.load(META)
        if can_see(encoder) and any(text.pictures for text in outputs):
            encoder.load_tower(META)  # the image encoder; before the dry run, which must not load anything
        with rehearsing(encoder) as ledger:
            encoded = [encoder.encode([text])[0] for text in outputs]
            phase = make_phase(f"text encoder {encoder.name}", ledger, extra)
        phases.append(_with_fewer_weights(phase, encoder, options, room))
        for text, conditions in zip(outputs, encoded, strict=True):
            outputs[text].update(make_solid(conditions))  # real tensors, which later dry runs accept
    return phases, gather_encoded(prompts, outputs)


def _with_fewer_weights(
    phase: memory_plan.Phase, encoder: TextEncoder, options: GenerationOptions, room: Room | None
) -> memory_plan.Phase:
    """Reduce the weights in a text encoder's phase by those on other devices or in host memory."""
    weights = phase.parts[0]  # the first line of the plan
    processes = memory_plan.sharing_processes(options.speed)
    if processes > 1 and can_divide(encoder):
        network = encoder.network
        (split,) = memory_plan.swaps_of(network, spec_of(network), options.speed.swap, processes)
        note = split.words(0, "").removeprefix("; ")  # written to follow another note; here it stands alone
        weights = replace(weights, device=weights.device - split.saved, note=note)
    elif room is not None and phase.device > room.usable and is_layered(encoder):
        waiting = encoder.waiting_bytes(room.usable)
        if waiting:
            on_device = weights.device - waiting
            weights = replace(weights, device=on_device, host=waiting, note="copied layer by layer")
    return memory_plan.Phase(phase.name, (weights, *phase.parts[1:]))


def rehearse_denoising(
    family: Family,
    options: GenerationOptions,
    prepared: Prepared,
    encoded: Mapping[int, EncodedPrompts],
    inputs: Mapping[int, Conditions],
    extra: memory_plan.MemoryPart,
    turns: ExpertTurns = ALONE,
    watch: Callable[[nn.Module], dry.Extrapolate] = dry.plainly,
) -> PhasePrediction:
    """Predict the peak memory of denoising: run its heaviest step on tensors without values.

    Args:
        family: The model family.
        options: Options of the run.
        prepared: The request with all values resolved.
        encoded: Encoded prompts by section.
        inputs: Conditions from input media, by section.
        extra: Other memory in use on the device.
        turns: Turns of the experts over the run.
        watch: Returns, for a network, the function that extrapolates from runs with few blocks to all.
    """
    speed = options.speed
    # load the transformer without values
    sdpa = replace(speed.attention.choice, mode="sdpa")  # represents all kernels, some of which need a GPU
    placement = Placement(META, attention=sdpa, quantization=rehearsed(speed.fp8.quantization))
    dit, lora_changes = load_with_loras(family, options, placement)
    dit.eval().requires_grad_(False)
    weights = memory_plan.dtypes_of(dit)
    processes = memory_plan.sharing_processes(speed)
    swaps = memory_plan.swaps_of(dit, family.dit, speed.swap, processes)
    blocks = family.dit.blocks(dit)
    extrapolate = watch(dit)
    if prepared.added:
        add_stage_loras(dit)
    # run one step with a few blocks, and extrapolate to all blocks
    with rehearsing(dit) as ledger:  # the ledger counts the bytes of tensors that exist
        dry.watch_blocks(blocks, ledger)
        _place_loras(dit, lora_changes, prepared, ledger)
        noise = SeededNoise(0, dry.ACCELERATOR)
        sections = sections_of(family, prepared, prompts=encoded, inputs=inputs, noise=noise)
        section = on_device(next(sections), dry.ACCELERATOR)
        guidance = make_guidance(prepared, options.guidance, family.experts)
        step = heaviest_step(prepared, options, family.experts, section.noise)

        def measure(counts: dry.Counts) -> Mapping[str, dry.Moment]:
            """Dry-run the step with these numbers of blocks; return the memory peaks by place in the step."""
            dry.keep_blocks(dit, blocks, counts, ledger)
            if section.overrides.section_cache is not None:
                section.overrides.section_cache.clear()  # its tensors belong to blocks of another run
            ledger.enter("forward outside the blocks")
            ledger.forget_peaks()
            with _cached_dit(family, prepared, dit) as dit_at:
                predict_at = predictor(
                    family,
                    dit_at,
                    step,
                    split=options.splits_guidance and not family.defaults.one_batch,
                    all_passes=section.overrides,
                    clean_streams=section.clean_streams,
                )
                with ledger.guessing():  # a family may branch on the value of the timestep
                    guidance(step, predict_at, section)
            return dict(ledger.peaks)

        if section.overrides.section_cache is not None:
            # The pass that fills it has the peak, and comes before layers outside of the blocks have computed
            # what they keep for all steps. Without it, its bytes would seem to be those of one more block.
            measure((1,) * len(blocks))  # one block of each list
        moments = extrapolate(measure, tuple(map(len, blocks.values())))
    return PhasePrediction(
        moments=moments,
        swaps=swaps,
        weights=weights,
        between=_list_work_between_steps(family, options, prepared),
        turns=turns,
        extra=extra,
    )


def _place_loras(
    dit: nn.Module,
    lora_changes: Mapping[str, Sequence[Change]],
    prepared: Prepared,
    ledger: dry.Ledger,
) -> None:
    """Allocate the LoRAs of quantized layers and of the request's stages on the device, for a dry run."""
    if lora_changes:
        with ledger.allocating(dry.NETWORK):
            add_unmerged(dit, lora_changes, dry.ACCELERATOR, dtype_of(dit))
    if prepared.added:
        with ledger.allocating(dry.ADAPTER):
            for loras, strength in zip(stage_loras_of(dit), prepared.added, strict=True):
                if strength:
                    loras.place_on(dry.ACCELERATOR, dtype_of(dit))


def _cached_dit(family: Family, prepared: Prepared, dit: nn.Module) -> AbstractContextManager[DitAt]:
    """Return a function from a timestep to the network, wrapped in the request's step cache if it has one."""
    if prepared.request.step_cache is None:
        return nullcontext(lambda _: dit)
    return StepCaches(prepared, family.dit).section(lambda _: dit)


def _list_work_between_steps(
    family: Family, options: GenerationOptions, prepared: Prepared
) -> list[tuple[int, str]]:
    """Return bytes and name of each network that runs between steps, for previews or to start a stage."""
    between: list[tuple[int, str]] = []
    preview_vae = options.preview.preview_vae
    if preview_vae is not None:
        *_, height, width = family.latent.shape(1, prepared.height, prepared.width)
        decoder = check_taehv(preview_vae, family.latent)
        preview_bytes = decoding_bytes(decoder, torch.float16, height, width)
        between.append((preview_bytes, "decoding a preview"))
    # networks that make the input of the request's next stage, each with the shape of its input
    for load, shape in prepared.begun_by:
        network = load(META)
        with rehearsing(network) as ledger:
            network(torch.empty(shape, dtype=dtype_of(network), device=dry.ACCELERATOR))
        _, moment = dry.largest(ledger.peaks)
        between.append((sum(moment.values()), type(network).__name__))
    return between


def heaviest_step(
    prepared: Prepared, options: GenerationOptions, experts: Sequence[Expert], noisy: Tensor
) -> Step:
    """Find the step that needs the most memory.

    This is the step with the most passes in one batch. Ties are broken by the total number of passes, then by
    the noisier expert, then by the earlier step.
    """
    candidates = []
    for expert, plans in zip(experts, plan_steps(prepared, options.guidance), strict=True):
        for index, plan in enumerate(plans):
            # sort key; the negative index prefers the first of equal steps
            key = (plan.max_together, len(plan.passes), expert.lowest, -index)
            candidates.append((key, index, expert.lowest))
    _, index, lowest = max(candidates)
    # a timestep of the expert that runs this step
    timestep = FIRST_TIMESTEP if lowest == experts[noisiest(experts)].lowest else lowest
    return Step(
        index,
        prepared.num_steps,
        sigma=1.0,
        timestep=timestep,
        noisy=noisy,
        audio_sigma=None if prepared.audio_shift == 1 else 1.0,  # None: the same noise level as the image
    )


def rehearse_decoding(family: Family, prepared: Prepared, extra: memory_plan.MemoryPart) -> memory_plan.Phase:
    """Predict the memory of decoding from a dry run of `DECODED` frames, which suffices to reach the peak."""
    encoders = family.media_encoders(META, images=False)
    shape = family.latent.shape(prepared.frames, prepared.height, prepared.width)
    with rehearsing(encoders) as ledger:
        decoded = 0
        for chunk in family.decode(encoders, torch.empty(shape)):
            decoded += chunk.shape[2]
            if decoded >= DECODED:
                break
        return make_phase("decoding", ledger, extra)


def make_phase(name: str, ledger: dry.Ledger, extra: memory_plan.MemoryPart) -> memory_plan.Phase:
    """Return a phase whose memory is the peak of a dry run, plus `extra`, which torch needs in any case."""
    _, moment = dry.largest(ledger.peaks)
    weights = moment.get(dry.WEIGHTS, 0)
    work = sum(moment.values()) - weights
    parts = (memory_plan.MemoryPart("weights", weights), memory_plan.MemoryPart("work", work), extra)
    return memory_plan.Phase(name, parts)


def make_solid(conditions: Conditions) -> Conditions:
    """Replace fake tensors of a dry run by real, uninitialized tensors, which later dry runs accept.

    Integer tensors are real already and keep their values.
    """

    def real(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor

    return {
        name: [real(tensor) for tensor in value] if isinstance(value, list) else real(value)
        for name, value in conditions.items()
    }


def plan_generation(
    family: Family, options: GenerationOptions, device: torch.device, room: Room | None
) -> None:
    """Print the memory plan of the largest request, without loading weights and without a GPU."""
    with quiet():
        prepared, prediction = predict_largest(
            family, options, all_requests(family, options), device=device, room=room
        )

    def plan(blocks: int, remarks: Sequence[str]) -> memory_plan.MemoryPlan:
        plan_of_blocks = prediction.plan(blocks)
        denoising = prediction.phase(blocks)
        expert_warnings = prediction.turns.remarks(plan_of_blocks, denoising, room, host_room())
        return replace(plan_of_blocks, remarks=(*remarks, *expert_warnings))

    def advise(room: Room) -> list[str]:
        return advice(family, options, prepared, prediction=prediction, room=room, device=device)

    memory_plan.print_plan(prediction, options.speed.swap, room, plan_of=plan, advice=advise)


def predict_largest(
    family: Family,
    options: GenerationOptions,
    requests: Sequence[Prepared],
    device: torch.device,
    room: Room | None = None,
) -> tuple[Prepared, PhasePrediction]:
    """Return the request (or one stage of it) that needs the most memory to denoise, and its prediction."""
    turns = order_turns(family, options, requests)
    predictions: list[tuple[Prepared, PhasePrediction]] = []
    for request in find_largest(family, requests):
        for stage in request.stages or (request,):
            prediction = predict(family, options, stage, device=device, turns=turns, room=room)
            predictions.append((stage, prediction))
    # by the bytes on the device with 0 swapped blocks
    return max(predictions, key=lambda candidate: candidate[1].device(0))


def advice(
    family: Family,
    options: GenerationOptions,
    prepared: Prepared,
    prediction: PhasePrediction,
    room: Room,
    device: torch.device,
) -> list[str]:
    """Return changes of options that make all phases fit, cheapest first; apply them cumulatively."""
    lines: list[str] = []
    for phase in (*prediction.before, *prediction.after):
        if phase.device > room.usable:
            smaller = SMALLER.get(
                phase.name, "a smaller form of the text encoder, if --help has --text_encoder_form"
            )
            lines.append(f"{phase.name} needs {gib(phase.device)} GiB by itself: use {smaller}")
    if prediction.device(0) <= room.usable:  # denoising fits without swapped blocks
        return lines
    speed = options.speed

    def in_fp8() -> PhasePrediction:
        fp8 = replace(options, speed=override_options(speed, {"fp8_scaled": True}))
        with quiet():
            return predict(family, fp8, prepared, device=device, turns=prediction.turns, room=room)

    cheaper = [("--fp8_scaled", in_fp8)] if speed.fp8.quantization is None else []
    can_swap = not speed.modes.splits_weights
    changes, cheapest = memory_plan.advise(
        prediction, cheaper, room.usable, can_swap=can_swap, phase=" while denoising"
    )
    lines += changes
    if cheapest is not None:
        limit = f"even --blocks_to_swap {cheapest.maximum} leaves" if can_swap else "what is above leaves"
        lines.append(f"fewer frames or a smaller size: {limit} {gib(cheapest.device(cheapest.maximum))}")
    return lines


SMALLER = {
    "decoding": "tiles of the VAE, such as --vae_spatial_tile_sample_min_size 128",
    "images and videos": "tiles of the VAE",
}


def resolve_options(
    family: Family, options: GenerationOptions, device: torch.device, room: Room | None
) -> tuple[GenerationOptions, Peaks | None]:
    """Replace --blocks_to_swap auto by a number; return the options and the predicted peaks.

    Args:
        family: The model family.
        options: Options of the run.
        device: Device of the run.
        room: Memory of a CUDA device; None on other devices, where no peaks are predicted.

    Returns:
        The options, and the predicted peaks; None if nothing was predicted.

    Raises:
        MemoryPlanError: If auto cannot be resolved.
    """
    requests: Sequence[Prepared] = ()  # empty: no prediction, such as for latents that are only decoded
    try:
        if room is not None and not options.latent_path:
            requests = all_requests(family, options)
    except OptionError as error:
        if not options.interactive:
            raise
        # prompt lines may complete an incomplete command line, but `auto` needs a complete request now
        if options.speed.swap.is_auto:
            raise MemoryPlanError(
                "--blocks_to_swap auto with --interactive needs a complete request on the command line: "
                f"{error}\n"
                "  Add the missing options, or give a number of blocks."
            ) from error
        return options, None

    def predict_peaks() -> PhasePrediction:
        with quiet():
            _, prediction = predict_largest(family, options, requests, device=device, room=room)
        return prediction

    speed, prediction = memory_plan.resolve_swap(options.speed, room if requests else None, predict_peaks)
    options = replace(options, speed=speed)
    if prediction is None:
        return options, None
    # `after` are the phases that follow denoising
    decoding = max((phase.device for phase in prediction.after), default=0)
    return options, Peaks(prediction.plan(speed.swap.number).device, decoding)

"""Plan the memory of a generation: rehearse its phases one by one, each with its own networks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blissful_tuner.guidance import make_guidance, plan_steps
from blissful_tuner.step_cache import StepCaches
from blissful_tuner.taehv import check_taehv, decoding_bytes
from generation.denoise import SeededNoise, on_device, predictor, sections_of
from generation.expert_memory import ALONE, ExpertTurns, all_requests, largest_of, load_with_loras, turns_of
from generation.options import GenerationOptions
from generation.request import Peaks
from generation.script_options import UNDECODED
from generation.session import NO_ENCODERS, encode_inputs, gather_encoded, needs_media, texts_of, wanted_texts
from modules.console import quiet
from modules.contract.data import Conditions
from modules.contract.family import Family, can_divide, hears_sound, is_layered
from modules.contract.loading import Placement
from modules.contract.requests import Prepared, Prompt
from modules.contract.rules import Expert, noisiest
from modules.contract.steps import DitAt, EncodedPrompts, Step
from modules.devices import dtype_of, gib
from modules.errors import MemoryPlanError, OptionError
from modules.installation import import_own
from modules.options import override_options
from modules.planning import dry_run as dry
from modules.planning import memory_plan
from modules.planning.device_memory import Room, host_room, room_on
from modules.private_torch import FakeTensor
from modules.run_blocks import spec_of
from modules.stored.forms import rehearsed

META = torch.device("meta")
FIRST_TIMESTEP = 1000.0
# frames of a video: after these a VAE that decodes four frames at a time has reached its peak
DECODED = 13


@dataclass(frozen=True)
class PhasePrediction:
    """The memory of one request: denoising without swapped blocks, effect of swapping, other phases."""

    moments: Mapping[str, dry.Moment]
    swaps: Sequence[memory_plan.Swapped]  # by --blocks_to_swap, from 0 to the most that can be
    weights: str  # their dtypes
    between: Sequence[tuple[int, str]]  # bytes of what works between two steps, beside weights; its name
    turns: ExpertTurns
    extra: memory_plan.MemoryPart
    before: tuple[memory_plan.Phase, ...] = ()  # texts and inputs
    after: tuple[memory_plan.Phase, ...] = ()  # decoding

    @property
    def most(self) -> int:
        return len(self.swaps) - 1

    def phase(self, count: int) -> memory_plan.Phase:
        """Return the largest moment of denoising with this number of blocks swapped."""
        (where, held), swap = dry.largest(self.moments), self.swaps[count]
        weights = held[dry.WEIGHTS]
        most, name = max(self.between, default=(0, ""))
        if most > sum(held.values()) - weights:  # between steps there are weights alone
            where, held = name, {dry.WEIGHTS: weights, dry.WORKING: most}
        note = self.weights + swap.words(count, "of buffers")
        parts = memory_plan.parts_of(held, swap, {dry.WEIGHTS: note, dry.WORKING: where})
        return memory_plan.Phase("denoising", (*parts, *self.turns.parts(weights, swap), self.extra))

    def plan(self, blocks: int, remarks: Sequence[str] = ()) -> memory_plan.MemoryPlan:
        return memory_plan.MemoryPlan((*self.before, self.phase(blocks), *self.after), tuple(remarks))

    def device(self, blocks: int) -> int:
        """Return the device memory of denoising with this number of blocks swapped, in bytes."""
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
    """Rehearse all phases. Weights are not read; LoRAs are merged while loading and so take nothing. Raises
    as loading does.

    Products in 8 bits are rehearsed as products in 16 bit of the same weights. turns: of the whole run; None:
    those of this request alone. room: memory of the device; text-encoder layers that do not fit wait on the
    host. watch: `TokenCounter.watch`, if cards are to share the step.
    """
    extra = memory_plan.workspace(device, is_training=False)
    before, encoded = rehearse_texts(family, options, prepared, extra, room)
    if needs_media(family, prepared):
        encoders = family.media_encoders(META)
        with rehearsing(encoders) as ledger:
            found = encode_inputs(family, encoders, prepared)
            before.append(phase_of("images and videos", ledger, extra))
        inputs = {section: make_solid(conditions) for section, conditions in found.items()}
    else:
        inputs = dict(encode_inputs(family, NO_ENCODERS, prepared))
    turns = turns or turns_of(family, options, [prepared])
    denoising = rehearse_denoising(family, options, prepared, encoded, inputs, extra, turns, watch)
    after: tuple[memory_plan.Phase, ...] = ()
    if options.output.output_type not in UNDECODED and not prepared.is_sound_alone:
        after = (rehearse_decoding(family, prepared, extra),)
    if prepared.joint is not None and hears_sound(family) and options.output.writes_sound:
        networks = family.sound_networks(META, decodes=True)
        with rehearsing(networks) as ledger:
            family.decode_sound(networks, torch.empty(1, *prepared.joint.sound))
            after = (phase_of("decoding sound", ledger, extra), *after)
    return replace(denoising, before=tuple(before), after=after)


@contextmanager
def rehearsing(networks: object) -> Iterator[dry.Ledger]:
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
    """Return a phase for each text encoder, and its outputs for the prompts as tensors without content.

    An encoder has its blocks split over the processes that share the transformer, or layers in host memory
    if there is no room for it.
    """
    wanted = wanted_texts(prepared, options.guidance)
    phases: list[memory_plan.Phase] = []
    outputs: dict[Prompt, dict[str, Tensor | list[Tensor]]] = {text: {} for text in texts_of([wanted])}
    processes = memory_plan.sharing_processes(options.speed)
    for encoder in family.text_encoders():
        encoder.load(META)
        with rehearsing(encoder) as ledger:
            found = [encoder.encode([text])[0] for text in outputs]
            phase = phase_of(f"text encoder {encoder.name}", ledger, extra)
        if processes > 1 and can_divide(encoder):
            network, (weights, *others) = encoder.network, phase.parts
            (split,) = memory_plan.swaps_of(network, spec_of(network), options.speed.swap, processes)
            note = split.words(0, "").removeprefix("; ")
            weights = replace(weights, device=weights.device - split.saved, note=note)
            phase = memory_plan.Phase(phase.name, (weights, *others))
        elif room is not None and phase.device > room.usable and is_layered(encoder):
            waiting = encoder.waiting_bytes(room.usable)
            if waiting:
                weights, *others = phase.parts
                left = weights.device - waiting
                weights = replace(weights, device=left, host=waiting, note="copied layer by layer")
                phase = memory_plan.Phase(phase.name, (weights, *others))
        phases.append(phase)
        for text, conditions in zip(outputs, found, strict=True):
            outputs[text].update(make_solid(conditions))
    return phases, gather_encoded(wanted, outputs)


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
    """Rehearse the step that takes most memory. watch: as of `predict`."""
    speed = options.speed
    choice = replace(speed.attention.choice, mode="sdpa")  # the stand-in of all kernels
    placement = Placement(META, attention=choice, quantisation=rehearsed(speed.fp8.quantisation))
    dit, beside = load_with_loras(family, options, placement)
    dit.eval().requires_grad_(False)
    weights, swaps = (
        memory_plan.dtypes_of(dit),
        memory_plan.swaps_of(dit, family.dit, speed.swap, memory_plan.sharing_processes(speed)),
    )
    blocks = family.dit.blocks(dit)
    extended = watch(dit)
    if prepared.added:
        import_own("networks.added").add_stage_loras(dit)
    with rehearsing(dit) as ledger:
        dry.watch_blocks(blocks, ledger)
        if beside:
            with ledger.allocating(dry.NETWORK):
                import_own("networks.beside").add_beside(dit, beside, dry.ACCELERATOR, dtype_of(dit))
        if prepared.added:  # on the device beside the weights
            with ledger.allocating(dry.ADAPTER):
                for loras, strength in zip(vars(dit)["stage_loras"], prepared.added, strict=True):
                    if strength:
                        loras.place_on(dry.ACCELERATOR, dtype_of(dit))
        section = on_device(
            next(sections_of(family, prepared, encoded, inputs, SeededNoise(0, dry.ACCELERATOR))),
            dry.ACCELERATOR,
        )
        guidance = make_guidance(prepared, options.guidance, family.experts)
        step = heaviest_step(prepared, options, family.experts, section.noise)

        def measure(counts: dry.Counts) -> Mapping[str, dry.Moment]:
            dry.keep_blocks(dit, blocks, counts, ledger)
            if section.tweaks.kept is not None:
                section.tweaks.kept.clear()  # by other blocks
            ledger.enter("forward outside the blocks")
            ledger.forget_peaks()
            caches: AbstractContextManager[DitAt] = nullcontext(lambda _: dit)
            if prepared.asked.step_cache is not None:
                caches = StepCaches(prepared, family.dit).section(lambda _: dit)
            with caches as cached_at:
                told = section.tweaks, section.held
                predict_at = predictor(family, cached_at, step, options.splits_guidance, *told)
                with ledger.guessing():  # a family may look at the timestep
                    guidance(step, predict_at, section)
            return dict(ledger.peaks)

        moments = extended(measure, tuple(map(len, blocks.values())))
    between, path = list[tuple[int, str]](), options.preview.preview_vae
    if path is not None:
        *_, height, width = family.latent.shape(1, prepared.height, prepared.width)
        preview = decoding_bytes(check_taehv(path, family.latent), torch.float16, height, width)
        between.append((preview, "decoding a preview"))
    for load, shape in prepared.begun_by:
        with rehearsing(network := load(META)) as ledger:
            network(torch.empty(shape, dtype=dtype_of(network), device=dry.ACCELERATOR))
        between.append((sum(dry.largest(ledger.peaks)[1].values()), type(network).__name__))
    return PhasePrediction(moments, swaps, weights, between, turns, extra)


def heaviest_step(
    prepared: Prepared, options: GenerationOptions, experts: Sequence[Expert], noisy: Tensor
) -> Step:
    """Find a step that takes most memory: the one with most passes in a batch, then with most passes."""
    steps = [
        ((plan.most_together, len(plan.passes), expert.lowest, -index), index)
        for expert, plans in zip(experts, plan_steps(prepared, options.guidance), strict=True)
        for index, plan in enumerate(plans)
    ]
    (_, _, lowest, _), index = max(steps)  # of equal ones the first
    timestep = FIRST_TIMESTEP if lowest == experts[noisiest(experts)].lowest else lowest
    return Step(index, prepared.num_steps, 1.0, timestep, noisy)


def rehearse_decoding(family: Family, prepared: Prepared, extra: memory_plan.MemoryPart) -> memory_plan.Phase:
    encoders = family.media_encoders(META, images=False)
    shape = family.latent.shape(prepared.frames, prepared.height, prepared.width)
    with rehearsing(encoders) as ledger:
        decoded = 0
        for chunk in family.decode(encoders, torch.empty(shape)):
            decoded += chunk.shape[2]
            if decoded >= DECODED:
                break
        return phase_of("decoding", ledger, extra)


def phase_of(name: str, ledger: dry.Ledger, extra: memory_plan.MemoryPart) -> memory_plan.Phase:
    _, moment = dry.largest(ledger.peaks)
    parts = [
        memory_plan.MemoryPart("weights", moment.get(dry.WEIGHTS, 0)),
        memory_plan.MemoryPart("work", sum(moment.values()) - moment.get(dry.WEIGHTS, 0)),
    ]
    return memory_plan.Phase(name, (*parts, extra))


def make_solid(conditions: Conditions) -> Conditions:
    """Return conditions that outlive their rehearsal: real tensors of the same sizes.

    Whole numbers, whose values matter, stay as they are.
    """

    def real(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor

    return {
        name: [real(each) for each in value] if isinstance(value, list) else real(value)
        for name, value in conditions.items()
    }


def plan_generation(family: Family, options: GenerationOptions, device: torch.device) -> None:
    """Print the plan of the request that needs most memory. Loads nothing large and needs no GPU."""
    cards, size = options.speed.plan.cards
    room = room_on(device, size)
    if cards > 1:
        import_own("generation.together").plan_ways(family, options, device, cards, room)
        return
    with quiet():
        prepared, prediction = predict_largest(family, options, all_requests(family, options), device, room)

    def plan(blocks: int, remarks: Sequence[str]) -> memory_plan.MemoryPlan:
        made = prediction.plan(blocks)
        more = prediction.turns.remarks(made, prediction.phase(blocks), room, host_room())
        return replace(made, remarks=(*remarks, *more))

    memory_plan.print_plan(
        prediction,
        options.speed.swap,
        room,
        plan,
        lambda room: advice(family, options, prepared, prediction, room, device),
    )


def predict_largest(
    family: Family,
    options: GenerationOptions,
    requests: Sequence[Prepared],
    device: torch.device,
    room: Room | None = None,
) -> tuple[Prepared, PhasePrediction]:
    turns = turns_of(family, options, requests)
    candidates = [stage for one in largest_of(family, requests) for stage in one.stages or (one,)]
    predictions = [(each, predict(family, options, each, device, turns, room)) for each in candidates]
    return max(predictions, key=lambda each: each[1].device(0))


def advice(
    family: Family,
    options: GenerationOptions,
    prepared: Prepared,
    prediction: PhasePrediction,
    room: Room,
    device: torch.device,
) -> list[str]:
    """List changes that make all phases fit, the cheapest first; each adds to those before it."""
    lines: list[str] = []
    for phase in (*prediction.before, *prediction.after):
        if phase.device > room.usable:
            smaller = SMALLER.get(
                phase.name, "a smaller form of the text encoder, if --help has --text_encoder_form"
            )
            lines.append(f"{phase.name} needs {gib(phase.device)} GiB by itself: use {smaller}")
    if prediction.device(0) <= room.usable:
        return lines
    speed = options.speed

    def in_fp8() -> PhasePrediction:
        fp8 = replace(options, speed=override_options(speed, {"fp8_scaled": True}))
        with quiet():
            return predict(family, fp8, prepared, device, prediction.turns, room)

    cheaper = [("--fp8_scaled", in_fp8)] if speed.fp8.quantisation is None else []
    can_swap = not speed.sharding.shard_base
    more, last = memory_plan.advise(
        prediction, cheaper, room.usable, can_swap=can_swap, phase=" while denoising"
    )
    lines += more
    if last is not None:
        even = f"even --blocks_to_swap {last.most} leaves" if can_swap else "what is above leaves"
        lines.append(f"fewer frames or a smaller size: {even} {gib(last.device(last.most))}")
    return lines


SMALLER = {
    "decoding": "tiles of the VAE, such as --vae_spatial_tile_sample_min_size 128",
    "images and videos": "tiles of the VAE",
}


def resolve_options(
    family: Family, options: GenerationOptions, device: torch.device, room: Room | None
) -> tuple[GenerationOptions, Peaks | None]:
    """Replace --blocks_to_swap auto by a number before loading; return the options and predicted peaks.

    room: memory of a CUDA device; without one nothing is rehearsed. Raises MemoryPlanError if auto cannot be
    resolved.
    """
    requests: Sequence[Prepared] = ()
    try:
        if room is not None and not options.latent_path:
            requests = all_requests(family, options)
    except OptionError as error:
        if not options.interactive:
            raise
        if options.speed.swap.is_auto:  # what the command line lacks may come with every line
            raise MemoryPlanError(
                "--blocks_to_swap auto with --interactive needs a complete request on the command line: "
                f"{error}\n"
                "  Add the missing options, or give a number of blocks."
            ) from error
        return options, None

    def found() -> PhasePrediction:
        with quiet():
            return predict_largest(family, options, requests, device, room)[1]

    speed, prediction = memory_plan.resolve_swap(options.speed, room if requests else None, found)
    options = replace(options, speed=speed)
    if prediction is None:
        return options, None
    decoding = max((phase.device for phase in prediction.after), default=0)
    return options, Peaks(prediction.plan(speed.swap.number).device, decoding)

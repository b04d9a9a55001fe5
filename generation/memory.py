"""Memory plan of a generation: rehearse its phases one by one, each with its own networks on the device."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import sub

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.video_to_video import steps_to_make
from generation.denoise import predictor
from generation.noise import SeededNoise
from generation.options import GenerationOptions
from generation.prompt_lines import parse_generation_line, read_generation_lines
from generation.request import make_request
from generation.sections import on_device
from generation.session import NO_ENCODERS, encode_inputs, encoded, texts_of, wanted_texts
from modules.contract.data import Conditions
from modules.contract.family import Family
from modules.contract.generation import EncodedPrompts, Prompt, Request
from modules.contract.loading import Placement
from modules.errors import MemoryPlanError, OptionError, UserError
from modules.planning.dry_run import (
    ACCELERATOR,
    WEIGHTS,
    WORKING,
    Counts,
    Ledger,
    Moment,
    dry_run,
    extrapolated,
    keep_blocks,
    largest,
    modules_in,
    place,
    quiet,
    watch_blocks,
)
from modules.planning.memory_plan import (
    MemoryPlan,
    Part,
    Phase,
    Room,
    dtypes_of,
    gib,
    parts_of,
    predicted_before_run,
    present,
    room_on,
    smallest_swap,
    swap_for,
    swaps_of,
    workspace,
)
from modules.speed_options import swapping

logger = logging.getLogger(__name__)

META = torch.device("meta")
FIRST_TIMESTEP = 1000.0
# frames of a video: after these a VAE that decodes four frames at a time has reached its peak
DECODED = 13


@dataclass(frozen=True)
class Peaks:
    """Expected peaks of device memory for tensors, in bytes."""

    most: int  # over all phases
    decoding: int  # while latents become pixels


@dataclass(frozen=True)
class Prediction:
    """Phases of one request; the transformer's is a function of the number of swapped blocks."""

    before: tuple[Phase, ...]  # texts and inputs
    after: tuple[Phase, ...]  # decoding
    denoising: Callable[[int], Phase]
    most: int  # largest number of blocks that can be swapped

    def plan(self, blocks: int, remarks: Sequence[str] = ()) -> MemoryPlan:
        """Return the plan of all phases with this number of blocks swapped."""
        return MemoryPlan("Memory plan", (*self.before, self.denoising(blocks), *self.after), tuple(remarks))

    def device(self, blocks: int) -> int:
        """Return the device memory of denoising with this number of blocks swapped, in bytes."""
        return self.denoising(blocks).device


def predict(family: Family, options: GenerationOptions, request: Request, device: torch.device) -> Prediction:
    """Rehearse all phases without reading weights. Raises the errors that loading would raise.

    request: as `Family.prepare` returned it. LoRAs are merged while loading and so take no memory. Products
    in 8 bits are rehearsed as products in 16 bits of the same weights.
    """
    extra = workspace(device, is_training=False)
    texts, encoded = rehearse_texts(family, request, extra)
    inputs_phase, inputs = rehearse_inputs(family, request, extra)
    denoising, most = rehearse_denoising(family, options, request, encoded, inputs, extra)
    before = [*texts, *([] if inputs_phase is None else [inputs_phase])]
    after = [rehearse_decoding(family, request, extra)] if options.output.decodes else []
    return Prediction(tuple(before), tuple(after), denoising, most)


def rehearse_texts(
    family: Family, request: Request, extra: Part
) -> tuple[list[Phase], Mapping[int, EncodedPrompts]]:
    """Return a phase for each text encoder, and its outputs for the prompts as tensors without content."""
    wanted = wanted_texts(family, request)
    phases: list[Phase] = []
    outputs: dict[Prompt, dict[str, Tensor | list[Tensor]]] = {text: {} for text in texts_of([wanted])}
    for encoder in family.text_encoders():
        encoder.load(META)
        with dry_run() as ledger, torch.no_grad():
            for module in modules_in(encoder):
                place(module, ledger)
            found = [encoder.encode([text])[0] for text in outputs]
            phases.append(phase_of(f"text encoder {encoder.name}", ledger, extra))
        for text, conditions in zip(outputs, found, strict=True):
            outputs[text].update(solid(conditions))

    return phases, {section: encoded(prompts, outputs) for section, prompts in wanted.items()}


def rehearse_inputs(
    family: Family, request: Request, extra: Part
) -> tuple[Phase | None, Mapping[int, Conditions]]:
    """Return the phase that encodes images and videos as conditions; None if there are none."""
    if not family.needs_media(request):
        return None, encode_inputs(family, NO_ENCODERS, [request])[0]
    encoders = family.media_encoders(META)
    with dry_run() as ledger:
        for module in modules_in(encoders):
            place(module, ledger)
        (inputs,) = encode_inputs(family, encoders, [request])
        phase = phase_of("images and videos", ledger, extra)
    return phase, {section: solid(conditions) for section, conditions in inputs.items()}


def rehearse_denoising(
    family: Family,
    options: GenerationOptions,
    request: Request,
    encoded: Mapping[int, EncodedPrompts],
    inputs: Mapping[int, Conditions],
    extra: Part,
) -> tuple[Callable[[int], Phase], int]:
    """Return the denoising phase as a function of the number of swapped blocks, and the largest number."""
    speed = options.speed
    choice = replace(speed.attention.choice, mode="sdpa")  # stands in for all kernels
    dit = family.load_dit(Placement(META, attention=choice, fp8=speed.fp8.quantisation))
    dit.eval().requires_grad_(False)
    weights, swaps = dtypes_of(dit), swaps_of(dit, family.dit, speed.swap.img_in_txt_in_offloading)
    blocks = {name: list(dit.get_submodule(name).children()) for name in family.dit.block_lists}
    with dry_run() as ledger, torch.no_grad():
        place(dit, ledger)
        watch_blocks(blocks, ledger)
        section = on_device(
            next(family.sections(request, encoded, inputs, SeededNoise(0, ACCELERATOR))), ACCELERATOR
        )
        steps = steps_to_make(request)

        def measure(counts: Counts) -> Mapping[str, Moment]:
            keep_blocks(dit, blocks, counts, ledger)
            ledger.enter("forward outside the blocks")
            ledger.forget_peaks()
            predict_at = predictor(family, lambda _: dit, section.noise, FIRST_TIMESTEP, options.split_uncond)
            with ledger.guessing():  # a family may read the timestep's value
                make_guidance(request, options.guidance, steps)(0, predict_at, section)
            return dict(ledger.peaks)

        moments = extrapolated(measure, tuple(map(len, blocks.values())))
    place_name, moment = largest(moments)

    def phase(count: int) -> Phase:
        note = f"; {count} blocks swapped, {gib(swaps[count].ring)} of buffers" if swaps[count].host else ""
        parts = parts_of(moment, swaps[count], {WEIGHTS: weights + note, WORKING: place_name})
        return Phase("denoising", (*parts, extra))

    return phase, len(swaps) - 1


def rehearse_decoding(family: Family, request: Request, extra: Part) -> Phase:
    """Return the phase that decodes latents to pixels."""
    encoders = family.media_encoders(META, images=False)
    width, height, frames = request.size
    with dry_run() as ledger, torch.no_grad():
        for module in modules_in(encoders):
            place(module, ledger)
        decoded = 0
        for chunk in family.decode(encoders, torch.empty(family.latent.shape(frames, height, width))):
            decoded += chunk.shape[2]
            if decoded >= DECODED:
                break
        return phase_of("decoding", ledger, extra)


def phase_of(name: str, ledger: Ledger, extra: Part) -> Phase:
    """Return a phase in which one network works at one place."""
    _, moment = largest(ledger.peaks)
    parts = [
        Part("weights", moment.get(WEIGHTS, 0)),
        Part("work", sum(moment.values()) - moment.get(WEIGHTS, 0)),
    ]
    return Phase(name, (*parts, extra))


def solid(conditions: Conditions) -> Conditions:
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
    with quiet():
        request, prediction = predict_largest(family, options, largest_requests(family, options), device)
    present(
        prediction,
        options.speed.swap,
        room_on(device, options.speed.plan.plan),
        prediction.plan,
        lambda room: advice(family, options, request, prediction, room, device),
    )


def predict_largest(
    family: Family, options: GenerationOptions, requests: Sequence[Request], device: torch.device
) -> tuple[Request, Prediction]:
    """Return the request that needs most memory while denoising, and its prediction."""
    predictions = [(request, predict(family, options, request, device)) for request in requests]
    return max(predictions, key=lambda each: each[1].device(0))


def largest_requests(family: Family, options: GenerationOptions) -> list[Request]:
    """Return the requests that no other request exceeds in both frame size and number of frames.

    Usually there is one. Which of several needs most memory only a rehearsal can tell: a video that is made
    in sections needs no more memory when it is longer. Invalid lines are skipped if at least one line is
    valid; their errors are reported when their turn comes.
    """
    lines = (
        [""] if options.from_file is None else [line for _, line in read_generation_lines(options.from_file)]
    )
    requests, errors = [], []
    for line in lines:
        try:
            with quiet():
                says = parse_generation_line(line, options.line_options) if line else {}
                requests.append(family.prepare(make_request(options.request, says)))
        except UserError as error:
            errors.append(error)
    if not requests:
        raise errors[0] if errors else OptionError(f"--from_file {options.from_file}: the file has no prompt")
    sizes = {
        (width * height, frames): request for request in requests for width, height, frames in [request.size]
    }
    largest = [
        size
        for size in sizes
        if not any(other != size and min(map(sub, other, size)) >= 0 for other in sizes)
    ]
    return [with_scale(sizes[size]) for size in largest]


def with_scale(request: Request) -> Request:
    """Return the request with a guidance scale; 1, which means no guidance, if it has none."""
    return request if request.guidance_scale is not None else replace(request, guidance_scale=1.0)


def advice(
    family: Family,
    options: GenerationOptions,
    request: Request,
    prediction: Prediction,
    room: Room,
    device: torch.device,
) -> list[str]:
    """List changes that make all phases fit, the cheapest first; each adds to those before it."""
    lines: list[str] = []
    for phase in (*prediction.before, *prediction.after):
        if phase.device > room.usable:
            smaller = SMALLER.get(phase.name, "the text encoder in fp8, --fp8_llm or --fp8_t5")
            lines.append(f"{phase.name} needs {gib(phase.device)} GiB by itself: use {smaller}")
    if prediction.device(0) <= room.usable:
        return lines
    speed = options.speed
    if speed.fp8.quantisation is None:
        fp8 = replace(options, speed=replace(speed, fp8=replace(speed.fp8, fp8_scaled=True)))
        with quiet():
            prediction = predict(family, fp8, request, device)
        needed = prediction.device(0)
        lines.append(
            f"--fp8_scaled: {gib(needed)} GiB while denoising" + (", fits" if needed <= room.usable else "")
        )
        if needed <= room.usable:
            return lines
    count = smallest_swap(prediction.device, prediction.most, room.usable)
    if count is not None:
        return [
            *lines,
            f"--blocks_to_swap {count}: {gib(prediction.device(count))} GiB while denoising, fits",
        ]
    return [
        *lines,
        f"fewer frames or a smaller size: even --blocks_to_swap {prediction.most} needs "
        f"{gib(prediction.device(prediction.most))} GiB",
    ]


SMALLER = {
    "decoding": "tiles of the VAE, such as --vae_spatial_tile_sample_min_size 128",
    "images and videos": "tiles of the VAE",
}


def resolved(
    family: Family, options: GenerationOptions, device: torch.device, room: Room | None
) -> tuple[GenerationOptions, Peaks | None]:
    """Replace --blocks_to_swap auto by a number before loading; return the options and predicted peaks.

    room: memory of a CUDA device; without one nothing is rehearsed. Raises MemoryPlanError if auto cannot be
    resolved.
    """
    is_auto = options.speed.swap.is_auto
    if room is None or options.latent_path:
        return (with_swap(options, 0), None) if is_auto else (options, None)
    try:
        requests = largest_requests(family, options)
    except OptionError as error:
        if not options.interactive:
            raise
        if is_auto:  # without it, each line may give what the command line lacks
            raise MemoryPlanError(
                "--blocks_to_swap auto with --interactive needs a complete request on the command line: "
                f"{error}\n"
                "  Add the missing options, or give a number of blocks."
            ) from error
        return options, None

    def found() -> Prediction:
        with quiet():
            return predict_largest(family, options, requests, device)[1]

    prediction = predicted_before_run(found, options.speed.swap)
    if prediction is None:
        return options, None
    blocks, reason = swap_for(prediction, options.speed.swap, room)
    if reason is not None:
        logger.info(reason)
        options = with_swap(options, blocks)
    decoding = max((phase.device for phase in prediction.after), default=0)
    return options, Peaks(prediction.plan(blocks).device, decoding)


def with_swap(options: GenerationOptions, blocks: int) -> GenerationOptions:
    """Return the options with this number of blocks to swap."""
    return replace(options, speed=swapping(options.speed, blocks))

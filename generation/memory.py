"""The plan of a generation: its phases rehearsed one after the other, each with its own networks on the
device.
"""

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
from modules.planning.advice import advise, resolve_swap
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
    present,
    room_on,
    swaps_of,
    workspace,
)

logger = logging.getLogger(__name__)

META = torch.device("meta")
FIRST_TIMESTEP = 1000.0
# frames of a video: by then a VAE that goes from frame to frame, four at a time, holds all it will ever hold
DECODED = 13


@dataclass(frozen=True)
class Peaks:
    """Bytes of tensors that the device is expected to hold at most."""

    most: int  # of all phases
    decoding: int  # while latents become pixels


@dataclass(frozen=True)
class Prediction:
    """The phases of one request, the transformer's as a function of how many blocks are swapped."""

    before: tuple[Phase, ...]  # texts and inputs
    after: tuple[Phase, ...]  # decoding
    denoising: Callable[[int], Phase]
    most: int  # blocks that can be swapped

    def plan(self, blocks: int, remarks: Sequence[str] = ()) -> MemoryPlan:
        """All phases with so many blocks swapped."""
        return MemoryPlan("Memory plan", (*self.before, self.denoising(blocks), *self.after), tuple(remarks))

    def device(self, blocks: int) -> int:
        """Bytes of the device while denoising."""
        return self.denoising(blocks).device


def predict(family: Family, options: GenerationOptions, request: Request, device: torch.device) -> Prediction:
    """Rehearse all phases. Weights are not read; LoRAs are merged while loading and so take nothing. Raises
    as loading does.

    request: as `Family.prepare` returned it. Products in 8 bits are rehearsed as products in 16 bit of the
    same weights.
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
    """A phase for each text encoder, and what they make of the prompts, without content."""
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
    """The phase in which images and videos become conditions; None where there are none."""
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
    """The phase in which the transformer works, as a function of how many blocks are swapped, and how many
    can be at most.
    """
    speed = options.speed
    choice = replace(speed.attention.choice, mode="sdpa")  # the stand-in of all kernels
    dit = family.load_dit(Placement(META, attention=choice, fp8=speed.fp8.quantisation))
    dit.eval().requires_grad_(False)
    weights, swaps = dtypes_of(dit), swaps_of(dit, family.dit, speed.swap.img_in_txt_in_offloading)
    blocks = family.dit.blocks(dit)
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
            with ledger.guessing():  # a family may look at the timestep
                make_guidance(request, options.guidance, steps)(0, predict_at, section)
            return dict(ledger.peaks)

        moments = extrapolated(measure, tuple(map(len, blocks.values())))
    place_name, moment = largest(moments)

    def phase(count: int) -> Phase:
        note = (
            f"; {count} blocks swapped, {gib(swaps[count].ring)} to pass through" if swaps[count].host else ""
        )
        parts = parts_of(moment, swaps[count], {WEIGHTS: weights + note, WORKING: place_name})
        return Phase("denoising", (*parts, extra))

    return phase, len(swaps) - 1


def rehearse_decoding(family: Family, request: Request, extra: Part) -> Phase:
    """The phase in which latents become pixels."""
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
    """A phase with one network and one place."""
    _, moment = largest(ledger.peaks)
    parts = [
        Part("weights", moment.get(WEIGHTS, 0)),
        Part("work", sum(moment.values()) - moment.get(WEIGHTS, 0)),
    ]
    return Phase(name, (*parts, extra))


def solid(conditions: Conditions) -> Conditions:
    """Conditions that outlive their rehearsal: real tensors of their sizes; whole numbers, which have values,
    as they are.
    """

    def real(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor

    return {
        name: [real(each) for each in value] if isinstance(value, list) else real(value)
        for name, value in conditions.items()
    }


def plan_generation(family: Family, options: GenerationOptions, device: torch.device) -> None:
    """Print the plan of the request that takes most. Nothing large is loaded, and no GPU is needed."""
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
    """Of requests the one that takes most while denoising, and its prediction."""
    predictions = [(request, predict(family, options, request, device)) for request in requests]
    return max(predictions, key=lambda each: each[1].device(0))


def largest_requests(family: Family, options: GenerationOptions) -> list[Request]:
    """Of what the command line or its file of prompts asks for, what no other equals both in pixels of a
    frame and in frames.

    Usually it is one. Which takes most only a rehearsal knows: where a video is made in sections, a long one
    takes no more. Lines that cannot be made are passed over, as long as one can; what is wrong with them is
    told when their turn comes.
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
        raise errors[0] if errors else OptionError(f"--from_file {options.from_file}: it has no prompt")
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
    """The request with a guidance scale; without one there is no guidance."""
    return request if request.guidance_scale is not None else replace(request, guidance_scale=1.0)


def advice(
    family: Family,
    options: GenerationOptions,
    request: Request,
    prediction: Prediction,
    room: Room,
    device: torch.device,
) -> list[str]:
    """What to change so that all phases fit, the cheapest first; each line adds to those before it."""
    lines: list[str] = []
    for phase in (*prediction.before, *prediction.after):
        if phase.device > room.usable:
            smaller = SMALLER.get(phase.name, "the text encoder in fp8, --fp8_llm or --fp8_t5")
            lines.append(f"{phase.name} needs {gib(phase.device)} GiB by itself: {smaller}")
    if prediction.device(0) <= room.usable:
        return lines
    speed = options.speed

    def in_fp8() -> Prediction:
        fp8 = replace(options, speed=replace(speed, fp8=replace(speed.fp8, fp8_scaled=True)))
        with quiet():
            return predict(family, fp8, request, device)

    cheaper = [("--fp8_scaled", in_fp8)] if speed.fp8.quantisation is None else []
    more, last = advise(prediction, cheaper, room.usable, phase=" while denoising")
    lines += more
    if last is not None:
        left = gib(last.device(last.most))
        lines.append(f"fewer frames or a smaller size: even --blocks_to_swap {last.most} leaves {left}")
    return lines


SMALLER = {
    "decoding": "tiles of the VAE, such as --vae_spatial_tile_sample_min_size 128",
    "images and videos": "tiles of the VAE",
}


def resolved(
    family: Family, options: GenerationOptions, device: torch.device, room: Room | None
) -> tuple[GenerationOptions, Peaks | None]:
    """Before anything is loaded: the options with the number that --blocks_to_swap auto stands for; and the
    predicted peaks.

    room: of a CUDA device; without one nothing is rehearsed. Raises MemoryPlanError where auto cannot be
    resolved.
    """
    requests: Sequence[Request] = ()
    try:
        if room is not None and not options.latent_path:
            requests = largest_requests(family, options)
    except OptionError as error:
        if not options.interactive:
            raise
        if options.speed.swap.is_auto:  # what the command line lacks may come with every line
            raise MemoryPlanError(
                "--blocks_to_swap auto with --interactive: the command line has to say what may be made, "
                f"and cannot: {error}\n"
                "  Give what it lacks, or a number of blocks."
            ) from error
        return options, None

    def found() -> Prediction:
        with quiet():
            return predict_largest(family, options, requests, device)[1]

    speed, prediction = resolve_swap(options.speed, room if requests else None, found)
    options = replace(options, speed=speed)
    if prediction is None:
        return options, None
    decoding = max((phase.device for phase in prediction.after), default=0)
    return options, Peaks(prediction.plan(speed.swap.number).device, decoding)

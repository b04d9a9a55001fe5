"""The plan of a generation: its phases rehearsed one after the other, each with its own networks on the device."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.video_to_video import steps_to_make
from generation.denoise import predictor
from generation.noise import SeededNoise
from generation.options import GenerationOptions
from generation.prompt_lines import (
    EMBEDDED_GENERATION_OPTIONS,
    GENERATION_OPTIONS,
    parse_generation_line,
    read_generation_lines,
)
from generation.request import make_request
from generation.sections import on_device
from generation.session import NO_ENCODERS, encode_inputs, encoded, texts_of, wanted_texts
from modules.dry_run import (
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
from modules.errors import MemoryPlanError, OptionError, UserError
from modules.family import Family
from modules.memory_plan import (
    MemoryPlan,
    Part,
    Phase,
    Room,
    chosen_swap,
    dtypes_of,
    gib,
    parts_of,
    room_on,
    show,
    smallest_swap,
    swaps_of,
    verdict,
    workspace,
)
from modules.records import Conditions, EncodedPrompts, Placement, Prompt, Request
from modules.speed_options import swapping

logger = logging.getLogger(__name__)

META = torch.device("meta")
FIRST_TIMESTEP = 1000.0
CHUNKS = 4  # of a decoded video: by then a VAE that goes from frame to frame holds all it will ever hold


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
    """Rehearse all phases. Weights are not read; LoRAs are merged while loading and so take nothing. Raises as loading does.

    request: as `Family.prepare` returned it. Products in 8 bits are rehearsed as products in 16 bit of the same weights.
    """
    extra = workspace(device, is_training=False)
    texts, encoded = rehearse_texts(family, request, extra)
    inputs_phase, inputs = rehearse_inputs(family, request, extra)
    denoising, most = rehearse_denoising(family, options, request, encoded, inputs, extra)
    before = [*texts, *([] if inputs_phase is None else [inputs_phase])]
    after = [rehearse_decoding(family, request, extra)] if options.output.decodes else []
    return Prediction(tuple(before), tuple(after), denoising, most)


def rehearse_texts(family: Family, request: Request, extra: Part) -> tuple[list[Phase], Mapping[int, EncodedPrompts]]:
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


def rehearse_inputs(family: Family, request: Request, extra: Part) -> tuple[Phase | None, Mapping[int, Conditions]]:
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
    """The phase in which the transformer works, as a function of how many blocks are swapped, and how many can be at most."""
    speed = options.speed
    choice = replace(speed.attention.choice, mode="sdpa")  # the stand-in of all kernels
    dit = family.load_dit(Placement(META, attention=choice, fp8=speed.fp8.quantisation))
    dit.eval().requires_grad_(False)
    weights, swaps = dtypes_of(dit), swaps_of(dit, family.dit, speed.swap.img_in_txt_in_offloading)
    blocks = {name: list(dit.get_submodule(name).children()) for name in family.dit.block_lists}
    with dry_run() as ledger, torch.no_grad():
        place(dit, ledger)
        watch_blocks(blocks, ledger)
        section = on_device(next(family.sections(request, encoded, inputs, SeededNoise(0, ACCELERATOR))), ACCELERATOR)
        steps = steps_to_make(request)

        def measure(counts: Counts) -> Mapping[str, Moment]:
            keep_blocks(dit, blocks, counts, ledger)
            ledger.enter("forward outside the blocks")
            ledger.forget_peaks()
            predict_at = predictor(family, lambda _: dit, section.noise, FIRST_TIMESTEP, options.split_uncond)
            make_guidance(request, options.guidance, steps)(0, predict_at, section)
            return dict(ledger.peaks)

        moments = extrapolated(measure, tuple(map(len, blocks.values())))
    place_name, moment = largest(moments)

    def phase(count: int) -> Phase:
        note = f"; {count} blocks swapped, {gib(swaps[count].ring)} to pass through" if swaps[count].host else ""
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
        for _ in islice(family.decode(encoders, torch.empty(family.latent.shape(frames, height, width))), CHUNKS):
            pass
        return phase_of("decoding", ledger, extra)


def phase_of(name: str, ledger: Ledger, extra: Part) -> Phase:
    """A phase with one network and one place."""
    _, moment = largest(ledger.peaks)
    parts = [Part("weights", moment.get(WEIGHTS, 0)), Part("work", sum(moment.values()) - moment.get(WEIGHTS, 0))]
    return Phase(name, (*parts, extra))


def solid(conditions: Conditions) -> Conditions:
    """Conditions that outlive their rehearsal: real tensors of their sizes; whole numbers, which have values, as they are."""

    def real(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor

    return {name: [real(each) for each in value] if isinstance(value, list) else real(value) for name, value in conditions.items()}


def plan_generation(family: Family, options: GenerationOptions, device: torch.device) -> None:
    """Print the plan of the request with most pixels. Nothing large is loaded, and no GPU is needed."""
    request = largest_request(family, options)
    with quiet():
        prediction = predict(family, options, request, device)
    room = room_on(device, options.speed.plan.plan)
    blocks, remarks = 0 if options.speed.swap.is_auto else options.speed.swap.number, []
    if options.speed.swap.is_auto:
        blocks, reason = chosen_swap(prediction.device, prediction.most, room)
        remarks.append(reason)
    plan = prediction.plan(blocks, remarks)
    fits = room is None or plan.device <= room.usable
    show(plan, verdict(plan, room, () if fits or room is None else advice(family, options, request, prediction, room, device)))


def largest_request(family: Family, options: GenerationOptions) -> Request:
    """Of what the command line or its file of prompts asks for, the one with most pixels.

    Lines that cannot be made are passed over, as long as one can; what is wrong with them is told when their turn comes.
    """
    lines = [""] if options.from_file is None else [line for _, line in read_generation_lines(options.from_file)]
    requests, errors = [], []
    for line in lines:
        try:
            with quiet():
                requests.append(family.prepare(make_request(options.request, read_line(family, line) if line else {})))
        except UserError as error:
            errors.append(error)
    if not requests:
        raise errors[0] if errors else OptionError(f"--from_file {options.from_file}: it has no prompt")
    request = max(requests, key=lambda each: prod(each.size))
    return request if request.guidance_scale is not None else replace(request, guidance_scale=1.0)


def read_line(family: Family, line: str) -> Mapping[str, Any]:
    """What a prompt line says. Raises OptionError."""
    has_embedded = family.defaults.embedded_guidance is not None
    return parse_generation_line(line, EMBEDDED_GENERATION_OPTIONS if has_embedded else GENERATION_OPTIONS)


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
            lines.append(f"{phase.name} needs {gib(phase.device)} GiB by itself: {SMALLER.get(phase.name, 'an encoder in fp8')}")
    if prediction.device(0) <= room.usable:
        return lines
    speed = options.speed
    if speed.fp8.quantisation is None:
        fp8 = replace(options, speed=replace(speed, fp8=replace(speed.fp8, fp8_scaled=True)))
        with quiet():
            prediction = predict(family, fp8, request, device)
        needed = prediction.device(0)
        lines.append(f"--fp8_scaled: {gib(needed)} GiB while denoising" + (" fits" if needed <= room.usable else ""))
        if needed <= room.usable:
            return lines
    count = smallest_swap(prediction.device, prediction.most, room.usable)
    if count is not None:
        return [*lines, f"--blocks_to_swap {count}: {gib(prediction.device(count))} GiB while denoising fits"]
    return [
        *lines,
        f"fewer frames or a smaller size: even --blocks_to_swap {prediction.most} leaves {gib(prediction.device(prediction.most))}",
    ]


SMALLER = {"decoding": "tiles of the VAE, such as --vae_spatial_tile_sample_min_size 128", "images and videos": "tiles of the VAE"}


def resolved(family: Family, options: GenerationOptions, device: torch.device) -> tuple[GenerationOptions, int | None]:
    """Before anything is loaded: the options with the number that --blocks_to_swap auto stands for; and the predicted peak.

    Only where there is a CUDA device is anything rehearsed. Raises MemoryPlanError where auto cannot be resolved.
    """
    is_auto, room = options.speed.swap.is_auto, room_on(device)
    if room is None or options.latent_path:
        return (with_swap(options, 0), None) if is_auto else (options, None)
    try:
        with quiet():
            prediction = predict(family, options, largest_request(family, options), device)
    except UserError:
        raise
    except Exception as error:  # a plan is an aid; without one a run is as good as before
        if is_auto:
            raise MemoryPlanError(f"--blocks_to_swap auto: no plan can be made ({error}). Give a number of blocks.") from error
        logger.warning("The memory of this run cannot be planned (%s: %s).", type(error).__name__, error)
        return options, None
    if is_auto:
        blocks, reason = chosen_swap(prediction.device, prediction.most, room)
        logger.info(reason)
        options = with_swap(options, blocks)
    return options, prediction.plan(options.speed.swap.number).device


def with_swap(options: GenerationOptions, blocks: int) -> GenerationOptions:
    """The options with a number of blocks to swap."""
    return replace(options, speed=swapping(options.speed, blocks))

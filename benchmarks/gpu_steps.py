"""The timed work of the rows of benchmarks/gpu.py that train and generate: the loops' own steps."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_families import (
    FAMILIES,
    Drawn,
    Shape,
    generation_family,
    training_family,
)
from benchmarks.gpu_rows import GENERATION, Row
from benchmarks.noise import NoisyFamily
from checkpoints.stored.forms import prepare
from generation.denoise import make_latents
from generation.experts import ExpertOffloader, list_expert_order
from generation.memory import predict_denoising
from generation.network_setup import dit_loader
from networks.adapter import make_network
from protocols.data import AUDIO_LATENTS, HAS_AUDIO, AudioVideoShapes, Batch
from protocols.family import get_audio_spec
from protocols.requests import Prepared, Request, resolve_request
from protocols.steps import EncodedPrompts
from runtime.network_setup import make_host_weights
from runtime.planning.memory_plan import workspace
from training.experts import choose_placement, set_up_network
from training.loss import NoisyAudio, NoisyBatch
from training.optimizers.optimizer import find_averaging_optimizer, make_optimizer
from training.planning.memory import predict_memory
from training.planning.rehearsal import make_autocast
from training.targets.passes import training_loss

SEED = 0


@dataclass(frozen=True)
class Bench:
    """A prepared model and the work of one measured call."""

    call: Callable[[], object]
    warm_up: Callable[[], object]  # the first call: it may compile, or be shorter
    operations: float  # of the call, recomputation included
    model_operations: float  # without recomputation
    planned: float  # bytes that the plan predicts for the device; 0: there is no plan
    loading: float  # seconds
    per: float = 1.0  # steps, clips or texts that a call makes
    losses: list[Tensor] = field(default_factory=list)  # of all calls so far
    norms: list[Tensor] = field(default_factory=list)  # of all gradients together, likewise
    whole: float = 1.0  # steps of a finished video or image
    held: object = None  # what must live as long as the calls


def train_steps(row: Row, path: Path, device: torch.device) -> Bench:
    """Prepare training steps of a LoRA of rank 32 on a random sample, which is the same in all rows.

    A step is loss, backward pass, clipping and optimizer step, as in the training loop.
    """
    options, family = training_family(row, path)
    batch = random_batch(row, family)
    planned = row.planned or plan_of_training(row, options, family, device)
    begun = time.monotonic()
    host = make_host_weights(family.dit, options.speed.swap, device)
    form = options.speed.fp8.quantization
    placement = choose_placement(options, device, form and prepare(form, device))
    dit = NoisyFamily(family).load_dit(replace(placement, host_weights=host)).requires_grad_(False)
    loading = time.monotonic() - begun
    assert options.network is not None
    network = make_network(options.network, family.lora_module, dit, seed=SEED)
    network.module.to(device)
    set_up_network(dit, family.dit, options.loop, device, options.speed.compilation.choice, host)
    parameters = list(network.parameters())  # clipped at each step
    groups, _ = network.parameter_groups(options.optimizer.learning_rate)
    optimizer, _ = make_optimizer(options.optimizer, groups)
    if (averaging := find_averaging_optimizer(optimizer)) is not None:
        averaging.train()
    autocast, batch = make_autocast(options, device), batch.to(device)
    losses: list[Tensor] = []
    norms: list[Tensor] = []

    def step() -> None:
        loss = training_loss(family, dit, batch, autocast)
        losses.append(loss.detach())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.optimizer.max_grad_norm)
        norms.append(norm.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Bench(
        step, step, *call_operations(row, options, family), planned, loading, losses=losses, norms=norms
    )


def generation(row: Row, path: Path, device: torch.device, high: Path | None = None) -> Bench:
    """Prepare some steps of the denoising loop with the default guidance, on random conditions.

    `high` is the file of the expert for high noise. The first call has two steps fewer or, with experts, as
    many: all must have run once before the time counts.
    """
    options, family = generation_family(row, path, high)
    prepared, prompts, inputs = random_request(row, family)
    experts = len(family.experts)
    planned = row.planned or plan_of_generation(row, options, family, path, device)
    noisy: Any = NoisyFamily(family)
    loader = dit_loader(noisy, (), device, options)
    dits = ExpertOffloader(family.experts, device, loader, loader.load_to_host, keep=True)
    begun = time.monotonic()
    phase = ExitStack()  # stays open
    dit_at = phase.enter_context(dits.phase(list_expert_order(noisy, [prepared] * 2)))
    loading = time.monotonic() - begun

    def make(asked: Prepared) -> Callable[[], Tensor]:
        return lambda: make_latents(
            family, dit_at, asked, prompts, inputs, device, split=options.splits_guidance
        )

    first = prepared if experts > 1 else replace(prepared, steps=max(prepared.steps - 2, 1))
    return Bench(
        *(make(prepared), make(first), *call_operations(row, options, family), planned, loading),
        per=prepared.steps,
        whole=family.defaults.steps,
        held=phase,  # else its end would put the network away
    )


def plan_of_training(row: Row, options: Any, family: Any, device: torch.device) -> float:
    """Return the bytes of the device that the plan predicts for a training step."""
    prediction = predict_memory(family, options, random_batch(row, family), device)
    return prediction.device_bytes(options.speed.swap.number)


def plan_of_generation(row: Row, options: Any, family: Any, path: Path, device: torch.device) -> float:
    """Return the bytes of the device that the plan predicts for denoising with the network in `path`."""
    prepared, prompts, inputs = random_request(row, family)
    extra = workspace(device, is_training=False)
    plan = predict_denoising(family, options, prepared, prompts, inputs, extra)
    further = (len(family.experts) - 1) * get_file_size(path)
    return plan.phase(options.speed.swap.number).device + further


def get_file_size(path: Path) -> int:
    """Return the size of a file: what an expert takes on the device while the other one works."""
    return path.stat().st_size


def section_of(row: Row, family: Any) -> Shape:
    """Return the shape of the latents that are denoised together."""
    size = row.size
    section: Shape = FAMILIES[row.model.family].section(
        family.latent.shape(size.frames, size.height, size.width)
    )
    return section


def call_operations(row: Row, options: Any, family: Any) -> tuple[float, float]:
    """Return the operations of a measured call, with recomputation and without."""
    entry = FAMILIES[row.model.family]
    count = entry.work
    assert count is not None
    audio = audio_shape(row, family)
    # tokens of sound see all and are seen by all, as those of the text
    further_tokens = row.text_tokens + (audio[1] * audio[2] if audio else 0)
    work = count(entry.config(family), section_of(row, family), further_tokens)
    if row.kind == GENERATION:
        made = row.steps * passes_of(family) * work.forward
        return made, made
    loop = options.loop
    keeps = loop.gradient_checkpointing_keep is not None
    # compiled blocks and products with 8-bit weights save tensors at their end: all of it is recomputed
    ends_early = options.speed.compilation.choice is None and options.speed.fp8.quantization is None
    made = work.lora_step(loop.gradient_checkpointing, keeps, ends_early)
    return made, work.lora_step(checkpointing=False)


def passes_of(family: Any) -> int:
    """Return the number of passes per step of generation: two with guidance."""
    default = family.defaults
    return (
        2 if any(scale != 1 for scale in (default.guidance_scale, *default.expert_guidance.values())) else 1
    )


def audio_shape(row: Row, family: Any) -> tuple[int, int, int] | None:
    """Return the shape of the latents of a clip's audio, C T M; None for a model without audio."""
    if not FAMILIES[row.model.family].audios:
        return None
    spec = get_audio_spec(family)
    assert spec is not None
    return spec.shape(row.size.frames, family.defaults.fps)


def random_batch(row: Row, family: Any) -> NoisyBatch:
    """Return a batch of one sample as the feed does: latents, texts, noise, and its audio."""
    drawn, entry = Drawn(torch.Generator().manual_seed(SEED)), FAMILIES[row.model.family]
    shape, config = section_of(row, family), entry.config(family)
    tensors = {
        "latents": drawn.numbers(*shape),
        **entry.texts(config, drawn, row.text_tokens),
        **entry.trained(config, drawn, shape),
    }
    one = torch.ones(1)
    noise = drawn.numbers(*shape)
    size, audio = audio_shape(row, family), None
    if size is not None:
        tensors |= {AUDIO_LATENTS: drawn.numbers(1, *size), HAS_AUDIO: one}
        audio = NoisyAudio(drawn.numbers(1, *size), one / 2, one * 500, one)
    return NoisyBatch(Batch(tensors, ("",), ("random",)), noise, one / 2, one * 500, one, audio=audio)


def random_request(row: Row, family: Any) -> tuple[Prepared, Any, Any]:
    """Return a request for a few steps, with its texts and its image as the encoders return them."""
    drawn, entry = Drawn(torch.Generator().manual_seed(SEED)), FAMILIES[row.model.family]
    size, config, default = row.size, entry.config(family), family.defaults
    texts = [without_batch(entry.texts(config, drawn, row.text_tokens)) for _ in range(2)]
    inputs = entry.inputs(config, drawn, family.latent.shape(size.frames, size.height, size.width))
    request = Request("", SEED, steps=row.steps)
    prepared = resolve_request(
        request,
        default,
        (size.width, size.height, size.frames),
        flow_shift=default.flow_shift or 3.0,
        default_negative="",
        experts=family.experts,
    )
    prepared = replace(prepared, family_settings=entry.own())
    if (audio := audio_shape(row, family)) is not None:
        _, *image = section_of(row, family)
        joint = AudioVideoShapes(tuple(image), audio)  # type: ignore[arg-type]  # four numbers
        prepared = replace(prepared, audio_video_shapes=joint, audio_shift=family.noise.audio_shift)
    return prepared, {0: EncodedPrompts(*texts)}, inputs


def without_batch(conditions: dict[str, Tensor | list[Tensor]]) -> dict[str, Tensor | list[Tensor]]:
    """Return conditions as a text encoder returns them: lists stay, tensors lose their first axis."""
    return {name: value if isinstance(value, list) else value[0] for name, value in conditions.items()}

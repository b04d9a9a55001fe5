"""What CUDA's kernels take, and whole steps, against what a plan says, within the plan's tolerance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from checkpoints.stored.forms import prepare
from checkpoints.stored.fp8_products import supports_fp8
from generation.denoise import make_latents
from generation.memory import predict_denoising
from generation.network_setup import dit_loader
from generation.options import read_generation
from generation.script_options import ScriptDefaults
from modules.attention.attend import attend
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import Float32LayerNorm, RMSNorm
from modules.layers.rope import rotate
from networks.adapter import make_network
from protocols.data import Batch
from protocols.requests import Request, resolve_request
from protocols.steps import EncodedPrompts
from runtime.offload.swap_plan import SwapPlan, host_weights
from runtime.planning.device_memory import TOLERANCE
from runtime.planning.dry_run import ACCELERATOR, dry_run
from runtime.planning.memory_plan import workspace
from tests.gpu.measuring import peak_of, release_cuda
from tests.manifests import tensor_list, write_hollow
from training.experts import choose_placement, set_up_network
from training.loss import NoisyBatch
from training.optimizers.optimizer import make_optimizer
from training.options import read_training
from training.planning.memory import predict_memory
from training.planning.rehearsal import make_autocast
from training.targets.passes import training_loss
from wan.family import family_for_generation, family_for_training
from wan.options import WanGenerationOptions, WanTrainingOptions

MIB = 1 << 20


@dataclass(frozen=True)
class Work:
    """A kernel with its inputs. make: a device -> inputs; the first `learning` of them get gradients.

    is_bound: some kernels need less than the stand-in says. cuDNN's backward pass needs no float32 copy of
    all queries if there are few keys: 50.7 MB on an H100, where FlashAttention's needs 79.
    """

    name: str
    make: Callable[[torch.device], list[Tensor]]
    run: Callable[..., Tensor]
    learning: int = 1
    is_bound: bool = False


def halves(*shapes: Sequence[int]) -> Callable[[torch.device], list[Tensor]]:
    return lambda device: [
        torch.empty(shape, dtype=torch.bfloat16, device=device).fill_(1) for shape in shapes
    ]


def turned(x: Tensor) -> Tensor:
    return rotate(x, torch.empty(x.shape[1], 1, x.shape[-1] // 2, 2, device=x.device))


def rms_normed(x: Tensor) -> Tensor:
    norm = RMSNorm(x.shape[-1], 1e-6).requires_grad_(False)
    norm.weight.data = torch.ones(x.shape[-1], device=x.device)
    return norm(x)


def layer_normed(x: Tensor) -> Tensor:
    return Float32LayerNorm(x.shape[-1], 1e-6)(x).to(x.dtype)


def modulated(x: Tensor) -> Tensor:
    shift, scale = torch.empty(2, 1, 1, x.shape[-1], device=x.device)
    return modulate(x.float(), shift, scale, x.dtype)


def gated(branch: Tensor) -> Tensor:
    x, gate = (
        torch.empty(1, length, branch.shape[-1], device=branch.device) for length in (branch.shape[1], 1)
    )
    with torch.autocast(branch.device.type, torch.bfloat16):
        return add_gated(x, gate, branch)


LENGTH, HEADS, WIDTH = 8192, 12, 128
TOKENS = (1, LENGTH, HEADS, WIDTH)
WORKS = (
    Work("rms_norm", halves((1, LENGTH, HEADS * WIDTH)), rms_normed),
    Work("layer_norm", halves((1, LENGTH, HEADS * WIDTH)), layer_normed),
    Work("modulation", halves((1, LENGTH, HEADS * WIDTH)), modulated),
    Work("gated sum", halves((1, LENGTH, HEADS * WIDTH)), gated),
    Work("rotary", halves(TOKENS), turned),
    Work("attention", halves(TOKENS, TOKENS, TOKENS), attend, learning=3),
    Work(
        "cross attention",
        halves(TOKENS, (1, 512, HEADS, WIDTH), (1, 512, HEADS, WIDTH)),
        attend,
        learning=3,
        is_bound=True,
    ),
    Work("gelu", halves((1, LENGTH, 8960)), lambda x: functional.gelu(x, approximate="tanh")),
)


def passes(
    work: Work, device: torch.device, watch: Callable[[Callable[[], Any]], tuple[Any, int]]
) -> list[int]:
    """By how many bytes the device's total rises in the forward and in the backward pass.

    watch: calls, and returns the result with the rise.
    """
    inputs = [
        tensor.requires_grad_(number < work.learning) for number, tensor in enumerate(work.make(device))
    ]
    result, forward = watch(lambda: work.run(*inputs))
    gradient = torch.empty_like(result)
    _, backward = watch(lambda: torch.autograd.grad(result, inputs[: work.learning], gradient))
    return [forward, backward]


def planned(work: Work) -> list[int]:
    """The same of the plan's stand-ins."""
    with dry_run() as ledger:
        return passes(work, ACCELERATOR, lambda call: ledger.peak_increase(call))


SIZE = 2 * LENGTH * HEADS * WIDTH  # bytes of the tokens in 16 bits
ROWS = 4 * LENGTH
FORMULAS = {
    "rms_norm": [SIZE + ROWS, SIZE],
    # a float32 copy, the float32 result, then that in 16 bits
    "layer_norm": [5 * SIZE, 4 * SIZE],
    # a float32 copy of the normed tokens, and the result; two gradients in float32 and 16 bits
    "modulation": [3 * SIZE, 3 * SIZE],
    # the float32 stream twice, before and after; no float32 copy of the branch, nor of its gradient
    "gated sum": [4 * SIZE, SIZE],
    "attention": [SIZE + HEADS * ROWS, 3 * SIZE + ROWS * HEADS * (WIDTH + 1)],
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_stand_ins_count_what_is_known_of_the_kernels(name: str) -> None:
    work = next(work for work in WORKS if work.name == name)
    assert planned(work) == pytest.approx(FORMULAS[name], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_kernels_take_what_their_stand_ins_say(cuda: torch.device, work: Work) -> None:
    def measured() -> list[int]:
        return passes(work, cuda, lambda call: peak_of(cuda, call)[:2])

    measured()  # libraries allocate their workspaces at their first call
    found = measured()
    expected = planned(work)
    if work.is_bound:
        expected = [min(pair) for pair in zip(found, expected, strict=True)]
    assert found == pytest.approx(expected, rel=TOLERANCE, abs=2 * MIB)


@dataclass(frozen=True)
class Case:
    """A training step with these options. frames: of a clip of 832x480."""

    name: str
    options: tuple[str, ...]
    frames: int = 21
    needs_fp8: bool = False


CHECKPOINTED = "--gradient_checkpointing"
CASES = (
    Case("kept", (), frames=5),
    Case("checkpointed", (CHECKPOINTED,)),
    Case("offloaded", (CHECKPOINTED, "--gradient_checkpointing_cpu_offload")),
    Case("swapped", (CHECKPOINTED, "--blocks_to_swap", "20")),
    Case("fp8", (CHECKPOINTED, "--fp8_base", "--fp8_scaled")),
    Case("fp8 products", (CHECKPOINTED, "--fp8_base", "--fp8_scaled", "--fp8_fast"), needs_fp8=True),
)


def hollow_wan(folder: Path) -> Path:
    """Wan2.1 1.3B without content."""
    tensors = {name: ("BF16", shape) for name, (_, shape) in tensor_list("wan2.1-t2v-1.3b").items()}
    return write_hollow(folder / "dit.safetensors", tensors)


def training_step(path: Path, case: Case, device: torch.device) -> tuple[float, Callable[[], Tensor]]:
    """The bytes that the plan predicts for the device, and a step."""
    words = ["--task", "t2v-1.3B", "--dit", str(path), "--mixed_precision", "bf16", "--network_dim", "32"]
    words += ["--dataset_config", "-", "--output_dir", "-", "--output_name", "-", *case.options]
    options, own, _ = read_training(None, WanTrainingOptions, words)
    family = family_for_training(own)
    config = family.files.dit_header().config
    shape, one = family.latent.shape(case.frames, 480, 832), torch.ones(1)
    tensors: dict[str, Any] = {"latents": torch.randn(shape), "t5": [torch.randn(256, config.text_dim)]}
    batch = NoisyBatch(Batch(tensors, ("",), ("",)), torch.randn(shape), one / 2, one * 500, one)
    planned = predict_memory(family, options, batch, device).device_bytes(options.speed.swap.number)
    host = host_weights(SwapPlan(family.dit, options.speed.swap.number), device)
    form = options.speed.fp8.quantization
    placement = choose_placement(options, device, form and prepare(form, device))
    dit = family.load_dit(replace(placement, host_weights=host)).requires_grad_(False)
    network = make_network(options.network, family.lora_module, dit, seed=0)
    network.module.to(device)
    set_up_network(dit, family.dit, options.loop, device, options.speed.compilation.choice, host)
    groups, _ = network.parameter_groups(options.optimizer.learning_rate)
    optimizer, _ = make_optimizer(options.optimizer, groups)
    autocast, on_device = make_autocast(options, device), batch.to(device)

    def step() -> Tensor:
        loss = training_loss(family, dit, on_device, autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), options.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return planned, step


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_takes_what_the_plan_says(cuda: torch.device, tmp_path: Path, case: Case) -> None:
    if case.needs_fp8 and not supports_fp8(cuda):
        pytest.skip("this GPU has no fp8 units")
    release_cuda()
    planned, step = training_step(hollow_wan(tmp_path), case, cuda)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == pytest.approx(planned, rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("words", [(), ("--fp8_scaled",), ("--blocks_to_swap", "20")], ids=str)
def test_a_generation_takes_what_the_plan_says(
    cuda: torch.device, tmp_path: Path, words: tuple[str, ...]
) -> None:
    release_cuda()
    given = ["--task", "t2v-1.3B", "--dit", str(hollow_wan(tmp_path)), "--prompt", "-", "--save_path", "-"]
    defaults = ScriptDefaults(fps=16, guidance_scale=5.0)
    options, own = read_generation(None, defaults, WanGenerationOptions, [*given, *words])
    family = family_for_generation(own)
    config = family.files.dit_header().config
    request = Request("", 0, steps=2, guidance_scale=5.0, solver="unipc", fps=16.0)
    prepared = resolve_request(request, family.defaults, (832, 480, 33), flow_shift=3.0, default_negative="")
    texts: list[Any] = [{"t5": [torch.randn(256, config.text_dim)]} for _ in range(2)]
    prompts = {0: EncodedPrompts(*texts)}
    plan = predict_denoising(family, options, prepared, prompts, {0: {}}, workspace(cuda, is_training=False))
    dit = dit_loader(family, (), cuda, options)(0)
    with torch.no_grad():
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            latents = make_latents(
                family, lambda _: dit, prepared, prompts, {0: {}}, cuda, split=options.split_uncond
            )
    assert latents.isfinite().all()
    expected = plan.phase(options.speed.swap.number).device
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=TOLERANCE)

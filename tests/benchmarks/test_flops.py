"""Operations and passes over memory are counted right; tables of cards; plain generation."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as functional
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import small_cards
from benchmarks.cards import CARDS, RUNS
from benchmarks.flops import (
    JointBlocks,
    Work,
    flux_3_work,
    gated_work,
    h3_work,
    joint_work,
    ltx_work,
    moss_image_work,
    qwen_image_21_work,
    unet_work,
    wan_work,
)
from benchmarks.generation import count_waits
from benchmarks.gpu_rows import GENERATION, TRAINING, WAN_14B, Row, Size
from benchmarks.gpu_steps import generation_family, random_batch, random_request, training_family
from benchmarks.traffic import Rates, Traffic, chosen, count_denoising, count_training, report
from benchmarks.traffic_count import (
    AGAIN,
    ATTENTION,
    CAST,
    COPY,
    ELEMENTWISE,
    FORWARD,
    NORM,
    PRODUCT,
    THIN,
    Counting,
    Operation,
)
from blissful_tuner.guidance import make_guidance
from blissful_tuner.options import PLAIN_GUIDANCE
from flux_3.model import Flux3Model
from generation.denoise import denoise
from hunyuan_model.configs import HunyuanVideoConfig
from hunyuan_model.model import HunyuanVideoModel
from krea2.model import Krea2Model
from ltx_2.configs import LtxConfig, StreamConfig
from ltx_2.model import LtxModel
from minimax_h3.configs import H3Config
from minimax_h3.model import H3Model
from modules.flow.solvers import solver_for
from moss_image.model import MossImageModel
from protocols.requests import Request
from protocols.rules import ONE_EXPERT
from protocols.steps import Section
from qwen_image.model import QwenImageModel
from qwen_image_21.model import QwenImage21Model
from runtime.planning.dry_run import dry_run
from runtime.planning.memory_plan import MemoryPart, Phase
from tests.commands import ROOT
from tests.preparing import prepare
from tests.tiny import flux_3 as tiny_flux_3
from tests.tiny import krea2 as tiny_krea2
from tests.tiny import moss_image as tiny_moss_image
from tests.tiny import qwen_image as tiny_qwen_image
from tests.tiny import qwen_image_21 as tiny_qwen_image_21
from tests.tiny import stable_diffusion as tiny_stable_diffusion
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.configs import WanConfig
from wan.model import WanModel

CONFIG_14B = WanConfig(5120, 13824, 256, 4096, 40, 40, 16, 16)
TINY_WAN = WanConfig(
    dim=256, ffn_dim=512, freq_dim=32, text_dim=32, num_heads=2, num_layers=2, in_dim=16, out_dim=16
)
ONE = torch.zeros(1)


def test_a_pass_of_wan_takes_as_many_operations_as_torch_counts() -> None:
    model = WanModel(TINY_WAN)
    counted = _operations_of_blocks(
        model, lambda: model(torch.zeros(1, 16, 4, 16, 16), ONE, torch.zeros(1, 512, 32))
    )
    assert counted == wan_work(TINY_WAN, video_tokens=4 * 8 * 8).forward


def test_a_pass_of_hunyuan_video_takes_as_many_operations_as_torch_counts() -> None:
    config = HunyuanVideoConfig(
        dim=256,
        ffn_dim=512,
        num_heads=2,
        double_blocks=2,
        single_blocks=3,
        refiner_blocks=1,
        refiner_ffn_dim=512,
        in_dim=16,
        out_dim=16,
        text_dim=32,
        pooled_dim=32,
    )
    model = HunyuanVideoModel(config)
    noisy, llama, pooled = torch.zeros(1, 16, 2, 8, 8), torch.zeros(1, 20, 32), torch.zeros(1, 32)
    counted = _operations_of_blocks(model, lambda: model(noisy, ONE, llama, torch.ones(1, 20), pooled, ONE))
    assert counted == joint_work(config, 2 * 4 * 4, 20).forward


def test_a_pass_of_krea_2_takes_as_many_operations_as_torch_counts() -> None:
    model = Krea2Model(tiny_krea2.CONFIG)
    noisy = torch.zeros(1, 16, 1, 8, 8)
    text = torch.zeros(1, 20, tiny_krea2.CONFIG.states, tiny_krea2.CONFIG.text_dim)

    counted = _operations_of_blocks(model, lambda: model(noisy, ONE, text, torch.ones(1, 20)))

    assert counted == gated_work(tiny_krea2.CONFIG, 4 * 4, 20).forward


def test_a_pass_of_qwen_image_takes_as_many_operations_as_torch_counts() -> None:
    config = tiny_qwen_image.CONFIG
    model = QwenImageModel(config)
    text = torch.zeros(1, 20, config.text_dim)

    counted = _operations_of_blocks(
        model, lambda: model(torch.zeros(1, 16, 1, 8, 8), ONE, text, torch.ones(1, 20))
    )

    blocks = JointBlocks(config.dim, config.ffn_dim, config.num_layers)
    assert counted == joint_work(blocks, 4 * 4, 20).forward


def test_a_pass_of_ltx_takes_as_many_operations_as_torch_counts() -> None:
    """The gates of heads, a number each, are left out."""
    stream = StreamConfig(dim=256, ffn_dim=1024, channels=128, text_dim=256)
    config = LtxConfig(
        stream, None, 4, 2, 128, projects_text=False, has_head_gates=False, modulates_text=False
    )
    model = LtxModel(config)
    noisy, text = torch.zeros(1, 128, 2, 4, 4), torch.zeros(1, 20, 256)

    counted = _operations_of_blocks(model, lambda: model(noisy, ONE, text))

    assert counted == ltx_work(config, 2 * 4 * 4, 20).forward


def test_a_pass_of_flux_3_takes_as_many_operations_as_torch_counts() -> None:
    config = tiny_flux_3.CONFIG
    model = Flux3Model(config)
    noisy, text = torch.zeros(1, config.channels, 1, 4, 4), torch.zeros(1, 20, config.text_dim)

    counted = _operations_of_blocks(
        model, lambda: model(noisy, ONE, text, torch.ones(1, 20).long()), r"\w+\.(\w+_blocks)(\.\w+)?\.\d+"
    )

    assert counted == flux_3_work(config, 4 * 4, 20).forward


def test_a_pass_of_qwen_image_2_1_takes_as_many_operations_as_torch_counts() -> None:
    config = tiny_qwen_image_21.CONFIG
    model = QwenImage21Model(config)
    noisy, text = torch.zeros(1, config.channels, 1, 4, 4), torch.zeros(1, 20, config.text_dim)
    slots = torch.zeros(1, 0, dtype=torch.int64)

    counted = _operations_of_blocks(model, lambda: model(noisy, ONE, text, torch.ones(1, 20), slots=slots))

    assert counted == qwen_image_21_work(config, 4 * 4, 20).forward


def test_a_pass_of_moss_image_takes_as_many_operations_as_torch_counts() -> None:
    """The refiners of the text, blocks of their own, are left out."""
    config = tiny_moss_image.CONFIG
    model = MossImageModel(config)
    noisy, text = torch.zeros(1, config.channels, 1, 4, 4), torch.zeros(1, 20, config.text_dim)

    counted = _operations_of_blocks(model, lambda: model(noisy, ONE, text, torch.ones(1, 20)))

    assert counted == moss_image_work(config, 4 * 4, 20).forward


def test_a_pass_of_minimax_h3_takes_as_many_operations_as_torch_counts() -> None:
    """Of pictures, sound and text together. The layer that makes rows of times is left out."""
    sizes = {"freq_dim": 32, "time_hidden": 32, "time_dim": 16, "frequencies": 4}
    config = H3Config(dim=64, num_heads=2, head_width=32, ffn_dim=128, num_layers=2, text_dim=32, **sizes)
    model = H3Model(config)
    noisy, audio = torch.zeros(1, 24, 2, 4, 4), torch.zeros(1, 32, 2, 3)

    counted = _operations_of_blocks(
        model,
        lambda: model(noisy, audio, (0.5, 0.5), torch.zeros(1, 20, 32)),
        r"\w+\.blocks\.\d+\.(attn|mlp)",
    )

    assert counted == h3_work(config, 2 * 2 * 2, 2 * 3 + 20).forward


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_pass_of_a_unet_takes_as_many_operations_as_torch_counts(kind: str) -> None:
    """With real numbers; some kernels of a CPU are not known to the counter."""
    config = dict(tiny_stable_diffusion.KINDS[kind].unet)
    network = UNet2DConditionModel(**config)
    width = network.config["cross_attention_dim"]
    added = {"text_embeds": torch.zeros(1, 64), "time_ids": torch.zeros(1, 6)} if kind == "sdxl" else None
    counter = FlopCounterMode(display=False)

    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(torch.zeros(1, 4, 8, 8), ONE, torch.zeros(1, 77, width), added_cond_kwargs=added)

    found = unet_work(config, rows=8, columns=8, text_tokens=77)
    assert found.forward == counter.get_total_flops()
    assert 0 < found.attention < found.linear


def _operations_of_blocks(
    model: nn.Module, call: Callable[[], object], names: str = r"\w+\.(\w+_)?(blocks|layers)\.\d+"
) -> int:
    """Count with torch; layers that see a single vector are left out: nothing at real sizes."""
    vectors: list[int] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(layer, nn.Linear) and output.numel() == layer.out_features:
            vectors.append(2 * layer.weight.numel())

    inside = [
        layer
        for name, layer in model.named_modules()
        if re.match(names.replace(r"\w+\.", "", 1) + r"\.", name) and isinstance(layer, nn.Linear)
    ]
    hooks = [layer.register_forward_hook(note) for layer in inside]
    counter = FlopCounterMode(display=False)
    # the CPU's own kernel is not known to the counter
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    for hook in hooks:
        hook.remove()
    counts = counter.get_flop_counts()
    blocks = [name for name in counts if re.fullmatch(names, name)]
    return sum(sum(counts[name].values()) for name in blocks) - sum(vectors)


def test_the_figures_of_wan_14b_are_those_of_its_arithmetic() -> None:
    """32,760 tokens: 1.68 PFLOP forward and 6.4 a step with checkpointing."""
    work = wan_work(CONFIG_14B, 21 * 30 * 52)
    assert round(work.forward / 1e15, 2) == 1.68
    assert round(work.lora_step(checkpointing=True) / 1e15, 1) == 6.4


def test_a_step_without_checkpointing_has_no_recomputation() -> None:
    work = Work(linear=2.0, attention=4.0, cross=1.0)
    assert work.lora_step(checkpointing=True) - work.lora_step(checkpointing=False) == work.forward


RATES = Rates(790e12, 600e12, 4.3e12)
L, C, WIDE = 320, 512, 1024


def counted(work: Callable[[torch.device], object]) -> list[Operation]:
    with (
        dry_run() as ledger,
        torch.autograd.set_detect_anomaly(True, check_nan=False),
        Counting(ledger.device) as counting,
    ):
        work(ledger.device)
    return counting.operations


def sizes(operations: list[Operation]) -> list[tuple[str, str, int]]:
    return [(one.phase, one.group, one.size) for one in operations]


def test_kernels_of_a_small_block_are_counted_as_by_hand() -> None:
    def work(device: torch.device) -> None:
        x = torch.empty(1, L, C, device=device)
        weight, bias = torch.empty(WIDE, C, device=device), torch.empty(WIDE, device=device)
        down = torch.empty(32, C, device=device)
        normed = functional.layer_norm(x, (C,))
        functional.linear(normed, weight, bias)
        functional.linear(normed, down)
        normed.to(torch.bfloat16)
        torch.addcmul(x, torch.empty(1, 1, C, device=device).expand(1, L, C), normed)
        x.add_(1)
        torch.cat([x, x.view(1, L, C)], dim=1)
        torch.mul(x, 2, out=torch.empty(1, L, C, dtype=torch.bfloat16, device=device))

    tokens = 4 * L * C
    assert sizes(counted(work)) == [
        (FORWARD, NORM, 2 * tokens + 2 * 4 * L),
        (FORWARD, PRODUCT, tokens + 4 * WIDE * C + 4 * WIDE + 4 * L * WIDE),
        (FORWARD, THIN, tokens + 4 * 32 * C + 4 * L * 32),
        (FORWARD, CAST, tokens + tokens // 2),
        (FORWARD, ELEMENTWISE, 3 * tokens + 4 * C),
        (FORWARD, ELEMENTWISE, 2 * tokens),
        (FORWARD, COPY, 3 * tokens),
        (FORWARD, ELEMENTWISE, tokens + tokens // 2),
    ]


@pytest.mark.slow_cases("False")
@pytest.mark.parametrize("generates", [False, True])
def test_the_operations_of_a_tiny_model_are_those_of_its_sizes(tmp_path: Path, generates: bool) -> None:
    path = write_dit(tmp_path, tiny_state("t2v", dtype=torch.bfloat16, num_layers=3))
    options = () if generates else ("--gradient_checkpointing",)
    kind = GENERATION if generates else TRAINING
    row = Row("tiny", kind, WAN_14B, Size(288, 288, 5), "", options, text_tokens=512)

    found, config = tiny_traffic(row, path)

    work = wan_work(config, 2 * 18 * 18)
    attention = chosen(found.step, group=ATTENTION).operations
    assert attention == (2 if generates else 4.5) * (work.attention + work.cross)
    products = sum(chosen(found.step, group=group).operations for group in (PRODUCT, THIN))
    if generates:
        assert products == pytest.approx(2 * work.linear, rel=0.25)  # and what is outside the blocks
    else:
        assert products > 3 * work.linear - work.last  # and those of a LoRA that is wide for this model
    assert (chosen(found.step, AGAIN).count > 0) is not generates
    lines = "\n".join(report(found, RATES, maximum=1000))
    assert "wan/model.py" in lines
    assert "modules/layers/rope.py" in lines


def tiny_traffic(row: Row, path: Path) -> tuple[Traffic, object]:
    if row.kind == GENERATION:
        options, family = generation_family(row, path)
        found = count_denoising(family, options, *random_request(row, family), RATES)
    else:
        options, family = training_family(row, path)
        found = count_training(family, options, random_batch(row, family), RATES)
    return found, family.files.dit_header().config


@pytest.mark.parametrize(
    ("page", "runs", "cards"),
    [
        ("cards.md", [run.about for runs in RUNS.values() for run in runs], CARDS),
        ("small_cards.md", [small_cards.about(row) for row in small_cards.ROWS], small_cards.CARDS),
    ],
)
def test_the_page_has_a_cell_for_each_run_and_card(
    page: str, runs: Sequence[str], cards: Sequence[int]
) -> None:
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()

    for run in runs:
        [row] = [line for line in lines if line.startswith(f"| {run} |")]
        assert len(row.strip("|").split("|")) == len(cards) + 1
    assert f"| | {' | '.join(f'{card} GB' for card in cards)} |" in lines


@dataclass(frozen=True)
class Planned:
    """A plan in which a swapped block saves a GiB."""

    whole: int  # GiB
    max_swapped_blocks: int = 4

    def device_bytes(self, blocks: int) -> int:
        return (self.whole - blocks) << 30

    def phase(self, blocks: int) -> Phase:
        return Phase("step", (MemoryPart("all", self.device_bytes(blocks), blocks << 30),))


@pytest.mark.parametrize(
    ("int8", "nf4", "offloaded", "expected"),
    [
        (8, 5, 5, "int8: 8.0"),
        (9, 8, 5, "nf4: 8.0"),
        (20, 9, 8, "nf4, offload: 8.0"),
        (20, 10, 9, "nf4, offload, swap 1: 8.0 (1.0)"),
        (20, 9, 9, "nf4, swap 1: 8.0 (1.0)"),
        (20, 20, 13, "does not fit"),
    ],
)
def test_a_small_card_gets_the_closest_form_that_fits(
    int8: int, nf4: int, offloaded: int, expected: str
) -> None:
    sizes = {small_cards.INT8: int8, small_cards.NF4: nf4, small_cards.OFFLOADED_NF4: offloaded}

    found = small_cards.choose(lambda way: cast(Any, Planned(sizes[way])), 8 << 30)

    assert found == expected


STEPS = 3
NETWORK = torch.nn.Identity()


class Family:
    """A family whose passes send a tensor to the device, or do not."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits

    def predict(self, dit: torch.nn.Module, noisy: Tensor, *_: Any) -> Tensor:
        return noisy * torch.ones(1).to(noisy.device) if self.waits else noisy


def arguments(family: Family) -> dict[str, Any]:
    noise = torch.ones(1, 2, 1, 3, 4)
    return {
        "family": family,
        "dit_at": lambda timestep: NETWORK,
        "section": Section(noise, {}),
        "latents": noise,
        "solver": solver_for("unipc", STEPS, 3.0),
        "guidance": make_guidance(
            prepare(Request("p", 1, guidance_scale=1.0, steps=STEPS)), PLAIN_GUIDANCE, ONE_EXPERT
        ),
    }


@pytest.mark.parametrize(("waits", "expected"), [(False, 0), (True, STEPS)])
def test_every_wait_of_a_step_is_counted(waits: bool, expected: int) -> None:
    assert count_waits(denoise, arguments(Family(waits))) == expected

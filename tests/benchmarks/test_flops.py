"""The operations that utilisation is computed from are those that torch counts."""

import re
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import Work, hunyuan_work, wan_work
from hunyuan_model.configs import HunyuanVideoConfig
from hunyuan_model.model import HunyuanVideoModel
from wan.configs import WanConfig
from wan.model import WanModel

WAN_14B = WanConfig(5120, 13824, 256, 4096, 40, 40, 16, 16)


def test_a_pass_of_wan_takes_as_many_operations_as_torch_counts() -> None:
    config = WanConfig(
        dim=256, ffn_dim=512, freq_dim=32, text_dim=32, num_heads=2, num_layers=2, in_dim=16, out_dim=16
    )
    model = WanModel(config)
    counted = _operations_of_blocks(
        lambda: model(torch.zeros(1, 16, 4, 16, 16), torch.zeros(1), torch.zeros(1, 512, 32))
    )
    assert counted == wan_work(config, video_tokens=4 * 8 * 8).forward


def test_a_pass_of_hunyuan_video_takes_as_many_operations_as_torch_counts() -> None:
    config = HunyuanVideoConfig(256, 512, 2, 2, 3, 1, 512, 16, 16, 32, 32)
    model = HunyuanVideoModel(config)
    noisy, number, llama, pooled = (
        torch.zeros(1, 16, 2, 8, 8),
        torch.zeros(1),
        torch.zeros(1, 20, 32),
        torch.zeros(1, 32),
    )
    counted = _operations_of_blocks(lambda: model(noisy, number, llama, torch.ones(1, 20), pooled, number))
    # of one vector, not of tokens: left out, as it is nothing at real sizes
    modulation = 2 * 256 * 256 * (2 * 2 * 6 + 3 * 3)
    assert counted - modulation == hunyuan_work(config, 2 * 4 * 4, 20).forward


def _operations_of_blocks(call: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    # the CPU's own kernel is not known to the counter
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    counts = counter.get_flop_counts()
    blocks = [name for name in counts if re.fullmatch(r"\w+\.(\w+_)?blocks\.\d+", name)]
    return sum(sum(counts[name].values()) for name in blocks)


def test_the_figures_of_wan_14b_are_those_of_its_arithmetic() -> None:
    """32,760 tokens: 1.68 PFLOP forward and 6.4 a step with checkpointing."""
    work = wan_work(WAN_14B, 21 * 30 * 52)
    assert round(work.forward / 1e15, 2) == 1.68
    assert round(work.lora_step(checkpointing=True) / 1e15, 1) == 6.4


def test_a_step_without_checkpointing_has_no_recomputation() -> None:
    work = Work(linear=2.0, attention=4.0)
    assert work.lora_step(checkpointing=True) - work.lora_step(checkpointing=False) == work.forward

"""The operations that utilisation is computed from are those that torch counts."""

import re
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import Work, joint_work, wan_work
from hunyuan_model.configs import HunyuanVideoConfig
from hunyuan_model.model import HunyuanVideoModel
from wan.configs import WanConfig
from wan.model import WanModel

WAN_14B = WanConfig(5120, 13824, 256, 4096, 40, 40, 16, 16)
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
    work = wan_work(WAN_14B, 21 * 30 * 52)
    assert round(work.forward / 1e15, 2) == 1.68
    assert round(work.lora_step(checkpointing=True) / 1e15, 1) == 6.4


def test_a_step_without_checkpointing_has_no_recomputation() -> None:
    work = Work(linear=2.0, attention=4.0, cross=1.0)
    assert work.lora_step(checkpointing=True) - work.lora_step(checkpointing=False) == work.forward

"""Run blocks in 8 and 4 bits in two processes, split and whole; print whether all numbers are equal."""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch  # noqa: E402  # found from here on
from torch import Tensor, distributed, nn  # noqa: E402

from checkpoints.stored.forms import QuantizedWeight, attach, make_quantization_format  # noqa: E402
from checkpoints.stored.fp8 import Fp8  # noqa: E402
from modules.speed_options import Quantization  # noqa: E402
from protocols.family import DitSpec  # noqa: E402
from protocols.steps import NO_OVERRIDES  # noqa: E402
from runtime.offload.sharding import ShardedBlocks  # noqa: E402
from runtime.run_blocks import Hidden, run_blocks  # noqa: E402
from tests.fp8_reference import emulated_product  # noqa: E402

WIDTH, TOKENS = 32, 24


class Block(nn.Module):
    def __init__(self, scales: str) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        if scales == "blocks":  # as files may have them: two in each row
            parts, quantization = self.linear.weight.data.view(WIDTH, 2, -1), Quantization("rows")
            scale = parts.abs().amax(-1, keepdim=True) / 448
            weight = (parts / scale).to(torch.float8_e4m3fn).view(WIDTH, WIDTH)
            attach(self.linear, QuantizedWeight(Fp8(quantization), (WIDTH, WIDTH), (weight, scale)))
        elif scales in {"int8", "nf4"}:
            quantization = Quantization(scales, form=scales)
            attach(self.linear, make_quantization_format(quantization).quantize(self.linear.weight.data))
        else:
            quantization = Quantization(scales, product=emulated_product)
            attach(self.linear, Fp8(quantization).quantize(self.linear.weight.data))

    def forward(self, x: Tensor, _: Any) -> Tensor:
        return x + self.linear(self.norm(x))


class Network(nn.Module):
    spec = DitSpec(block_lists=("blocks",))

    def __init__(self, scales: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(scales) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = Hidden(x, None)
        run_blocks(self, hidden, NO_OVERRIDES)
        return hidden.x


def compare(scales: str) -> None:
    """Compare both for a kind of scales."""
    full, split = Network(scales), Network(scales)
    ShardedBlocks(torch.device("cpu"), "--shard_base").finish(split)
    kept = split.blocks[0].get_submodule("linear").get_parameter("weight")
    assert kept.to_local().numel() * 2 == kept.numel()  # type: ignore[attr-defined]
    torch.manual_seed(1 + distributed.get_rank())
    found = []
    x = torch.randn(1, TOKENS, WIDTH)
    for network in (full, split):
        given = x.clone().requires_grad_()
        out = network(given)
        out.square().sum().backward()
        found += [out, given.grad]
    equal = torch.equal(found[0], found[2]), torch.equal(found[1], found[3])
    print(scales, *equal, flush=True)  # noqa: T201


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for kind in sys.argv[1:]:
        compare(kind)
    os._exit(0)  # gloo may abort at the interpreter's end

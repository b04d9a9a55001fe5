"""LoRAs put into a loaded model: the weights are those of loading it with them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from networks.apply import LoraPatch, OriginalWeights
from networks.loading import LoraUse, read_lora

NAME = "blocks.0.self_attn.q.weight"


def network(dtype: torch.dtype) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].self_attn = nn.ModuleDict({"q": nn.Linear(8, 8, bias=False, dtype=dtype)})
    return model.requires_grad_(False)


def lora(folder: Path, seed: int, size: int = 8) -> LoraUse:
    generator = torch.Generator().manual_seed(seed)
    base = "lora_unet_blocks_0_self_attn_q"
    tensors = {
        f"{base}.lora_down.weight": torch.randn(2, size, generator=generator),
        f"{base}.lora_up.weight": torch.randn(size, 2, generator=generator),
        f"{base}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, folder / f"{seed}.safetensors")
    return LoraUse(read_lora(folder / f"{seed}.safetensors"), 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_equal_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = torch.randn(8, 8, generator=torch.Generator().manual_seed(9))  # float32, as in the file
    uses = [lora(tmp_path, 1), lora(tmp_path, 2)]
    model, originals = network(dtype), OriginalWeights(uses)
    weight = model.get_parameter(NAME)
    weight.copy_(originals(NAME, stored))
    originals.check()
    plain = weight.clone()

    for chosen in ([uses[0]], [uses[1]], uses, [uses[0]]):
        originals.switch(model, chosen)
        expected = torch.empty_like(weight).copy_(LoraPatch(chosen)(NAME, stored))
        assert torch.equal(weight, expected)
        assert not torch.equal(weight, plain)

    originals.switch(model, [])
    assert torch.equal(weight, plain)

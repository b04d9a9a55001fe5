"""Random numbers that do not depend on the device: masks of dropout, and noise made on the CPU."""

import pytest
import torch

from generation.denoise import SeededNoise
from networks.lora_layer import keep_mask
from tests.gpu.measuring import equal_bits, relative_error, sent
from tests.tiny.dits import ONE_OF_EACH, TinyDit, gradients

CPU = torch.device("cpu")
SEED = (0x9E3779B9, 0x7F4A7C15)  # low and high half


def hash_32(x: int) -> int:
    """Mix the bits of a 32-bit number: lowbias32, in Python's own numbers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


@pytest.mark.parametrize("shape", [(64,), (3, 7, 11), (5, 1, 4)], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_dropout_mask_is_a_function_of_the_seed_alone(
    device: torch.device, shape: tuple[int, ...], share: float
) -> None:
    low, high = SEED
    expected = [
        hash_32((hash_32(index ^ low) + high) & 0xFFFFFFFF) >= int(share * 2**32)
        for index in range(torch.Size(shape).numel())
    ]
    mask = keep_mask(shape, share, SEED, device)
    assert mask.device.type == device.type
    assert mask.flatten().tolist() == expected
    assert keep_mask((1 << 20,), share, SEED, device).double().mean().item() == pytest.approx(
        1 - share, abs=2e-3
    )


@pytest.mark.parametrize(
    "dropout", [{"neuron_dropout": 0.3}, {"rank_dropout": "0.3"}, {"module_dropout": "0.5"}], ids=str
)
@pytest.mark.parametrize("tiny", ONE_OF_EACH[:2], ids=lambda tiny: tiny.name)
def test_a_lora_drops_the_same_on_every_device(
    device: torch.device, tiny: TinyDit, dropout: dict[str, float]
) -> None:
    # on a CPU the rows that pad Wan's text are one row, with one mask: here are as many words as rows
    inputs, found = tiny.inputs((1, 4, 4, 512 if tiny.name == "wan t2v" else 7), 1), []
    for where, seed in ((CPU, 1), (device, 1), (device, 2)):
        dit, network = tiny.with_lora(blocks=1, **dropout)
        network.set_dropout_seed(seed)
        grown = gradients(dit.to(where).train(), network.to(where), sent(inputs, where))[1]
        found.append(torch.cat([one.flatten().cpu() for one in grown]))
    assert relative_error(found[1], found[0]) < 1e-4
    assert relative_error(found[2], found[0]) > 0.1  # another mask shows


def test_noise_made_on_the_cpu_has_the_same_bits_on_every_device(device: torch.device) -> None:
    expected = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(77))
    noise = SeededNoise(77, device, cpu_noise=True)
    assert equal_bits(noise.draw((2, 3, 5)), expected)
    assert not equal_bits(noise.draw((2, 3, 5)), expected)  # it goes on

import torch
from torch import nn

from modules.layers.norms import activation_dtype, in_own_dtype, run_float32

CPU = torch.device("cpu")


def test_a_layer_gets_its_input_in_the_dtype_of_its_weight() -> None:
    assert in_own_dtype(nn.Linear(4, 4).to(torch.bfloat16), torch.ones(1, 4)).dtype == torch.bfloat16


def test_under_autocast_the_layer_computes_in_autocast_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert in_own_dtype(nn.Linear(4, 4), torch.ones(1, 4)).dtype == torch.bfloat16


def test_a_float32_layer_stays_float32_under_autocast() -> None:
    layer, x = nn.Linear(256, 4), torch.randn(2, 256, generator=torch.Generator().manual_seed(0))

    with torch.autocast("cpu", torch.bfloat16):
        result = run_float32(layer, x)

    assert torch.equal(result, layer(x))


def test_a_narrower_layer_still_returns_float32() -> None:
    assert run_float32(nn.Linear(4, 4).to(torch.bfloat16), torch.ones(1, 4)).dtype == torch.float32


def test_activations_follow_the_weights_unless_autocast_is_on() -> None:
    assert activation_dtype(CPU, torch.float16) == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert activation_dtype(CPU, torch.float16) == torch.bfloat16

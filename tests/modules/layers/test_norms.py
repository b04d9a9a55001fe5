import torch

from modules.layers.norms import Float32LayerNorm, RMSNorm


def _input(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (5 + 3 * torch.randn(4, 1536, generator=torch.Generator().manual_seed(0))).to(dtype)


def test_layer_norm_has_mean_zero_and_variance_one() -> None:
    normal = Float32LayerNorm(1536, 1e-6)(_input())

    torch.testing.assert_close(normal.mean(-1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.var(-1, correction=0), torch.ones(4), atol=1e-5, rtol=0)


def test_layer_norm_returns_float32_whatever_its_weights_and_input_are() -> None:
    norm = Float32LayerNorm(1536, 1e-6, affine=True).to(torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16):
        normal = norm(_input(torch.bfloat16))

    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal, Float32LayerNorm(1536, 1e-6)(_input(torch.bfloat16)))


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    x, norm = _input(), RMSNorm(1536, 1e-6)
    torch.nn.init.constant_(norm.weight, 2.0)

    torch.testing.assert_close(norm(x), 2 * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_rms_norm_of_bfloat16_is_float32_arithmetic_rounded_once() -> None:
    x = _input(torch.bfloat16)

    normal = RMSNorm(1536, 1e-6).to(torch.bfloat16)(x)

    assert normal.dtype == torch.bfloat16
    assert torch.equal(normal, RMSNorm(1536, 1e-6)(x.float()).to(torch.bfloat16))


def test_rms_norm_keeps_the_dtype_of_its_input_under_float32_weights() -> None:
    assert RMSNorm(1536, 1e-6)(_input(torch.bfloat16)).dtype == torch.bfloat16

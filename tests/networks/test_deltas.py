"""What LoRA, LoHa and LoKr factors add to a weight, against sums written out."""

import pytest
import torch
from torch import Tensor

from networks.deltas import bias_delta, find_fault, strength, weight_delta

CPU = torch.device("cpu")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(factors: dict[str, Tensor], expected: Tensor) -> None:
    assert find_fault(factors) is None
    delta = weight_delta(factors, CPU)
    assert delta is not None
    torch.testing.assert_close(delta.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    meta = weight_delta(factors, torch.device("meta"))
    assert meta is not None
    assert meta.shape == delta.shape


def test_lora_is_up_times_down_times_alpha_over_rank() -> None:
    down, up = random(3, 5), random(7, 3)
    check({"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.5)}, 0.5 * up @ down)


@pytest.mark.parametrize("alpha", [{}, {"alpha": torch.tensor(0.0)}])
def test_missing_or_zero_alpha_means_the_rank(alpha: dict[str, Tensor]) -> None:
    assert strength({"lora_down.weight": random(3, 5), "lora_up.weight": random(7, 3), **alpha}) == 1.0


def test_lora_of_a_convolution_keeps_the_kernel() -> None:
    down, up = random(3, 5, 2, 2), random(7, 3, 1, 1)
    check(
        {"lora_down.weight": down, "lora_up.weight": up}, torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    )


def test_lora_with_a_core_in_the_middle() -> None:
    down, mid, up = random(3, 5, 1, 1), random(3, 3, 2, 2), random(7, 3, 1, 1)
    expected = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    check({"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, expected)


def test_loha_is_the_product_of_two_loras() -> None:
    a1, b1, a2, b2 = random(7, 3), random(3, 5), random(7, 3) + 1, random(3, 5) - 1
    factors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(6.0)}
    check(factors, 2 * (a1 @ b1) * (a2 @ b2))


def test_loha_of_a_convolution_with_cores() -> None:
    a1, b1, a2, b2 = random(3, 7), random(3, 5), random(3, 7) + 1, random(3, 5) - 1
    t1, t2 = random(3, 3, 2, 2), random(3, 3, 2, 2) + 1
    rebuilt = [torch.einsum("pqkl,po,qi->oikl", t, a, b) for t, a, b in ((t1, a1, b1), (t2, a2, b2))]
    factors = {
        "hada_w1_a": a1,
        "hada_w1_b": b1,
        "hada_w2_a": a2,
        "hada_w2_b": b2,
        "hada_t1": t1,
        "hada_t2": t2,
    }
    check(factors, rebuilt[0] * rebuilt[1])


def test_lokr_stored_whole_is_not_scaled() -> None:
    w1, w2 = random(2, 3), random(4, 5)
    check({"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(8.0)}, torch.kron(w1, w2))


def test_lokr_with_factors_is_scaled_by_their_rank() -> None:
    w1, a, b = random(2, 3), random(4, 6), random(6, 5)
    check(
        {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)},
        0.5 * torch.kron(w1, a @ b),
    )


def test_lokr_of_a_convolution_with_a_core() -> None:
    w1, a, b, core = random(2, 3), random(6, 4), random(6, 5), random(6, 6, 2, 2)
    second = torch.einsum("pqkl,po,qi->oikl", core, a, b)
    expected = torch.kron(w1[:, :, None, None], second.contiguous())
    check({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}, expected)


def test_whole_differences_and_bias_differences() -> None:
    check({"diff": random(3, 4), "diff_b": random(3)}, random(3, 4))
    delta = bias_delta({"diff_b": random(3)}, CPU)
    assert delta is not None
    assert torch.equal(delta, random(3))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["lora_down.weight", "alpha"], "no lora_up.weight"),
        (["hada_w1_a", "hada_w1_b"], "no hada_w2_a"),
        (["lokr_w1"], "no lokr_w2"),
        (["alpha"], "only alpha"),
        (["lora_down.weight", "lora_up.weight", "dora_scale"], "its dora_scale has the shape [2, 2]"),
        (["dora_scale"], "only dora_scale"),
    ],
)
def test_incomplete_factors_are_explained(parts: list[str], words: str) -> None:
    reason = find_fault(dict.fromkeys(parts, torch.ones(2, 2)))
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora_down.weight": torch.ones(0, 5)},
        {"lora_up.weight": torch.ones(7)},
        {"alpha": torch.ones(2)},
        {"alpha": torch.tensor(torch.nan)},
    ],
)
def test_factors_that_are_no_matrices_are_explained(wrong: dict[str, Tensor]) -> None:
    reason = find_fault({"lora_down.weight": random(3, 5), "lora_up.weight": random(7, 3)} | wrong)
    assert reason is not None
    assert next(iter(wrong)) in reason

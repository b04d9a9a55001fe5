import pytest
import torch
from torch import Tensor

from modules.attention import attend
from modules.errors import OptionError


def _inputs(batch: int = 2, queries: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, length, 3, 8, generator=generator) for length in (queries, keys, keys))  # type: ignore[return-value]


def test_attention_is_the_softmax_average_of_the_values() -> None:
    query, key, value = _inputs()

    weights = torch.einsum("blnd,bsnd->bnls", query, key).div(8**0.5).softmax(-1)

    torch.testing.assert_close(attend(query, key, value), torch.einsum("bnls,bsnd->blnd", weights, value))


def test_keys_beyond_a_length_are_not_looked_at() -> None:
    query, key, value = _inputs()

    result = attend(query, key, value, lengths=torch.tensor([7, 4]))

    torch.testing.assert_close(result[0], attend(query, key, value)[0])
    torch.testing.assert_close(result[1:], attend(query[1:], key[1:, :4], value[1:, :4]))


def test_a_key_may_stand_for_many_equal_ones() -> None:
    query, key, value = _inputs()
    repeats = torch.tensor([1.0, 1, 1, 1, 1, 1, 505])

    merged = attend(query, key, value, repeats=repeats)

    many = (tensor.repeat_interleave(repeats.long(), dim=1) for tensor in (key, value))
    torch.testing.assert_close(merged, attend(query, *many), atol=5e-5, rtol=1e-5)  # sums of 511 rounded exponentials


def test_few_tokens_in_bfloat16_on_a_cpu_stay_near_float32() -> None:
    inputs = _inputs(queries=20, keys=30)
    repeats = torch.rand(30) * 9 + 1

    result = attend(*(tensor.to(torch.bfloat16) for tensor in inputs), repeats=repeats)

    torch.testing.assert_close(result.float(), attend(*inputs, repeats=repeats), atol=2e-2, rtol=2e-2)  # bfloat16 has 8 bits


def test_the_result_has_the_dtype_of_the_inputs() -> None:
    query, key, value = (tensor.to(torch.bfloat16) for tensor in _inputs())

    assert attend(query, key, value).dtype == torch.bfloat16


def test_a_mode_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(OptionError, match="attention sageattn is not supported yet. Use one of: --sdpa"):
        attend(*_inputs(), mode="sageattn")

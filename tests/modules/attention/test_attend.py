import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.attention.attend import (
    BACKENDS,
    attend,
    check_backend,
    check_results,
    explain_unsupported,
    make_lengths,
)
from modules.errors import OptionError
from modules.speed_options import SDPA, AttentionChoice
from tests.modules.attention_packages import PACKAGES, Call, put_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COUNTS = (9, 4, 7)  # real tokens of the samples of a padded batch of 9
EVERY_MODE = ["sdpa", *PACKAGES]
NEAR = 1e-6  # float32, sums of a few numbers in another order


def _inputs(batch: int = 2, queries: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, length, 3, 8, generator=generator) for length in (queries, keys, keys))  # type: ignore[return-value]


def _choice(
    monkeypatch: pytest.MonkeyPatch, mode: str, split: bool = False
) -> tuple[AttentionChoice, list[Call]]:
    """The back end, its package standing in; and the calls the package gets."""
    calls = put_in(monkeypatch, mode) if mode in PACKAGES else []
    return AttentionChoice(mode.partition(" ")[0], split), calls


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_every_back_end_equals_torch(monkeypatch: pytest.MonkeyPatch, mode: str, split: bool) -> None:
    query, key, value = _inputs()
    choice, calls = _choice(monkeypatch, mode, split)

    result = attend(query, key, value, choice)

    torch.testing.assert_close(result, attend(query, key, value), atol=NEAR, rtol=NEAR)
    shapes = [(1, 5, 3, 8), (1, 5, 3, 8)] if split else [(2, 5, 3, 8)]
    assert [call.shape for call in calls] == ([] if mode == "sdpa" else shapes)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_a_padded_batch_equals_its_samples_alone_whatever_stands_in_the_padding(
    monkeypatch: pytest.MonkeyPatch, mode: str, split: bool
) -> None:
    inputs = _inputs(3, 9, 9)
    for one in inputs:
        for sample, count in enumerate(COUNTS):
            one[sample, count:] = torch.nan
        one.requires_grad_()
    choice, _ = _choice(monkeypatch, mode, split)
    weights = torch.rand(3, 9, 3, 8, generator=torch.Generator().manual_seed(1))

    result = attend(*inputs, choice, make_lengths(COUNTS, CPU))
    gradients = torch.autograd.grad((result * weights).sum(), inputs)

    for sample, count in enumerate(COUNTS):
        own = [one[sample : sample + 1, :count].detach().requires_grad_() for one in inputs]
        alone = attend(*own)
        theirs = torch.autograd.grad((alone * weights[sample, :count]).sum(), own)
        for ours, expected in zip((result, *gradients), (alone, *theirs), strict=True):
            torch.testing.assert_close(ours[sample, :count], expected[0], atol=NEAR, rtol=1e-5)
            assert not ours[sample, count:].any()


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_keys_in_front_of_a_padded_batch_are_all_seen(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    query, key, value = _inputs(3, 9, 13)
    for sample, count in enumerate(COUNTS):
        query[sample, count:] = key[sample, 4 + count :] = value[sample, 4 + count :] = torch.nan
    choice, _ = _choice(monkeypatch, mode)

    result = attend(query, key, value, choice, make_lengths(COUNTS, CPU))

    for one, count in enumerate(COUNTS):
        alone = attend(query[one, None, :count], key[one, None, : 4 + count], value[one, None, : 4 + count])
        torch.testing.assert_close(result[one, :count], alone[0], atol=NEAR, rtol=1e-5)
        assert not result[one, count:].any()
    with pytest.raises(ValueError, match="self-attention only"):
        attend(query, key[:, :8], value[:, :8], choice, make_lengths(COUNTS, CPU))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", PACKAGES)
def test_packages_get_real_tokens_only_with_arguments_in_their_order(
    monkeypatch: pytest.MonkeyPatch, mode: str, split: bool
) -> None:
    choice, calls = _choice(monkeypatch, mode, split)

    attend(*_inputs(3, 9, 9), choice, make_lengths(COUNTS, CPU))

    one_by_one = {"sage": ("sageattn", (False,)), "xformers": ("memory_efficient_attention", ())}
    together = {"xformers": Call("memory_efficient_attention", (1, 20, 3, 8), (COUNTS,))}
    if split or mode == "sage":
        function, more = one_by_one.get(mode, ("flash_attn_func", ()))
        assert calls == [Call(function, (1, count, 3, 8), more) for count in COUNTS]
    else:
        flash = Call("flash_attn_varlen_func", (20, 3, 8), ([0, 9, 13, 20], 9, 9))
        assert calls == [together.get(mode, flash)]


@pytest.mark.parametrize("mode", PACKAGES)
def test_packages_compute_in_autocasts_dtype(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    choice, _ = _choice(monkeypatch, mode)

    with torch.autocast("cpu", torch.bfloat16):
        result = attend(*_inputs(2, 9, 9), choice, make_lengths((9, 5), CPU))

    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("counts", [None, (20, 11)])
def test_few_tokens_in_bfloat16_on_a_cpu_stay_near_float32(counts: tuple[int, ...] | None) -> None:
    inputs = _inputs(queries=20, keys=20)
    repeats = torch.rand(20) * 9 + 1 if counts is None else None
    lengths = None if counts is None else make_lengths(counts, CPU)

    result = attend(*(tensor.to(torch.bfloat16) for tensor in inputs), SDPA, lengths, repeats)

    expected = attend(*inputs, SDPA, lengths, repeats)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=2e-2, rtol=2e-2)  # bfloat16 has 8 bits


def _bfloat16() -> torch.dtype:
    return torch.bfloat16


@pytest.mark.parametrize(
    ("mode", "training", "message"),
    [
        ("flash", True, "--flash_attn runs on CUDA devices only, .* Omit --flash_attn"),
        ("xformers", False, "--attn_mode xformers runs on CUDA devices only"),
        ("sage", True, "--sage_attn has no backward pass, .*: it is for generation only"),
        ("sage", False, "--attn_mode sageattn runs on CUDA devices only"),
    ],
)
def test_a_back_end_that_cannot_run_here_is_refused_by_the_option_that_asked(
    mode: str, training: bool, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        check_backend(AttentionChoice(mode), CPU, _bfloat16, training)


@pytest.mark.parametrize(
    ("mode", "capability", "dtype", "message"),
    [
        ("flash", (7, 5), torch.float16, "capability 8.0 or more (Ampere and later); this one has 7.5"),
        ("flash", (8, 0), torch.float32, "float16 and bfloat16 only, and the model computes in float32"),
        ("flash", (12, 0), torch.bfloat16, None),
        ("flash3", (8, 9), torch.bfloat16, "Hopper GPUs (H100, H200, GH200), of compute capability 9.0"),
        ("flash3", (10, 0), torch.bfloat16, "this GPU has 10.0"),
        ("flash3", (9, 0), torch.float16, None),
        ("flash3", (9, 0), torch.float32, "the model computes in float32"),
        ("sage", (7, 0), torch.float16, "this one has 7.0"),
        ("sage", (8, 9), torch.float32, "the model computes in float32"),
        ("sage", (8, 6), torch.bfloat16, None),
        ("xformers", (7, 5), torch.float32, None),
    ],
)
def test_what_a_package_asks_of_gpu_and_dtype(
    mode: str, capability: tuple[int, int], dtype: torch.dtype, message: str | None
) -> None:
    package = BACKENDS[mode]

    reason = explain_unsupported(package, capability, lambda: dtype, training=False)

    assert reason is None if message is None else message in str(reason)


@pytest.mark.parametrize("mode", ["flash", "flash3", "sage", "xformers"])
def test_a_package_that_is_not_installed_is_named_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    package = BACKENDS[mode]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delitem(sys.modules, package.module, raising=False)

    with pytest.raises(
        OptionError, match=f"needs {package.name}, which is not installed. Install it (with: pip|from source)"
    ):
        check_backend(AttentionChoice(mode), CUDA, _bfloat16, training=False)


def test_a_package_that_breaks_while_it_is_imported_is_refused_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    with pytest.raises(
        OptionError, match=r"--flash_attn: FlashAttention 2 cannot be loaded \(undefined symbol: _ZN3c10\)"
    ):
        check_backend(AttentionChoice("flash"), CUDA, _bfloat16, training=True)


def test_a_package_without_a_kernel_for_the_gpu_is_refused_with_its_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("flash_attn")

    def fails(*_: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    module.__dict__["flash_attn_func"] = fails
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)  # there is no such device here

    with pytest.raises(OptionError, match="does not work here .*no kernel image"):
        check_backend(AttentionChoice("flash"), CUDA, _bfloat16, training=True)


@pytest.mark.parametrize("mode", ["flash", "flash3", "xformers"])
@pytest.mark.parametrize("training", [False, True])
def test_a_trial_computes_both_ways_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, mode: str, training: bool
) -> None:
    choice, calls = _choice(monkeypatch, mode)

    check_results(choice, CPU, torch.bfloat16, training)

    assert len(calls) == 2


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda q, k, v: torch.zeros_like(q), "its results are wrong"),
        (lambda q, k, v: attend(q, k, v).detach(), "does not require grad"),
        (lambda q, k, v: attend(q, k, v) * torch.nan, "its results are wrong"),
    ],
)
def test_a_trial_sees_wrong_results_and_missing_gradients(
    monkeypatch: pytest.MonkeyPatch, make: Any, error: str
) -> None:
    module = ModuleType("flash_attn")
    module.__dict__["flash_attn_func"] = make
    monkeypatch.setitem(sys.modules, "flash_attn", module)

    with pytest.raises((ArithmeticError, RuntimeError), match=error):
        check_results(AttentionChoice("flash"), CPU, torch.bfloat16, training=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_float32_is_that_of_wide_inputs(autocast: bool, padded: bool) -> None:
    """Float16 overflows in some models: neither inputs nor autocast may narrow it."""
    generator = torch.Generator().manual_seed(0)
    narrow = [torch.randn(2, 6, 2, 16, generator=generator).bfloat16() for _ in range(3)]
    lengths = make_lengths([6, 4], CPU) if padded else None
    expected = attend(*(one.float() for one in narrow), lengths=lengths).bfloat16()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(*narrow, AttentionChoice("sdpa", in_float32=True), lengths)
        plain = attend(*narrow, lengths=lengths)

    assert torch.equal(found, expected)
    assert not torch.equal(plain, expected)

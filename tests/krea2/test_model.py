"""The Krea 2 transformer against diffusers' in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from krea2.configs import STATES
from modules.attention.attend import CombineAttention
from modules.compile_options import Compilation
from modules.layers.norms import CenteredNorm, rms_norm
from protocols.steps import NagText, Overrides
from runtime.compile import compile_blocks
from tests.krea2.making import in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.parity.running import assert_equal
from tests.qwen_image.making import pack
from tests.tiny.krea2 import tiny_state


@pytest.mark.parametrize("batch", [1, 2], ids=["no padding", "padded"])
@torch.no_grad()
def test_velocities_equal_those_of_diffusers(batch: int) -> None:
    given = tiny_inputs(batch)

    ours = tiny_model()(**given)

    assert_equal(pack(ours), predict_with(in_diffusers(tiny_state()), given), "velocity", 1e-5)


def test_states_are_those_that_diffusers_reads() -> None:
    assert STATES == (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)


@torch.no_grad()
def test_the_scale_of_a_norm_is_not_cut_in_16_bits() -> None:
    """1 + 2^-8 is 1 in bfloat16; 1.75 of it is not 1.75."""
    norm = CenteredNorm(4, 0.0).bfloat16()
    norm.scale.fill_(2**-8)
    x = torch.tensor([1.75, (4 - 1.75**2) ** 0.5, 0, 0]).bfloat16()
    expected = x.float() * (1 + 2**-8) / x.float().square().mean().sqrt()
    assert torch.equal(norm(x), expected.bfloat16())
    assert not torch.equal(norm(x), rms_norm(x, 1 + norm.scale, 0.0))


def test_sizes_that_do_not_fit_are_refused() -> None:
    given = tiny_inputs()
    with pytest.raises(ValueError, match="even sides"):
        tiny_model()(**{**given, "noisy": given["noisy"][..., :-1]})
    with pytest.raises(ValueError, match="a text mask of"):
        tiny_model()(**{**given, "text_mask": given["text_mask"][:, :-1]})


def compiled(model: nn.Module) -> None:
    compile_blocks(model, model.spec, Compilation(backend="eager", fullgraph=True))  # type: ignore[arg-type]


STEER: CombineAttention = lambda first, second: first + 2 * (first - second)  # noqa: E731


@pytest.mark.parametrize(
    ("batch", "dress"),
    [(1, None), (2, None), pytest.param(1, compiled, marks=pytest.mark.slow)],
    ids=["no padding", "padded", "compiled"],
)
@torch.no_grad()
def test_references_that_see_each_other_alone_are_computed_once(
    batch: int, dress: Callable[[nn.Module], None] | None
) -> None:
    """With what is kept of a pass, other noise, times and texts have the velocities of a whole pass."""
    model = tiny_model()
    if dress is not None:
        dress(model)
    given: dict[str, Any]
    given, draw = {**tiny_inputs(batch)}, torch.Generator().manual_seed(3)
    references = [torch.randn(1, 16, 1, *size, generator=draw) for size in ((4, 6), (8, 2))]
    given["references"] = [one.expand(batch, -1, -1, -1, -1) for one in references]
    given["isolated"] = True
    second = {"text": given["text"][:1].flip(1), "text_mask": given["text_mask"][:1]}
    counts: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))
    first = {name: given[name][:1] for name in ("timesteps", "text", "text_mask")}
    first["references"] = [one[:1] for one in given["references"]]
    changes: list[dict[str, Any]] = [
        {},
        {"timesteps": given["timesteps"] / 3, "text": -given["text"]},
        {"noisy": -given["noisy"][:1], **first},
        {"overrides": {"nag": NagText(second, STEER)}},
        {"overrides": {"skip_blocks": frozenset({1})}},
    ]
    kept: dict[Any, Any] = {}
    for change in changes[: 2 if dress else None]:  # each variant is compiled anew
        told = change.pop("overrides", {})
        asked = {**given, **change}
        counts.clear()
        plain = model(**asked, overrides=Overrides(**told))
        assert counts == [counts[0]]
        found = model(**asked, overrides=Overrides(section_cache=kept, **told))
        assert_equal(found, plain, "velocity", 1e-5)
        once = [10] if not change and not told else []  # tokens of both references
        assert counts[1:] == [*once, counts[0] - (0 if "skip_blocks" in told else 10)]
    assert not any(attention.cached_keys_values for attention in model.attentions())

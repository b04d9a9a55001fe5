"""Steps of weights on a device that need care: random rounding, states that are paged."""

import importlib.util

import pytest
import torch
from torch.nn import Parameter

from training.optimizers.optimizer import optimizer_state, restore_optimizer
from training.optimizers.stepping import stochastic_bfloat16


def test_rounding_is_right_on_average_and_keeps_what_is_no_number(device: torch.device) -> None:
    values = torch.full((1 << 16,), 1.0 + 2.0**-10, device=device)  # an eighth of a step of bf16
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], device=device)

    rounded = stochastic_bfloat16(values, torch.Generator(device).manual_seed(0))
    kept = stochastic_bfloat16(special, torch.Generator(device).manual_seed(0))

    assert set(rounded.float().unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    share = float((rounded.float() > 1).double().mean())
    assert abs(share - 0.125) < 4 * (0.125 * 0.875 / len(values)) ** 0.5
    assert bool(kept[0].isnan())
    assert torch.equal(kept[1:].float(), special[1:])


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_8_bit_states_are_where_they_were_after_a_resume(cuda: torch.device, name: str) -> None:
    from bitsandbytes import optim

    def made() -> tuple[Parameter, torch.optim.Optimizer]:
        weight = Parameter(torch.linspace(-1, 1, 512 * 512, device=cuda).view(512, 512))
        weight.grad = torch.linspace(1, -1, 512 * 512, device=cuda).view(512, 512)
        return weight, getattr(optim, name)([weight], lr=0.01)

    (weight, saved), (other, fresh) = made(), made()
    saved.step()
    state = optimizer_state(saved, {weight: "a"})
    with torch.no_grad():
        other.copy_(weight)
    restore_optimizer(fresh, {other: "a"}, state, cuda)

    for ours, theirs in ((fresh.state[other], saved.state[weight]),):
        assert getattr(ours["state1"], "is_paged", False) == (name == "PagedAdamW8bit")
        assert torch.equal(ours["state1"].cpu(), theirs["state1"].cpu())
    saved.step()
    fresh.step()
    assert torch.equal(weight, other)

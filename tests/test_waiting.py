"""No pass of a transformer has the host wait for the device: it could ask for nothing meanwhile, and the
device would run dry.

The device is torch's meta device, which lets nobody read its numbers; what is sent to it is seen.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from blissful_tuner.guidance import make_guidance
from blissful_tuner.guidance_formulas import NormalisedGuidance
from blissful_tuner.options import PLAIN_GUIDANCE
from generation.denoise import LoopStart, SeededNoise, denoise
from generation.prompt_lines import SOLVERS
from modules.contract.data import Conditions
from modules.contract.requests import Request
from modules.contract.steps import Away, Section, Tweaks
from modules.flow.solvers import solver_for
from modules.layers.rope import Slow
from tests.preparing import prepare
from tests.test_second_text import TEXTS
from tests.tiny.dits import DITS, TI2V, TinyDit

META, HOST = torch.device("meta"), torch.device("cpu")


class _Copies(TorchDispatchMode):
    """Copies from the host to the device, by whether the host waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device == HOST and named.get("device") == META:
            if not named.get("non_blocking"):
                self.waiting.append(f"a tensor of {tuple(args[0].shape)}")
        elif (
            func is torch.ops.aten.copy_.default
            and args[0].device == META
            and args[1].device == HOST
            and not any(args[2:])
        ):
            self.waiting.append(f"into a tensor of {tuple(args[0].shape)}")
        return func(*args, **named)


class _Made(TorchFunctionMode):
    """Tensors made on the device of numbers of the host: a copy that torch hides from modes of the other
    kind.
    """

    def __init__(self, copies: _Copies) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in {torch.tensor, torch.as_tensor} and (kwargs or {}).get("device") == META:
            self._copies.waiting.append(f"{func.__name__}({args[0]})")
        return func(*args, **(kwargs or {}))


def waits(call: Callable[..., object], inputs: dict[str, Any]) -> list[str]:
    with _Copies() as copies, _Made(copies):
        call(**inputs)
    return copies.waiting


def sent(value: Any) -> Any:
    """As `modules.devices.send`, which leaves whole numbers on the host."""
    if isinstance(value, list):
        return [sent(each) for each in value]
    return value.to(META) if value.is_floating_point() else value


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.parametrize("tiny", DITS, ids=lambda each: each.name)
def test_a_pass_waits_for_nothing(tiny: TinyDit) -> None:
    dit = tiny.make(2).to(META)
    # texts of two lengths
    inputs = {name: sent(value) for name, value in tiny.inputs((3, 4, 6, 9), 2).items()}

    assert waits(dit, inputs) == []  # the first pass of its size makes a table of positions too


@pytest.mark.parametrize("tiny", DITS, ids=lambda each: each.name)
def test_a_second_text_and_a_slowed_frequency_wait_for_nothing_either(tiny: TinyDit) -> None:
    dit = tiny.make(2).to(META)
    inputs = {name: sent(value) for name, value in tiny.inputs((3, 4, 6, 9), 2).items()}
    text = {name: inputs[name] for name in TEXTS if name in inputs}
    slow = None if tiny.name == "framepack" else Slow(3, 90.0)
    tweaks = Tweaks(away=Away(text, NormalisedGuidance(5.0, 3.5, 0.5)), slow_frames=slow)

    assert waits(dit, {**inputs, "tweaks": tweaks}) == []


def test_given_frames_wait_for_nothing_either() -> None:
    dit = TI2V.make(2).to(META)
    inputs = {name: sent(value) for name, value in TI2V.inputs((3, 4, 6, 9), 2).items()}

    assert waits(dit, {**inputs, "tweaks": Tweaks(given_frames=1)}) == []


class Halves:
    """A family whose velocity is half of what the passes are given."""

    def predict(
        self, dit: torch.nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks
    ) -> Tensor:
        return 0.5 * noisy + timesteps.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("name", SOLVERS.values())
def test_the_steps_of_a_solver_wait_for_nothing(name: str) -> None:
    """With guidance and, as solvers that add noise ask for it, noise from the host."""
    noise = SeededNoise(1, META, cpu_noise=True)
    start = noise.draw((1, 2, 1, 3, 4))
    section = Section(start, {}, {})
    request = prepare(Request("p", 1, guidance_scale=5.0, steps=4))
    inputs = {
        "family": Halves(),
        "dit_at": lambda timestep: torch.nn.Identity(),
        "section": section,
        "start": LoopStart(start),
        "solver": solver_for(name, 4, 3.0, draw=noise.draw),
        "guidance": make_guidance(request, PLAIN_GUIDANCE),
    }
    assert waits(denoise, inputs) == []

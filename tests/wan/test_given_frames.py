"""Given frames of a Wan transformer go together with all that stands around its blocks, and with guidance."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blissful_tuner.guidance import make_guidance
from blissful_tuner.guidance_formulas import NormalisedGuidance
from blissful_tuner.options import PLAIN_GUIDANCE
from generation.denoise import LoopStart, SeededNoise, denoise
from generation.prompt_lines import SOLVERS
from modules.contract.data import Conditions
from modules.contract.requests import Request
from modules.contract.steps import Away, Section, StepDone, Tweaks
from modules.flow.solvers import solver_for
from modules.offload.checkpointing import checkpoint_blocks, compute_in_pieces
from modules.speed_options import AttentionChoice
from tests.modules.fake_device import FakeDevice
from tests.modules.offload import test_checkpointing as pieces
from tests.modules.swap_cases import swapped
from tests.preparing import prepare
from tests.tiny.dits import TI2V, TinyDit, gradients
from tests.wan.making import tiny_inputs, tiny_model


def with_tweaks(tiny: TinyDit, tweaks: Tweaks) -> TinyDit:
    return replace(tiny, inputs=lambda size, batch: {**tiny.inputs(size, batch), "tweaks": tweaks})


GIVEN = with_tweaks(TI2V, Tweaks(given_frames=1))


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pieces_of_tokens_follow_the_time_of_their_frame(autocast: bool) -> None:
    """A frame has 16 tokens here, of which two pieces are made, the others have 32, of which two."""
    found = [pieces.results(GIVEN, in_pieces, autocast) for in_pieces in (True, False)]

    pieces.assert_alike(*found, pieces.BF16 if autocast else pieces.FLOAT32)
    plain = pieces.results(TI2V, True, autocast)
    assert (found[0][0] - plain[0]).abs().max() > 0.01 * plain[0].abs().max()


def test_swapped_blocks_give_the_same_bits() -> None:
    found = []
    for swaps in (False, True):
        dit, network = GIVEN.with_lora(blocks=4)
        compute_in_pieces(dit, GIVEN.spec, pieces.PIECE)
        checkpoint_blocks(dit, GIVEN.spec)
        if swaps:
            swapped(dit, GIVEN.spec, 2, FakeDevice())
        velocity, grads = gradients(dit.train(), network, GIVEN.inputs(pieces.SIZE, 1))
        found.append([velocity, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_compiled_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch.compiler.reset()
    found = pieces.results(GIVEN, True, backend="eager")
    torch.compiler.reset()
    pieces.assert_alike(found, pieces.results(GIVEN, False), pieces.FLOAT32)


def test_split_attention_and_a_second_text_keep_given_frames() -> None:
    model, inputs, tweaks = tiny_model("ti2v"), tiny_inputs("ti2v"), Tweaks(given_frames=1)
    plain = model(**inputs, tweaks=tweaks)
    model.attention = AttentionChoice("sdpa", True)
    torch.testing.assert_close(model(**inputs, tweaks=tweaks), plain, atol=1e-5, rtol=1e-5)

    away = Away({"text": inputs["text"][::-1]}, NormalisedGuidance(5.0, 3.5, 0.5))
    steered = model(**inputs, tweaks=replace(tweaks, away=away))

    assert not steered[:, :, :1].any()
    assert not torch.allclose(steered, plain)


# the denoising loop

GIVEN_LATENTS = torch.full((1, 2, 1, 3, 4), 7.0)


class Told:
    """A family whose network answers by the text it is given, and 0 for given frames."""

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks
    ) -> Tensor:
        count = tweaks.given_frames
        assert torch.equal(
            noisy[:, :, :count], GIVEN_LATENTS[:, :, :count].expand(len(noisy), -1, -1, -1, -1)
        )
        answer = cond["answer"]
        assert isinstance(answer, Tensor)
        velocity = answer * (noisy + 0.1).sin()
        return torch.cat([torch.zeros_like(velocity[:, :, :count]), velocity[:, :, count:]], dim=2)


def run(section: Section, solver: str, watch: Callable[[StepDone], bool], **guidance: Any) -> Tensor:
    request = prepare(Request("p", 1, guidance_scale=5.0, steps=5))
    draw = SeededNoise(2, torch.device("cpu")).draw
    return denoise(
        Told(),  # type: ignore[arg-type]
        lambda _: nn.Identity(),
        section,
        LoopStart(section.noise),
        solver_for(solver, 5, 3.0, draw=draw),
        make_guidance(request, replace(PLAIN_GUIDANCE, **guidance)),
        [watch],
    )


def section_of(frames: int, given: bool) -> Section:
    noise = torch.randn(1, 2, 4, 3, 4, generator=torch.Generator().manual_seed(0))[:, :, -frames:]
    answers = [{"answer": torch.tensor([value]).view(1, 1, 1, 1, 1)} for value in (1.0, 0.6, 0.3)]
    section = Section(noise, *answers)
    if not given:
        return section
    return replace(section, given=GIVEN_LATENTS, tweaks=Tweaks(given_frames=1))


GUIDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "cfg-zero*": {"cfgzerostar_scaling": True, "cfgzerostar_init_steps": 1},
    "perpendicular": {"perp_neg": 1.5},
}


@pytest.mark.parametrize("guidance", GUIDED.values(), ids=GUIDED)
@pytest.mark.parametrize("solver", sorted(set(SOLVERS.values())))
def test_given_frames_stay_and_change_no_guidance_of_the_others(
    solver: str, guidance: dict[str, Any]
) -> None:
    """Also at every step of a preview. The others are those of a video without the given frame, as the
    answers here know nothing of it; solvers that add noise draw it for all frames: theirs are not compared.
    """
    previews: list[Tensor] = []

    def watch(done: StepDone) -> bool:
        previews.append(done.clean)
        return False

    found = run(section_of(4, True), solver, watch, **guidance)

    assert len(previews) == 5
    for latents in (*previews, found):
        assert torch.equal(latents[:, :, :1], GIVEN_LATENTS)
    if solver not in {"dpm++sde", "lcm"}:
        without = run(section_of(3, False), solver, lambda _: False, **guidance)
        torch.testing.assert_close(found[:, :, 1:], without, atol=1e-5, rtol=1e-5)


def test_a_loop_that_ends_early_returns_given_frames_too() -> None:
    found = run(section_of(4, True), "unipc", lambda done: done.step.index == 2)
    assert torch.equal(found[:, :, :1], GIVEN_LATENTS)

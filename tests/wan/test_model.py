"""The Wan2.1 transformer against recorded vectors, against diffusers, and against itself."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blissful_tuner.guidance import make_guidance
from blissful_tuner.guidance_formulas import NormalizedGuidance
from blissful_tuner.options import PLAIN_GUIDANCE
from generation.denoise import SeededNoise, denoise
from generation.prompt_lines import SOLVERS
from modules.flow.solvers import solver_for
from modules.speed_options import AttentionChoice
from protocols.data import Conditions
from protocols.requests import Request
from protocols.steps import CompletedStep, NagText, Overrides, Section
from runtime.offload.checkpointing import checkpoint_blocks, compute_in_pieces
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import swapped
from tests.preparing import prepare
from tests.runtime.offload import test_checkpointing as pieces
from tests.tiny.dits import TI2V, TinyDit, gradients
from tests.tiny.wan_dit import CONFIGS, tiny_state
from tests.wan.making import golden_model, in_diffusers, tiny_inputs, tiny_model
from wan.model import WanModel
from wan.spec import pad_texts

CASES = ("wan_dit_t2v", "wan_dit_i2v", "wan_dit_fun_control", "wan_dit_flf2v")


@pytest.mark.parametrize("rope", ["default", "comfy"])
@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_recorded_output(case: str, rope: str) -> None:
    model, inputs, expected = golden_model(case, rope)

    velocity = model(**inputs)

    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, expected["out"], **expected["tolerance"]["out"])


def test_a_skipped_block_passes_its_input_through() -> None:
    model, inputs, expected = golden_model("wan_dit_t2v")

    velocity = model(**inputs, overrides=Overrides(skip_blocks=frozenset({1})))

    torch.testing.assert_close(
        velocity, expected["out_skip_block_1"], **expected["tolerance"]["out_skip_block_1"]
    )


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v"])
def test_forward_equals_diffusers_with_the_same_weights(kind: str) -> None:
    theirs = in_diffusers(CONFIGS[kind], tiny_state(kind))
    inputs = tiny_inputs(kind)
    text = torch.stack([torch.nn.functional.pad(rows, (0, 0, 0, 512 - len(rows))) for rows in inputs["text"]])
    image = inputs.get("image_embeds")
    if kind == "flf2v":
        image = image.reshape(4, 257, -1)  # diffusers takes the two images as two samples

    velocity = tiny_model(kind)(**inputs)

    with torch.no_grad():
        expected = theirs(inputs["noisy"], inputs["timesteps"], text, image, return_dict=False)[0]
    assert (velocity - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("given", [0, 1, 2])
def test_given_frames_equal_diffusers_fed_a_time_for_each_token(given: int) -> None:
    """As its pipelines with `expand_timesteps` do; their velocity of given frames is not used."""
    theirs, inputs = in_diffusers(CONFIGS["ti2v"], tiny_state("ti2v")), tiny_inputs("ti2v", frames=4)
    text = torch.stack([torch.nn.functional.pad(rows, (0, 0, 0, 512 - len(rows))) for rows in inputs["text"]])
    times = inputs["timesteps"].view(2, 1, 1, 1).repeat(1, 4, 2, 3)
    times[:, :given] = 0

    velocity = tiny_model("ti2v")(**inputs, overrides=Overrides(num_clean_frames=given))

    with torch.no_grad():
        expected = theirs(inputs["noisy"], times.flatten(1), text, return_dict=False)[0]
    difference = (velocity - expected)[:, :, given:]
    assert difference.abs().max() <= 1e-5 * expected.abs().max()
    assert not velocity[:, :, :given].any()


def test_what_a_step_cache_compares_is_what_attention_gets_with_given_frames_too() -> None:
    model, inputs = tiny_model("ti2v"), tiny_inputs("ti2v")
    hidden = model.embed(**inputs, overrides=Overrides(num_clean_frames=1))
    x, tokens = hidden.x, hidden.tokens
    block, seen = model.blocks[0], []
    block.self_attn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    block(x, tokens)

    assert torch.equal(block.modulated_input(x, tokens), seen[0])


def test_half_precision_of_the_modulation_reaches_given_frames() -> None:
    model = WanModel(CONFIGS["ti2v"], precision=torch.float16)
    model.load_state_dict(tiny_state("ti2v"))
    inputs, overrides = tiny_inputs("ti2v"), Overrides(num_clean_frames=1)
    exact = tiny_model("ti2v")(**inputs, overrides=overrides)

    with torch.no_grad():
        velocity = model(**inputs, overrides=overrides)

    difference = (velocity - exact).abs().max()
    assert 0 < difference < 0.02 * exact.abs().max()


def test_text_may_come_as_one_padded_tensor() -> None:
    model, inputs = tiny_model("t2v"), tiny_inputs("t2v")
    padded = torch.stack(
        [torch.nn.functional.pad(rows, (0, 0, 0, 60 - len(rows))) for rows in inputs["text"]]
    )

    torch.testing.assert_close(model(**inputs), model(**inputs | {"text": padded}), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_padding_rows_computed_once_give_what_all_of_them_give(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_model(kind).requires_grad_(True), tiny_inputs(kind)
    merged = learned(model, inputs)
    monkeypatch.setattr(
        "wan.model.pad_texts", lambda text, length, attention, padded=pad_texts: padded(text, length, None)
    )

    for name, gradient in learned(model, inputs).items():
        torch.testing.assert_close(merged[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def learned(model: WanModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of the mean square of the velocity, by parameter; and the velocity itself."""
    velocity = model(**inputs)
    found = torch.autograd.grad(velocity.square().mean(), list(model.parameters()), allow_unused=True)
    named = zip(model.state_dict(), found, strict=True)
    return {"velocity": velocity, **{name: gradient for name, gradient in named if gradient is not None}}


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_the_residual_stream_stays_float32_in_bfloat16(how: str) -> None:
    model, inputs = tiny_model("t2v"), tiny_inputs("t2v")
    if how == "weights":
        model = model.to(torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        hidden = model.embed(inputs["noisy"], inputs["timesteps"], inputs["text"])
        x, tokens = hidden.x, hidden.tokens
        out = model.blocks[0](x, tokens)

    assert tokens.dtype == tokens.text_tokens[0][0].dtype == torch.bfloat16
    assert {x.dtype, out.dtype, tokens.time.dtype, tokens.modulation.dtype} == {torch.float32}


def test_the_rotary_table_follows_the_grid() -> None:
    model = tiny_model("t2v")
    expected = tiny_model("t2v")(**tiny_inputs("t2v", frames=2))

    model(**tiny_inputs("t2v", frames=3))

    assert torch.equal(model(**tiny_inputs("t2v", frames=2)), expected)


def test_image_attention_without_features_reads_the_first_text_rows() -> None:
    model, inputs = tiny_model("fun-control"), tiny_inputs("fun-control")
    del inputs["image_embeds"]

    tokens = model.embed(**inputs).tokens

    assert tokens.image_tokens is not None
    assert tokens.image_tokens.shape[1] == 257
    assert tokens.text_tokens[0][0].shape[1] == 512 - 257


def with_overrides(tiny: TinyDit, overrides: Overrides) -> TinyDit:
    return replace(tiny, inputs=lambda size, batch: {**tiny.inputs(size, batch), "overrides": overrides})


GIVEN = with_overrides(TI2V, Overrides(num_clean_frames=1))


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
    model, inputs, overrides = tiny_model("ti2v"), tiny_inputs("ti2v"), Overrides(num_clean_frames=1)
    plain = model(**inputs, overrides=overrides)
    model.attention = AttentionChoice("sdpa", True)
    torch.testing.assert_close(model(**inputs, overrides=overrides), plain, atol=1e-5, rtol=1e-5)

    nag = NagText({"text": inputs["text"][::-1]}, NormalizedGuidance(5.0, 3.5, 0.5))
    steered = model(**inputs, overrides=replace(overrides, nag=nag))

    assert not steered[:, :, :1].any()
    assert not torch.allclose(steered, plain)


# the denoising loop

GIVEN_LATENTS = torch.full((1, 2, 1, 3, 4), 7.0)


class Told:
    """A family whose network answers by the text it is given, and 0 for given frames."""

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, overrides: Overrides
    ) -> Tensor:
        count = overrides.num_clean_frames
        assert torch.equal(
            noisy[:, :, :count], GIVEN_LATENTS[:, :, :count].expand(len(noisy), -1, -1, -1, -1)
        )
        answer = cond["answer"]
        assert isinstance(answer, Tensor)
        velocity = answer * (noisy + 0.1).sin()
        return torch.cat([torch.zeros_like(velocity[:, :, :count]), velocity[:, :, count:]], dim=2)


def run(section: Section, solver: str, watch: Callable[[CompletedStep], bool], **guidance: Any) -> Tensor:
    request = prepare(Request("p", 1, guidance_scale=5.0, steps=5))
    draw = SeededNoise(2, torch.device("cpu")).draw
    return denoise(
        Told(),  # type: ignore[arg-type]
        lambda _: nn.Identity(),
        section,
        section.noise,
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
    return replace(section, clean_frames=GIVEN_LATENTS, overrides=Overrides(num_clean_frames=1))


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

    def watch(done: CompletedStep) -> bool:
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


def test_cached_texts_in_bfloat16_are_stacked_under_autocast_in_float16() -> None:
    texts = [torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(5, 4, dtype=torch.bfloat16)]

    with torch.autocast("cpu", torch.float16):
        stacked, _ = pad_texts(texts, 8, None)

    assert stacked.sum(dim=(1, 2)).tolist() == [12, 20]

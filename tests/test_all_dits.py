"""The transformers of all families: batches, padding, back ends, a second text, and no wait for the host."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from blissful_tuner.guidance import make_guidance
from blissful_tuner.guidance_formulas import NormalizedGuidance
from blissful_tuner.options import PLAIN_GUIDANCE
from generation.denoise import SeededNoise, denoise
from generation.prompt_lines import SOLVERS
from modules.flow.solvers import solver_for
from modules.layers.rope import SlowedFrequency
from modules.speed_options import AttentionChoice
from protocols.data import Conditions
from protocols.requests import Request
from protocols.steps import NagText, Overrides, Section
from tests.modules.attention_packages import PACKAGES, put_in
from tests.preparing import prepare
from tests.tiny.dits import DITS, TI2V, Size, TinyDit

SIZE: Size = (2, 4, 6, 9)
NEAR = 1e-5  # of the largest value, in float32
NEAR_IN_BF16 = 0.05
# their blocks are those of another one
LIKE_ANOTHER = {"wan t2v", "flux chroma", "hunyuan_image", "qwen_image edit", "ltx_2 2.0", "ltx_2 2.5"}
ONE_OF_EACH_BLOCK = [each for each in DITS if each.name not in LIKE_ANOTHER]
HIDING = [each for each in DITS if each.name != "flux chroma"]  # which sees one row of padding, as trained
of_each_that_hides = pytest.mark.parametrize("tiny", HIDING, ids=lambda each: each.name)


EDITING_OR_OTHER_RELEASES = {"qwen_image edit", "krea2 edit", "ltx_2 2.0", "ltx_2 2.5"}
EDITING_OR_OTHER_RELEASES |= {"qwen_image_21 edit"}
DAILY = [
    pytest.param(each, id=each.name, marks=[pytest.mark.slow] * (each.name in EDITING_OR_OTHER_RELEASES))
    for each in DITS
]


@pytest.fixture(params=DAILY)
def tiny(request: pytest.FixtureRequest) -> TinyDit:
    return request.param


def masks_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The masks of texts by the texts' names."""
    return {name.removesuffix("_mask"): mask for name, mask in inputs.items() if name.endswith("_mask")}


def text_of(inputs: dict[str, Any], name: str) -> str:
    """The name of the input that a mask is for: `glyph_mask` is for `glyphs`."""
    return name if name in inputs else f"{name}s"


def assert_near(found: Tensor, expected: Tensor, near: float = NEAR) -> None:
    assert (found - expected).abs().max() <= near * expected.abs().max()


def one_of(name: str, value: Any, sample: int) -> Any:
    """An argument of a network for one sample of a batch; references are batches."""
    if name == "references":
        return [each[sample : sample + 1] for each in value]
    return value[sample : sample + 1] if isinstance(value, (Tensor, list)) else value


@of_each_that_hides
def test_a_sample_of_a_batch_equals_that_sample_alone_without_its_padding(tiny: TinyDit) -> None:
    model, inputs = tiny.make(2), tiny.inputs(SIZE, 2)

    together = model(**inputs)

    for sample in range(2):
        alone = {name: one_of(name, value, sample) for name, value in inputs.items()}
        for name, mask in masks_of(inputs).items():
            length = max(int(mask[sample].sum()), 1)  # an empty text is a row that nobody sees
            for each in (text_of(inputs, name), f"{name}_mask"):
                alone[each] = alone[each][:, :length]
        assert_near(model(**alone)[0], together[sample])


@of_each_that_hides
def test_what_stands_in_the_padding_does_not_matter(tiny: TinyDit) -> None:
    model, inputs = tiny.make(2), tiny.inputs(SIZE, 2)
    changed = {}
    for name, mask in masks_of(inputs).items():
        changed[text_of(inputs, name)] = text = inputs[text_of(inputs, name)].clone()
        text[mask == 0] = -5.0

    assert torch.equal(model(**inputs), model(**inputs | changed))


@pytest.mark.parametrize(
    ("mode", "split"),
    [*((mode, False) for mode in ("flash", "flash3", "sage", "xformers")), ("sdpa", True), ("flash", True)],
)
def test_every_attention_back_end_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tiny: TinyDit, mode: str, split: bool
) -> None:
    """With stand-ins for the packages."""
    if mode in PACKAGES:
        put_in(monkeypatch, mode)
    model, inputs = tiny.make(1), tiny.inputs(SIZE, 2)
    expected = model(**inputs)
    model.attention = AttentionChoice(mode, split)

    assert_near(model(**inputs), expected)


def test_bfloat16_autocast_stays_near_float32(tiny: TinyDit) -> None:
    model, inputs = tiny.make(2), tiny.inputs(SIZE, 2)
    expected = model(**inputs)

    with torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs)

    assert_near(found.float(), expected, NEAR_IN_BF16)


def test_numbers_are_embedded_in_float32_where_the_model_computes_in_bf16(tiny: TinyDit) -> None:
    """Of 900.93 bf16 makes 900, of a guidance of 6.304 6.3125: the embedding is rounded, not the number."""
    model = tiny.make(1).bfloat16()
    inputs = {name: in_bf16(value) for name, value in tiny.inputs(SIZE, 2).items()}
    numbers = [name for name, value in inputs.items() if isinstance(value, Tensor) and is_number(value)]
    assert numbers
    for name in numbers:
        exact = inputs[name].float() * 1.001 + (0.001 if inputs[name].max() <= 1 else 0.3)
        rounded = exact.bfloat16().float()
        assert (rounded != exact).all()

        assert not torch.equal(model(**inputs | {name: exact}), model(**inputs | {name: rounded})), name


def is_number(value: Tensor) -> bool:
    """Whether an input is one number for each sample: a timestep, a guidance, a frame rate."""
    return value.ndim == 1 and value.is_floating_point()


def in_bf16(value: Any) -> Any:
    """An input as a model in bf16 gets it: all but numbers, masks and positions in bf16."""
    if isinstance(value, list):
        return [in_bf16(each) for each in value]
    if not isinstance(value, Tensor) or is_number(value) or not value.is_floating_point():
        return value
    return value.bfloat16()


def test_a_model_that_made_a_sample_in_inference_mode_trains_on(tiny: TinyDit) -> None:
    model, inputs = tiny.make(1).requires_grad_(True).train(), tiny.inputs(SIZE, 2)
    with torch.inference_mode():
        model(**inputs)

    model(**inputs).square().mean().backward()

    assert any(weight.grad is not None for weight in model.parameters())


LONGER = (3, 4, 6, 9)  # latent frames, rows, columns, tokens of the text
# arguments that a text gives
TEXTS = (
    *("text", "audio_text", "text_mask", "glyphs", "glyph_mask", "glyphs_mask", "caption", "caption_mask"),
    *("llama", "llama_mask", "clip_l", "t5", "t5_mask", "pooled"),
    *("states", "states_mask", "ids", "weights"),
    *("shown", "grids"),
)
POOLED = {"clip_l", "pooled"}
NAG = NormalizedGuidance(5.0, 2.5, 0.5)


def toward(first: Tensor, second: Tensor) -> Tensor:
    return first


def nag(first: Tensor, second: Tensor) -> Tensor:
    return second


def texts_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in TEXTS if name in inputs}


def other_text(tiny: TinyDit, batch: int = 1, length: int = 6) -> dict[str, Any]:
    """Another text of another length, with the pooled vector of the first one where there is one."""
    text = {
        name: [one.flip(0) * 0.5 for one in value] if isinstance(value, list) else value.flip(-1)
        for name, value in texts_of(tiny.inputs((*LONGER[:3], length), batch)).items()
    }
    masks = {name: value.flip(-1) for name, value in text.items() if name.endswith("_mask")}  # as they were
    pooled = {name: value for name, value in tiny.inputs(LONGER, batch).items() if name in POOLED}
    return text | masks | pooled


@torch.no_grad()
def velocity(
    tiny: TinyDit,
    second: dict[str, Any] | None = None,
    steer: Callable[[Tensor, Tensor], Tensor] = NAG,
    batch: int = 1,
    **given: Any,
) -> Tensor:
    """What the transformer makes of the usual inputs with a second text, if one is given."""
    overrides = Overrides(nag=None if second is None else NagText(second, steer))
    return tiny.make(2)(**{**tiny.inputs(LONGER, batch), **given}, overrides=overrides)


def assert_same(steered: Tensor, plain: Tensor) -> None:
    """Where texts have queries too, products of both texts are of other sizes, and rounded otherwise."""
    torch.testing.assert_close(steered, plain, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])  # in a batch texts differ in length
def test_what_sees_the_second_text_alone_is_the_pass_of_that_text(tiny: TinyDit, batch: int) -> None:
    other = other_text(tiny, batch)

    seen = velocity(tiny, other, nag, batch)

    torch.testing.assert_close(seen, velocity(tiny, batch=batch, **other), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(seen, velocity(tiny, batch=batch), atol=1e-4)


def test_a_second_text_that_is_the_same_or_steers_nothing_changes_nothing(tiny: TinyDit) -> None:
    plain = velocity(tiny)

    assert_same(velocity(tiny, other_text(tiny), toward), plain)
    assert_same(velocity(tiny, texts_of(tiny.inputs(LONGER, 1))), plain)


def test_one_second_text_serves_all_samples(tiny: TinyDit) -> None:
    one = other_text(tiny)
    twice = {
        name: value * 2 if isinstance(value, list) else value.expand(2, *value.shape[1:])
        for name, value in one.items()
    }

    # products of one text and of two are rounded otherwise
    torch.testing.assert_close(
        velocity(tiny, one, batch=2), velocity(tiny, twice, batch=2), atol=1e-5, rtol=1e-5
    )


def test_normalised_guidance_leaves_the_pass_of_either_text(tiny: TinyDit) -> None:
    other = other_text(tiny)
    steered, plain = velocity(tiny, other), velocity(tiny)

    assert not torch.allclose(steered, plain, atol=1e-4)
    assert not torch.allclose(steered, velocity(tiny, **other), atol=1e-4)


@pytest.mark.parametrize("tiny", DITS[2:4], ids=lambda each: each.name)
def test_the_pooled_vector_of_the_second_text_reaches_only_that_text(tiny: TinyDit) -> None:
    other = other_text(tiny)
    changed = {**other, "clip_l": -other["clip_l"]}

    assert_same(velocity(tiny, changed, toward), velocity(tiny))
    assert not torch.allclose(velocity(tiny, changed), velocity(tiny, other), atol=1e-5)


@pytest.mark.slow_cases(
    "anima",
    "flux dev",
    "flux_2",
    "framepack",
    "hunyuan t2v",
    "krea2 edit",
    "krea2",
    "ltx_2 2.3",
    "qwen_image",
    "qwen_image_21 edit",
    "qwen_image_21",
    "wan i2v",
    "wan vace",
    "z_image",
)
@pytest.mark.parametrize("tiny", ONE_OF_EACH_BLOCK, ids=lambda each: each.name)
def test_compiled_blocks_see_a_second_text_too(tiny: TinyDit) -> None:
    torch._dynamo.reset()  # the families share a forward, and a process compiles it 8 times
    inputs = {**tiny.inputs(LONGER, 1), "overrides": Overrides(nag=NagText(other_text(tiny), NAG))}
    dit = tiny.make(1)
    with torch.no_grad():
        expected = dit(**inputs)
    for blocks in tiny.spec.blocks(dit).values():
        for block in blocks:
            block.compile(backend="eager", fullgraph=True)

    with torch.no_grad():
        steered = dit(**inputs)

    torch.testing.assert_close(steered, expected, atol=1e-5, rtol=1e-5)


def test_the_image_is_seen_as_without_a_second_text() -> None:
    """Wan adds what it sees of the image after the texts are combined."""
    tiny = DITS[1]
    dit = tiny.make(1)
    block = dit.get_submodule("blocks.0.cross_attn")
    embedded = dit.embed(  # type: ignore[operator]
        *tiny.inputs(LONGER, 1).values(),
        Overrides(nag=NagText(other_text(tiny), lambda first, second: 0 * first)),
    )

    with torch.no_grad():
        seen = block(embedded.x, embedded.tokens)
        without = block(embedded.x, replace(embedded.tokens, image_tokens=None))

    assert torch.equal(without, block.o.bias.expand_as(without))  # type: ignore[union-attr, operator]
    assert not torch.allclose(seen, without, atol=1e-3)


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
    return value.to(META) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("tweaked", [False, True], ids=["plain", "second text"])
def test_a_pass_waits_for_nothing(tiny: TinyDit, tweaked: bool) -> None:
    """With texts of two lengths. The first pass of its size makes a table of positions too."""
    dit = tiny.make(2).to(META)
    inputs = {name: sent(value) for name, value in tiny.inputs(LONGER, 2).items()}
    if tweaked:
        slow = None if tiny.name == "framepack" else SlowedFrequency(3, 90.0)
        inputs["overrides"] = Overrides(nag=NagText(texts_of(inputs), NAG), slow_frames=slow)

    assert waits(dit, inputs) == []


@pytest.mark.usefixtures("no_autocast")
def test_given_frames_wait_for_nothing_either() -> None:
    dit = TI2V.make(2).to(META)
    inputs = {name: sent(value) for name, value in TI2V.inputs(LONGER, 2).items()}

    assert waits(dit, {**inputs, "overrides": Overrides(num_clean_frames=1)}) == []


class Halves:
    """A family whose velocity is half of what the passes are given."""

    def predict(
        self, dit: torch.nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, overrides: Overrides
    ) -> Tensor:
        return 0.5 * noisy + timesteps.view(-1, 1, 1, 1, 1)


@pytest.mark.usefixtures("no_autocast")
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
        "latents": start,
        "solver": solver_for(name, 4, 3.0, draw=noise.draw),
        "guidance": make_guidance(request, PLAIN_GUIDANCE),
    }
    assert waits(denoise, inputs) == []


def test_conditions_in_bf16_meet_a_transformer_in_fp16() -> None:
    """As Wan's caches do in --mixed_precision fp16; all families by command: tests/emulated/test_fp16.py."""
    tiny = DITS[0]
    dit, network = tiny.with_lora(blocks=2)
    inputs = tiny.inputs(SIZE, 2)
    for name, value in inputs.items():
        if name != "noisy" and isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = value.bfloat16()

    with torch.autocast("cpu", torch.float16):
        velocity = dit.half().train()(**inputs)
    velocity.float().square().mean().backward()

    grown = [one.grad for one in network.parameters() if one.grad is not None]
    assert grown
    assert all(bool(one.isfinite().all()) for one in (velocity, *grown))

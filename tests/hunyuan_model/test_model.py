"""The HunyuanVideo transformer against recorded vectors, against diffusers, and against itself: its joined
tokens, and what caches hold of clips.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.traffic_count import Counting
from frame_pack.model import FramePackRefiner as FramePackRefiner
from hunyuan_model.joining import gelu, join_gelu, rotate_and_join, rotate_first
from hunyuan_model.model import HunyuanVideoModel
from hunyuan_model.vae import HunyuanVae, encode_latents, load_vae
from modules.layers.rope import TokenGrid, rotary_table, rotate
from protocols.data import MediaBatch
from protocols.steps import Overrides
from tests.golden_cases import FLOAT32_POWERS
from tests.hunyuan_model.making import golden_model, in_diffusers, run_there, tiny_inputs, tiny_model
from tests.tiny.hunyuan_dit import CONFIGS
from tests.tiny.hunyuan_vae import write_vae

GOLDEN = ("hv_dit_guidance", "hv_dit_noguidance", "skyreels_i2v_dit")
NEAR = 2e-6  # of the largest value: the same formulas in float32, summed in another order


@pytest.mark.parametrize("case", GOLDEN)
def test_forward_equals_the_recorded_output(case: str) -> None:
    model, inputs, expected = golden_model(case)

    velocity = model(**inputs)

    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, expected["out"], **expected["tolerance"]["out"])
    assert (velocity - expected["out"]).abs().max() <= FLOAT32_POWERS * expected["out"].abs().max()


def test_refined_text_and_rotary_angles_equal_the_recorded_ones() -> None:
    model, inputs, expected = golden_model("hv_dit_guidance")
    lengths = inputs["llama_mask"].sum(1).tolist()

    text = model.txt_in(inputs["llama"], inputs["timesteps"], lengths, torch.float32)
    tokens = model.embed(**inputs).tokens

    for sample, length in enumerate(lengths):
        ours, theirs = text[sample, :length], expected["refined_text"][sample, :length]
        torch.testing.assert_close(ours, theirs, rtol=0, **expected["tolerance"]["refined_text"])
    turns = tokens.rotary.squeeze(1).repeat_interleave(2, dim=-2)
    torch.testing.assert_close(
        turns[..., 0], expected["freqs_cos"], rtol=0, **expected["tolerance"]["freqs_*"]
    )
    torch.testing.assert_close(
        turns[..., 1], expected["freqs_sin"], rtol=0, **expected["tolerance"]["freqs_*"]
    )


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [*((kind, (5, 11)) for kind in CONFIGS), ("t2v", (1, 12)), ("t2v", (7,)), ("t2v", (12, 12))],
)
def test_forward_equals_diffusers_with_the_same_weights(kind: str, lengths: tuple[int, ...]) -> None:
    inputs = tiny_inputs(kind, lengths)

    velocity = tiny_model(kind)(**inputs)

    expected = run_there(in_diffusers(kind), inputs)
    assert (velocity - expected).abs().max() <= NEAR * expected.abs().max()


def test_without_embedded_guidance_a_distilled_model_is_one_that_has_none() -> None:
    distilled, inputs = tiny_model("t2v"), tiny_inputs("t2v")
    plain = HunyuanVideoModel(replace(CONFIGS["t2v"], has_guidance=False))
    plain.load_state_dict(
        {name: value for name, value in distilled.state_dict().items() if not name.startswith("guidance_in.")}
    )

    without = distilled(**inputs, overrides=Overrides(embedded_guidance=False))

    # the weights lie elsewhere in memory, and by their alignment some kernels sum in another order
    torch.testing.assert_close(without, plain(**inputs))
    assert (without - distilled(**inputs)).abs().max() > 1e-3


def test_the_mask_may_be_of_truth_values() -> None:
    model, inputs = tiny_model("t2v"), tiny_inputs("t2v")

    assert torch.equal(model(**inputs), model(**inputs | {"llama_mask": inputs["llama_mask"].bool()}))


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("learns", [False, True])
def test_an_embedding_that_learns_stays_float32_in_bfloat16(how: str, learns: bool) -> None:
    model, inputs = tiny_model("t2v").requires_grad_(learns), tiny_inputs("t2v")
    if how == "weights":
        model = model.to(torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        hidden = model.embed(**inputs)
        x, tokens = hidden.x, hidden.tokens
        double, single = model.double_blocks[0](x, tokens), model.single_blocks[0](x, tokens)

    assert {x.dtype, double.dtype, single.dtype, tokens.dtype} == {torch.bfloat16}
    assert tokens.vector.dtype == (torch.float32 if learns else torch.bfloat16)


B, L, T, N, D = 2, 24, 5, 8, 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def table() -> Tensor:
    return rotary_table(TokenGrid((2, 3, 4)), (4, 6, 6))


def first_plainly(x: Tensor, turns: Tensor) -> Tensor:
    return torch.cat([rotate(x[:, :L], turns), x[:, L:]], dim=1)


def joined_plainly(video: Tensor, text: Tensor, turns: Tensor) -> Tensor:
    return torch.cat([rotate(video, turns), text], dim=1)


def gelu_plainly(seen: Tensor, hidden: Tensor) -> Tensor:
    return torch.cat([seen, gelu(hidden)], dim=-1)


def inputs_of(what: str, dtype: torch.dtype) -> list[Tensor]:
    if what == "gelu":  # whole vectors of the CPU, which computes the rest of a row in another way
        return [draw(B, L + T, 48, dtype=dtype), draw(B, L + T, 64, dtype=dtype)]
    if what == "first":
        return [draw(B, L + T, N, D, dtype=dtype)]
    return [draw(B, L, N, D, dtype=dtype), draw(B, T, N, D, dtype=dtype)]


def call(function: Callable[..., Tensor], what: str, inputs: Sequence[Tensor]) -> Tensor:
    return function(*inputs) if what == "gelu" else function(*inputs, table())


PAIRS = {
    "first": (rotate_first, first_plainly),
    "join": (rotate_and_join, joined_plainly),
    "gelu": (join_gelu, gelu_plainly),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["", "gradient of another layout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", PAIRS)
def test_bits_are_those_of_separate_operators(what: str, dtype: torch.dtype, transposed: bool) -> None:
    inputs = inputs_of(what, dtype)
    results = []
    for function in PAIRS[what]:
        out = call(function, what, inputs)
        given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        given = given.transpose(1, -1).contiguous().transpose(1, -1) if transposed else given
        results.append([out, *torch.autograd.grad(out, inputs, given)])

    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("what", PAIRS)
def test_there_are_fewer_passes(what: str) -> None:
    totals = []
    for function in PAIRS[what]:
        inputs = inputs_of(what, torch.bfloat16)
        with Counting(torch.device("cpu")) as counting:
            out = call(function, what, inputs)
            torch.autograd.grad(out, inputs, torch.empty_like(out))
        totals.append(sum(each.size for each in counting.operations))

    assert totals[0] < 0.93 * totals[1]


CPU = torch.device("cpu")
BATCH_NEAR = 1e-5  # float32; convolutions of a batch may be summed in another order


@pytest.fixture(params=[None, 32], ids=["whole", "in tiles"])
def vae(request: pytest.FixtureRequest, tmp_path: Path) -> HunyuanVae:
    return load_vae(write_vae(tmp_path / "vae.safetensors"), CPU, torch.float32, tile=request.param)


def clips(*keys: str) -> MediaBatch:
    frames = torch.randint(
        0, 256, (len(keys), 5, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return MediaBatch(frames, keys, ((0, 5),) * len(keys))


@pytest.mark.slow_cases("in tiles-False", "in tiles-True")
@pytest.mark.parametrize("with_image", [False, True])
def test_a_batch_gives_each_clip_what_it_gets_alone(vae: HunyuanVae, with_image: bool) -> None:
    """As on a GPU, where clips are encoded together.

    Noise shared or in another order would differ by whole units.
    """
    media = clips("one", "two", "three")

    together = encode_latents(vae, media, with_image)

    singly = media.split_for(torch.device("cpu"))
    alone = [entry for one in singly for entry in encode_latents(vae, one, with_image)]
    assert len(together) == len(alone) == 3
    for ours, expected in zip(together, alone, strict=True):
        assert set(ours.tensors) == ({"latents", "latents_image"} if with_image else {"latents"})
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(
                ours.tensors[name], tensor, rtol=0, atol=BATCH_NEAR * float(tensor.abs().max()), msg=name
            )
    (renamed,) = encode_latents(vae, replace(singly[0], keys=("four",)), with_image)
    assert not torch.allclose(renamed.tensors["latents"], alone[0].tensors["latents"], atol=0.1)


def test_only_a_cpu_takes_clips_one_by_one() -> None:
    media = clips("one", "two")

    assert [part.keys for part in media.split_for(CPU)] == [("one",), ("two",)]
    assert [part.keys for part in media.split_for(torch.device("cuda"))] == [("one", "two")]

"""The FramePack transformer against recorded vectors, against diffusers, and against itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frame_pack import batches
from frame_pack.family import FramePack
from frame_pack.files import FramePackFiles
from frame_pack.model import FramePackModel
from hunyuan_model.blocks import HunyuanTokens
from modules.errors import CacheError
from protocols.data import Batch
from protocols.one_frame import OneFrame
from tests.frame_pack.making import CLEAN, golden_model, in_diffusers, run_there, tiny_inputs, tiny_model
from tests.golden_cases import FLOAT32_POWERS
from tests.tiny.framepack_dit import CONFIG, tiny_state, write_dit

NEAR = 2e-6  # of the largest value: the same formulas in float32, summed in another order


def embedded(model: FramePackModel, inputs: dict[str, Any]) -> tuple[Tensor, HunyuanTokens]:
    """What the model hands its first block."""
    found: list[tuple[Tensor, HunyuanTokens]] = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(lambda _, given: found.append(given))
    model(**inputs)
    hook.remove()
    return found[0]


def without(inputs: dict[str, Any], *kinds: str) -> dict[str, Any]:
    left_out = {name for kind in kinds for name in (kind, CLEAN[kind][1])}
    return {name: value for name, value in inputs.items() if name not in left_out}


@pytest.mark.parametrize(
    ("stored", "left_out", "scale"),
    [
        ("out", (), 1.0),
        ("out_only_1x_clean", ("clean_latents_2x", "clean_latents_4x"), 1.0),
        ("out_rope_scaled", (), 0.5),
    ],
)
def test_forward_equals_the_recorded_output(stored: str, left_out: tuple[str, ...], scale: float) -> None:
    model, inputs, expected = golden_model()

    velocity = model(**without(inputs, *left_out), position_scale=scale)

    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, expected[stored], **expected["tolerance"]["out*"])
    assert (velocity - expected[stored]).abs().max() <= FLOAT32_POWERS * expected[stored].abs().max()


def test_packed_latents_and_rotary_angles_equal_the_recorded_ones() -> None:
    model, inputs, expected = golden_model()

    x, tokens = embedded(model, inputs)

    torch.testing.assert_close(
        x[:, : tokens.num_video_tokens],
        expected["packed_tokens"],
        rtol=0,
        **expected["tolerance"]["packed_tokens"],
    )
    cosines, sines = expected["rope_freqs"][0].chunk(2, dim=-1)
    turns = tokens.rotary.squeeze(1).repeat_interleave(2, dim=-2)
    torch.testing.assert_close(turns[..., 0], cosines, rtol=0, **expected["tolerance"]["rope_freqs"])
    torch.testing.assert_close(turns[..., 1], sines, rtol=0, **expected["tolerance"]["rope_freqs"])


@pytest.mark.parametrize(
    ("lengths", "size"), [((5, 11), (6, 10)), ((7,), (8, 8)), ((12, 12), (2, 2)), ((3, 1, 9), (6, 10))]
)
def test_forward_equals_diffusers_with_the_same_weights(
    lengths: tuple[int, ...], size: tuple[int, int]
) -> None:
    inputs = tiny_inputs(lengths, size=size)

    velocity = tiny_model()(**inputs)

    with torch.no_grad():
        expected = run_there(in_diffusers(), inputs)
    assert (velocity - expected).abs().max() <= NEAR * expected.abs().max()


def test_samples_of_a_batch_may_stand_at_different_places() -> None:
    model, inputs = tiny_model(), tiny_inputs((5, 11))
    for name, value in inputs.items():
        if name.endswith("indices"):
            inputs[name] = torch.stack([value[0], value[0] + torch.arange(value.shape[1]) + 1])

    _, tokens = embedded(model, inputs)
    together = model(**inputs)

    assert tokens.rotary.ndim == 5
    for sample in range(2):
        alone = {name: value[sample : sample + 1] for name, value in inputs.items()}
        assert (model(**alone) - together[sample]).abs().max() <= NEAR * together.abs().max()
    assert not torch.allclose(model(**tiny_inputs((5, 11)))[1], together[1])


WINDOW, AREA = 2, (4, 6)


class Seen(nn.Module):
    """Keeps what it is called with."""

    def forward(self, noisy: Tensor, timesteps: Tensor, **inputs: Any) -> Tensor:
        self.history = {name: tensor for name, tensor in inputs.items() if name.startswith("clean_")}
        return noisy


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> FramePack:
    return FramePack(
        FramePackFiles(write_dit(tmp_path_factory.mktemp("dit"), tiny_state())), trained_guidance=2.5
    )


def batch(*left_out: str, **others: Tensor) -> Batch:
    """Two sections with all of their history, but for what is left out."""
    tensors = {
        "latents": torch.ones(2, 16, WINDOW, *AREA),
        "latent_indices": torch.ones(2, WINDOW, dtype=torch.int64),
        "image_embeddings": torch.ones(2, 9, CONFIG.image_dim),
        "llama_vec": torch.ones(2, 512, CONFIG.text_dim),
        "llama_attention_mask": torch.ones(2, 512, dtype=torch.bool),
        "clip_l_pooler": torch.ones(2, CONFIG.pooled_dim),
    }
    for kind, count in (("", 2), ("_2x", 2), ("_4x", 16)):
        tensors[f"latents_clean{kind}"] = torch.ones(2, 16, count, *AREA)
        tensors[f"clean_latent{kind}_indices"] = torch.ones(2, count, dtype=torch.int64)
    kept = {name: tensor for name, tensor in (tensors | others).items() if name not in left_out}
    return Batch(kept, ("a cat", "a dog"), ("clip 0_00000-017-0001", "clip 1_00000-017-0000"))


def predicted(family: FramePack, one: Batch) -> Seen:
    dit, noisy = Seen(), torch.zeros(2, 16, WINDOW, *AREA)
    family.predict(
        dit, noisy, torch.tensor([965.5172, 3.0]), family.batch_conditions(one.tensor("latents"), one)
    )
    return dit


def test_a_kind_of_history_without_latents_is_black_and_one_without_places_is_not_there(
    family: FramePack,
) -> None:
    left_out = ("latents_clean_2x", "latents_clean_4x", "clean_latent_4x_indices")
    half = torch.ones(2, 16, 2, *AREA, dtype=torch.float16)

    seen = predicted(family, batch(*left_out, latents_clean=half))

    assert seen.history.keys() == {
        "clean_latents",
        "clean_latent_indices",
        "clean_latents_2x",
        "clean_latent_2x_indices",
    }
    assert seen.history["clean_latents_2x"].shape == (2, 16, 2, *AREA)
    assert not seen.history["clean_latents_2x"].any()
    # of the dtype of the noisy ones, whatever caches keep
    assert {seen.history[name].dtype for name in ("clean_latents", "clean_latents_2x")} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("llama_vec", "fpack_cache_text_encoder_outputs.py and the text encoders of HunyuanVideo"),
        ("clip_l_pooler", "fpack_cache_text_encoder_outputs.py and the text encoders of HunyuanVideo"),
        ("image_embeddings", "fpack_cache_latents.py and the SigLIP image encoder of FramePack"),
    ],
)
def test_caches_of_another_encoder_are_named(family: FramePack, name: str, command: str) -> None:
    shape = batch().tensor(name).shape
    with pytest.raises(
        CacheError,
        match=rf"{name} in its cache has width 96, .*framepack.safetensors requires .*{command}",
    ):
        predicted(family, batch(**{name: torch.zeros(*shape[:-1], 96)}))


@pytest.mark.parametrize(
    ("left_out", "others", "message"),
    [
        (
            ("clean_latent_2x_indices",),
            {},
            "the cache has latents_clean_2x without clean_latent_2x_indices. Cache again with fpack_cache",
        ),
        ((), {"latent_indices": torch.ones(2, WINDOW)}, r"latent_indices of shape 2 \(torch.float32\) and"),
        ((), {"clean_latent_4x_indices": torch.ones(2, 15, dtype=torch.int64)}, "of shape 15 .* do not fit"),
        ((), {"latents_clean": torch.ones(2, 16, 2, 4, 4)}, "latents_clean of 16x2x4x4 do not fit latents"),
    ],
)
def test_caches_whose_frames_and_places_differ_are_refused(
    family: FramePack, left_out: tuple[str, ...], others: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(CacheError, match=rf"clip 0_00000-017-0001: .*{message}"):
        predicted(family, batch(*left_out, **others))


@pytest.mark.parametrize(
    ("settings", "neighbor", "said"),
    [
        ({}, 3, ""),
        ({}, 0, "are for FramePack-F1 (fpack_cache_latents.py --f1), but --f1 is not given"),
        ({"is_f1": True}, 0, ""),
        ({"is_f1": True}, 3, "--f1 is given, but the sections in the caches are not for FramePack-F1"),
        ({"one_frame": OneFrame()}, 3, "--one_frame is given, but the caches hold sections of clips"),
    ],
)
def test_samples_of_another_kind_than_the_caches_are_warned_of(
    family: FramePack, settings: dict[str, Any], neighbor: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """neighbor: the place of the frame next in time; that of the target is 1."""
    batches._warn_of_caches_without_f1.cache_clear()
    batches._warn_of_caches_with_f1.cache_clear()
    batches._warn_of_cached_clips.cache_clear()

    predicted(replace(family, **settings), batch(clean_latent_indices=torch.full((2, 2), neighbor)))

    assert said in caplog.text
    assert bool(caplog.text) == bool(said)

"""What training gives the transformer of what the caches hold, and how it is told that caches do not go
together.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from frame_pack.batches import HISTORY
from frame_pack.family import FramePack
from frame_pack.files import FramePackFiles
from modules.contract.data import Batch
from modules.errors import CacheError
from tests.tiny.framepack_dit import CONFIG, tiny_state, write_dit

WINDOW, AREA = 2, (4, 6)
Change = Callable[[dict[str, Tensor]], object]


class Seen(nn.Module):
    """Keeps what it is called with."""

    def forward(
        self, noisy: Tensor, *others: object, position_scale: object, tweaks: object, **history: object
    ) -> Tensor:
        self.given = (noisy, *others)
        self.history = history
        return noisy


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> FramePack:
    return FramePack(
        FramePackFiles(write_dit(tmp_path_factory.mktemp("dit"), tiny_state())), trained_guidance=2.5
    )


def batch() -> Batch:
    """Two sections at different places, with all of their history: the first picture, and what comes behind
    the section.
    """
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    def places(start: int, count: int) -> Tensor:
        return torch.stack([torch.arange(start, start + count), torch.arange(start + 4, start + 4 + count)])

    tensors = {
        "latents": draw(16, WINDOW, *AREA),
        "latent_indices": places(1, WINDOW),
        "latents_clean": draw(16, 2, *AREA).half(),
        "clean_latent_indices": torch.tensor([[0, 3], [0, 7]]),
        "latents_clean_2x": draw(16, 2, *AREA),
        "clean_latent_2x_indices": places(5, 2),
        "latents_clean_4x": draw(16, 16, *AREA),
        "clean_latent_4x_indices": places(7, 16),
        "image_embeddings": draw(9, CONFIG.image_dim).half(),
        "llama_vec": draw(512, CONFIG.text_dim),
        "llama_attention_mask": torch.arange(512).expand(2, -1) < torch.tensor([[7], [500]]),
        "clip_l_pooler": draw(CONFIG.pooled_dim),
    }
    return Batch(tensors, ("a cat", "a dog"), ("clip 0_00000-017-0001", "clip 1_00000-017-0000"))


def changed(change: Change) -> Batch:
    tensors = {name: value for name, value in batch().tensors.items() if isinstance(value, Tensor)}
    change(tensors)
    return replace(batch(), tensors=tensors)


def predicted(family: FramePack, one: Batch) -> Seen:
    dit, noisy = Seen(), torch.zeros(2, 16, WINDOW, *AREA)
    family.predict(
        dit, noisy, torch.tensor([965.5172, 3.0]), family.batch_conditions(one.tensor("latents"), one)
    )
    return dit


def test_the_transformer_is_given_what_the_caches_hold(family: FramePack) -> None:
    one = batch()
    seen = predicted(family, one)
    names = ("llama_vec", "llama_attention_mask", "clip_l_pooler", "image_embeddings", "latent_indices")

    assert torch.equal(seen.given[1], torch.tensor([965.5172, 3.0]))  # not rounded
    assert torch.equal(seen.given[5], torch.tensor([2500.0, 2500.0]))
    for name, given in zip(names, (*seen.given[2:5], *seen.given[6:8]), strict=True):
        assert given is one.tensors[name]
    for latents, (argument, indices) in HISTORY.items():
        assert torch.equal(seen.history[argument], one.tensor(latents).float())
        assert seen.history[indices] is one.tensors[indices]
    assert seen.history["clean_latents"].dtype == torch.float32  # as the noisy ones, whatever the caches keep


def test_a_kind_of_history_without_latents_is_black_and_one_without_places_is_not_there(
    family: FramePack,
) -> None:
    def without(tensors: dict[str, Tensor]) -> None:
        del tensors["latents_clean_2x"], tensors["latents_clean_4x"], tensors["clean_latent_4x_indices"]

    seen = predicted(family, changed(without))

    assert seen.history.keys() == {
        "clean_latents",
        "clean_latent_indices",
        "clean_latents_2x",
        "clean_latent_2x_indices",
    }
    assert seen.history["clean_latents_2x"].shape == (2, 16, 2, *AREA)
    assert not seen.history["clean_latents_2x"].any()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("llama_vec", "fpack_cache_text_encoder_outputs.py and the text encoders of HunyuanVideo"),
        ("clip_l_pooler", "fpack_cache_text_encoder_outputs.py and the text encoders of HunyuanVideo"),
        ("image_embeddings", "fpack_cache_latents.py and the SigLIP image encoder of FramePack"),
    ],
)
def test_caches_of_another_encoder_are_named(family: FramePack, name: str, command: str) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(*tensors[name].shape[:-1], 96)

    with pytest.raises(
        CacheError,
        match=rf"{name} in its cache is 96 numbers wide, .*framepack.safetensors takes .*{command}",
    ):
        predicted(family, changed(widen))

"""What caches hold of clips, encoded one by one or together."""

from pathlib import Path

import pytest
import torch

from hunyuan_model.conditioning import encode_latents
from hunyuan_model.vae import HunyuanVae, load_vae
from modules.contract.data import MediaBatch
from tests.tiny.hunyuan_vae import write_vae

CPU = torch.device("cpu")
NEAR = 1e-5  # float32; convolutions of a batch may be summed in another order


@pytest.fixture(params=[None, 32], ids=["whole", "in tiles"])
def vae(request: pytest.FixtureRequest, tmp_path: Path) -> HunyuanVae:
    return load_vae(write_vae(tmp_path / "vae.safetensors"), CPU, torch.float32, tile=request.param)


def clips(*keys: str) -> MediaBatch:
    frames = torch.randint(
        0, 256, (len(keys), 5, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return MediaBatch(frames, keys, ((0, 5),) * len(keys))


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
                ours.tensors[name], tensor, rtol=0, atol=NEAR * float(tensor.abs().max()), msg=name
            )


def test_only_a_cpu_takes_clips_one_by_one() -> None:
    media = clips("one", "two")

    assert [part.keys for part in media.split_for(CPU)] == [("one",), ("two",)]
    assert [part.keys for part in media.split_for(torch.device("cuda"))] == [("one", "two")]

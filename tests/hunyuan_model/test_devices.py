"""Every tensor that the networks make lies on the device of their weights.

On a CPU nothing shows a tensor made in the wrong place. Here the weights lie on torch's meta device, which
refuses most computing with the CPU's tensors, and to give its own away, as a GPU does; what it computes has
shapes and no values.
"""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from encoders.clip_layers import ClipText
from hunyuan_model import model as transformer
from hunyuan_model.family import HunyuanVideo
from hunyuan_model.files import HunyuanFiles
from hunyuan_model.llama import Llama
from hunyuan_model.model import HunyuanVideoModel
from hunyuan_model.spec import DIT
from hunyuan_model.vae import HunyuanVae, Tiling
from modules.layers.convolution import lay_out
from tests.tiny.hunyuan_dit import CONFIGS
from tests.tiny.hunyuan_encoders import clip_text_config, llama_config
from tests.tiny.hunyuan_vae import vae_config

META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def elsewhere(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The network on the meta device, some of its layers in float32 as when it is loaded."""
    with META:
        network = make()
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.startswith(DIT.keep_float32) else dtype)
    return network.requires_grad_(False)


def test_the_device_tells_tensors_of_others_apart() -> None:
    # matrix products it lets pass
    for compute in (lambda a, b: a * b, lambda a, b: torch.cat([a, b]), lambda a, b: b.copy_(a)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            compute(torch.zeros(2, 2, device=META), torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("same_lengths", [True, False])
def test_the_transformer(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str, same_lengths: bool
) -> None:
    """Its conditions may come from the CPU, as caches do."""
    counts = None if same_lengths else [8, 1]
    monkeypatch.setattr(transformer, "real_tokens", lambda mask: (8, counts))  # it reads values
    config = CONFIGS[kind]
    dit = elsewhere(lambda: HunyuanVideoModel(config), dtype)
    conditions: dict[str, Tensor | list[Tensor]] = {
        "llm": torch.zeros(2, 12, config.text_dim, dtype=torch.float16),
        "llm_mask": torch.ones(2, 12, dtype=torch.int64),
        "clipL": torch.zeros(2, config.pooled_dim, dtype=torch.float16),
        "guidance": torch.ones(2, dtype=dtype),
    }
    if kind == "i2v":
        conditions["condition_latents"] = torch.zeros(2, 16, 3, 4, 6)

    noisy, timesteps = torch.zeros(2, 16, 3, 4, 6, device=META), torch.ones(2, device=META)
    velocity = HunyuanVideo(HunyuanFiles()).predict(dit, noisy, timesteps, conditions)

    assert (velocity.device, velocity.dtype, velocity.shape) == (META, torch.float32, noisy.shape)


@pytest.mark.parametrize("frames", [1, 17])  # longer than a tile by one
@pytest.mark.parametrize(
    ("tiling", "dtype"),
    [
        (None, torch.float16),
        (None, torch.float32),
        (Tiling(edge=512, frames=16), torch.float32),
        (Tiling(edge=32, frames=16), torch.float16),
    ],
)
def test_the_vae(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, frames: int, tiling: Tiling | None
) -> None:
    """Pixels and latents come from the CPU."""
    vae = elsewhere(lambda: HunyuanVae(vae_config(), tiling=tiling), dtype)
    assert isinstance(vae, HunyuanVae)
    lay_out(vae, torch.device("cuda"))

    mean, log_variance = vae.posterior(torch.zeros(1, 3, frames, 40, 32))
    assert (mean.device, log_variance.device) == (META, META)

    if tiling is not None and tiling.edge < 40:
        # tiles of pixels go to the host, the meta device gives none away
        monkeypatch.setattr(torch, "device", lambda name: META)
    pixels = list(vae.decode(torch.zeros(1, 16, (frames - 1) // 4 + 1, 5, 4)))
    assert sum(chunk.shape[2] for chunk in pixels) == frames
    assert {chunk.device for chunk in pixels} == {META}


def test_the_text_encoders() -> None:
    llama = elsewhere(lambda: Llama(llama_config()), torch.float16)
    clip = elsewhere(lambda: ClipText(clip_text_config()), torch.float16)
    ids, ends = (
        torch.zeros(2, 77, dtype=torch.int64, device=META),
        torch.ones(2, dtype=torch.int64, device=META),
    )

    assert llama(ids, torch.ones_like(ids)).device == META
    assert clip(ids, ends).device == META

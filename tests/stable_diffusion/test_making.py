"""Batches made by `Maker`: passes, guidance, starts, pixels."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from modules.errors import OptionError
from stable_diffusion.assembling import assemble
from stable_diffusion.contract import AskedPicture, Idea, PictureSettings, UnetCall
from stable_diffusion.making import Maker
from stable_diffusion.options import read_gen_img
from stable_diffusion.starting import encode_pixels, to_image, to_pixels
from stable_diffusion.text import Texts
from tests.parity.stable_diffusion import generators, their_scheduler, write_picture
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1

SIZE, STEPS = 32, 3
SETTINGS = PictureSettings(SIZE, SIZE, STEPS, 4.0)


def picture(seed: int = 1, settings: PictureSettings = SETTINGS, **others: Any) -> AskedPicture:
    return AskedPicture("line 1", "a red cat", "ugly", seed, settings, "", **others)


@dataclass
class Recorder:
    """Keeps the calls of the U-Net."""

    calls: list[UnetCall] = field(default_factory=list)

    @contextmanager
    def for_batch(self, pictures: Sequence[AskedPicture], width: int, height: int) -> Iterator[Idea | None]:
        yield self._record

    def _record(self, call: UnetCall) -> UnetCall:
        self.calls.append(call)
        return call


def load(folder: Path, write: Any = write_sd1, *words: str, **sizes: Any) -> Maker:
    checkpoint = write(folder, **sizes)
    tokenizers = tokenizer_folder(folder / "tokenizers")
    given = ["--ckpt", str(checkpoint), "--tokenizer_cache_dir", str(tokenizers), "--prompt", "x", *words]
    made = assemble(read_gen_img(None, given), torch.device("cpu")).maker
    assert isinstance(made, Maker)
    return made


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return load(tmp_path_factory.mktemp("sd1"))


def follow(maker: Maker, noise: Tensor, guide: Any) -> Tensor:
    """DDIM in plain code. guide(says): what is made of what the U-Net says of texts; says(text) calls it."""
    scheduler = their_scheduler("ddim")
    scheduler.set_timesteps(STEPS)
    latents = noise
    for timestep in scheduler.timesteps:

        def says(text: str, latents: Tensor = latents, timestep: Tensor = timestep) -> Tensor:
            context = maker.texts.encode(text).context[None]
            with torch.no_grad():
                said: Tensor = maker.model.unet(latents, timestep, context).sample
            return said

        latents = scheduler.step(guide(says), timestep, latents).prev_sample
    return latents


def start_noise(seed: int) -> Tensor:
    return torch.randn((1, 4, SIZE // 8, SIZE // 8), generator=generators(seed)[0])


def test_negative_scale_has_a_pass_of_its_own(maker: Maker) -> None:
    recorder = Recorder()
    settings = replace(SETTINGS, negative_scale=1.5)
    made = replace(maker, ideas=[recorder]).make([picture(5, settings)], wants_images=False)

    def guide(says: Any) -> Tensor:
        empty = says("")
        return empty + 4 * (says("a red cat") - empty) - 1.5 * (says("ugly") - empty)

    torch.testing.assert_close(made.latents, follow(maker, start_noise(5), guide), rtol=1e-4, atol=1e-4)
    assert made.images is None
    assert [(len(call.sample), call.negative_rows) for call in recorder.calls] == [(3, 2)] * STEPS


def test_texts_of_other_lengths_are_made_apart_in_the_order_they_came(maker: Maker) -> None:
    recorder = Recorder()
    pictures = [replace(picture(2), prompt="a cat BREAK a dog"), picture(1)]
    pictures.append(replace(pictures[0], seed=3))
    made = load_like(maker, recorder, "2").make(pictures, wants_images=False).latents
    for number, each in enumerate(pictures):
        alone = load_like(maker, Recorder(), "2").make([each], wants_images=False).latents
        torch.testing.assert_close(made[number : number + 1], alone, rtol=1e-4, atol=1e-4)
    assert {call.context.shape[1] for call in recorder.calls} == {77, 152}


def load_like(maker: Maker, recorder: Recorder, multiples: str) -> Maker:
    """The same model, which reads long texts."""
    words = ["--ckpt", "x", "--prompt", "x", "--max_embeddings_multiples", multiples]
    texts = Texts(maker.model.texts, maker.model.kind, read_gen_img(None, words).text)
    return replace(maker, texts=texts, ideas=[recorder])


# Starts


def test_no_strength_keeps_the_picture(maker: Maker, tmp_path: Path) -> None:
    source = write_picture(tmp_path / "source.png", (SIZE, SIZE))
    recorder = Recorder()
    made = replace(maker, ideas=[recorder]).make([picture(3, replace(SETTINGS, strength=0.0), image=source)])

    pixels = to_pixels(Image.open(source), SIZE, SIZE)
    torch.testing.assert_close(made.latents, encode_pixels(maker.model, pixels, generators(3)))
    assert recorder.calls == []


def test_what_cannot_start_is_refused(maker: Maker, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="line 1: the mask .* needs --image_path"):
        maker.make([picture(mask=tmp_path / "mask.png")])
    with pytest.raises(OptionError, match="is an inpainting checkpoint, which needs --image_path"):
        load(tmp_path, channels=9)


# Sizes and pixels


def test_pixels_are_rounded_and_nan_is_black(caplog: pytest.LogCaptureFixture) -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.4999, 1.0, 3.0]).expand(3, 1, 6).clone()
    assert np.asarray(to_image(pixels, "line 7"))[0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]
    assert not caplog.records
    pixels[0, 0, 5] = torch.nan
    with caplog.at_level(logging.WARNING):
        assert np.asarray(to_image(pixels, "line 7"))[0, 5].tolist() == [0, 255, 255]
    assert "line 7" in caplog.text
    assert "--no_half_vae" in caplog.text

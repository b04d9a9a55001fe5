"""Batches made by Maker: passes, guidance, starts, pixels; names of pictures, and the texts in them."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blissful_tuner.metaview import as_lines, read_file_info
from modules.atomic_write import claim_name
from modules.errors import OptionError
from modules.media.reading import read_tags
from stable_diffusion.assembling import assemble
from stable_diffusion.contract import SD1, SDXL, ImageSettings, ModelKind, RequestedImage, UnetCall, UnetHook
from stable_diffusion.lines import LONGEST_NAME, read_line
from stable_diffusion.making import ImageGenerator
from stable_diffusion.options import ImageOutputOptions, read_gen_img
from stable_diffusion.run import ImageFiles
from stable_diffusion.sampling_options import SizeOptions
from stable_diffusion.starting import encode_pixels, to_image, to_pixels
from stable_diffusion.text import PromptEncoder
from tests.parity.stable_diffusion import generators, their_scheduler, write_image
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1

SIZE, STEPS = 32, 3
SETTINGS = ImageSettings(SIZE, SIZE, STEPS, 4.0)


def picture(seed: int = 1, settings: ImageSettings = SETTINGS, **others: Any) -> RequestedImage:
    return RequestedImage("line 1", "a red cat", "ugly", seed, settings, "", **others)


@dataclass
class Recorder:
    """Keeps the calls of the U-Net."""

    calls: list[UnetCall] = field(default_factory=list)

    @contextmanager
    def apply_to_batch(
        self, pictures: Sequence[RequestedImage], width: int, height: int
    ) -> Iterator[UnetHook | None]:
        yield self._record

    def _record(self, call: UnetCall) -> UnetCall:
        self.calls.append(call)
        return call


def load(folder: Path, write: Any = write_sd1, *words: str, **sizes: Any) -> ImageGenerator:
    checkpoint = write(folder, **sizes)
    tokenizers = tokenizer_folder(folder / "tokenizers")
    given = ["--ckpt", str(checkpoint), "--tokenizer_cache_dir", str(tokenizers), "--prompt", "x", *words]
    made = assemble(read_gen_img(None, given), torch.device("cpu"))
    assert isinstance(made, ImageGenerator)
    return made


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> ImageGenerator:
    return load(tmp_path_factory.mktemp("sd1"))


def follow(maker: ImageGenerator, noise: Tensor, guide: Any) -> Tensor:
    """DDIM in plain code. guide(says): what is made of what the U-Net says of texts; says(text) calls it."""
    scheduler = their_scheduler("ddim")
    scheduler.set_timesteps(STEPS)
    latents = noise
    for timestep in scheduler.timesteps:

        def says(text: str, latents: Tensor = latents, timestep: Tensor = timestep) -> Tensor:
            context = maker.prompt_encoder.encode(text).context[None]
            with torch.no_grad():
                said: Tensor = maker.model.unet(latents, timestep, context).sample
            return said

        latents = scheduler.step(guide(says), timestep, latents).prev_sample
    return latents


def start_noise(seed: int) -> Tensor:
    return torch.randn((1, 4, SIZE // 8, SIZE // 8), generator=generators(seed)[0])


def test_negative_scale_has_a_pass_of_its_own(maker: ImageGenerator) -> None:
    recorder = Recorder()
    settings = replace(SETTINGS, negative_scale=1.5)
    made = replace(maker, batch_hooks=[recorder]).make([picture(5, settings)], wants_images=False)

    def guide(says: Any) -> Tensor:
        empty = says("")
        return empty + 4 * (says("a red cat") - empty) - 1.5 * (says("ugly") - empty)

    torch.testing.assert_close(made.latents, follow(maker, start_noise(5), guide), rtol=1e-4, atol=1e-4)
    assert made.images is None
    assert [(len(call.sample), call.negative_rows) for call in recorder.calls] == [(3, 2)] * STEPS


def test_texts_of_other_lengths_are_made_apart_in_the_order_they_came(maker: ImageGenerator) -> None:
    recorder = Recorder()
    images = [replace(picture(2), prompt="a cat BREAK a dog"), picture(1)]
    images.append(replace(images[0], seed=3))
    made = load_like(maker, recorder, "2").make(images, wants_images=False).latents
    for number, each in enumerate(images):
        alone = load_like(maker, Recorder(), "2").make([each], wants_images=False).latents
        torch.testing.assert_close(made[number : number + 1], alone, rtol=1e-4, atol=1e-4)
    assert {call.context.shape[1] for call in recorder.calls} == {77, 152}


def load_like(maker: ImageGenerator, recorder: Recorder, multiples: str) -> ImageGenerator:
    """The same model, which reads long texts."""
    words = ["--ckpt", "x", "--prompt", "x", "--max_embeddings_multiples", multiples]
    texts = PromptEncoder(maker.model.text_encoders, maker.model.kind, read_gen_img(None, words).text)
    return replace(maker, prompt_encoder=texts, batch_hooks=[recorder])


# Starts


def test_no_strength_keeps_the_picture(maker: ImageGenerator, tmp_path: Path) -> None:
    source = write_image(tmp_path / "source.png", (SIZE, SIZE))
    recorder = Recorder()
    made = replace(maker, batch_hooks=[recorder]).make(
        [picture(3, replace(SETTINGS, strength=0.0), image=source)]
    )

    pixels = to_pixels(Image.open(source), SIZE, SIZE)
    torch.testing.assert_close(made.latents, encode_pixels(maker.model, pixels, generators(3)))
    assert recorder.calls == []


def test_what_cannot_start_is_refused(maker: ImageGenerator, tmp_path: Path) -> None:
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


NOW = datetime(2024, 3, 5, 16, 7, 8)
PLAIN = RequestedImage("the prompt", "a cat", "", 7, ImageSettings(16, 8, 20, 7.5), "a {cat|dog}")
IMAGE = Image.new("RGB", (16, 8), (9, 8, 7))


def files(
    folder: Path, sequential: bool = False, original: bool = False, kind: ModelKind = SD1
) -> ImageFiles:
    return ImageFiles(
        ImageOutputOptions(outdir=folder, sequential_file_name=sequential, use_original_file_name=original),
        kind,
        "k_euler",
        lambda: NOW,
    )


def changed(**changes: object) -> RequestedImage:
    return RequestedImage(**{**PLAIN.__dict__, **changes})


def test_names_hold_time_number_and_seed(tmp_path: Path) -> None:
    out = files(tmp_path)
    assert out.save(PLAIN, IMAGE, "", 0).name == "im_20240305160708_000_7.png"
    assert out.save(changed(seed=8), IMAGE, "", 1).name == "im_20240305160708_001_8.png"
    assert out.save(PLAIN, IMAGE, "0", 0).name == "im_20240305160708_0000_7.png"
    assert out.save(PLAIN, IMAGE, "1", 0).name == "im_20240305160708_1000_7.png"


def test_no_file_is_replaced(tmp_path: Path) -> None:
    first = files(tmp_path).save(PLAIN, IMAGE, "", 0)
    before = first.read_bytes()
    assert files(tmp_path).save(PLAIN, IMAGE, "", 0).name == "im_20240305160708_001_7.png"
    assert first.read_bytes() == before
    with claim_name(tmp_path / "im_20240305160708_002_7.png"):  # another run is writing it
        assert files(tmp_path).save(PLAIN, IMAGE, "", 0).name == "im_20240305160708_003_7.png"
    assert len(list(tmp_path.iterdir())) == 3


def test_numbers_go_on_after_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "im_000041.png").touch()
    (tmp_path / "im_abcdef.png").touch()
    out = files(tmp_path, sequential=True)
    assert [out.save(PLAIN, IMAGE, "", 0).name for _ in range(2)] == ["im_000042.png", "im_000043.png"]
    assert files(tmp_path, sequential=True).save(PLAIN, IMAGE, "", 3).name == "im_000044.png"
    assert out.save(PLAIN, IMAGE, "", 0).name == "im_000045.png"
    assert out.save(PLAIN, IMAGE, "1", 0).name == "im_1000001.png"


def test_names_of_lines_and_of_input_pictures_are_kept(tmp_path: Path) -> None:
    named = changed(file_name="my cat.png", image=Path("in/photo.jpg"))
    out = files(tmp_path, original=True)
    assert out.save(named, IMAGE, "0", 0).name == "my cat_0.png"
    assert [out.save(named, IMAGE, "1", 0).name for _ in range(2)] == ["my cat.png", "my cat_1.png"]
    photo = changed(image=Path("in/photo.jpg"))
    assert [out.save(photo, IMAGE, "", n).name for n in range(2)] == ["photo.png", "photo_1.png"]


@pytest.mark.parametrize("letter", ["n", "é", "字"])
def test_the_longest_names_can_be_written(tmp_path: Path, letter: str) -> None:
    """With the digit of a stage, a number, and the mark of a file that is being written."""
    longest = letter * (LONGEST_NAME // len(letter.encode()))
    assert read_line(f"a --f {longest}")["file_name"] == longest
    named, found = changed(file_name=longest), changed(image=Path(letter * 80 + "\x1b[31m\n.jpg"))
    for name in (f"{longest}_0", *(f"{longest}_0_{number}" for number in range(1, 4))):
        assert files(tmp_path).save(named, IMAGE, "0", 0).name == f"{name}.png"
    saved = files(tmp_path, original=True).save(found, IMAGE, "", 0)
    assert saved.stem == (letter * 80 + "_[31m_").encode()[:LONGEST_NAME].decode("utf-8", "ignore")


def test_the_texts_say_how_a_picture_was_made(tmp_path: Path) -> None:
    path = files(tmp_path).save(PLAIN, IMAGE, "", 0)
    said = {"prompt": "a cat", "seed": "7", "sampler": "k_euler", "steps": "20", "scale": "7.5"}
    assert read_tags(path) == {**said, "raw-prompt": "a {cat|dog}"}
    with Image.open(path) as image:
        assert (image.size, image.getpixel((0, 0))) == ((16, 8), (9, 8, 7))


def test_they_say_all_of_a_picture_of_xl(tmp_path: Path) -> None:
    sizes = SizeOptions(original_width=99, original_height_negative=33, crop_left=4)
    settings = ImageSettings(16, 8, 20, 7.5, negative_scale=2.0, sizes=sizes)
    full = changed(settings=settings, negative_prompt="schlecht, ü 字", clip_prompt="c")
    path = files(tmp_path, kind=SDXL).save(full, IMAGE, "", 0)

    texts = read_tags(path)
    assert texts["negative-prompt"] == "schlecht, ü 字"
    assert (texts["negative-scale"], texts["clip-prompt"]) == ("2.0", "c")
    assert (texts["original-width"], texts["original-height"]) == ("99", "8")
    assert (texts["original-width-negative"], texts["original-height-negative"]) == ("99", "33")
    assert (texts["crop-top"], texts["crop-left"]) == ("0", "4")
    shown = list(as_lines([read_file_info(path)], is_one=True))
    assert {"prompt: a cat", "negative-prompt: schlecht, ü 字", "seed: 7", "scale: 7.5"} <= set(shown)

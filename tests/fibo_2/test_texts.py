"""States of texts, and pictures to edit, are those of diffusers' pipeline with transformers' Qwen3-VL."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import BriaFibo2Pipeline
from diffusers.pipelines.bria_fibo2.image_processor import BriaFibo2ImageProcessor
from PIL import Image
from torch import Tensor

from encoders.language_encoder import LanguageModelEncoder
from fibo_2.captions import NULL, list_drawn_texts
from fibo_2.configs import PLACES
from fibo_2.references import crop_cover, nearest_trained_size, read_edited, read_encoder_image, read_masked
from fibo_2.texts import ENCODER_SETTINGS, KEY, Fibo2TextEncoder
from modules.errors import MediaError, OptionError
from protocols.requests import Prompt
from tests.fibo_2.making import bundles_there
from tests.tiny.fibo_2 import write_text_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> LanguageModelEncoder:
    folder = write_text_encoder(tmp_path_factory.mktemp("texts") / "text_encoder")
    loaded = Fibo2TextEncoder(ENCODER_SETTINGS, folder, torch.float32)
    loaded.load(CPU)
    return loaded


def bundles_here(encoder: LanguageModelEncoder, prompt: Prompt) -> Tensor:
    states = encoder.encode([prompt])[0][KEY][0]
    return torch.stack([torch.cat([states[:, place] for place in places], dim=-1) for places in PLACES])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (Prompt('{"short_description": "a cat", "context": ""}'), '{"short_description":"a cat"}'),
        (Prompt("a cat"), '{"short_description":"a cat"}'),
        (Prompt(""), NULL),
        (Prompt("a cat", is_negative=True), "a cat"),
        (Prompt('{"context": ""}', is_negative=True), '{"context": ""}'),
    ],
    ids=["JSON", "plain", "empty", "negative", "negative JSON"],
)
def test_the_states_are_those_of_the_pipeline(
    encoder: LanguageModelEncoder, prompt: Prompt, text: str
) -> None:
    torch.testing.assert_close(bundles_here(encoder, prompt), bundles_there(text), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (
            '{"short_descripton": "a"}',
            "short_descripton is not a key of a caption: short_description is meant",
        ),
        ('{"short_description": 3}', "short_description is a number, not a text"),
        ("{}", "short_description is missing"),
        (
            '{"short_description": "a", "edit_instruction": "make it red"}',
            "edit_instruction is left out, as there is no image to edit",
        ),
    ],
)
def test_a_prompt_with_keys_that_the_model_does_not_know_is_told_once(
    prompt: str, told: str, encoder: LanguageModelEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    good = '{"short_description": "a cat", "lighting": {"conditions": "sun"}}'
    own = Fibo2TextEncoder(ENCODER_SETTINGS, encoder.path, torch.float32)
    own.load(CPU)
    own.encode([Prompt(good), Prompt("a cat"), Prompt(""), Prompt(prompt, is_negative=True)])
    own.token_counter()(prompt)  # may be that of an edit
    assert not [record for record in caplog.records if record.levelname == "WARNING"]

    own.encode([Prompt(prompt)])
    own.encode([Prompt(prompt)])

    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told in warning


def test_a_plain_edit_is_told_as_it_is_read(
    tmp_path: Path, encoder: LanguageModelEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    own = Fibo2TextEncoder(ENCODER_SETTINGS, encoder.path, torch.float32)
    own.load(CPU)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    caplog.set_level("INFO")

    own.token_counter()("add a hat")
    own.encode([Prompt("add a hat", images=(tmp_path / "a.png",), image_size=(64, 64))])

    (told,) = [message for message in caplog.messages if message.startswith("plain texts")]
    assert told.endswith('such as {"edit_instruction":"add a hat"}')


@pytest.mark.parametrize(
    "size", [(640, 480), (300, 200), (1920, 1080), (2560, 1080), (400, 200), (77, 500), (64, 64)]
)
def test_the_size_of_training_is_the_released_one(size: tuple[int, int]) -> None:
    assert nearest_trained_size(size) == BriaFibo2ImageProcessor().get_image_size(size[0] / size[1])


def test_pictures_are_cropped_and_shown_as_there(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    image = Image.fromarray(generator.integers(0, 255, (90, 130, 3), dtype=np.uint8)).resize((1301, 902))
    mask = Image.fromarray(generator.integers(0, 255, (902, 1301), dtype=np.uint8), "L")
    image.save(tmp_path / "a.png")
    mask.save(tmp_path / "mask.png")
    path, size = tmp_path / "a.png", (1040, 960)

    for masked in (None, mask):
        crops, shown = BriaFibo2ImageProcessor().preprocess(image, height=960, width=1040, mask=masked)
        expected = ((crops[0][0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
        read = read_edited(path, size) if masked is None else read_masked(path, tmp_path / "mask.png", size)
        assert torch.equal(read, expected)
        if masked is None:
            assert torch.equal(read_encoder_image(path, size), torch.from_numpy(np.array(shown[0])))

    (crop, _), _ = BriaFibo2ImageProcessor().preprocess([image, image])
    assert read_edited(path, None).shape[:2] == crop.shape[2:]
    mask.resize((5, 6)).save(tmp_path / "small.png")
    with pytest.raises(OptionError, match="Pass a mask of the image's size"):
        read_masked(path, tmp_path / "small.png", size)


def test_an_edit_has_its_pictures_inside_its_object(encoder: LanguageModelEncoder, tmp_path: Path) -> None:
    """The tokens of pictures take the place of their mark, in the order of the release."""
    Image.new("RGB", (64, 96), "red").save(tmp_path / "a.png")
    written: list[str] = []
    original = encoder.encode_templated

    def remember(texts: Any, compute: Any) -> Any:
        written.extend(text.text for text in texts)
        return original(texts, compute)

    encoder.encode_templated = remember  # type: ignore[method-assign]
    for count in (1, 2):
        images = (tmp_path / "a.png",) * count
        encoder.encode([Prompt("add a hat", images=images, image_size=(64, 96))])
    del encoder.encode_templated
    pad = "<|image_pad|>"
    for text, count in zip(written, (1, 2), strict=True):
        expected = BriaFibo2Pipeline._get_edit_prompt("add a hat", count)
        shown = text.removeprefix(ENCODER_SETTINGS.template_prefix).removesuffix(
            ENCODER_SETTINGS.template_suffix
        )
        assert shown.replace(pad * 6, pad) == expected
    with pytest.raises(MediaError, match="stands for an image"):
        encoder.encode([Prompt(f"a {pad}", images=(tmp_path / "a.png",), image_size=(64, 96))])


def test_crops_cover(tmp_path: Path) -> None:
    frame = np.zeros((50, 70, 3), np.uint8)
    assert crop_cover(frame, (32, 48)).shape == (48, 32, 3)


def test_texts_that_are_not_drawn_are_told_once(
    encoder: LanguageModelEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    own = Fibo2TextEncoder(ENCODER_SETTINGS, encoder.path, torch.float32, draws_texts=False)
    own.load(CPU)
    silent = (
        '{"short_description":"a sign","text_render":[]}',
        "text_render",
        '{"text_render":[{"text":""}]}',
    )
    own.encode([Prompt(text) for text in silent])
    assert not [record for record in caplog.records if "drawings" in record.getMessage()]

    drawn = '{"short_description":"a sign","text_render":[{"text":"SALE"}]}'
    for _ in range(2):
        (conditions,) = own.encode([Prompt(drawn)])
        assert conditions.keys() == own.keys == {KEY}
        expected = bundles_there('{"short_description":"a sign","text_render":[{"text":"SALE"}]}')
        torch.testing.assert_close(bundles_here(own, Prompt(drawn)), expected, rtol=1e-4, atol=1e-4)

    (warned,) = [record.getMessage() for record in caplog.records if "drawings" in record.getMessage()]
    assert warned.startswith("text_render of {")
    assert "reads only the words" in warned


def test_texts_of_an_edit_are_told_too(encoder: LanguageModelEncoder) -> None:
    text = '{"structured_caption":{"text_render":[{"text":"SALE"}]},"edit_instruction":"add a sign"}'
    assert list_drawn_texts(text) == ["SALE"]
    assert list_drawn_texts('{"text_render":[{"text":"A"},{"size":"big"},3,{"text":""},{"text":4}]}') == ["A"]
    assert list_drawn_texts('{"edit_instruction":"add a sign"}') == []

"""Drawings of texts, and where they stand in a prompt, are those of diffusers' pipeline."""

import json
import re
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from diffusers import BriaFibo2Pipeline
from diffusers.pipelines.bria_fibo2.pipeline_bria_fibo2 import VISION_MARKER
from diffusers.pipelines.bria_fibo2.text_images import draw_text_image, load_font
from PIL import Image
from torch import Tensor, nn

from fibo_2.drawn_texts import draw_text, find_undrawable, read_fonts
from fibo_2.family import DRAWN_TIMES, Fibo2
from fibo_2.files import Fibo2Files
from fibo_2.options import Fibo2TextOptions
from fibo_2.texts import DRAWN_KEY, ENCODER_SETTINGS, KEY, Fibo2TextEncoder
from modules.errors import MediaError, OptionError
from protocols.requests import Prompt
from tests.fibo_2.making import bundles_there
from tests.fibo_2.test_texts import bundles_here
from tests.tiny.fibo_2 import write_text_encoder

CPU = torch.device("cpu")
PAD = "<|image_pad|>"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SALE = '{"short_description":"a sign","text_render":[{"text":"SALE","location":"top"},{"text":""}]}'


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Fibo2TextEncoder:
    folder = write_text_encoder(tmp_path_factory.mktemp("texts") / "text_encoder")
    encoder = Fibo2TextEncoder(ENCODER_SETTINGS, folder, torch.float32)
    encoder.load(CPU)
    return encoder


@pytest.fixture
def encoder(loaded: Fibo2TextEncoder) -> Fibo2TextEncoder:
    """The encoder, which has told nothing yet."""
    fresh = copy(loaded)
    fresh._long_prompts, fresh._logged_errors = set(), set()
    return fresh


@pytest.fixture
def written(encoder: Fibo2TextEncoder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the encoder tokenizes."""
    texts: list[str] = []
    original = encoder.encode_templated

    def remember(templated: Any, compute: Any) -> Any:
        texts.extend(
            text.text.removeprefix(ENCODER_SETTINGS.template_prefix).removesuffix(
                ENCODER_SETTINGS.template_suffix
            )
            for text in templated
        )
        return original(templated, compute)

    monkeypatch.setattr(encoder, "encode_templated", remember)
    return texts


@pytest.mark.parametrize(
    "text",
    ["SALE", "gjpqy", " a\t b\n", "x", "", "word " * 120, "Café – 20 €", "日本 SALE 語", "a\u4e00" * 200],
)
@pytest.mark.parametrize("names", [(), ("DejaVuSans.ttf",), ("DejaVuSerif.ttf", "DejaVuSans.ttf")])
def test_drawings_are_those_of_diffusers(text: str, names: tuple[str, ...]) -> None:
    paths = [FONTS / name for name in names]
    expected = draw_text_image(text, [load_font(str(path)) for path in paths])
    assert torch.equal(draw_text(text, read_fonts(paths)), torch.from_numpy(np.array(expected)))


def test_fonts_are_files_or_a_folder_of_them(tmp_path: Path) -> None:
    for name in ("b ü.TTF", "a.ttf"):
        (tmp_path / name).write_bytes((FONTS / "DejaVuSans.ttf").read_bytes())
    (tmp_path / "readme.txt").write_text("x", encoding="utf-8")
    assert [Path(font.path).name for font in read_fonts([tmp_path])] == ["a.ttf", "b ü.TTF"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    for name, words in (("empty", "no font lies there"), ("broken.ttf", "no font that can be read")):
        with pytest.raises(OptionError, match=words):
            read_fonts([tmp_path / name])
    assert find_undrawable("A 語 é語\u3000") == "é語"


def test_a_generation_has_states_without_and_with_its_drawings(
    encoder: Fibo2TextEncoder, written: list[str]
) -> None:
    (conditions,) = encoder.encode([Prompt(SALE)])

    caption = {"short_description": "a sign", "text_render": [{"text": "SALE", "location": "top"}]}
    without, shown = written
    for text, mark in ((without, ""), (shown, VISION_MARKER)):
        marked = BriaFibo2Pipeline._mark_text_images(json.loads(json.dumps(caption)), mark)
        assert re.sub(f"({re.escape(PAD)})+", PAD, text) == json.dumps(marked, separators=(",", ":"))
    assert without.count(PAD) == 0
    assert shown.count(PAD) > 1
    torch.testing.assert_close(
        bundles_here(encoder, Prompt(SALE)), bundles_there(without), rtol=1e-4, atol=1e-4
    )
    # 2: the marks around the drawing
    assert len(conditions[DRAWN_KEY][0]) >= len(conditions[KEY][0]) + shown.count(PAD)


@pytest.mark.parametrize(
    "prompt",
    [Prompt("a cat"), Prompt(""), Prompt(SALE, is_negative=True), Prompt('{"text_render":[]}')],
    ids=["plain", "empty", "negative", "no text"],
)
def test_prompts_without_texts_have_no_drawn_states(encoder: Fibo2TextEncoder, prompt: Prompt) -> None:
    (conditions,) = encoder.encode([prompt])
    assert conditions[DRAWN_KEY][0].shape == (0, *conditions[KEY][0].shape[1:])


def test_an_edit_sees_drawings_behind_its_images_at_all_noise_levels(
    encoder: Fibo2TextEncoder, written: list[str], tmp_path: Path
) -> None:
    Image.new("RGB", (64, 96), "red").save(tmp_path / "a.png")
    text = f'{{"structured_caption":{SALE},"edit_instruction":"add a sign"}}'
    prompt = Prompt(text, images=(tmp_path / "a.png",), image_size=(64, 96))
    assert [frame.shape[:2] for frame in encoder.read_frames(prompt)] == [
        (96, 64),
        draw_text("SALE").shape[:2],
    ]

    (conditions,) = encoder.encode([prompt])

    (shown,) = written
    expected = BriaFibo2Pipeline._get_edit_prompt(text, 1, text_images=True)
    pads = [len(run) // len(PAD) for run in shown.split('"') if run.startswith("<|vision_start|>")]
    assert len(pads) == expected.count(VISION_MARKER) == 2
    assert re.sub(f"({re.escape(PAD)})+", PAD, shown) == expected
    assert len(conditions[DRAWN_KEY][0]) == 0


def test_a_typed_placeholder_is_no_drawing(encoder: Fibo2TextEncoder) -> None:
    with pytest.raises(MediaError, match="stands for an image"):
        encoder.encode([Prompt(SALE.replace("a sign", f"a {VISION_MARKER}"))])


def test_a_caption_that_is_cut_off_has_no_drawings(
    encoder: Fibo2TextEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fibo_2.texts.MAX_TOKENS", 10)
    (conditions,) = encoder.encode([Prompt(SALE)])
    assert len(conditions[DRAWN_KEY][0]) == 0
    assert "none of its texts is drawn" in caplog.text


def test_characters_that_no_font_has_are_told(
    encoder: Fibo2TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        encoder.encode([Prompt(SALE.replace("SALE", "\u30bb\u30fc\u30eb"))])
    (told,) = [record.getMessage() for record in caplog.records if "no font" in record.getMessage()]
    assert "no font here has \u30bb\u30eb\u30fc" in told
    assert "--fonts" in told


class Recorder(nn.Module):
    """A network that keeps the texts that it gets."""

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, **_: Any) -> Tensor:
        self.text = text
        return noisy


def test_the_network_reads_drawings_up_to_a_noise_level() -> None:
    family = Fibo2(Fibo2Files())
    plain, drawn, none = torch.zeros(4, 15, 8), torch.ones(6, 15, 8), torch.zeros(0, 15, 8)
    conditions = {KEY: [plain, plain, plain], DRAWN_KEY: [drawn, drawn, none]}
    network = Recorder()
    # the first sample is at the level, the second above it, the third has no texts
    times = torch.tensor([DRAWN_TIMES, DRAWN_TIMES + 1, 100.0])
    family.predict(network, torch.zeros(3, 128, 1, 2, 2), times, conditions)
    assert [float(text.max()) for text in network.text] == [1, 0, 0]
    family.predict(network, torch.zeros(3, 128, 1, 2, 2), times, {KEY: [plain] * 3})
    assert network.text.shape[1] == len(plain)


def test_caches_record_whether_and_how_texts_are_drawn(tmp_path: Path) -> None:
    folder = write_text_encoder(tmp_path / "text_encoder")
    files = Fibo2Files()
    options = Fibo2TextOptions(text_encoder=folder)
    drawn = files.add_text(options).language_model()
    fonts = files.add_text(replace(options, fonts=(FONTS / "DejaVuSans.ttf",))).language_model()
    words = files.add_text(replace(options, no_text_images=True)).language_model()
    assert drawn.keys == {KEY, DRAWN_KEY}
    assert words.keys == {KEY}
    assert len({json.dumps(dict(encoder.identity)) for encoder in (drawn, fonts, words)}) == 3

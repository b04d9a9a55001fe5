"""FramePack's text encoders against transformers, in every layout of their files."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from checkpoints.model_files import read_once
from encoders.siglip import SiglipConfig, SiglipVision, load_siglip, read_siglip
from encoders.text_encoder import FileTextEncoder
from frame_pack.files import FramePackClip, FramePackLlama
from hunyuan_model.text_encoders import VIDEO_TEMPLATE, select_template
from modules.media.pixels import to_pixels
from protocols.requests import Prompt
from tests.golden_cases import read_case
from tests.manifests import fit, tensor_list, write_hollow
from tests.parity.framepack import load_siglip as their_siglip
from tests.parity.framepack_generation import Given, Theirs
from tests.tiny.framepack import SIGLIP_DIM, siglip_layouts, siglip_tensors, write_siglip
from tests.tiny.hunyuan_encoders import save, write_text_encoders

CPU = torch.device("cpu")
LONG = "the rabbit runs through tall grass " * 60
PROMPTS = (
    "a rabbit in the grass, 1024 x 576",
    "",
    "\n  The SUN rises — über den Hügeln {}; don't   blink\t",
    "日本 🐇",
    LONG,
)
SYSTEMS = (
    "Describe the image in one word.",
    "",
    "Name {} and {0} first;\n\nthen <|eot_id|> 日本",
    "Describe the grass. " * 90,  # longer than what is kept of a prompt
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEPT_TOKENS = 256


def template_there(system: str | None = None) -> tuple[str, str]:
    """What stands before a prompt and behind it. system: in place of the recorded system text."""
    text = read_case("text_constants")[0]["hunyuanvideo_llm_templates"]["dit-llm-encode-video"]["template"]
    before, behind = text.split("{}")
    if system is not None:
        start, end = before.index("\n\n") + 2, before.index("<|eot_id|>")
        before = before[:start] + system + before[end:]
    return before, behind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    write_text_encoders(folder)
    return folder


@pytest.fixture(scope="module")
def there(folder: Path) -> Theirs:
    return Theirs(folder)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def rounded(request: pytest.FixtureRequest, folder: Path) -> Theirs:
    """In each dtype that one can choose."""
    return Theirs(folder, text_dtype=request.param)


def encoded(encoder: FileTextEncoder, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    encoder.load(CPU)
    return [dict(found) for found in encoder.encode([Prompt(text) for text in prompts])]  # type: ignore[arg-type]


def assert_text(found: dict[str, Tensor], expected: Given) -> None:
    """Equal to the last bit: these are the same operations in the same order, over as many tokens."""
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name][0], rtol=0, atol=0)


@pytest.mark.slow_cases("torch.bfloat16", "torch.float16")
def test_texts_are_those_of_transformers_without_the_template(folder: Path, rounded: Theirs) -> None:
    """The states of the prompt's own tokens, zeros behind them; CLIP's pooled state."""
    prompts, counts = [*PROMPTS, "a rabbit <|endoftext|> and a dog"], set()
    encoders = FramePackLlama(folder, rounded.text_dtype), FramePackClip(folder, rounded.text_dtype)

    llama, clip = (encoded(encoder, prompts) for encoder in encoders)

    for prompt, states, pooled in zip(prompts, llama, clip, strict=True):
        assert_text(states | pooled, rounded.text(prompt))
        counts.add(int(states["llama_attention_mask"].sum()))
    assert min(counts) == 1  # the end of the empty prompt
    assert max(counts) == KEPT_TOKENS  # of the one that is too long


@pytest.mark.parametrize("system", SYSTEMS, ids=range(len(SYSTEMS)))
def test_a_system_prompt_of_ones_own_is_told_and_cut_off(
    folder: Path, there: Theirs, system: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    default = encoded(FramePackLlama(folder, torch.float32), PROMPTS)
    own = encoded(FramePackLlama(folder, torch.float32, template=select_template(system)), PROMPTS)
    before, behind = template_there(system)
    counted = len(there.pipe.tokenizer(before).input_ids)
    escaped = before.replace("{", "{{").replace("}", "}}")
    template = {"template": f"{escaped}{{}}{behind}", "crop_start": counted}
    for prompt, found, plain in zip(PROMPTS, own, default, strict=True):
        assert_text(found, there.text(prompt, template))
        # the prompt's tokens are the same
        assert torch.equal(found["llama_attention_mask"], plain["llama_attention_mask"])
        # but they come after other words
        assert not torch.allclose(found["llama_vec"], plain["llama_vec"], rtol=0.1)
    assert f"system prompt: {system} ({counted} tokens before the prompt" in caplog.text
    assert "cut in the wrong place" not in caplog.text


def test_the_usual_system_prompt_given_as_ones_own_changes_nothing(folder: Path) -> None:
    default = FramePackLlama(folder)
    own = FramePackLlama(folder, template=select_template(VIDEO_TEMPLATE.system))
    assert own.identity == default.identity
    for found, expected in zip(encoded(own, PROMPTS), encoded(default, PROMPTS), strict=True):
        assert torch.equal(found["llama_vec"], expected["llama_vec"])


def frames(height: int = 37, width: int = 51, batch: int = 1) -> Tensor:
    """Noise as B H W 3 uint8."""
    return torch.randint(
        0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def pixels_of(images: Tensor) -> Tensor:
    """B H W 3 uint8 -> B 3 H W in -1..1."""
    return to_pixels(images[:, None]).squeeze(2)


def tower(path: Path, dtype: torch.dtype = torch.float32) -> SiglipVision:
    return load_siglip(
        save(path / "model.safetensors", siglip_layouts(siglip_tensors())["vision"]), CPU, dtype
    )


# Numbers


@pytest.mark.parametrize(("height", "width"), [(37, 51), (384, 384), (480, 832), (700, 130)])
def test_images_are_prepared_as_by_the_released_processor(tmp_path: Path, height: int, width: int) -> None:
    images = frames(height, width, batch=2)
    processor = SiglipImageProcessorPil(
        size={"height": 384, "width": 384},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    expected = processor.preprocess(list(images.numpy()), return_tensors="pt")["pixel_values"]

    prepared = tower(tmp_path).prepare(pixels_of(images))

    assert prepared.dtype == torch.float32
    # the same 8-bit steps; the way from there to -1..1 is rounded otherwise, by far less than a step of
    # 1/127.5
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)


def test_features_equal_those_of_transformers(tmp_path: Path) -> None:
    siglip, theirs = tower(tmp_path), their_siglip(write_siglip(tmp_path / "theirs.safetensors"))
    pixels = pixels_of(frames(batch=2))

    with torch.no_grad():
        expected = theirs(siglip.prepare(pixels)).last_hidden_state
    features = siglip.encode(pixels)

    assert features.shape == (2, 729, SIGLIP_DIM)
    # float32 throughout: sums in another order
    assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()


# Files


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", siglip_layouts(siglip_tensors()))
def test_every_layout_gives_the_same_weights(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    tensors = siglip_tensors(dtype=dtype)
    siglip = load_siglip(
        save(tmp_path / "model.safetensors", siglip_layouts(tensors)[layout]), CPU, torch.float32
    )
    state = siglip.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())
    assert not any(parameter.requires_grad for parameter in siglip.parameters())


def test_the_published_file_fits_at_full_size(tmp_path: Path) -> None:
    tensors = tensor_list("sigclip-vision-384")
    path = write_hollow(tmp_path / "model.safetensors", tensors)
    network = fit(path, read_siglip, SiglipVision)
    assert read_once(path, read_siglip).config == SiglipConfig(1152, 4304, 16, 27, 384, 14)
    in_head = [name for name in tensors if name.startswith("vision_model.head.")]
    assert len(network.state_dict()) == len(tensors) - len(in_head)

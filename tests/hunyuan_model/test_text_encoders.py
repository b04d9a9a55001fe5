"""The two text encoders against the diffusers pipeline, and what goes through them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from hunyuan_model.text_encoders import (
    VIDEO_TEMPLATE,
    HunyuanClip,
    LlavaTextEncoder,
    PromptTemplate,
)
from modules.errors import CheckpointError
from protocols.family import TextEncoder
from protocols.requests import Prompt
from tests.golden_cases import read_case
from tests.parity.hunyuan import text_pipeline
from tests.tiny.hunyuan_encoders import (
    CLIP_DIM,
    IMAGE_TEMPLATE,
    LLAMA_LAYERS,
    LLM_DIM,
    write_clip_tokenizer,
    write_text_encoders,
)

CPU = torch.device("cpu")
PROMPTS = (
    "a rabbit in the grass, 1024 x 576",
    "",
    "\n  The SUN rises — über den Hügeln {}; don't   blink\t",
    "日本 🐇",
    "the rabbit runs through tall grass " * 60,
)
TOLERANCE = 1e-5  # of the largest number, float32: the same operations, in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    write_text_encoders(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> HunyuanVideoPipeline:
    """The published pipeline around the same weights and tokenizers."""
    return text_pipeline(folder)


def encoded(encoder: TextEncoder, prompts: Sequence[str | Prompt]) -> dict[str, Tensor]:
    """Loaded, and all prompts encoded together, stacked."""
    encoder.load(CPU)
    found = encoder.encode([prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts])
    return {key: torch.stack([one[key] for one in found]) for key in found[0]}  # type: ignore[misc]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_templates_and_lengths_are_the_recorded_ones() -> None:
    recorded, _ = read_case("text_constants")
    templates = recorded["hunyuanvideo_llm_templates"]
    ours = {"template": VIDEO_TEMPLATE.text, "crop_start": VIDEO_TEMPLATE.crop_start}
    assert ours == templates["dit-llm-encode-video"]
    lengths = recorded["hunyuanvideo_lengths"]
    assert lengths["video_max_length"] == lengths["kept_tokens"] + VIDEO_TEMPLATE.crop_start


VIDEO, IMAGE = VIDEO_TEMPLATE, IMAGE_TEMPLATE


@pytest.mark.parametrize(
    ("template", "skip"), [*((VIDEO, skip) for skip in range(LLAMA_LAYERS + 1)), (IMAGE, 2)]
)
def test_the_language_models_states_are_those_of_the_pipeline(
    folder: Path, pipeline: HunyuanVideoPipeline, template: PromptTemplate, skip: int
) -> None:
    ours = encoded(LlavaTextEncoder(folder, torch.float32, skip_layers=skip, template=template), PROMPTS)
    with torch.no_grad():
        states, mask = pipeline._get_llama_prompt_embeds(
            list(PROMPTS),
            {"template": template.text, "crop_start": 95 if template is VIDEO else 36},
            device=CPU,
            num_hidden_layers_to_skip=skip,
        )
    assert ours["llm"].shape == (len(PROMPTS), 256, LLM_DIM)
    assert torch.equal(ours["llm_mask"], mask)
    assert 1 <= mask.sum(1).min() < 8
    assert mask.sum(1).max() == 256  # one prompt is too long
    assert_close(ours["llm"], states)


def test_the_final_norm_comes_on_top_of_the_state(folder: Path, pipeline: HunyuanVideoPipeline) -> None:
    plain = encoded(LlavaTextEncoder(folder, torch.float32), PROMPTS[:1])["llm"]
    normed = encoded(LlavaTextEncoder(folder, torch.float32, final_norm=True), PROMPTS[:1])["llm"]
    with torch.no_grad():
        assert_close(normed, pipeline.text_encoder.norm(plain))
    last = encoded(LlavaTextEncoder(folder, torch.float32, skip_layers=0), PROMPTS[:1])["llm"]
    again = encoded(LlavaTextEncoder(folder, torch.float32, skip_layers=0, final_norm=True), PROMPTS[:1])[
        "llm"
    ]
    assert torch.equal(last, again)  # the last state is normed once


def test_clips_pooled_state_is_that_of_the_pipeline(folder: Path, pipeline: HunyuanVideoPipeline) -> None:
    prompts = [*PROMPTS, "a rabbit <|endoftext|> and a dog"]
    ours = encoded(HunyuanClip(folder, torch.float32), prompts)
    with torch.no_grad():
        theirs = pipeline._get_clip_prompt_embeds(prompts, device=CPU)
    tokens = pipeline.tokenizer_2(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    assert ours["clipL"].shape == (len(prompts), CLIP_DIM)
    assert torch.equal(ours["clipL_mask"], tokens.attention_mask)
    assert_close(ours["clipL"], theirs)


def test_more_layers_to_skip_than_there_are_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--hidden_state_skip_layer 5: .* has only 4 layers"):
        LlavaTextEncoder(folder, skip_layers=5).load(CPU)


def test_identity_follows_all_that_an_output_depends_on(folder: Path, tmp_path: Path) -> None:
    write_text_encoders(tmp_path)
    path = tmp_path / "text_encoder"
    before = dict(LlavaTextEncoder(path).identity)
    assert before == dict(LlavaTextEncoder(folder / "text_encoder").identity)
    for other in (
        LlavaTextEncoder(path, torch.bfloat16),
        LlavaTextEncoder(path, template=IMAGE_TEMPLATE),
        LlavaTextEncoder(path, skip_layers=1),
        LlavaTextEncoder(path, final_norm=True),
        LlavaTextEncoder(path, form="fp8"),
    ):
        assert dict(other.identity) != before
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}), encoding="utf-8")
    changed = dict(LlavaTextEncoder(path).identity)
    assert {key for key in before if before[key] != changed[key]} == {"llm_config"}

    path = tmp_path / "text_encoder_2"
    before = dict(HunyuanClip(path).identity)
    merges = path / "merges.txt"
    merges.write_text(merges.read_text(encoding="utf-8").rsplit("\n", 2)[0] + "\n", encoding="utf-8")
    changed = dict(HunyuanClip(path).identity)
    assert {key for key in before if before[key] != changed[key]} == {"clipL_tokenizer"}


def test_a_tokenizer_that_cuts_the_template_elsewhere_is_warned_of(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LlavaTextEncoder(folder, torch.float32).load(CPU)
    assert "cut in the wrong place" not in caplog.text
    write_clip_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    LlavaTextEncoder(folder, torch.float32, tokenizer=tmp_path).load(CPU)
    assert "but the model's own into 95: prompts will be cut" in caplog.text

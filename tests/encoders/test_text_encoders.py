"""What all text encoders have in common: order, counting and cutting, weights of parts, identity, memory."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoders.language_encoder import LanguageModelEncoder
from encoders.t5 import T5TextEncoder
from encoders.text_encoder import FileTextEncoder
from flux_2.versions import MISTRAL_USE
from frame_pack.files import FramePackClip, FramePackLlama
from hunyuan_image.text_encoders import QwenTextEncoder
from hunyuan_model.text_encoders import VIDEO_TEMPLATE, HunyuanClip, LlavaTextEncoder, PromptTemplate
from lumina.text_encoder import GemmaTextEncoder
from modules.errors import CheckpointError
from protocols.requests import Prompt
from tests.tiny.hunyuan_encoders import write_llama_tokenizer, write_text_encoders
from tests.tiny.hunyuan_image import write_qwen
from tests.tiny.language_models import mistral3, write_mistral_tokenizer, write_model
from tests.tiny.lumina import write_gemma
from tests.tiny.picture_encoders import write_t5xxl
from tests.tiny.wan_encoders import T5_FILE, t5_tensors, write_tokenizer
from wan.t5 import WanTextEncoder

CPU = torch.device("cpu")
TEXT = "the sun rises over the hills while a squirrel laughs 😀 twice"
TEXTS = (TEXT, "", "日本語 and 😀 in the hills", " ".join(f"rabbit {number}" for number in range(900)))
SUN = (4, 13, 1.5)
# its own tokenizer makes another number of tokens of the template than the released one
TEMPLATE = PromptTemplate(VIDEO_TEMPLATE.system)
Encoder = FileTextEncoder[nn.Module]


def make_umt5(folder: Path, name: str = "tokenizer.json") -> WanTextEncoder:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(t5_tensors(), folder / T5_FILE)
    write_tokenizer(folder / "google" / "umt5-xxl")
    return WanTextEncoder(folder / T5_FILE, folder / "google" / "umt5-xxl" / name)


def make_llama(folder: Path, adds_begin: bool = True) -> LlavaTextEncoder:
    write_text_encoders(folder)
    write_llama_tokenizer(folder / "text_encoder", adds_begin)
    return LlavaTextEncoder(folder, torch.float32, template=TEMPLATE)


def of_hunyuan(kind: Callable[..., Encoder], folder: Path, **settings: Any) -> Encoder:
    """A text encoder of HunyuanVideo's files."""
    write_text_encoders(folder)
    return kind(folder, torch.float32, **settings)


def make_mistral(folder: Path) -> LanguageModelEncoder:
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model.safetensors", mistral3())
    use = replace(MISTRAL_USE, states=(1, 2))
    return LanguageModelEncoder(use, folder, torch.float32, write_mistral_tokenizer(folder))


KINDS: dict[str, Callable[[Path], Any]] = {
    "umT5": make_umt5,
    "umT5 by pieces": lambda folder: make_umt5(folder, "spiece.model"),
    "T5": lambda folder: T5TextEncoder(write_t5xxl(folder), torch.float32, max_length=32, uses_mask=True),
    "Llama": make_llama,
    "Llama without begin": lambda folder: make_llama(folder, adds_begin=False),
    "FramePack's Llama": partial(of_hunyuan, FramePackLlama, template=TEMPLATE),
    "CLIP-L": partial(of_hunyuan, HunyuanClip),
    "FramePack's CLIP-L": partial(of_hunyuan, FramePackClip),
    "Qwen": lambda folder: QwenTextEncoder(write_qwen(folder), torch.float32),
    "Gemma": lambda folder: GemmaTextEncoder(
        write_gemma(folder), torch.float32, system_prompt="Draw.", max_tokens=40
    ),
    "Mistral": make_mistral,
}


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    made: Encoder = KINDS[request.param](tmp_path_factory.mktemp("encoder") / "model")
    made.load(CPU)
    return made


def encoded(encoder: Encoder, *prompts: str | Prompt) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        found = encoder.encode([one if isinstance(one, Prompt) else Prompt(one) for one in prompts])
    return [
        {name: value[0] if isinstance(value, list) else value for name, value in one.items()} for one in found
    ]


@pytest.mark.slow_cases(
    "FramePack's CLIP-L", "FramePack's Llama", "Llama without begin", "Mistral", "Qwen", "umT5 by pieces"
)
def test_prompts_together_are_each_alone_in_their_order(encoder: Encoder) -> None:
    many = [TEXTS[-1]] * 8  # two groups of umT5
    texts = (*TEXTS, *(f"{number} rabbits" for number in range(9)), *many)
    for text, found in zip(texts, encoded(encoder, *texts), strict=True):
        assert found.keys() == encoder.keys
        for name, alone in encoded(encoder, text)[0].items():
            torch.testing.assert_close(found[name], alone, rtol=1e-5, atol=1e-5)
            assert found[name].untyped_storage().nbytes() == found[name].nbytes  # no view of the others
    assert encoder.encode([]) == []


def test_tokens_are_counted_and_what_is_read_ends_where_the_encoder_stops(encoder: Encoder) -> None:
    count = encoder.token_counter()
    for text in TEXTS:
        found = count(text)
        assert found.is_cut == (found.tokens > found.limit == encoder.max_length)
        assert found.text.endswith(found.cut_text)
        if not found.is_cut:
            assert found.num_read == len(found.text)
            continue
        # the last word may be cut too, and then has other tokens
        assert abs(count(text[: found.num_read]).tokens - found.limit) <= 2
        assert count(text[: found.num_read + 12]).tokens > found.limit
    assert count(TEXTS[-1]).is_cut


def test_weights_multiply_the_rows_of_their_part_alone(encoder: Encoder) -> None:
    for text in (TEXT, TEXTS[-1]):
        plain, same = encoded(encoder, text, Prompt(text, ((0, len(text), 1.0),)))
        assert all(torch.equal(plain[name], same[name]) for name in plain)
    prompts = TEXT, Prompt(TEXT, (SUN,)), Prompt(TEXT, ((0, len(TEXT), 2.0),))
    plain, weighted_states_key, all_of_it = encoded(encoder, *prompts)
    if not encoder.weighted_states_key:
        assert all(torch.equal(plain[name], weighted_states_key[name]) for name in plain)
        return
    states = next(name for name, value in plain.items() if value.is_floating_point())
    rows, sun, full = (one[states] for one in (plain, weighted_states_key, all_of_it))
    changed = (sun != rows).any(dim=1)
    assert torch.equal(sun[changed], rows[changed] * 1.5)
    doubled = (full != rows).any(dim=1)
    assert torch.equal(full[doubled], rows[doubled] * 2)
    assert 0 < int(changed.sum()) < int(doubled.sum()) < int(rows.any(dim=1).sum())
    first, last = (int(number) for number in changed.nonzero()[[0, -1], 0])
    assert changed[first : last + 1].all()
    assert doubled[first]
    if encoder.pads_left:
        assert not doubled[: encoder.max_length - encoder.token_counter()(TEXT).tokens].any()


def test_identity_follows_the_files(encoder: Encoder, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    make = KINDS[request.node.callspec.params["encoder"]]
    same, other = (make(tmp_path / name / "model") for name in ("same", "other"))
    assert dict(same.identity) == dict(encoder.identity)
    tokenizer = other.source.find(other.tokenizer, other.path)[0]
    model = next(iter(sorted(other.path.glob("*.safetensors")))) if other.path.is_dir() else other.path
    before = dict(other.identity)
    for file, ending in ((model, ""), (tokenizer, "_tokenizer")):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        changed = {name for name, value in _identity(other).items() if value != before[name]}
        assert {name for name in changed if name.endswith(ending)} == changed
        assert changed, file
        file.write_bytes(content)


def _identity(encoder: Encoder) -> dict[str, str]:
    try:
        return dict(encoder.identity)
    except CheckpointError:  # a tokenizer or header that is damaged by the change
        return {}


def test_a_tokenizer_with_more_tokens_than_the_network_is_refused(encoder: Encoder) -> None:
    network = encoder.network
    holder = network.get_submodule(encoder.embedding.removesuffix(".weight"))
    full = holder.weight
    try:
        holder.weight = nn.Parameter(full[:5].detach(), requires_grad=False)  # type: ignore[index]
        with pytest.raises(CheckpointError, match=f"knows 5 tokens.*{encoder.source.files.option}"):
            encoder.encode([Prompt(TEXT)])
    finally:
        holder.weight = full

"""States of texts are those of transformers' Qwen3-VL, with the padding and the positions of the training."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from encoders.language_encoder import LanguageModelEncoder
from flux_3.files import FLUX_3_USE
from protocols.requests import Prompt
from tests.flux_3.making import Processor
from tests.tiny.dit_files import TinyModel
from tests.tiny.flux_3 import TEXT_LAYERS, write_text_encoder
from tests.tiny.language_models import qwen3_vl

CPU = torch.device("cpu")
SHORT = "a cat on the grass"
LONG = "a small rabbit runs through the grass, " * 15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("texts") / "text_encoder")


@torch.no_grad()
def states_there(folder: Path, text: str, position: int | None) -> Tensor:
    """As diffusers' modular pipeline computes them. position: of padding; None: as transformers chooses."""
    processor = Processor(TinyModel(folder, folder, folder))
    message = [{"role": "user", "content": text}]
    written = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    count = len(processor.tokenizer(written)["input_ids"])
    inputs = processor.tokenizer(
        written, return_tensors="pt", padding="max_length", max_length=-(-count // 80) * 80
    )
    mask = inputs["attention_mask"]
    places = None
    if position is not None:
        places = torch.arange(mask.shape[1])[None].masked_fill(mask == 0, position)
    output = qwen3_vl(TEXT_LAYERS)(
        input_ids=inputs["input_ids"],
        attention_mask=mask,
        position_ids=places,
        output_hidden_states=True,
        use_cache=False,
    )
    return torch.cat([output.hidden_states[layer][0] for layer in FLUX_3_USE.states], dim=-1)


@pytest.mark.parametrize(("text", "tokens"), [(SHORT, 80), (LONG, 160)], ids=["short", "long"])
def test_states_of_texts_and_their_padding_equal_those_there(folder: Path, text: str, tokens: int) -> None:
    encoder = LanguageModelEncoder(FLUX_3_USE, folder, torch.float32)
    encoder.load(CPU)

    ((states,),) = (conditions["ctx_vec"] for conditions in encoder.encode([Prompt(text)]))

    expected = states_there(folder, text, position=1)
    scale = expected.abs().max()
    assert states.shape == (tokens, len(FLUX_3_USE.states) * 64)
    assert (states - expected).abs().max() < 1e-5 * scale
    # what transformers 5 would choose changes the states of the padding
    assert (states - states_there(folder, text, position=0)).abs().max() > 1e-3 * scale
    encoder.free()


def test_texts_of_one_call_equal_each_by_itself(folder: Path) -> None:
    encoder = LanguageModelEncoder(FLUX_3_USE, folder, torch.float32)
    encoder.load(CPU)

    together = [conditions["ctx_vec"][0] for conditions in encoder.encode([Prompt(SHORT), Prompt(LONG)])]

    alone = [encoder.encode([Prompt(text)])[0]["ctx_vec"][0] for text in (SHORT, LONG)]
    assert [len(states) for states in together] == [80, 160]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    encoder.free()

"""Prompts that a chat model rewrites."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import wan_generate_video
from blissful_tuner.prompt_rewrite import (
    PromptRewriter,
)
from modules.answers import take_answer
from modules.errors import CheckpointError
from tests.tiny.chat_model import write_chat_model
from tests.tiny.wan import write_tiny_wan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights that answers with words of its small vocabulary."""
    return write_chat_model(tmp_path_factory.mktemp("chat modél"))


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        ('  "A cat\nwalks."  ', "A cat walks."),
        ("<think>It is a\n cat.</think>\n\nA cat.", "A cat."),
        ("<think>Okay, the user wants a cat, and then no end of the", ""),
        ("A cat.<thinking>Was that", "A cat."),
        ("It is a cat, no start of the thought.</think> A cat.", "A cat."),
        ("“A cat.”", "A cat."),
        ('"A" and "B"', 'A" and "B'),
        ("", ""),
        ("x" * 9000, "x" * 4000),
    ],
)
def test_the_answer_is_one_paragraph(answer: str, taken: str) -> None:
    assert take_answer(answer) == taken


def test_it_is_used_and_recorded(chat_model: Path, tmp_path: Path) -> None:
    """The video is that of the rewritten prompt typed by hand; the file says both texts."""
    files = write_tiny_wan(tmp_path / "models")
    words = [*files.models, "--video_size", "32", "32", "--video_length", "1", "--infer_steps", "1"]
    words += ["--seed", "1", "--output_type", "latent", "--device", "cpu", "--task", "t2v-1.3B"]

    def make(name: str, *more: str) -> tuple[torch.Tensor, dict[str, str]]:
        wan_generate_video.main([*words, "--save_path", str(tmp_path / name), *more])
        (path,) = (tmp_path / name).glob("*_latent.safetensors")
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("latent"), file.metadata()

    rewriting = ["--prompt_rewrite", "master", "--prompt_rewrite_model", str(chat_model)]
    latents, metadata = make("rewritten", "--prompt", "a cat", *rewriting)
    text = metadata["bt_rewritten_prompt"]
    assert text
    assert metadata["bt_prompt"] == "a cat"
    typed, _ = make("typed", "--prompt", text)
    assert torch.equal(latents, typed)
    plain, _ = make("plain", "--prompt", "a cat")
    assert not torch.equal(latents, plain)


def test_what_is_no_chat_model_is_an_error(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot load it"):
        PromptRewriter(tmp_path, "normal").load(CPU)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((chat_model / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"no chat template|cannot load it"):
        PromptRewriter(tmp_path, "normal").load(CPU)


@pytest.fixture
def own_copy(chat_model: Path, tmp_path: Path) -> Path:
    """A copy of the chat model to damage."""
    return Path(shutil.copytree(chat_model, tmp_path / "copy"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_folder_cannot_name_code_to_fetch(key: str, own_copy: Path) -> None:
    """transformers takes attention of that form from the hub and runs it, if the package kernels is there."""
    config = json.loads((own_copy / "config.json").read_text(encoding="utf-8"))
    (own_copy / "config.json").write_text(json.dumps({**config, key: "someone/code"}), encoding="utf-8")
    rewriter = PromptRewriter(own_copy, "normal")
    rewriter.load(CPU)
    model, _ = rewriter._loaded.get()
    assert model.config._attn_implementation == "eager"

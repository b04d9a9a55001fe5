"""Where tokenizers are found: the option's folder, the checkpoint's, the hub."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import CLIPTokenizer

from modules.errors import CheckpointError
from stable_diffusion.tokenizers import check_vocabulary, find_tokenizers
from tests.tiny.stable_diffusion import TOKENIZERS, tokenizer_folder, write_tokenizer

BOTH = (False, True)
TEXTS = ("a cat", "A  photo, of (a) girl's 2 dogs.", "naïve café 日本語 🙂", "", "x" * 400)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("modules.checkpoints.tokenizers.hf_hub_download", refuse)


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path)
    for words, name in zip(find_tokenizers(tmp_path, tmp_path, BOTH), TOKENIZERS.values(), strict=True):
        theirs = CLIPTokenizer.from_pretrained(tmp_path / name)

        assert [words.tokenize(text) for text in TEXTS] == [
            theirs(text, add_special_tokens=False).input_ids for text in TEXTS
        ]
        assert (words.start, words.end) == (theirs.bos_token_id, theirs.eos_token_id)


def test_an_exclamation_mark_is_a_word_and_no_padding(tmp_path: Path) -> None:
    """transformers cut it out as OpenCLIP's padding, token 0; it was a word while the encoder was trained."""
    first, second = find_tokenizers(tokenizer_folder(tmp_path), tmp_path, BOTH)

    assert first.tokenize("a dog!") == second.tokenize("a dog!")
    assert 0 not in second.tokenize("a dog!")


@pytest.mark.parametrize("name", [*TOKENIZERS.values(), "stabilityai_stable-diffusion-2"])
def test_either_vocabulary_serves_openclip(name: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / name)

    assert find_tokenizers(tmp_path, tmp_path / "sd2.safetensors", [True])[0].tokenize("cat")


@pytest.mark.parametrize("place", ["tokenizer", "clip_l", "openai_clip-vit-large-patch14", "."])
def test_files_beside_a_single_file_are_found(place: str, tmp_path: Path, no_hub: None) -> None:
    write_tokenizer(tmp_path / place)

    assert len(find_tokenizers(None, tmp_path / "sdxl.safetensors", BOTH)) == 2


def test_the_tokenizer_of_another_model_in_the_same_folder_is_left_alone(tmp_path: Path) -> None:
    other = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    (tmp_path / "tokenizer").mkdir()
    other.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    write_tokenizer(tmp_path / "clip_l")

    assert find_tokenizers(None, tmp_path / "sd1.safetensors", [False])[0].tokenize("a cat")


@pytest.mark.usefixtures("no_hub")
def test_a_missing_tokenizer_gets_one_message(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--tokenizer_cache_dir") as raised:
        find_tokenizers(tmp_path / "none yet", tmp_path / "sd1.safetensors", [False])

    assert "openai/clip-vit-large-patch14" in str(raised.value)


def test_a_download_is_kept_for_runs_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = write_tokenizer(tmp_path / "hub")
    CLIPTokenizer.from_pretrained(stored).backend_tokenizer.save(str(stored / "tokenizer.json"))
    whole = stored / "tokenizer.json"
    asked = []

    def fetch(repository: str, name: str, subfolder: str | None = None, **_: object) -> str:
        asked.append((repository, name))
        return str(whole)

    monkeypatch.setattr("modules.checkpoints.tokenizers.hf_hub_download", fetch)
    cache = tmp_path / "cache"

    first = find_tokenizers(cache, tmp_path / "models" / "sdxl.safetensors", BOTH)
    second = find_tokenizers(cache, tmp_path / "models" / "sdxl.safetensors", BOTH)

    assert asked == [("openai/clip-vit-large-patch14", "tokenizer.json")]
    assert first[0].tokenize("a cat") == second[1].tokenize("a cat") != []
    assert (cache / TOKENIZERS["clip_l"] / "tokenizer.json").is_file()


def test_a_tokenizer_of_another_model_is_noticed(tmp_path: Path) -> None:
    words = find_tokenizers(tokenizer_folder(tmp_path), tmp_path, [False])[0]

    check_vocabulary(words, words.end + 1, tmp_path)
    with pytest.raises(CheckpointError, match="rows of token embeddings"):
        check_vocabulary(words, words.end, tmp_path)

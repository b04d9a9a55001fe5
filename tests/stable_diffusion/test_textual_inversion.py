from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter, ParameterDict

from modules.errors import CheckpointError
from stable_diffusion.text import Texts
from stable_diffusion.textual_inversion import read_words, with_words
from tests.stable_diffusion.text_towers import make_towers, text_options, tokenize
from tests.tiny.stable_diffusion import TEXT_DIM


def vectors(count: int = 2, width: int = TEXT_DIM, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def write(path: Path, content: dict[str, object]) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


FORMS = {
    "emb_params.safetensors": lambda rows: {"emb_params": rows},
    "diffusers.safetensors": lambda rows: {"<blob>": rows},
    "diffusers.bin": lambda rows: {"<blob>": rows},
    "one_vector.bin": lambda rows: {"<blob>": rows[0]},
    "webui.pt": lambda rows: {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": Parameter(rows)},
        "name": "blob",
        "step": 10,
        "sd_checkpoint": None,
    },
    "paper.pt": lambda rows: {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": ParameterDict({"*": Parameter(rows)}),
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_of_files_are_read(tmp_path: Path, name: str) -> None:
    rows = vectors()
    (word,) = read_words([write(tmp_path / name, FORMS[name](rows))])
    assert word.word == name.split(".")[0]
    assert word.token == ("<blob>" if "<blob>" in FORMS[name](rows) else None)
    assert torch.equal(word.vectors[0], rows[:1] if name == "one_vector.bin" else rows)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_word_is_its_vectors_in_the_place_of_tokens(tmp_path: Path, kind: str) -> None:
    """A word whose vectors are those of known tokens is the same as these tokens."""
    towers, sort = make_towers(kind)
    rows = [tower.network.embeddings.token_embedding.weight[tokenize("red cat")].clone() for tower in towers]
    names = ["clip_l", "clip_g"] if kind == "sdxl" else ["emb_params"]
    path = write(tmp_path / "Blob-v1.safetensors", dict(zip(names, rows, strict=True)))
    expected = Texts(towers, sort, text_options()).encode("a red cat , (red cat:1.5) in a house cat")
    texts = Texts(make_towers(kind)[0], sort, text_options("--textual_inversion_embeddings", path))
    found = texts.encode("a blob-v1, (BLOB-V1:1.5) in a house blob-v11")
    assert torch.equal(found.context, expected.context)
    if kind == "sdxl":
        assert found.pooled is not None
        assert expected.pooled is not None
        assert torch.equal(found.pooled, expected.pooled)
    other = texts.encode("a dog, (BLOB-V1:1.5) in a house blob-v11")
    assert not torch.equal(found.context, other.context)


def test_words_are_found_alone_the_longest_first() -> None:
    found = with_words(tokenize, {"blob": [1], "blob x": [2], "<a>": [3]})
    assert found("blob x") == [2]
    assert found("blob, cat BLOB") == [1, *tokenize(", cat"), 1]
    assert found("the<a>one") == [*tokenize("the"), 3, *tokenize("one")]
    assert found("noblob blobby blob_x") == tokenize("noblob blobby blob_x")


def test_harmful_tensors_are_refused(tmp_path: Path) -> None:
    """A few bytes repeated over a shape that no memory holds; a container without its own fields."""
    huge = torch.ones(1, 1).expand(10**9, TEXT_DIM)
    bare = ParameterDict()
    bare.__dict__.clear()
    for number, value in enumerate([{"*": huge}, {"*": torch.ones(2, 2).to_sparse()}, bare]):
        path = write(tmp_path / f"{number}.pt", {"string_to_param": value})
        with pytest.raises(CheckpointError, match=r"no row of vectors|sparse|is damaged"):
            read_words([path])


def test_missing_and_equal_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_words([tmp_path / "none.pt"])
    first = write(tmp_path / "blob.safetensors", {"emb_params": vectors()})
    second = write(tmp_path / "Blob.bin", {"x": vectors()})
    with pytest.raises(CheckpointError, match="are both for the word"):
        read_words([first, second])


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("sd1", "blob", {"emb_params": vectors(2, 32)}, "have 32 numbers.*take 64"),
        ("sd1", "blob", {"clip_l": vectors(), "clip_g": vectors()}, "have 64 and 64 numbers.*take 64"),
        ("sdxl", "blob", {"emb_params": vectors()}, "one set of vectors.*clip_l and clip_g"),
        ("sd1", "blob", {"emb_params": vectors(76)}, "it has 76 vectors.*75"),
        ("sd1", "cat", {"emb_params": vectors()}, "cat is a word that the text encoder knows"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    tmp_path: Path, kind: str, name: str, content: dict[str, object], message: str
) -> None:
    path = write(tmp_path / f"{name}.safetensors", content)
    towers, sort = make_towers(kind)
    rows = len(towers[0].network.embeddings.token_embedding.weight)
    with pytest.raises(CheckpointError, match=message):
        Texts(towers, sort, text_options("--textual_inversion_embeddings", path))
    assert len(towers[0].network.embeddings.token_embedding.weight) == rows

"""Options of texts through the command line: words of one's own, pictures in place of texts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from tests.encoders.test_clip_vision import noise, write_tower
from tests.faults.messages import run_here
from tests.tiny.stable_diffusion import TEXT_DIM, text_state, tokenizer_folder, write_sd1, write_sdxl

SMALL = ("--tokenizer_cache_dir", "tokenizers", "--W", "64", "--H", "64", "--steps", "2", "--seed", "1")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_sd1(folder)
    write_sdxl(folder)
    tokenizers = tokenizer_folder(folder / "tokenizers")
    words = CLIPTokenizer.from_pretrained(tokenizers / "openai_clip-vit-large-patch14")
    ids = words("red cat", add_special_tokens=False)["input_ids"]
    rows = text_state("sd1")["text_model.embeddings.token_embedding.weight"][ids]
    save_file({"emb_params": rows.contiguous()}, folder / "blob.safetensors")
    write_tower(folder / "image_encoder", projection=TEXT_DIM)
    noise(64, 64).save(folder / "one.png")
    return folder


def make(project: Path, out: Path, *words: object) -> np.ndarray:
    code, said = run_here("gen_img.py", *SMALL, "--outdir", out, *words, folder=project)
    assert code == 0, said[-3000:]
    (path,) = out.glob("*.png")
    return np.asarray(Image.open(path)).astype(int)


def test_a_learned_word_makes_the_picture_of_the_words_that_it_equals(project: Path, tmp_path: Path) -> None:
    model = ("--ckpt", "sd1.safetensors")
    word = ("--textual_inversion_embeddings", "blob.safetensors")
    expected = make(project, tmp_path / "1", *model, "--prompt", "a (red cat:1.3) in the sea")
    found = make(project, tmp_path / "2", *model, *word, "--prompt", "a (BLOB:1.3) in the sea")
    without = make(project, tmp_path / "3", *model, "--prompt", "a (blob:1.3) in the sea")
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - without).max() > 3


def test_a_picture_in_place_of_the_pooled_state(project: Path, tmp_path: Path) -> None:
    words = ("--ckpt", "sdxl.safetensors", "--prompt", "a cat", "--image_path", "one.png")
    plain, weak, strong = (
        make(project, tmp_path / str(number), *words, *more)
        for number, more in enumerate(
            ((), ("--clip_vision_strength", "0.5"), ("--clip_vision_strength", "2"))
        )
    )
    assert np.abs(plain - weak).max() > 1
    assert np.abs(weak - strong).max() > 1

"""Words with vectors of their own, also for each cross-attention; where tokenizers are found."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import Parameter, ParameterDict
from transformers import CLIPTokenizer

from generation.embedding_marks import warn_about_unknown_words
from modules.errors import CheckpointError
from protocols.bundled_embeddings import find_words
from stable_diffusion.assembling import list_cross_attentions
from stable_diffusion.contract import ImageSettings, RequestedImage
from stable_diffusion.making import ImageGenerator
from stable_diffusion.text import PromptEncoder
from stable_diffusion.textual_inversion import (
    merge_lora_words,
    read_lora_words,
    read_words,
    tokenize_with_words,
)
from stable_diffusion.tokenizers import check_vocabulary, load_tokenizers
from tests.faults.messages import run_here
from tests.parity.stable_diffusion import their_scheduler
from tests.stable_diffusion import loaded
from tests.stable_diffusion.loaded import make_towers, options, tokenize
from tests.stable_diffusion.test_making import load, start_noise
from tests.tiny import stable_diffusion as tiny


def vectors(count: int = 2, width: int = tiny.TEXT_DIM, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def write(path: Path, content: Mapping[str, object]) -> Path:
    if path.suffix == ".safetensors":
        save_file(dict(content), path)
    else:
        torch.save(content, path)
    return path


FORMS = {
    "emb_params.safetensors": lambda rows: {"emb_params": rows},
    "diffusers.safetensors": lambda rows: {"<blob>": rows},
    "diffusers.bin": lambda rows: {"<blob>": rows},
    "one_vector.bin": lambda rows: {"<blob>": rows[0]},
    "webui.pt": lambda rows: {"string_to_param": {"*": Parameter(rows)}, "name": "blob", "step": 10},
    "paper.pt": lambda rows: {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": ParameterDict({"*": Parameter(rows)}),
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_of_files_are_read(tmp_path: Path, name: str) -> None:
    rows = vectors()
    (word,) = read_words([write(tmp_path / name, FORMS[name](rows))])
    assert word.text == name.split(".")[0]
    assert word.placeholder_token == ("<blob>" if "<blob>" in FORMS[name](rows) else None)
    assert torch.equal(word.vectors[0], rows[:1] if name == "one_vector.bin" else rows)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_word_is_its_vectors_in_the_place_of_tokens(tmp_path: Path, kind: str) -> None:
    """A word whose vectors are those of known tokens is the same as these tokens."""
    towers, sort = make_towers(kind)
    rows = [tower.network.embeddings.token_embedding.weight[tokenize("red cat")].clone() for tower in towers]
    names = ["clip_l", "clip_g"] if kind == "sdxl" else ["emb_params"]
    path = write(tmp_path / "Blob-v1.safetensors", dict(zip(names, rows, strict=True)))
    expected = PromptEncoder(towers, sort, options().text).encode("a red cat , (red cat:1.5) in a house cat")
    texts = PromptEncoder(make_towers(kind)[0], sort, options("--textual_inversion_embeddings", path).text)
    found = texts.encode("a blob-v1, (BLOB-V1:1.5) in a house blob-v11")
    assert torch.equal(found.context, expected.context)
    if kind == "sdxl":
        assert found.pooled is not None
        assert expected.pooled is not None
        assert torch.equal(found.pooled, expected.pooled)
    other = texts.encode("a dog, (BLOB-V1:1.5) in a house blob-v11")
    assert not torch.equal(found.context, other.context)


def test_words_are_found_alone_the_longest_first() -> None:
    found = tokenize_with_words(tokenize, {"blob": [1], "blob x": [2], "<a>": [3]})
    assert found("blob x") == [2]
    assert found("blob, cat BLOB") == [1, *tokenize(", cat"), 1]
    assert found("the<a>one") == [*tokenize("the"), 3, *tokenize("one")]
    assert found("noblob blobby blob_x") == tokenize("noblob blobby blob_x")


MARKED = ("embedding:blob", "Embedding:BLOB.safetensors", "embedding:my/blob.pt", "embedding: blob")


@pytest.mark.parametrize("text", [*MARKED, "embedding:my\\blob"])
def test_words_are_found_with_the_mark_of_comfyui(text: str, caplog: pytest.LogCaptureFixture) -> None:
    found = tokenize_with_words(tokenize, {"blob": [1]})
    assert found(f"a cat, {text}, red") == [*tokenize("a cat, "), 1, *tokenize(", red")]
    warn_about_unknown_words(f"a cat, ({text}:1.2)", ["blob"], "")
    assert caplog.text == ""
    warn_about_unknown_words(f"a cat, ({text}:1.2)", ["blob1"], "--load it")
    assert "no embedding of this name is loaded" in caplog.text


def test_texts_report_an_embedding_that_is_not_loaded_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    towers, sort = make_towers("sd1")
    path = write(tmp_path / "blob.safetensors", {"emb_params": vectors()})
    texts = PromptEncoder(towers, sort, options("--textual_inversion_embeddings", path).text)
    plain = texts.encode("a blob, red")

    marked = texts.encode("a (embedding:blob:1.0), red")

    assert torch.equal(plain.context, marked.context)
    assert "is read as words" not in caplog.text
    for _ in range(2):
        texts.encode("a embedding:mycat, red")
    assert caplog.text.count("embedding:mycat in a prompt is read as words") == 1


def test_harmful_tensors_are_refused(tmp_path: Path) -> None:
    """A few bytes repeated over a shape that no memory holds; a container without its own fields."""
    huge = torch.ones(1, 1).expand(10**9, tiny.TEXT_DIM)
    bare = ParameterDict()
    bare.__dict__.clear()
    for number, value in enumerate([{"*": huge}, {"*": torch.ones(2, 2).to_sparse()}, bare]):
        path = write(tmp_path / f"{number}.pt", {"string_to_param": value})
        with pytest.raises(CheckpointError, match=r"not a row of vectors|sparse|is damaged"):
            read_words([path])


def test_equal_names_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "blob.safetensors", {"emb_params": vectors()})
    second = write(tmp_path / "Blob.bin", {"x": vectors()})
    with pytest.raises(CheckpointError, match="are both for the word"):
        read_words([first, second])


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("sd1", "blob", {"emb_params": vectors(2, 32)}, "have width 32.*take width 64"),
        ("sd1", "blob", {"clip_l": vectors(), "clip_g": vectors()}, "have width 64 and 64.*take width 64"),
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
        PromptEncoder(towers, sort, options("--textual_inversion_embeddings", path).text)
    assert len(towers[0].network.embeddings.token_embedding.weight) == rows


SIZE, STEPS, SCALE = 32, 3, 4.0
LAYERS = {
    "IN01": "down_blocks.0.attentions.0",
    "IN02": "down_blocks.0.attentions.1",
    "MID": "mid_block.attentions.0",
    "OUT03": "up_blocks.1.attentions.0",
    "OUT04": "up_blocks.1.attentions.1",
    "OUT05": "up_blocks.1.attentions.2",
}
PROMPT, AVOIDED = "a (blob:1.3) cat", "ugly blob1"
IMAGE = RequestedImage("line 1", PROMPT, AVOIDED, 5, ImageSettings(SIZE, SIZE, STEPS, SCALE), "")


def load_with(folder: Path, option: str, rows: Mapping[str, Tensor]) -> ImageGenerator:
    folder.mkdir()
    return load(folder, tiny.write_sd1, option, str(write(folder / "blob.safetensors", dict(rows))))


def all_of(rows: Tensor) -> dict[str, Tensor]:
    return {name: rows.clone() for name in LAYERS}


def make(maker: ImageGenerator, *pictures: RequestedImage) -> Tensor:
    return maker.make(pictures or [IMAGE], wants_images=False).latents


def test_released_models_have_sixteen_of_them() -> None:
    with torch.device("meta"):
        names = UNet2DConditionModel().state_dict()  # of the size of Stable Diffusion 1.x
    inner, outer = ("01", "02", "04", "05", "07", "08"), [f"{number:02d}" for number in range(3, 12)]
    wanted = [*(f"IN{number}" for number in inner), "MID", *(f"OUT{number}" for number in outer)]
    assert list(list_cross_attentions(names)) == wanted


@pytest.mark.slow
def test_each_layer_reads_its_own_vectors(tmp_path: Path) -> None:
    """Against diffusers' U-Net, whose attentions are told what ordinary textual inversion makes of them."""
    rows = {name: vectors(seed=number) for number, name in enumerate(LAYERS)}
    made = make(load_with(tmp_path / "all", "--XTI_embeddings", rows))

    alone = {
        name: load_with(tmp_path / name, "--textual_inversion_embeddings", {"emb_params": own})
        for name, own in rows.items()
    }
    contexts: dict[str, dict[str, Tensor]] = {
        text: {LAYERS[name]: maker.prompt_encoder.encode(text).context[None] for name, maker in alone.items()}
        for text in (PROMPT, AVOIDED)
    }
    unet = UNet2DConditionModel.from_pretrained(tiny.write_folder("sd1", tmp_path / "theirs") / "unet")
    told: dict[str, Tensor] = {}
    for path in LAYERS.values():
        for name, module in unet.get_submodule(path).named_modules():
            if name.endswith("attn2"):

                def tell(_: Any, args: Any, kwargs: Any, path: str = path) -> Any:
                    return args, {**kwargs, "encoder_hidden_states": told[path]}

                module.register_forward_pre_hook(tell, with_kwargs=True)
    scheduler, latents = their_scheduler("ddim"), start_noise(5)
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps:
        said = {}
        for text, context in contexts.items():
            told |= context
            with torch.no_grad():
                said[text] = unet(latents, timestep, context[LAYERS["MID"]]).sample
        noise = said[AVOIDED] + SCALE * (said[PROMPT] - said[AVOIDED])
        latents = scheduler.step(noise, timestep, latents).prev_sample

    torch.testing.assert_close(made, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))
    equal = make(load_with(tmp_path / "one", "--XTI_embeddings", all_of(rows["MID"])))
    assert (made - equal).abs().max() > 1e-3


@pytest.mark.slow
def test_equal_vectors_are_ordinary_textual_inversion(tmp_path: Path) -> None:
    """With parts of a prompt too, and the U-Net is as before once a batch is made."""
    rows = vectors(seed=1)
    extended = load_with(tmp_path / "a", "--XTI_embeddings", all_of(rows))
    default = load_with(tmp_path / "b", "--textual_inversion_embeddings", {"emb_params": rows})
    parts = replace(IMAGE, prompt="a blob AND a dog", settings=replace(IMAGE.settings, num_parts=2))
    plain = replace(IMAGE, prompt="a dog", negative_prompt="")
    for image in (IMAGE, parts, plain, IMAGE):
        assert torch.allclose(make(extended, image), make(default, image), rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in extended.model.unet.modules())


BOTH = (False, True)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", reject)


def test_an_exclamation_mark_is_a_word_and_no_padding(tmp_path: Path) -> None:
    """transformers cut it out as OpenCLIP's padding, token 0; it was a word while the encoder was trained."""
    first, second = load_tokenizers(tiny.tokenizer_folder(tmp_path), tmp_path, BOTH)

    assert first.tokenize("a dog!") == second.tokenize("a dog!")
    assert 0 not in second.tokenize("a dog!")


@pytest.mark.parametrize("name", [*tiny.TOKENIZERS.values(), "stabilityai_stable-diffusion-2"])
def test_either_vocabulary_serves_openclip(name: str, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / name)

    assert load_tokenizers(tmp_path, tmp_path / "sd2.safetensors", [True])[0].tokenize("cat")


@pytest.mark.parametrize("place", ["tokenizer", "openai_clip-vit-large-patch14", "."])
def test_files_beside_a_single_file_are_found(place: str, tmp_path: Path, no_hub: None) -> None:
    tiny.write_tokenizer(tmp_path / place)

    assert len(load_tokenizers(None, tmp_path / "sdxl.safetensors", BOTH)) == 2


def test_the_tokenizer_of_another_model_in_the_same_folder_is_left_alone(tmp_path: Path) -> None:
    other = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    (tmp_path / "tokenizer").mkdir()
    other.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    tiny.write_tokenizer(tmp_path / "clip_l")

    assert load_tokenizers(None, tmp_path / "sd1.safetensors", [False])[0].tokenize("a cat")


@pytest.mark.usefixtures("no_hub")
def test_a_missing_tokenizer_gets_one_message(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--tokenizer_cache_dir") as raised:
        load_tokenizers(tmp_path / "none yet", tmp_path / "sd1.safetensors", [False])

    assert "openai/clip-vit-large-patch14" in str(raised.value)


def test_a_download_is_kept_for_runs_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tiny.write_tokenizer(tmp_path / "hub")
    CLIPTokenizer.from_pretrained(stored).backend_tokenizer.save(str(stored / "tokenizer.json"))
    full = stored / "tokenizer.json"
    asked = []

    def fetch(repository: str, name: str, subfolder: str | None = None, **_: object) -> str:
        asked.append((repository, name))
        return str(full)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    cache = tmp_path / "cache"

    first = load_tokenizers(cache, tmp_path / "models" / "sdxl.safetensors", BOTH)
    second = load_tokenizers(cache, tmp_path / "models" / "sdxl.safetensors", BOTH)

    assert asked == [("openai/clip-vit-large-patch14", "tokenizer.json")]
    assert first[0].tokenize("a cat") == second[1].tokenize("a cat") != []
    assert (cache / tiny.TOKENIZERS["clip_l"] / "tokenizer.json").is_file()


def test_a_tokenizer_of_another_model_is_noticed(tmp_path: Path) -> None:
    words = load_tokenizers(tiny.tokenizer_folder(tmp_path), tmp_path, [False])[0]

    check_vocabulary(words, words.end + 1, tmp_path)
    with pytest.raises(CheckpointError, match="token embeddings, but its tokenizer"):
        check_vocabulary(words, words.end, tmp_path)


ROWS = {"clip_l": vectors(8, seed=1), "clip_g": vectors(8, seed=2)}


def bundle(word: str, content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"bundle_emb.{word}.{name}": rows for name, rows in content.items()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XL, a LoRA with and without a word, and the word's own file."""
    folder = tmp_path_factory.mktemp("bundle")
    tiny.tokenizer_folder(folder / "tokenizers")
    model = loaded.load(tiny.write_sdxl(folder), "--tokenizer_cache_dir", folder / "tokenizers")
    lora = loaded.write_kohya(folder / "plain.safetensors", model, lambda path: "attn1" in path)
    save_file(load_file(lora) | bundle("blob", ROWS), folder / "bundled.safetensors")
    save_file(dict(ROWS), folder / "blob.safetensors")
    return folder


@pytest.mark.parametrize("script", ["gen_img.py", "sdxl_generate_image.py"])
def test_a_word_in_a_lora_is_the_word_of_its_own_file(project: Path, tmp_path: Path, script: str) -> None:
    """96 vectors, so that the prompt takes two chunks, which the words' own letters would not fill."""
    settings = ["--ckpt", "sdxl.safetensors", "--steps", 2, "--seed", 5, "--scale", 4]
    settings += ["--max_embeddings_multiples", 3, "--prompt", "a cat " + "blob " * 12]
    of_gen_img = [*settings, "--W", 64, "--H", 64]
    own_file = ["--textual_inversion_embeddings", "blob.safetensors"]
    lora = "--network_weights"
    (wanted,) = loaded.make_images(
        project, tmp_path / "own", *of_gen_img, lora, "plain.safetensors", *own_file
    )
    if script == "gen_img.py":
        (made,) = loaded.make_images(project, tmp_path / "bundled", *of_gen_img, lora, "bundled.safetensors")
        (without,) = loaded.make_images(project, tmp_path / "plain", *of_gen_img, lora, "plain.safetensors")
        assert abs(without - wanted).max() > 20
    else:
        words = [
            "--image_size",
            64,
            64,
            "--lora_weight",
            "bundled.safetensors",
            "--save_path",
            tmp_path / "b",
        ]
        code, said = run_here(
            script, *settings, "--tokenizer_cache_dir", "tokenizers", *words, folder=project
        )
        assert code == 0, said[-3000:]
        assert said.count("brings learned words for prompts: blob (8 vectors)") == 1
        assert "ignored" not in said
        (path,) = (tmp_path / "b").glob("*.png")
        made = np.asarray(Image.open(path)).astype(int)

    assert wanted.std() > 5
    assert abs(made - wanted).max() <= 1


def test_words_of_loras_are_read_as_those_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also of a table, of a word with dots, and of diffusers; one that is there already is told."""
    first, second = vectors(2, seed=1), vectors(1, seed=2)
    tensors = {
        "lora_unet_x.lora_down.weight": vectors(),
        "bundle_emb.blob.string_to_param.*": first,
        "bundle_emb.blob.string_to_token.*": torch.tensor(265),
        "bundle_emb.my.word.emb_params": second,
        "bundle_emb.other.<blob>": second,
    }
    lora_words = read_lora_words({tmp_path / "lora.safetensors": find_words(tensors)}, "--lora_weight")
    assert [word.text for word in lora_words] == ["blob", "my.word", "other"]
    for word, rows in zip(lora_words, (first, second, second), strict=True):
        assert torch.equal(word.vectors[0], rows)

    given = read_words([write(tmp_path / "Blob.safetensors", {"emb_params": second})])
    assert merge_lora_words(given, lora_words) == (*given, *lora_words[1:])
    assert "the word Blob of" in caplog.text


def test_a_word_of_a_lora_may_be_known_and_has_to_fit(tmp_path: Path) -> None:
    """Words of files may not be known ones; a LoRA's take their place, as in other programs."""
    towers, sort = make_towers("sd1")
    plain = PromptEncoder(towers, sort, options().text).encode("a cat")
    lora = tmp_path / "lora.safetensors"
    cat = read_lora_words({lora: {"cat": {"emb_params": vectors(2)}}}, "--lora_weight")
    texts = PromptEncoder(towers, sort, options().text, lora_words=cat)
    assert not torch.equal(texts.encode("a cat").context, plain.context)

    wide = read_lora_words({lora: {"blob": {"emb_params": vectors(2, 32)}}}, "--lora_weight")
    with pytest.raises(CheckpointError, match=r"the word blob in --lora_weight .*have width 32"):
        PromptEncoder(make_towers("sd1")[0], sort, options().text, lora_words=wide)
    with pytest.raises(
        CheckpointError, match=r"the word blob in .*is not a textual inversion: it contains t5"
    ):
        read_lora_words({lora: {"blob": {"t5": vectors(), "x": vectors()}}}, "--lora_weight")

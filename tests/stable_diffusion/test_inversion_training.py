"""Training of textual inversion, against plain transformers and autograd."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers import CLIPTokenizer

from encoders.inversion import LearnedWordVectors, write_vectors
from modules.errors import OptionError
from protocols.loading import Placement
from protocols.requests import Prompt
from stable_diffusion.family import StableDiffusion, with_inversion
from stable_diffusion.inversion_learning import OBJECT_SENTENCES, STYLE_SENTENCES, with_templates_and_command
from stable_diffusion.sd1.options import Sd1InversionTrainingOptions
from stable_diffusion.sdxl.options import SdxlInversionTrainingOptions
from stable_diffusion.textual_inversion import SDXL_TENSOR_NAMES
from stable_diffusion.towers import LazyTextEncoder, TextEncoderTraining
from stable_diffusion.training_options import InversionOptions
from tests.faults.messages import run_here, succeed_here
from tests.stable_diffusion.test_training_step import (
    CPU,
    KINDS,
    make_batch,
    make_family,
    plain_encoders,
    plain_loss,
)
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1, write_sdxl
from training.data.live import LiveTextEncoders
from training.loss import NoisyBatch
from training.targets.passes import training_loss

WORD = "zorb"
CAPTIONS = (f"a {WORD}, red", f"a cat and {WORD}")
RECORDS = {
    "sd1": Sd1InversionTrainingOptions,
    "sd2": Sd1InversionTrainingOptions,
    "sdxl": SdxlInversionTrainingOptions,
}


def inversion_family(kind: str, folder: Path, **values: Any) -> StableDiffusion:
    options = RECORDS[kind].from_defaults(token_string=WORD, **values)
    return with_inversion(make_family(kind, folder, options=options, text_training=TextEncoderTraining({})))


def make_rows(family: StableDiffusion) -> tuple[LearnedWordVectors, LiveTextEncoders]:
    """Load the text encoders, with rows in them that learn."""
    encoders = [encoder for encoder in family.text_encoders() if isinstance(encoder, LazyTextEncoder)]
    texts = LiveTextEncoders(encoders, encoders)
    texts.load(CPU)
    assert family.custom_network is not None
    torch.manual_seed(0)
    rows = family.custom_network.make(torch.nn.ModuleDict(texts.networks), True).requires_grad_(True)
    assert isinstance(rows, LearnedWordVectors)
    return rows, texts


def with_captions(noisy_batch: NoisyBatch) -> NoisyBatch:
    return replace(noisy_batch, batch=replace(noisy_batch.batch, captions=CAPTIONS))


@contextlib.contextmanager
def take_embedded(text: Any, embedded: Tensor) -> Iterator[None]:
    """Let a text encoder of transformers read these rows, B L C, in place of those of its ids."""
    hook = text.embeddings.token_embedding.register_forward_hook(lambda module, inputs, output: embedded)
    yield
    hook.remove()


def encode_plainly(kind: str, folder: Path, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs for CAPTIONS by transformers: table cat(old, rows), pooled state of the end token."""
    results: dict[str, Tensor] = {}
    for number, (encoder, new) in enumerate(zip(plain_encoders(kind, folder), rows.values(), strict=True)):
        encoder.requires_grad_(False)
        tokenizer = CLIPTokenizer.from_pretrained(
            folder / (f"tokenizer_{number + 1}" if number else "tokenizer")
        )
        text = getattr(encoder, "text_model", encoder)
        old = text.embeddings.token_embedding.weight
        table = torch.cat([old, new])
        states, pooled = [], []
        for caption in CAPTIONS:
            ids: list[int] = []
            for part in re.split(f"({WORD})", caption):
                new_ids = [len(old) + place for place in range(len(new))]
                ids += new_ids if part == WORD else tokenizer(part, add_special_tokens=False).input_ids
            row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            end = len(row) - 1
            row += [tokenizer.pad_token_id] * (77 - len(row))
            embedded = torch.nn.functional.embedding(torch.tensor([row]), table)
            with take_embedded(text, embedded):
                output = encoder(torch.tensor([row]).clamp(max=len(old) - 1), output_hidden_states=True)
            states.append(output.hidden_states[-2][0] if kind == "sdxl" else output.last_hidden_state[0])
            if number:
                last = text.final_layer_norm(output.hidden_states[-1][0])
                pooled.append(encoder.text_projection(last[end]))
        results[f"hidden_state{number + 1}" if kind == "sdxl" else "hidden_state"] = torch.stack(states)
        if pooled:
            results["pool2"] = torch.stack(pooled)
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_rows_are_those_of_autograd(kind: str, tmp_path: Path) -> None:
    family = inversion_family(kind, tmp_path, num_vectors_per_token=2)
    noisy_batch = with_captions(make_batch(family, (20, 500)))
    unet: Any = family.load_dit(Placement(CPU)).requires_grad_(False)
    rows, texts = make_rows(family)

    found = replace(noisy_batch, batch=texts.add_encoded_captions(noisy_batch.batch))
    loss = training_loss(family, unet, found, contextlib.nullcontext)
    loss.backward()

    plain = {name: Parameter(tensor.detach().clone()) for name, tensor in rows.named_parameters()}
    tensors = {**noisy_batch.batch.tensors, **encode_plainly(kind, tmp_path / kind, plain)}
    expected = plain_loss(
        unet, family, replace(noisy_batch, batch=replace(noisy_batch.batch, tensors=tensors))
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in rows.named_parameters():
        grad = plain[name].grad
        assert grad is not None
        assert parameter.grad is not None
        assert (grad.abs().amax(dim=1) > 0).all(), "each vector learns"
        torch.testing.assert_close(parameter.grad, grad, rtol=2e-3, atol=2e-3 * float(grad.abs().max()))
    assert not any(
        weight.requires_grad for network in texts.networks.values() for weight in network.parameters()
    )


def test_rows_alone_are_the_whole_table_with_its_old_rows_copied_back(tmp_path: Path) -> None:
    family = inversion_family("sd1", tmp_path, num_vectors_per_token=2)
    rows, texts = make_rows(family)
    encoder = texts.encoders[0]
    (network,) = texts.networks.values()
    growing: Any = network.embeddings.token_embedding  # type: ignore[union-attr]
    old = growing.weight.detach().clone()
    full = Parameter(torch.cat([old, rows.emb_params.detach()]))
    target = torch.randn(2, 77, old.shape[1], generator=torch.Generator().manual_seed(4))
    alone = torch.optim.AdamW(rows.parameters(), lr=0.01, weight_decay=0.1)
    copied = torch.optim.AdamW([full], lr=0.01, weight_decay=0.1)
    batch = with_captions(make_batch(replace(family, text_training=None), (1, 2))).batch

    def learn(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        states = texts.add_encoded_captions(batch).tensor("hidden_state")
        (states - target).square().mean().backward()
        optimizer.step()

    ours = growing.forward
    for _ in range(4):
        growing.forward = ours
        learn(alone)
        growing.forward = lambda ids: torch.nn.functional.embedding(ids, full)
        learn(copied)
        with torch.no_grad():
            full[: len(old)] = old

    assert encoder.name == "text_encoder"
    assert torch.equal(rows.emb_params, full[len(old) :])


def test_rows_begin_with_the_tokens_of_the_initial_words_in_each_encoder(tmp_path: Path) -> None:
    family = inversion_family("sdxl", tmp_path, num_vectors_per_token=3, init_word="cat red")
    rows, texts = make_rows(family)

    for name, (encoder, network) in zip(
        ("clip_l", "clip_g"), zip(texts.encoders, texts.networks.values(), strict=True), strict=True
    ):
        assert isinstance(encoder, LazyTextEncoder)
        ids = family.files.tokenizers[encoder._index].tokenize("cat red")
        table: Any = network.embeddings.token_embedding.weight  # type: ignore[union-attr]
        expected = table[[ids[place % len(ids)] for place in range(3)]]
        assert torch.equal(rows.get_parameter(name), expected)
    assert rows.clip_l.shape[1] != rows.clip_g.shape[1] or not torch.equal(rows.clip_l, rows.clip_g)


def test_random_rows_have_the_spread_of_the_table(tmp_path: Path) -> None:
    rows, texts = make_rows(inversion_family("sd1", tmp_path, num_vectors_per_token=75))
    (network,) = texts.networks.values()
    table: Any = network.embeddings.token_embedding.weight  # type: ignore[union-attr]

    assert float(rows.emb_params.detach().std() / table.std()) == pytest.approx(1, abs=0.1)
    assert abs(float(rows.emb_params.detach().mean())) < 0.1 * float(table.std())


def test_sentences_are_those_of_the_paper() -> None:
    assert len(OBJECT_SENTENCES) == len(set(OBJECT_SENTENCES)) == 27
    assert (len(STYLE_SENTENCES), len(set(STYLE_SENTENCES))) == (19, 17)
    assert "a photo of the weird {}" in OBJECT_SENTENCES
    assert "the painting in the style of {}" in STYLE_SENTENCES


STEP = f"{WORD}-step00000002"


@pytest.mark.parametrize(
    ("given", "sample", "expected"),
    [
        ({"use_object_template": True}, {"prompt": "a cat", "example": None}, f"a photo of a {STEP}"),
        (
            {"use_style_template": True},
            {"prompt": "cats", "example": None},
            f"a painting in the style of {STEP}",
        ),
        ({}, {"prompt": "a cat", "example": None}, f"a photo of {STEP}"),  # a caption without the word
        ({}, {"prompt": None, "example": None}, f"a photo of {STEP}"),
        ({}, {"prompt": f"a {WORD}, red", "example": None}, f"a {STEP}, red"),
        ({"num_vectors_per_token": 3}, {"prompt": f"{WORD}2 and {WORD}"}, f"{STEP}2 and {STEP}"),
        ({"use_object_template": True}, {"prompt": "a user's"}, "a user's"),
    ],
)
def test_the_next_command_has_the_word_by_the_name_of_its_file(
    given: dict[str, Any], sample: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    options = Sd1InversionTrainingOptions.from_defaults(token_string=WORD, **given)
    model = make_family("sd1", tmp_path)
    network = with_templates_and_command(model.word_network(options.word), options)

    file = tmp_path / f"{STEP}.safetensors"
    assert network.write_prompt is not None
    prompt = network.write_prompt(file, sample, network.sentences)
    words = [*network.generate(file, {**sample, "prompt": prompt}, [])]

    assert words[words.index("--prompt") + 1] == prompt == expected


def test_the_next_command_has_the_sampler_and_the_layer_of_texts(tmp_path: Path) -> None:
    options = Sd1InversionTrainingOptions.from_defaults(token_string=WORD, clip_skip=2)
    network = with_templates_and_command(make_family("sd1", tmp_path).word_network(options.word), options)

    assert network.generate is not None
    words = [*network.generate(tmp_path / "x.safetensors", {"solver": "euler_a"}, [])]

    assert words[words.index("--sampler") + 1] == "euler_a"
    assert words[words.index("--clip_skip") + 1] == "2"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("Zorb", "Pass zorb"),
        ("a zorb", "has spaces"),
        ("zorb1", "ends with a digit"),
        ("zorb(x)", "contains ("),
        ("", "is empty"),
    ],
)
def test_words_that_cannot_be_new_ones_are_refused(word: str, told: str) -> None:
    with pytest.raises(OptionError, match=re.escape(told)):
        InversionOptions.from_defaults(token_string=word)


def test_diffusers_reads_the_file_as_we_do(tmp_path: Path) -> None:
    family = inversion_family("sdxl", tmp_path, num_vectors_per_token=2)
    rows, texts = make_rows(family)
    write_vectors(rows, tmp_path / "zorb.safetensors", None, {})
    vectors = load_file(tmp_path / "zorb.safetensors")
    encoders = plain_encoders("sdxl", tmp_path / "sdxl")
    loader: Any = TextualInversionLoaderMixin()
    loader.hf_device_map, loader.components = None, {}  # of a pipeline

    for number, (name, ours, theirs) in enumerate(
        zip(SDXL_TENSOR_NAMES, texts.encoders, encoders, strict=True)
    ):
        folder = tmp_path / "sdxl" / (f"tokenizer_{number + 1}" if number else "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        loader.load_textual_inversion(vectors[name], token=WORD, tokenizer=tokenizer, text_encoder=theirs)
        prompt = loader.maybe_convert_prompt(f"a {WORD} and a cat", tokenizer)
        row = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = theirs(row, output_hidden_states=True).hidden_states[-2][0]
            found = ours.encode([Prompt(f"a {WORD} and a cat")])[0][f"hidden_state{number + 1}"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Commands


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
        text = "a cat" if index == 2 else f"a red {WORD}, number {index}"
        (tmp_path / "pictures" / f"{index}.txt").write_text(text, encoding="utf-8")
    config = '[general]\nresolution = 64\ncaption_extension = ".txt"\n\n[[datasets]]\nbatch_size = 3\n\n'
    config += '[[datasets.subsets]]\nimage_dir = "pictures"\n'
    (tmp_path / "dataset.toml").write_text(config, encoding="utf-8")
    tokenizer_folder(tmp_path / "tokenizers")
    return tmp_path


def words_of(model: Path, *words: str) -> list[str]:
    files = ["--pretrained_model_name_or_path", model.name, "--tokenizer_cache_dir", "tokenizers"]
    learning = ["--max_train_steps", "2", "--seed", "1", "--learning_rate", "0.05", "--cache_latents"]
    places = ["--dataset_config", "dataset.toml", "--output_dir", "output", "--token_string", WORD]
    return [*files, *learning, *places, *words]


def picture(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.int64))


LINE = f"a red {WORD} --n ugly --w 64 --h 64 --d 5 --s 2 --l 4"


def test_samples_are_the_pictures_of_gen_img_and_a_resumed_run_is_the_same(folder: Path) -> None:
    model = write_sdxl(folder)
    (folder / "samples.txt").write_text(f"{LINE}\n", encoding="utf-8")
    script = "sdxl_train_textual_inversion.py"
    sizes = ["--num_vectors_per_token", "2"]
    samples = ["--sample_prompts", "samples.txt", "--sample_every_n_steps", "2"]
    saving = ["--save_every_n_steps", "1", "--save_state"]

    told = succeed_here(script, *words_of(model, *sizes, *samples, *saving), folder=folder)
    state = str(next((folder / "output").glob("*000001-state")))
    resumed = [*sizes, "--resume", state, "--output_dir", "resumed"]
    succeed_here(script, *words_of(model, *resumed), folder=folder)

    assert f"1 of 3 captions lack the word {WORD}" in told
    assert "norms of the vectors of zorb" in told or "Such a word drowns" in told
    saved = folder / "output" / f"{WORD}.safetensors"
    tensors, again = load_file(saved), load_file(folder / "resumed" / saved.name)
    assert tensors.keys() == again.keys() == {"clip_l", "clip_g"}
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    assert {len(tensor) for tensor in tensors.values()} == {2}
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert metadata["modelspec.trigger_phrase"] == WORD
    assert metadata["modelspec.title"] == WORD
    assert "ss_network_dim" not in metadata
    files = [
        "--ckpt",
        model.name,
        "--tokenizer_cache_dir",
        "tokenizers",
        "--prompt",
        LINE,
        "--sampler",
        "ddim",
    ]
    embedding = ["--textual_inversion_embeddings", f"output/{WORD}.safetensors"]
    succeed_here("gen_img.py", *files, *embedding, "--outdir", "with", folder=folder)
    succeed_here("gen_img.py", *files, "--outdir", "without", folder=folder)
    (sample,) = (folder / "output" / "sample").glob("*_000002_00_*.png")
    (generated,) = (folder / "with").glob("*.png")
    (base,) = (folder / "without").glob("*.png")
    assert (picture(sample) - picture(generated)).abs().max() <= 1
    assert (picture(sample) - picture(base)).abs().max() > 2


def rejection(script: str, folder: Path, *words: str) -> str:
    code, told = run_here(script, *words, folder=folder)
    assert code != 0
    assert "Traceback" not in told, told
    return told


@pytest.mark.parametrize(
    ("word", "told"),
    [("<cat-toy>", "contains <"), ("*", "contains *"), ("con", "is a device"), ("a/b", "contains /")],
)
def test_a_word_that_names_no_file_is_refused_by_the_option_that_was_typed(
    tmp_path: Path, word: str, told: str
) -> None:
    words = ["--dataset_config", "d.toml", "--output_dir", "output", "--token_string", word]

    said = rejection("train_textual_inversion.py", tmp_path, *words)

    assert "--output_name" not in said
    assert f"--token_string {word!r}" in said
    assert told in said


def test_mistakes_are_named(folder: Path) -> None:
    model, script = write_sd1(folder), "train_textual_inversion.py"
    words = words_of(model)
    save_file({"emb_params": torch.zeros(1, 9)}, folder / "wide.safetensors")
    save_file({"clip_l": torch.zeros(1, 8), "clip_g": torch.zeros(1, 8)}, folder / "xl.safetensors")

    assert "knows this word already" in rejection(script, folder, *words, "--token_string", "a")
    assert "its vectors have width 9" in rejection(script, folder, *words, "--weights", "wide.safetensors")
    assert "--weights xl.safetensors" in rejection(script, folder, *words, "--weights", "xl.safetensors")
    assert "--num_vectors_per_token" in rejection(script, folder, *words, "--num_vectors_per_token", "76")
    assert "number of vectors" in rejection(script, folder, *words, "--network_dim", "4")
    assert "train_network.py" in rejection(script, folder, *words, "--network_module", "networks.lora")
    assert "Omit it" in rejection(script, folder, *words, "--cache_text_encoder_outputs")
    assert "safetensors" in rejection(script, folder, *words, "--save_model_as", "pt")
    assert "--token_string is missing" in rejection(script, folder, *words[:-2])
    assert "no caption has this word" in rejection(script, folder, *words, "--token_string", "blub")
    config = (folder / "dataset.toml").read_text(encoding="utf-8")
    (folder / "dataset.toml").write_text(f"{config}is_reg = true\n", encoding="utf-8")
    assert "regularization" in rejection(script, folder, *words)


def test_sentences_need_no_captions(folder: Path) -> None:
    for file in (folder / "pictures").glob("*.txt"):
        file.unlink()
    words = words_of(write_sd1(folder), "--use_object_template", "--max_train_steps", "1")

    succeed_here("train_textual_inversion.py", *words, "--output_name", "other", folder=folder)

    assert load_file(folder / "output" / "other.safetensors").keys() == {"emb_params"}

"""A LoRA and the vectors of a new word, learned together (--train_embedding)."""

import contextlib
import copy
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from networks.builtin_networks import build_network
from networks.options import NetworkOptions
from protocols.loading import Placement
from stable_diffusion.towers import LazyTextEncoder, TextEncoderTraining
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.stable_diffusion.test_inversion_training import (
    LINE,
    WORD,
    encode_plainly,
    folder,
    picture,
    rejection,
    with_captions,
)
from tests.stable_diffusion.test_training_step import CPU, make_batch, make_family, plain_loss
from tests.tiny.loras import network_options
from tests.tiny.stable_diffusion import write_sd1, write_sdxl
from training.data.live import LiveTextEncoders
from training.features.embedding import EmbeddingOptions
from training.features.embedding_rows import make_word_vectors
from training.learner import find_network_spec
from training.saving.files import Names, find_results
from training.targets.passes import training_loss
from training.trainable import LearningRates, prepare_network

__all__ = ("folder",)


@pytest.mark.slow_cases("sdxl")
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_two_steps_are_those_of_plain_torch(kind: str, tmp_path: Path) -> None:
    """Two groups of SGD, one norm of all gradients; the plain encoders are those of transformers."""
    options = EmbeddingOptions.from_defaults(train_embedding=WORD, embedding_vectors=2, embedding_lr=3.0)
    base = make_family(kind, tmp_path, text_training=TextEncoderTraining({}))
    word = options.word()
    family = base.with_word_in_texts(word)
    noisy_batch = with_captions(make_batch(replace(base, text_training=None), (20, 500)))
    unet: Any = family.load_dit(Placement(CPU)).requires_grad_(False)
    twin_unet = copy.deepcopy(unet)
    torch.manual_seed(1)
    arguments = network_options("lora", 2, alpha=2.0)
    network = build_network("networks.lora", arguments, unet, encoders={})
    twin = build_network("networks.lora", arguments, twin_unet, encoders={})
    twin.load_state_dict(network.state_dict())
    for lora in (network, twin):
        lora.attach()
    encoders = [encoder for encoder in family.text_encoders() if isinstance(encoder, LazyTextEncoder)]
    texts = LiveTextEncoders(encoders, word_encoders=encoders)
    texts.load(CPU)
    assert texts.networks == {}
    of_word = base.word_network(word)
    rows = make_word_vectors(
        word, of_word, False, texts.networks_with_new_word, seed=3, has_initial_values=True
    )
    network_spec = find_network_spec(family, NetworkOptions.from_defaults())
    trainable = prepare_network(
        network, LearningRates(1.0), max_norm=None, device=CPU, network_spec=network_spec
    )
    trainable = rows.add_to(trainable, learning_rate=1.0, total_steps=2, device=CPU)
    plain_rows = {name: Parameter(tensor.detach().clone()) for name, tensor in rows.module.named_parameters()}
    plain_parameters = [*twin.parameters(), *plain_rows.values()]
    begun = [parameter.detach().clone() for parameter in plain_parameters]
    # a word is not pulled to 0
    assert [group.get("weight_decay") for group in trainable.groups] == [None, 0.0]
    ours = torch.optim.SGD([{**group} for group in trainable.groups])
    of_rows = {"params": [*plain_rows.values()], "lr": 3.0}
    plain = torch.optim.SGD([{"params": [*twin.parameters()], "lr": 1.0}, of_rows])

    for _ in range(2):
        found = replace(noisy_batch, batch=texts.add_encoded_captions(noisy_batch.batch))
        training_loss(family, unet, found, contextlib.nullcontext).backward()
        torch.nn.utils.clip_grad_norm_(trainable.parameters, 1.0)
        tensors = {**noisy_batch.batch.tensors, **encode_plainly(kind, tmp_path / kind, plain_rows)}
        batch = replace(noisy_batch, batch=replace(noisy_batch.batch, tensors=tensors))
        plain_loss(twin_unet, family, batch).backward()
        torch.nn.utils.clip_grad_norm_(plain_parameters, 1.0)
        for optimizer in (ours, plain):
            optimizer.step()
            optimizer.zero_grad()

    def changes(parameters: Sequence[Parameter]) -> Tensor:
        return torch.cat([(new.detach() - old).flatten() for new, old in zip(parameters, begun, strict=True)])

    expected = changes(plain_parameters)
    num_rows = sum(parameter.numel() for parameter in plain_rows.values())
    for part in (slice(0, -num_rows), slice(-num_rows, None)):
        difference = (changes(trainable.parameters) - expected)[part].norm()
        assert difference < 5e-3 * expected[part].norm()
    assert expected[-num_rows:].norm() > 0.01


def words_of(model: Path, *words: str) -> list[str]:
    files = ["--pretrained_model_name_or_path", model.name, "--tokenizer_cache_dir", "tokenizers"]
    learning = ["--max_train_steps", "2", "--seed", "1", "--learning_rate", "0.01", "--cache_latents"]
    places = ["--dataset_config", "dataset.toml", "--output_dir", "output", "--output_name", "cat"]
    word = ["--train_embedding", WORD, "--embedding_lr", "0.05", "--network_dim", "2"]
    return [*files, *learning, *places, *word, *words]


def without_word(words: list[str]) -> list[str]:
    place = words.index("--train_embedding")
    return [*words[:place], *words[place + 4 :]]


@pytest.mark.slow
def test_a_word_learns_alone_by_the_script_of_loras(folder: Path) -> None:
    model = write_sdxl(folder)
    words = words_of(model)
    words = [*words[: words.index("--embedding_lr")], "--embedding_only", "--output_name", WORD]
    said = succeed_here("sdxl_train_network.py", *words, folder=folder)

    rows = load_file(folder / "output" / f"{WORD}.safetensors")
    assert sorted(rows) == ["clip_g", "clip_l"]
    assert "--textual_inversion_embeddings" in said
    wrong = [*words, "--unet_lr", "1", "--network_args", "conv_dim=2"]
    code, said = run_here("sdxl_train_network.py", *wrong, folder=folder)
    assert_one_message(code, said, "--network_args, --unet_lr. Omit")


def test_a_lora_and_a_word_learn_together_and_a_resumed_run_is_the_same(folder: Path) -> None:
    model = write_sdxl(folder)
    (folder / "samples.txt").write_text(f"{LINE}\n", encoding="utf-8")
    script = "sdxl_train_network.py"
    sizes = ["--embedding_vectors", "2", "--network_train_unet_only", "--embedding_file"]
    samples = ["--sample_prompts", "samples.txt", "--sample_every_n_steps", "2"]
    saving = ["--save_every_n_steps", "1", "--save_state", "--save_last_n_steps", "1"]

    told = succeed_here(script, *words_of(model, *sizes, *samples, *saving), folder=folder)
    state = str(next((folder / "output").glob("*00000001-state")))
    resumed = [*sizes, "--resume", state, "--output_dir", "resumed"]
    succeed_here(script, *words_of(model, *resumed), folder=folder)

    assert f"1 of 3 captions lack the word {WORD}" in told
    assert f"new word:      {WORD}, 2 vectors" in told
    assert f"0.05: the word {WORD}" in told
    saved = folder / "output" / "cat.safetensors"
    tensors, again = load_file(saved), load_file(folder / "resumed" / saved.name)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    rows = {name: tensors[f"bundle_emb.{WORD}.{name}"] for name in ("clip_l", "clip_g")}
    assert {len(tensor) for tensor in rows.values()} == {2}
    assert not any(name.startswith("lora_te") for name in tensors)
    assert any(name.startswith("lora_unet") for name in tensors)
    first = load_file(folder / "output" / "cat-step00000001.safetensors")
    assert not torch.equal(first[f"bundle_emb.{WORD}.clip_g"], rows["clip_g"])
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.trigger_phrase"] == metadata["ss_train_embedding"] == WORD
    assert (metadata["ss_network_dim"], metadata["ss_embedding_lr"]) == ("2", "0.05")

    alone = load_file(folder / "output" / f"cat_{WORD}.safetensors")
    assert alone.keys() == rows.keys()
    assert all(torch.equal(alone[name], tensor) for name, tensor in rows.items())
    with safe_open(folder / "output" / f"cat_{WORD}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert metadata["modelspec.trigger_phrase"] == WORD
    assert "ss_network_dim" not in metadata
    names = {path.name for path in find_results(Names(folder / "output", "cat")) if path.is_file()}
    assert {"cat.safetensors", f"cat_{WORD}.safetensors"} < names

    (sample,) = (folder / "output" / "sample").glob("*_000002_00_*.png")
    files = ["--ckpt", model.name, "--tokenizer_cache_dir", "tokenizers", "--prompt", LINE]
    plain = {name: tensor for name, tensor in tensors.items() if "bundle_emb" not in name}
    save_file(plain, folder / "plain.safetensors")
    for lora, outdir in (("output/cat.safetensors", "with"), ("plain.safetensors", "without")):
        network = ["--network_module", "networks.lora", "--network_weights", lora]
        succeed_here("gen_img.py", *files, "--sampler", "ddim", *network, "--outdir", outdir, folder=folder)
    (generated,) = (folder / "with").glob("*.png")
    (base,) = (folder / "without").glob("*.png")
    assert (picture(sample) - picture(generated)).abs().max() <= 1
    assert (picture(sample) - picture(base)).abs().max() > 2


def test_vectors_learn_in_their_share_of_the_steps_and_the_lora_to_the_end(folder: Path) -> None:
    """Here with LoRAs in the text encoder too, and an average of all."""
    model = write_sd1(folder)
    words = words_of(model, "--embedding_until", "0.5", "--save_every_n_steps", "1", "--ema_decay", "0.5")

    told = succeed_here("train_network.py", *words, "--max_train_steps", "3", folder=folder)

    assert f"{WORD}, 1 vector, in the first 50% of the steps" in told
    name = f"bundle_emb.{WORD}.emb_params"
    first, second, last = (
        load_file(folder / "output" / f"cat{step}.safetensors")
        for step in ("-step00000001", "-step00000002", "")
    )
    average = load_file(folder / "output" / "cat-ema.safetensors")
    assert not torch.equal(first[name], second[name])
    assert torch.equal(second[name], last[name])
    assert not torch.equal(average[name], last[name])
    for part in ("lora_te_", "lora_unet_"):
        up = next(key for key in last if key.startswith(part) and key.endswith("lora_up.weight"))
        assert not torch.equal(second[up], last[up])


def test_a_run_continues_with_the_word_of_a_lora(folder: Path) -> None:
    """Nothing but the LoRA is given again; without the option the word is lost, which is said."""
    words = words_of(write_sd1(folder), "--max_train_steps", "1", "--network_train_unet_only")
    further = ["--network_weights", "output/cat.safetensors", "--embedding_init_word", "a"]
    succeed_here("train_network.py", *words, folder=folder)

    told = succeed_here("train_network.py", *words, *further, "--output_name", "more", folder=folder)
    lost = succeed_here("train_network.py", *without_word(words), *further[:2], folder=folder)

    assert told.count(f"The vectors of {WORD} continue from output") == 1
    assert "means nothing" not in told
    name = f"bundle_emb.{WORD}.emb_params"
    first = load_file(folder / "output" / "more.safetensors")[name]
    again = next((folder / "output").glob("cat.before-*")) / "cat.safetensors"
    assert (first - load_file(again)[name]).abs().max() < 0.06  # a step of AdamW at this rate
    assert lost.count(f"contains the word {WORD}, which is not trained further") == 1
    assert not any("bundle_emb" in key for key in load_file(folder / "output" / "cat.safetensors"))


def test_check_and_plan_know_the_word(folder: Path) -> None:
    words = words_of(write_sd1(folder), "--cache_latents_to_disk", "--max_train_steps", "1")
    succeed_here("train_network.py", *words, folder=folder)

    printed = io.StringIO()

    code, told = run_here("train_network.py", *words, "--check", folder=folder, printed=printed)
    planned = io.StringIO()
    plan = [*words, "--plan", "--embedding_vectors", "75"]
    assert run_here("train_network.py", *plan, folder=folder, printed=planned)[0] == 0
    further = ["--check", "--train_embedding", "blob"]
    rejected_code, _ = run_here("train_network.py", *words, *further, folder=folder, printed=printed)

    assert code == 0, told
    assert f"1 of 3 captions lack the word {WORD}" in printed.getvalue()
    assert "weights of text encoders" in planned.getvalue()
    assert rejected_code != 0
    assert "no caption has this word" in printed.getvalue()
    for further, reason in (
        (["--train_embedding", "a"], "--train_embedding a: the text encoder knows this word already"),
        (["--embedding_init_word", " "], "--embedding_init_word ' ': the text encoder has no token"),
        (["--embedding_weights", "none.safetensors"], "none.safetensors"),
    ):
        assert reason in rejection("train_network.py", folder, *words, "--check", *further)


def test_mistakes_with_a_word_are_named(folder: Path) -> None:
    model, script = write_sd1(folder), "train_network.py"
    words = words_of(model)
    save_file({"clip_l": torch.zeros(1, 8), "clip_g": torch.zeros(1, 8)}, folder / "xl.safetensors")

    def told(*further: str, without: int = 0) -> str:
        return rejection(script, folder, *words[: len(words) - without], *further)

    assert "the text encoder knows this word already" in told("--train_embedding", "a")
    assert "Pass zorb" in told("--train_embedding", "Zorb")
    assert "no caption has this word" in told("--train_embedding", "blub")
    assert "cannot be cached" in told("--cache_text_encoder_outputs")
    assert "--embedding_vectors" in told("--embedding_vectors", "76")
    assert "--embedding_init_word" in told("--embedding_init_word", " ")
    assert "--embedding_weights xl.safetensors" in told("--embedding_weights", "xl.safetensors")
    assert "--embedding_until" in told("--embedding_until", "1.5")
    assert "no such file" in told("--embedding_weights", "none.safetensors")
    code, text = run_here(script, *without_word(words), "--embedding_lr", "0.1", folder=folder)
    assert code != 0
    assert "--train_embedding" in text

"""Training of extended textual inversion (XTI): vectors of a word for each cross-attention of the U-Net."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from protocols.loading import Placement
from stable_diffusion.family import with_extended_inversion
from stable_diffusion.layer_texts import list_cross_attentions
from stable_diffusion.sd1.options import Sd1ExtendedInversionTrainingOptions
from stable_diffusion.towers import TextEncoderTraining
from tests.faults.messages import succeed_here
from tests.stable_diffusion.test_inversion_training import (
    LINE,
    WORD,
    encode_plainly,
    folder,
    make_rows,
    picture,
    rejection,
    with_captions,
    words_of,
)
from tests.stable_diffusion.test_training_step import CPU, make_batch, make_family, plain_loss
from tests.tiny.stable_diffusion import write_sd1
from training.targets.passes import training_loss

__all__ = ("folder",)

SCRIPT = "train_textual_inversion_XTI.py"


@pytest.mark.slow
def test_gradients_are_those_of_a_network_whose_layers_are_given_their_states(tmp_path: Path) -> None:
    options = Sd1ExtendedInversionTrainingOptions.from_defaults(token_string=WORD, num_vectors_per_token=2)
    base = make_family("sd1", tmp_path, options=options, text_training=TextEncoderTraining({}))
    twin: Any = base.load_dit(Placement(CPU)).requires_grad_(False)
    family = with_extended_inversion(base)
    noisy_batch = with_captions(make_batch(family, (20, 500)))
    unet: Any = family.load_dit(Placement(CPU)).requires_grad_(False)
    rows, texts = make_rows(family)
    layers = list_cross_attentions([name for name, _ in twin.named_parameters()])
    for index, parameter in enumerate(rows.parameters()):  # each layer's own
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))

    found = replace(noisy_batch, batch=texts.add_encoded_captions(noisy_batch.batch))
    loss = training_loss(family, unet, found, contextlib.nullcontext)
    loss.backward()

    plain = {name: Parameter(tensor.detach().clone()) for name, tensor in rows.named_parameters()}
    assert plain.keys() == layers.keys()
    states = {}
    for name, path in layers.items():
        states[name] = encode_plainly("sd1", tmp_path / "sd1", {"emb_params": plain[name]})["hidden_state"]

        def give(module: Any, inputs: Any, named: Any, name: str = name) -> Any:
            return inputs, {**named, "encoder_hidden_states": states[name]}

        for part, module in twin.get_submodule(path).named_modules():
            if part.endswith(".attn2"):
                module.register_forward_pre_hook(give, with_kwargs=True)
    tensors = {**noisy_batch.batch.tensors, "hidden_state": states["MID"]}
    batch = replace(noisy_batch, batch=replace(noisy_batch.batch, tensors=tensors))
    expected = plain_loss(twin, base, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in rows.named_parameters():
        grad = plain[name].grad
        assert grad is not None
        assert parameter.grad is not None
        assert (grad.abs().amax(dim=1) > 0).all()
        torch.testing.assert_close(parameter.grad, grad, rtol=2e-3, atol=2e-3 * float(grad.abs().max()))


def test_samples_are_the_images_of_gen_img_and_a_resumed_run_is_the_same(folder: Path) -> None:
    model = write_sd1(folder)
    (folder / "samples.txt").write_text(f"{LINE}\n", encoding="utf-8")
    sizes = ["--num_vectors_per_token", "2", "--init_word", "cat"]
    samples = ["--sample_prompts", "samples.txt", "--sample_every_n_steps", "2"]
    saving = ["--save_every_n_steps", "1", "--save_state"]

    told = succeed_here(SCRIPT, *words_of(model, *sizes, *samples, *saving), folder=folder)
    state = str(next((folder / "output").glob("*00000001-state")))
    resumed = [*sizes, "--resume", state, "--output_dir", "resumed"]
    succeed_here(SCRIPT, *words_of(model, *resumed), folder=folder)
    further = [*sizes[:2], "--weights", f"output/{WORD}.safetensors", "--output_dir", "further"]
    succeed_here(SCRIPT, *words_of(model, *further, "--max_train_steps", "1"), folder=folder)

    assert "--XTI_embeddings" in told
    saved, again = (load_file(folder / place / f"{WORD}.safetensors") for place in ("output", "resumed"))
    assert "MID" in saved
    assert {len(vectors) for vectors in saved.values()} == {2}
    assert all(torch.equal(vectors, again[name]) for name, vectors in saved.items())
    assert len({vectors.numpy().tobytes() for vectors in saved.values()}) == len(saved)
    later = load_file(folder / "further" / f"{WORD}.safetensors")
    assert all(0 < (later[name] - saved[name]).abs().max() < 0.06 for name in saved)

    (sample,) = (folder / "output" / "sample").glob("*_000002_00_*.png")
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
    succeed_here(
        "gen_img.py",
        *files,
        "--XTI_embeddings",
        f"output/{WORD}.safetensors",
        "--outdir",
        "with",
        folder=folder,
    )
    save_file({"emb_params": saved["MID"]}, folder / f"{WORD}.safetensors")
    one = ["--textual_inversion_embeddings", f"{WORD}.safetensors", "--outdir", "one"]
    succeed_here("gen_img.py", *files, *one, folder=folder)
    (generated,) = (folder / "with").glob("*.png")
    (other,) = (folder / "one").glob("*.png")
    assert (picture(sample) - picture(generated)).abs().max() <= 1
    assert (picture(sample) - picture(other)).abs().max() > 1


@pytest.mark.slow
def test_mistakes_are_named(folder: Path) -> None:
    words = words_of(write_sd1(folder))
    save_file({"emb_params": torch.zeros(1, 8)}, folder / "plain.safetensors")

    told = rejection(SCRIPT, folder, *words, "--weights", "plain.safetensors")

    assert "is not an extended textual inversion" in told


def test_a_word_is_learned_on_an_inpainting_model(folder: Path) -> None:
    model = write_sd1(folder, channels=9, name="nine.safetensors")
    words = words_of(model, "--init_word", "cat", "--max_train_steps", "1", "--train_inpainting")
    words.remove("--cache_latents")

    succeed_here(SCRIPT, *words, folder=folder)

    assert "MID" in load_file(folder / "output" / f"{WORD}.safetensors")

"""Lumina-Image-2.0 through the command lines equals diffusers: whole pipelines, and steps of training.

diffusers' pipeline ends guidance after a share of the steps instead of a share of data, and its normalisation
makes every row of a prediction as long as without guidance, where the release limits the length of the whole
(recorded vectors have that: tests/lumina). So here guidance is limited in neither way, or ends at a step that
both rules name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import Gemma2Model, PreTrainedTokenizerFast

import lumina_generate_image
from encoders.autoencoder import SCALE, SHIFT
from modules.media.reading import read_image
from tests.encoders.test_autoencoder import diffusers_autoencoder
from tests.faults.messages import succeed_here
from tests.lumina.making import in_diffusers
from tests.parity.running import assert_equal
from tests.parity.training import (
    RANK,
    Factors,
    Item,
    assert_steps_of_descent,
    descent,
    learning,
    mixed,
    ratio_of,
    shifted,
    shuffled,
    uniform_of,
)
from tests.tiny.lumina import GEMMA, TinyLumina, diffusers_state, gemma_state, write_tiny_lumina
from tests.tiny.project import write_plain_pictures

PROMPT, NEGATIVE, SYSTEM, SEED = "a red cat sits down", "dull", "Draw well.", 20
HEIGHT, WIDTH, STEPS, FLOW_SHIFT = 32, 48, 4, 6.0
RATE = 2.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyLumina:
    return write_tiny_lumina(tmp_path_factory.mktemp("models"))


def theirs(files: TinyLumina) -> Lumina2Pipeline:
    """diffusers' pipeline with the weights of these files, in float32 on the CPU."""
    config = {
        "vocab_size": GEMMA.vocabulary,
        "hidden_size": GEMMA.dim,
        "intermediate_size": GEMMA.ffn_dim,
        "num_hidden_layers": GEMMA.num_layers,
        "num_attention_heads": GEMMA.num_heads,
        "num_key_value_heads": GEMMA.num_kv_heads,
        "head_dim": GEMMA.head_width,
        "query_pre_attn_scalar": GEMMA.settings["query_pre_attn_scalar"],
        "attn_implementation": "eager",
    }
    text_encoder = Gemma2Model(Gemma2Model.config_class(**config)).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in gemma_state().items()}
    text_encoder.load_state_dict(state)
    vae = diffusers_autoencoder()
    vae.register_to_config(scaling_factor=SCALE, shift_factor=SHIFT)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.gemma2 / "tokenizer.json"), pad_token="<pad>", bos_token="<bos>"
    )
    pipe = Lumina2Pipeline(
        transformer=in_diffusers(load_file(files.dit)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("ours", "guided"), [(1.0, STEPS), (0.2, 2)], ids=["guided", "guided at first"])
def test_pictures_equal_those_of_diffusers(
    files: TinyLumina, tmp_path: Path, ours: float, guided: int
) -> None:
    words = [*files.models, "--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--system_prompt", SYSTEM]
    words += ["--image_size", str(HEIGHT), str(WIDTH), "--infer_steps", str(STEPS), "--seed", str(SEED)]
    words += ["--cfg_trunc_ratio", str(ours), "--renorm_cfg", "0", "--output_type", "latent_images"]

    lumina_generate_image.main([*words, "--device", "cpu", "--save_path", str(tmp_path)])

    low = FLOW_SHIFT * 0.001 / (1 + (FLOW_SHIFT - 1) * 0.001)
    asked = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "system_prompt": SYSTEM,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "sigmas": numpy.linspace(1, low, STEPS),
        "guidance_scale": 3.5,
        "cfg_trunc_ratio": guided / STEPS,
        "cfg_normalization": False,
        "generator": torch.Generator().manual_seed(SEED),
    }
    pipe = theirs(files)
    expected = pipe(**asked, output_type="latent").images
    (latents,) = (load_file(path)["latent"] for path in tmp_path.rglob("*_latent.safetensors"))
    assert_equal(latents[:, 0], expected[0], "latents")
    pixels = pipe.vae.decode(expected / SCALE + SHIFT).sample[0].clamp(-1, 1)
    (picture,) = tmp_path.rglob("*.png")
    levels = torch.from_numpy(read_image(picture)).permute(2, 0, 1)
    assert (levels - (pixels + 1) * 127.5).abs().max() < 0.51  # as near as bytes can be


@dataclass(frozen=True)
class LuminaItem(Item):
    mask: Tensor = torch.zeros(0)


def read_items(folder: Path) -> list[LuminaItem]:
    """What our caches hold, in the order of their names."""

    def tensor(path: Path, start: str) -> Tensor:
        (found,) = (value for name, value in load_file(path).items() if start in name)
        return found

    items = []
    for path in sorted(folder.glob("*_lumina.safetensors")):
        text = folder / f"{path.name.rsplit('_', 2)[0]}_lumina_te.safetensors"
        states, mask = tensor(text, "hidden_state"), tensor(text, "attention_mask")
        items.append(LuminaItem(tensor(path, "latents"), states, mask=mask))
    return items


def gradients(
    files: TinyLumina, parts: dict[str, list[str]], factors: Factors, batch: Sequence[LuminaItem], step: int
) -> Factors:
    """Of the loss of a batch, by the factors."""
    tokens = batch[0].latents.shape[-1] * batch[0].latents.shape[-2] // 4
    sigmas = shifted(uniform_of(batch, step), ratio_of(tokens))  # nextdit_shift
    noisy, velocity = mixed(batch, step, sigmas)
    text, mask = torch.stack([item.text for item in batch]), torch.stack([item.mask for item in batch])
    dit = in_diffusers(load_file(files.dit))
    with learning(dit, parts, factors) as found:
        direction = dit(noisy[:, :, 0], 1 - sigmas, text, mask).sample
        (direction + velocity[:, :, 0]).square().mean().backward()
    return found()


def test_two_steps_of_training_equal_those_computed_with_diffusers(files: TinyLumina, tmp_path: Path) -> None:
    write_plain_pictures(tmp_path, batch_size=4)
    dataset = ["--dataset_config", "dataset.toml"]
    reading = ["--gemma2", files.gemma2, "--text_encoder_dtype", "float32"]
    latents = ["--ae", files.ae, "--vae_dtype", "float32"]
    succeed_here("lumina_cache_latents.py", *dataset, *latents, folder=tmp_path)
    succeed_here("lumina_cache_text_encoder_outputs.py", *dataset, *reading, folder=tmp_path)
    words = [*dataset, "--pretrained_model_name_or_path", files.dit, "--network_train_unet_only"]
    words += ["--network_module", "networks.lora_lumina", "--network_dim", RANK, *descent(RATE)]
    words += ["--timestep_sampling", "nextdit_shift"]
    succeed_here("lumina_train_network.py", *words, folder=tmp_path)

    items, state = read_items(tmp_path / "cache"), load_file(files.dit)
    paths = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    parts = {  # one, or q, k and v
        path.replace(".", "_"): [
            part.removesuffix(".weight")
            for part in diffusers_state({f"{path}.weight": state[f"{path}.weight"]})
        ]
        for path in paths
        if "embedder" not in path and "norm" not in path
    }
    assert len(items) == 4
    assert len(parts) == 25
    assert_steps_of_descent(
        tmp_path / "out",
        parts,
        RATE,
        lambda factors, step: gradients(files, parts, factors, shuffled(items, step), step),
        "lumina",
    )

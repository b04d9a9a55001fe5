"""Lumina-Image-2.0 through the command line equals diffusers' whole pipeline.

diffusers' pipeline ends guidance after a share of the steps instead of a share of data, and its normalisation
makes every row of a prediction as long as without guidance, where the release limits the length of the whole
(recorded vectors have that: tests/lumina). So here guidance is limited in neither way, or ends at a step that
both rules name.
"""

from pathlib import Path

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from safetensors.torch import load_file
from transformers import Gemma2Model, PreTrainedTokenizerFast

import lumina_generate_image
from encoders.autoencoder import SCALE, SHIFT
from tests.encoders.test_autoencoder import diffusers_autoencoder
from tests.lumina.making import in_diffusers
from tests.parity.running import assert_equal, latents_in, picture_in
from tests.tiny.lumina import GEMMA, TinyLumina, gemma_state, write_tiny_lumina

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
    assert_equal(latents_in(tmp_path)[:, 0], expected[0], "latents")
    pixels = pipe.vae.decode(expected / SCALE + SHIFT).sample[0].clamp(-1, 1).permute(1, 2, 0)
    assert (picture_in(tmp_path) - (pixels + 1) * 127.5).abs().max() < 0.51  # as near as bytes can be

"""Pictures of gen_img.py with LoRAs equal those of diffusers' pipelines, which convert names themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.torch import load_file

import convert_lora
from tests.parity.stable_diffusion import (
    Files,
    assert_close,
    generators,
    pipeline,
    run_script,
    their_pixels,
    write_files,
)
from tests.stable_diffusion.loaded import load
from tests.stable_diffusion.making_loras import write_kohya

PROMPT = "a red cat sits on a table"
STEPS, SCALE, SEED, SIZE = 3, 5.0, 7, 32


def words(*others: object) -> list[object]:
    line = f"{PROMPT} --l {SCALE} --s {STEPS} --d {SEED} --w {SIZE} --h {SIZE}"
    return ["--prompt", line, "--sampler", "ddim", "--W", SIZE, "--H", SIZE, *others]


def theirs(pipe: Any) -> np.ndarray[Any, Any]:
    made = pipe(
        prompt=[PROMPT],
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        generator=generators(SEED),
        width=SIZE,
        height=SIZE,
    )
    return their_pixels(made)


def in_attention(path: str) -> bool:
    """diffusers converts no others for SDXL."""
    return ".attentions." in path and not path.endswith(("norm",))


@pytest.mark.parametrize("kind", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_a_file_of_sd_scripts_in_the_u_net_and_the_text_encoders(tmp_path: Path, kind: str) -> None:
    files = write_files(kind, tmp_path)
    model = load(files.single, "--tokenizer_cache_dir", files.tokenizers)
    path = write_kohya(tmp_path / "x.safetensors", model, in_attention)
    pipe = pipeline(files, "", "ddim")
    plain = theirs(pipe)
    pipe.load_lora_weights(path)
    wanted = theirs(pipe)
    pipe.unload_lora_weights()
    converted = tmp_path / "converted.safetensors"
    convert_lora.main(["--input", str(path), "--output", str(converted), "--target", "diffusers"])
    pipe.load_lora_weights(converted)
    assert_close(theirs(pipe), wanted)
    pipe.unload_lora_weights()

    for number, how in enumerate(([], ["--network_merge"], ["--network_pre_calc"])):
        options = ["--network_module", "networks.lora", "--network_weights", path, *how]
        assert_close(run_script(files, tmp_path / f"out{number}", *words(*options)), wanted)
    assert np.abs(wanted.astype(int) - plain.astype(int)).max() > 20


def test_strengths_of_a_line(tmp_path: Path) -> None:
    files: Files = write_files("sd1", tmp_path)
    model = load(files.single, "--tokenizer_cache_dir", files.tokenizers)
    path = write_kohya(tmp_path / "x.safetensors", model, in_attention)
    pipe = pipeline(files, "", "ddim")
    pipe.load_lora_weights(path, adapter_name="x")
    pipe.set_adapters(["x"], [0.4])
    wanted = theirs(pipe)
    pipe.unload_lora_weights()
    asked = words("--network_weights", path)
    asked[1] = f"{asked[1]} --am 0.4"

    assert_close(run_script(files, tmp_path / "out", *asked), wanted)


def test_a_file_that_peft_and_diffusers_write(tmp_path: Path) -> None:
    """With the alphas in its metadata, of the U-Net and of the text encoder."""
    files = write_files("sd1", tmp_path)
    pipe = pipeline(files, "", "ddim")
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=9, target_modules=layers, init_lora_weights="gaussian"))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"]))
    fill(pipe.unet)
    fill(pipe.text_encoder)
    wanted = theirs(pipe)
    save(pipe, tmp_path / "lora")
    pipe.unload_lora_weights()
    plain = theirs(pipe)
    path = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert any(name.startswith("text_encoder.") for name in load_file(path))

    assert_close(run_script(files, tmp_path / "out", *words("--network_weights", path)), wanted)
    assert np.abs(wanted.astype(int) - plain.astype(int)).max() > 20


def fill(network: Any) -> None:
    """Give the second factors values, which begin as zeros."""
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            values = np.random.default_rng(len(name)).standard_normal(parameter.shape) * 0.1
            parameter.data.copy_(parameter.data.new_tensor(values))


def save(pipe: Any, folder: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    states = {
        name: convert_state_dict_to_diffusers(get_peft_model_state_dict(one))
        for name, one in networks.items()
    }
    settings = {name: one.peft_config["default"].to_dict() for name, one in networks.items()}
    type(pipe).save_lora_weights(
        folder,
        states["unet"],
        states["text_encoder"],
        unet_lora_adapter_metadata=settings["unet"],
        text_encoder_lora_adapter_metadata=settings["text_encoder"],
    )

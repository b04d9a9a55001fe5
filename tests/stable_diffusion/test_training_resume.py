"""Two steps, a state and two steps are four steps, with all that draws numbers or has a memory."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.commands import run_script
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1, write_sdxl
from tests.training.toy import same

pytestmark = pytest.mark.slow
# captions change at each step: tags change places and fall away, one of several words is taken
DATASET = """[general]
resolution = 64
caption_extension = ".txt"
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = 32
shuffle_caption = true
keep_tokens = 1
caption_dropout_rate = 0.2
caption_tag_dropout_rate = 0.3
enable_wildcard = true
flip_aug = true

[[datasets]]
batch_size = 2

[[datasets.subsets]]
image_dir = "pictures"

[[datasets.subsets]]
image_dir = "others"
is_reg = true
num_repeats = 2
"""
NOISE = [
    *("--noise_offset", "0.1", "--noise_offset_random_strength", "--adaptive_noise_scale", "0.01"),
    *("--multires_noise_iterations", "3", "--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"),
]
LOSS = [
    *("--loss_type", "huber", "--huber_schedule", "snr", "--prior_loss_weight", "0.5"),
    *("--min_snr_gamma", "5", "--debiased_estimation_loss"),
]
LEARNING = [
    *("--network_dim", "2", "--network_args", "conv_dim=2", "rank_dropout=0.2", "loraplus_lr_ratio=4"),
    *("--learning_rate", "0.01", "--seed", "1", "--network_dropout", "0.1"),
    *("--lr_scheduler", "cosine", "--gradient_accumulation_steps", "2", "--scale_weight_norms", "0.5"),
    *("--ema_decay", "0.9", "--output_name", "lora", "--max_train_steps", "4"),
]
RATES = ["--text_encoder_lr", "0.01", "0.02"]
CASES = {
    "sdxl": ("sdxl_train_network.py", [*NOISE, *LOSS, "--v_pred_like_loss", "0.5", *RATES]),
    "sd1": ("train_network.py", [*NOISE, *LOSS, "--v_pred_like_loss", "0.5", "--clip_skip", "2"]),
    "sdxl, v": (
        "sdxl_train_network.py",
        [
            *(*NOISE, *LOSS, "--v_parameterization", "--zero_terminal_snr"),
            *("--scale_v_pred_loss_like_noise_pred", "--max_token_length", "150", *RATES),
        ],
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name, count in {"pictures": 3, "others": 2}.items():
        (tmp_path / name).mkdir()
        for index in range(count):
            pixels = generator.integers(0, 255, (64, 64 if index else 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
            caption = f"a {{red|blue|green}} cat, number {index}, big, small, round"
            (tmp_path / name / f"{index}.txt").write_text(caption, encoding="utf-8")
    (tmp_path / "dataset.toml").write_text(DATASET, encoding="utf-8")
    tokenizer_folder(tmp_path / "tokenizers")
    return tmp_path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_training_ends_with_the_same_bytes(folder: Path, case: str, precision: str) -> None:
    script, words = CASES[case]
    model = write_sd1(folder) if case == "sd1" else write_sdxl(folder)
    command = [
        *("--pretrained_model_name_or_path", model, "--tokenizer_cache_dir", "tokenizers"),
        *("--dataset_config", "dataset.toml", "--mixed_precision", precision, *LEARNING, *words),
        *("--cache_latents", "--save_state", "--save_every_n_steps", "2"),
    ]
    run_script(script, *command, "--output_dir", "whole", folder=folder)
    state = "whole/lora-step00000002-state"

    resumed = run_script(script, *command, "--output_dir", "resumed", "--resume", state, folder=folder)

    assert "2/4" in resumed.stderr or "step 2" in resumed.stdout + resumed.stderr
    files = sorted(path.name for path in (folder / "whole").glob("*.safetensors"))
    assert len(files) >= 3, files  # of step 2, of the end, its average
    for name in files:
        if "step00000002" in name:
            continue
        full, again = load_file(folder / "whole" / name), load_file(folder / "resumed" / name)
        assert same(full, again), name
    halfway = load_file(folder / "whole" / "lora-step00000002.safetensors")
    assert not same(halfway, load_file(folder / "whole" / "lora.safetensors"))

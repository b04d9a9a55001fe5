"""`new --from`: the files that a project trains on are those that are trained, or the command stops."""

import sys
from pathlib import Path
from typing import Any

import pytest

from modules.errors import OptionError, UserError
from tests.project.test_foreign_runs import Described, describe
from tests.project.test_new import write_photos
from tests.tiny.new_models import write_new_model

KOHYA: dict[str, Any] = {
    "LoRA_type": "Standard",
    "sdxl": True,
    "train_data_dir": "photos",
    "train_batch_size": 1,
    "max_train_steps": 30,
    "learning_rate": 3e-5,
    "network_dim": 8,
    "optimizer": "AdamW",
}
ONETRAINER: dict[str, Any] = {
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "epochs": 1,
    "learning_rate": 3e-4,
}
SIMPLETUNER: dict[str, Any] = {
    "model_type": "lora",
    "model_family": "z-image",
    "model_flavour": "base",
    "learning_rate": 1e-4,
    "max_train_steps": 30,
}


def ai_toolkit(model: dict[str, Any], **train: Any) -> dict[str, Any]:
    process = {
        "type": "sd_trainer",
        "network": {"type": "lora", "linear": 8, "linear_alpha": 8},
        "train": {"steps": 30, "lr": 1e-4, **train},
        "model": model,
    }
    return {"job": "extension", "config": {"name": "mine", "process": [process]}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny models ü")
    for name in ("stable_diffusion xl", "stable_diffusion 1.5", "z_image turbo"):
        write_new_model(name, folder / name)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_photos(folder)
    return folder


def is_written(folder: Path) -> bool:
    return any(folder.glob("*.toml"))


def test_the_base_model_of_a_project_that_is_here_is_trained(
    models: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = models / "stable_diffusion xl" / "ckpt.safetensors"
    content = KOHYA | {"pretrained_model_name_or_path": str(ckpt)}
    described = describe(photos, content, capsys)
    assert described.training["pretrained_model_name_or_path"] == ckpt.as_posix()
    assert f"--model_file ckpt={ckpt}" in described.told


def test_a_file_of_the_name_in_the_folder_of_the_models_is_the_one_of_another_machine(
    models: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = ONETRAINER | {"base_model_name": "D:\\sd\\ckpt.safetensors"}
    folder = models / "stable_diffusion xl"
    described = describe(photos, content, capsys, "--models", str(folder))
    assert described.training["pretrained_model_name_or_path"] == (folder / "ckpt.safetensors").as_posix()


def test_a_file_of_another_family_ends_the_command(
    models: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = models / "stable_diffusion 1.5" / "ckpt.safetensors"
    with pytest.raises(UserError, match="Stable Diffusion"):
        describe(photos, KOHYA | {"pretrained_model_name_or_path": str(ckpt)}, capsys)
    assert not is_written(photos)


MISSING = [
    (KOHYA | {"pretrained_model_name_or_path": "C:/models/ponyDiffusionV6XL.safetensors"}, "ckpt"),
    (ONETRAINER | {"base_model_name": "/home/me/ponyDiffusionV6XL.safetensors"}, "ckpt"),
    (ONETRAINER | {"base_model_name": "RunDiffusion/Juggernaut-XL-v9"}, "ckpt"),
    (ai_toolkit({"name_or_path": "/d/my flux.safetensors", "is_flux": True}), "dit"),
    (SIMPLETUNER | {"pretrained_transformer_model_name_or_path": "somebody/z"}, "dit"),
    (SIMPLETUNER | {"pretrained_vae_model_name_or_path": "/d/my vae.safetensors"}, "vae"),
    (KOHYA | {"vae": "/d/my vae.safetensors"}, "vae"),
]
PIPE = """epochs = 4
micro_batch_size_per_gpu = 1
pipeline_stages = 1
[model]
type = 'wan'
ckpt_path = '/data/Wan2.1-T2V-1.3B'
{line}
[adapter]
type = 'lora'
rank = 8
[optimizer]
type = 'adamw'
lr = 2e-5
"""


@pytest.mark.parametrize(("content", "name"), MISSING)
def test_without_a_file_of_the_project_the_command_stops_and_says_what_to_add(
    content: dict[str, Any], name: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OptionError) as raised:
        describe(photos, content, capsys)
    *_, last = str(raised.value).splitlines()
    assert last.startswith("  python reelsmith.py new ")
    assert last.endswith(f" --model_file {name}=PATH")
    assert "--from " in last
    assert not is_written(photos)


@pytest.mark.skipif(sys.platform == "win32", reason="there it is a path of this machine")
def test_a_path_of_windows_is_called_so(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = KOHYA | {"pretrained_model_name_or_path": "C:\\models\\pony.safetensors"}
    with pytest.raises(OptionError, match="it is not here: this is a Windows path"):
        describe(photos, content, capsys)


@pytest.mark.parametrize(
    ("line", "name"),
    [("llm_path = '/d/umt5.safetensors'", "t5"), ("transformer_path = '/d/my.safetensors'", "dit")],
)
def test_files_of_diffusion_pipe_are_asked_for(
    line: str, name: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OptionError, match=f"--model_file {name}=PATH$"):
        describe(photos, PIPE.format(line=line), capsys, name="p.toml")
    described = describe(photos, PIPE.format(line=""), capsys, name="p.toml")
    assert Path(described.training["dit"]).name == "wan2.1_t2v_1.3B_bf16.safetensors"


@pytest.mark.parametrize(
    "value", ["stabilityai/stable-diffusion-xl-base-1.0", "E:\\sd_xl_base_1.0.safetensors"]
)
def test_released_names_are_the_released_model(
    value: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = describe(photos, ONETRAINER | {"base_model_name": value}, capsys)
    path = Path(described.training["pretrained_model_name_or_path"])
    assert path.name == "sd_xl_base_1.0.safetensors"
    assert "different from your project" not in described.told


def test_a_typed_model_is_trained_and_the_difference_comes_first(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = ONETRAINER | {"base_model_name": "RunDiffusion/Juggernaut-XL-v9"}
    described = describe(photos, content, capsys, "--family", "stable_diffusion", "--task", "xl")
    _, after = described.told.split("nothing of it is run. ")
    assert after.startswith("different from your project: base_model_name = RunDiffusion/Juggernaut-XL-v9")


@pytest.mark.parametrize("is_here", [True, False])
def test_a_lora_to_start_from_is_the_start(
    is_here: bool, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = photos.parent / "start.safetensors"
    content = ONETRAINER | {"lora_model_name": str(start)}
    if is_here:
        start.write_bytes(b"")
        described = describe(photos, content, capsys)
        assert described.training["network_weights"] == start.as_posix()
        return
    with pytest.raises(OptionError, match=r"starts from the LoRA .*start\.safetensors"):
        describe(photos, content, capsys)
    assert not is_written(photos)


ADAPTERS = [
    (
        {"name_or_path": "Tongyi-MAI/Z-Image-Turbo", "arch": "zimage:turbo"},
        "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors",
        "zimage_turbo_training_adapter_v2.safetensors",
    ),
    (
        {"name_or_path": "black-forest-labs/FLUX.1-schnell", "is_flux": True},
        "ostris/FLUX.1-schnell-training-adapter",
        "FLUX.1-schnell-training-adapter.safetensors",
    ),
    (
        {"name_or_path": "krea/Krea-2-Turbo", "arch": "krea2:turbo"},
        "ostris/krea2_turbo_training_adapter/krea2_turbo_training_adapter_v1.safetensors",
        "krea2_turbo_training_adapter_v1.safetensors",
    ),
]


@pytest.mark.parametrize(("model", "value", "name"), ADAPTERS)
def test_a_published_training_adapter_is_trained_with(
    model: dict[str, Any], value: str, name: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = describe(photos, ai_toolkit(model | {"assistant_lora_path": value}), capsys)
    assert Path(described.training["training_adapter"]).name == name
    assert "plain training unlearns" not in described.told


@pytest.mark.parametrize("is_here", [True, False])
def test_a_training_adapter_of_ones_own_is_trained_with(
    is_here: bool, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = photos.parent / "mine.safetensors"
    model = {"name_or_path": "black-forest-labs/FLUX.1-dev", "is_flux": True}
    content = ai_toolkit(model | {"assistant_lora_path": str(adapter)})
    if is_here:
        adapter.write_bytes(b"")
        assert describe(photos, content, capsys).training["training_adapter"] == adapter.as_posix()
        return
    with pytest.raises(OptionError, match=r"trains with the adapter .*mine\.safetensors"):
        describe(photos, content, capsys)


def describe_xl(photos: Path, capsys: pytest.CaptureFixture[str], **keys: Any) -> Described:
    return describe(photos, ONETRAINER | keys, capsys)


@pytest.mark.parametrize(
    ("keys", "option", "value"),
    [
        ({"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 4.0}, "min_snr_gamma", 4.0),
        ({"loss_weight_fn": "MIN_SNR_GAMMA"}, "min_snr_gamma", 5.0),
        ({"loss_weight_fn": "CONSTANT", "loss_weight_strength": 4.0}, "min_snr_gamma", None),
        ({"loss_weight_fn": "DEBIASED_ESTIMATION"}, "debiased_estimation_loss", True),
        ({"ema": "GPU", "ema_decay": 0.995}, "ema_decay", 0.995),
        ({"ema": "CPU"}, "ema_decay", 0.999),
        ({"ema": "OFF", "ema_decay": 0.995}, "ema_decay", None),
    ],
)
def test_pairs_of_a_switch_and_a_value_of_onetrainer(
    keys: dict[str, Any], option: str, value: Any, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = describe_xl(photos, capsys, **keys)
    assert described.training.get(option) == value
    assert "ema_decay below" not in described.told


def test_a_weight_that_is_not_here_is_a_difference(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = describe_xl(photos, capsys, loss_weight_fn="P2", loss_weight_strength=1.0)
    assert "different from your project: loss_weight_fn = P2" in described.told


@pytest.mark.parametrize(("weight", "is_told"), [(0.5, True), (1.0, False)])
def test_weights_of_concepts_are_told_truly(
    weight: float, is_told: bool, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concepts = [{"name": "me", "path": "photos", "loss_weight": weight}]
    described = describe_xl(photos, capsys, concepts=concepts)
    assert ("different from your project: concepts[0].loss_weight = 0.5" in described.told) is is_told


@pytest.mark.parametrize(
    ("keys", "decay"),
    [({"use_ema": True}, 0.995), ({"use_ema": True, "ema_decay": 0.9}, 0.9), ({"ema_decay": 0.9}, None)],
)
def test_ema_and_shift_of_simpletuner(
    keys: dict[str, Any], decay: float | None, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = describe(photos, SIMPLETUNER | keys | {"flow_schedule_shift": 4}, capsys)
    assert described.training.get("ema_decay") == decay
    assert described.training["discrete_flow_shift"] == 4
    assert described.training["timestep_sampling"] == "shift"


@pytest.mark.parametrize(("kept", "age"), [(4, 750), (1, 1)])
def test_as_many_saved_files_are_kept(
    kept: int, age: int, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = SIMPLETUNER | {"checkpointing_steps": 250, "checkpoints_total_limit": kept}
    assert describe(photos, content, capsys).training["save_last_n_steps"] == age


def test_a_missing_package_comes_first(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.foreign.optimizing.find_spec", lambda name: None)
    described = describe_xl(photos, capsys, optimizer={"optimizer": "PRODIGY"})
    assert described.training["optimizer_type"] == "prodigy"
    assert "First pip install prodigyopt. Then python reelsmith.py run " in described.told
    assert "left: optimizer" not in described.told


@pytest.mark.parametrize("validates", [True, False])
def test_a_project_that_validates_holds_files_out(
    validates: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    write_photos(folder, 12)
    described = describe_xl(folder, capsys, validation=validates)
    assert described.training.get("validation_split") == (0.1 if validates else None)
    assert "this program calls it" not in described.told

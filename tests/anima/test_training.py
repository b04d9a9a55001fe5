"""What trainings of Anima train, what their caches and files hold, and texts as its encoder reads them."""

import re
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from anima.files import AnimaFiles
from anima.model import AnimaModel
from anima.names import SOURCE_BLOCKS
from anima.options import AnimaTextOptions
from modules.errors import CheckpointError
from protocols.requests import Prompt
from tests.anima.making import tiny_model
from tests.faults.messages import succeed_here
from tests.tiny.anima import CONFIG, TinyAnima, tiny_state, write_tiny_anima
from tests.tiny.dit_files import frozen
from tests.tiny.families import OUTPUT, family_called
from tests.tiny.language_models import qwen3
from tests.tiny.loras import make_lora

CPU = torch.device("cpu")
FAMILY = family_called("anima")
LONG = "a red square " * 300
FAMILY_MODULE = "lora_anima"
TWELVE = replace(CONFIG, num_layers=12)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with cached pictures and captions."""
    folder = tmp_path_factory.mktemp("anima")
    FAMILY.prepare(folder)
    for command in (FAMILY.cache_latents, FAMILY.cache_texts):
        succeed_here(*command, folder=folder)
    return folder


def train(folder: Path, name: str, *more: object) -> dict[str, Tensor]:
    words = [*FAMILY.train, *OUTPUT, "--max_train_steps", 1, "--output_name", name, *more]
    succeed_here(*words, folder=folder)
    return load_file(folder / "output" / f"{name}.safetensors")


def test_a_lora_has_ten_layers_of_each_block_and_those_of_the_adapter_on_request(project: Path) -> None:
    made = train(project, "usual")
    modules = {name.partition(".")[0] for name in made}
    assert len(modules) == 10 * CONFIG.num_layers
    assert not any("modulation" in name or "llm_adapter" in name for name in modules)
    with safe_open(project / "output" / "usual.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata[SOURCE_BLOCKS[0]] == "2"
    assert metadata["ss_base_model_version"] == "anima"
    assert metadata["modelspec.architecture"] == "anima-preview/lora"

    made = train(project, "adapter", "--network_args", "train_llm_adapter=True")
    added = {name.partition(".")[0] for name in made} - modules
    assert len(added) == 10 * 2
    assert all(name.startswith("lora_unet_llm_adapter_blocks_") for name in added)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("lora_anima", {}),
        ("loha", {}),
        ("lokr", {}),
        ("lora_anima", {"dora_wd": "True"}),
        ("oft", {}),
        ("lora_anima", {"tlora": "True"}),
    ],
    ids=["LoRA", "LoHa", "LoKr", "DoRA", "OFT", "T-LoRA"],
)
def test_every_kind_of_network_leaves_the_adapter_out_unless_it_is_asked_for(
    module: str, arguments: dict[str, str]
) -> None:
    asked = {"train_llm_adapter": "True"}
    if module != FAMILY_MODULE:  # which alone has the switch
        asked = {"include_patterns": r"[r'llm_adapter\.blocks\..*']"}
    for more, count in (({}, 20), (asked, 40)):
        network = make_lora(module, 4, 1.0, tiny_model(), **arguments, **more)
        of_adapter = [name for name in network.names if "llm_adapter" in name]
        assert len(network.names) == count
        assert len(of_adapter) == count - 20


def test_blocks_and_the_adapter_have_rates_of_their_own() -> None:
    """Patterns as the known trainer takes them; the last one that fits counts."""
    rates = r"blocks\.[0-9]\..*=1e-4,.*cross_attn.*=3e-4,.*llm_adapter.*=1e-6"
    arguments = {"train_llm_adapter": "True", "network_reg_lrs": rates}
    network = make_lora(
        "lora_anima", 2, 1.0, frozen(AnimaModel(TWELVE), tiny_state(num_layers=12)), **arguments
    )
    groups, _ = network.parameter_groups(1e-5)

    given = {id(one): group["lr"] for group in groups for one in group["params"]}
    for name, layer in zip(network.names, network.layers, strict=True):
        block = int(re.search(r"blocks_(\d+)", name)[1])  # type: ignore[index]
        default = 1e-4 if block < 10 else 1e-5
        expected = 1e-6 if "llm_adapter" in name else 3e-4 if "cross_attn" in name else default
        assert {given[id(one)] for one in layer.parameters()} == {expected}, name


def test_qwen3_learns_unless_the_transformer_alone_is_asked_for(project: Path) -> None:
    words = [word for word in FAMILY.train if word != "--network_train_unet_only"]
    dataset = (project / "dataset.toml").read_text(encoding="utf-8")
    (project / "live.toml").write_text(re.sub(r"(?m)^cache_directory.*$", "", dataset), encoding="utf-8")
    succeed_here(
        *(*words, *OUTPUT, "--dataset_config", "live.toml", "--cache_latents", "--max_train_steps", 1),
        *("--output_name", "live", "--network_dim", 2),
        folder=project,
    )
    made = load_file(project / "output" / "live.safetensors")
    texts = {name.partition(".")[0] for name in made if name.startswith("lora_te_layers_")}
    assert len(texts) == 7 * 4
    ups = [tensor for name, tensor in made.items() if name.startswith("lora_te_") and "lora_up" in name]
    assert sum(bool(tensor.any()) for tensor in ups) > 20


def test_parts_of_a_whole_model_have_rates_of_their_own(project: Path) -> None:
    words = [*FAMILY.train]
    start = words.index("--network_module")
    kept = [word for word in words[1:start] if word != "--network_train_unet_only"]
    rates = ["--llm_adapter_lr", 0, "--mod_lr", 0, "--self_attn_lr", 0.01]
    said = succeed_here(
        *("anima_train.py", *kept, *rates, "--learning_rate", 1, "--optimizer_type", "torch.optim.SGD"),
        # a step of this rate changes every weight, whatever the noise
        *("--max_train_steps", 1, "--seed", 1, "--output_dir", "output", "--output_name", "whole"),
        folder=project,
    )
    assert "the adapter is trained too" not in said
    before = load_file(project / "model" / "dit.safetensors")
    after = load_file(project / "output" / "whole.safetensors")
    assert after.keys() == before.keys()
    for name, weight in after.items():
        is_frozen = "llm_adapter." in name or "adaln_modulation" in name
        assert weight.equal(before[name]) == is_frozen, name


def test_npz_caches_are_those_of_the_known_trainer(tmp_path: Path) -> None:
    FAMILY.prepare(tmp_path)
    dataset = tmp_path / "dataset.toml"
    text = re.sub(r"(?m)^cache_directory.*$", "", dataset.read_text(encoding="utf-8"))
    rate = 'cache_format = "npz"\ncaption_dropout_rate = 0.25\n'
    dataset.write_text(text + rate, encoding="utf-8")
    for command in (FAMILY.cache_latents, FAMILY.cache_texts):
        succeed_here(*command, folder=tmp_path)

    (texts, *_) = sorted(tmp_path.rglob("*_anima_te.npz"))
    with numpy.load(texts) as file:
        arrays = {name: file[name] for name in file.files if name != "reelsmith"}
    assert {name: (one.shape, str(one.dtype)) for name, one in arrays.items()} == {
        "prompt_embeds": ((512, 64), "float32"),
        "attn_mask": ((512,), "int64"),
        "t5_input_ids": ((512,), "int32"),
        "t5_attn_mask": ((512,), "int32"),
        "caption_dropout_rate": ((), "float32"),
    }
    assert arrays["caption_dropout_rate"] == 0.25
    ours = train(tmp_path, "ours")

    # another program's: no record, another rate, and in older files the axis of the one frame
    for path in tmp_path.rglob("*_anima_te.npz"):
        with numpy.load(path) as file:
            found = {name: file[name] for name in file.files if name != "reelsmith"}
        numpy.savez(path, **{**found, "caption_dropout_rate": numpy.float32(0.5)})
    for path in tmp_path.rglob("*_anima.npz"):
        with numpy.load(path) as file:
            found = {name: file[name] for name in file.files if not name.startswith("reelsmith")}
        numpy.savez(path, **{name: one[:, None] if one.ndim == 3 else one for name, one in found.items()})
    theirs = train(tmp_path, "theirs")
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyAnima:
    return write_tiny_anima(tmp_path_factory.mktemp("files"))


def encode(files: TinyAnima, *prompts: Prompt) -> list[dict[str, Tensor]]:
    made = AnimaFiles(text_dtype=torch.float32).add_texts(
        files.text_encoder, AnimaTextOptions.from_defaults(text_encoder_dtype="float32")
    )
    encoder = made.language_model()
    encoder.load(CPU)
    return encoder.encode(prompts)  # type: ignore[return-value]


@torch.no_grad()
def test_states_are_those_behind_the_final_norm_without_any_template(files: TinyAnima) -> None:
    """And those before that norm are far away."""
    (found,) = encode(files, Prompt("a red square"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(files.text_encoder / "tokenizer.json"))
    ids = tokenizer("a red square", return_tensors="pt").input_ids
    model, before_norm = qwen3().model, []
    model.norm.register_forward_pre_hook(lambda _, given: before_norm.append(given[0]))
    expected = model(input_ids=ids).last_hidden_state[0]
    count = ids.shape[1]
    assert found["attn_mask"].sum() == count
    states = found["prompt_embeds"][:count]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
    assert (states - before_norm[0][0]).abs().max() > 0.1
    assert not found["prompt_embeds"][count:].any()


def test_the_end_of_a_long_text_stays_and_an_empty_one_has_it_alone(files: TinyAnima) -> None:
    long, empty = encode(files, Prompt(LONG), Prompt(""))
    assert long["attn_mask"].all()
    assert long["t5_attn_mask"].all()
    assert long["t5_input_ids"][-1] == 1
    assert (empty["t5_input_ids"].sum(), empty["t5_attn_mask"].sum(), empty["attn_mask"].sum()) == (1, 1, 0)
    assert empty["t5_input_ids"][0] == 1
    assert not empty["prompt_embeds"].any()


def test_weights_of_words_are_those_of_t5s_tokens(files: TinyAnima) -> None:
    plain, weighted = encode(files, Prompt("a red square"), Prompt("a red square", ((2, 5, 1.5),)))
    assert weighted["prompt_embeds"].equal(plain["prompt_embeds"])
    count = int(plain["t5_attn_mask"].sum())
    assert set(weighted["t5_attn_mask"][:count].tolist()) == {1.0, 1.5}
    assert weighted["t5_attn_mask"][count - 1] == 1  # the end
    assert not weighted["t5_attn_mask"][count:].any()


def test_a_text_encoder_of_another_size_is_refused(files: TinyAnima) -> None:
    made = AnimaFiles(dit=files.dit, text_encoder=files.text_encoder)
    config = made.dit_header().config
    assert config.adapter == CONFIG.adapter
    with pytest.raises(CheckpointError, match="produces hidden states of width 64, .* takes width 32"):
        made.check_texts(replace(config, adapter=replace(config.adapter, text_dim=32)), needed=True)

"""LoRA files as other programs write them, merged into a model: what they add, computed by numpy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from networks.key_formats import to_native
from networks.loading import read_lora
from networks.metadata import describe_lora
from networks.rewriting import rewrite
from tests.networks.making import add_lora, inputs, tiny_dit, wan_network

WIDTH, RANK = 8, 2
SHAPES = {
    **{f"double_blocks.0.{s}_attn.qkv": (3 * WIDTH, WIDTH) for s in ("img", "txt")},
    **{f"double_blocks.0.{s}_attn.proj": (WIDTH, WIDTH) for s in ("img", "txt")},
    "single_blocks.0.linear1": (7 * WIDTH, WIDTH),
    "single_blocks.0.linear2": (WIDTH, 5 * WIDTH),
}
QKV, PROJ = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj"
Changes = Mapping[str, np.ndarray]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def product(down: Tensor, up: Tensor, scale: float = 1.0) -> np.ndarray:
    return scale * (up.double().numpy() @ down.double().numpy())


def plain(name: str, module: str = PROJ, factors: str = "lora_A lora_B", **of: Any) -> tuple[Any, Changes]:
    """A LoRA for one module under a name of another program, and the change of the weight."""
    rows, columns = SHAPES[module]
    down, up = drawn(RANK, columns, seed=1), drawn(rows, RANK, seed=2)
    keys = [f"{name}.{factor}.weight" for factor in factors.split()]
    return dict(zip(keys, (down, up), strict=True)), {module: product(down, up, **of)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({f"{name}.weight": drawn(*shape, seed=9) for name, shape in SHAPES.items()}, path)
    return path


def check(model: Path, lora: Path, expected: Changes) -> None:
    """Merge by the script; compare each change with the expected one."""
    merged = model.with_name("merged.safetensors")
    given = {"--dit": model, "--lora_weight": lora, "--save_merged_model": merged, "--device": "cpu"}
    merge_lora.main([str(word) for pair in given.items() for word in pair])
    before, after = load_file(model), load_file(merged)
    for name, shape in SHAPES.items():
        change = (after[f"{name}.weight"].double() - before[f"{name}.weight"].double()).numpy()
        np.testing.assert_allclose(change, expected.get(name, np.zeros(shape)), atol=1e-5, err_msg=name)


def write(model: Path, tensors: Mapping[str, Tensor], metadata: Any = None, name: str = "lora") -> Path:
    path = model.with_name(f"{name}.safetensors")
    save_file({key: one.contiguous() for key, one in tensors.items()}, path, metadata)
    return path


PEFT = {"transformer.lora_alpha": 16, "transformer.r": RANK}


@pytest.mark.parametrize(
    ("metadata", "config", "alpha"),
    [
        ({"alpha": "16", "rank": "2"}, None, 16),
        ({"network_alpha": "16.0"}, None, 16),
        ({"transformer.lora_alpha": "16", "transformer.r": "2"}, None, 16),
        ({"transformer_alpha": "16", "transformer_rank": "2"}, None, 16),
        ({"text_encoder.lora_alpha": "16"}, None, RANK),
        ({"lora_te1_alpha": "16"}, None, RANK),
        ({"ss_network_alpha": "16", "ss_network_dim": "2"}, None, 16),
        ({"lora_adapter_metadata": json.dumps(PEFT), "alpha": "16"}, None, 16),
        ({}, {"r": 2, "lora_alpha": 16}, 16),
        ({"alpha": "16"}, {"r": 2, "lora_alpha": 16}, 16),
        ({"LoRA_Alpha": "16", "Rank": "2"}, None, 16),
        ({"linear_alpha": "16", "linear": "2"}, None, 16),
        ({"peft_config": json.dumps({"r": 2, "lora_alpha": 16})}, None, 16),
        ({"peft_config": json.dumps({"default": {"r": 2, "lora_alpha": 16}})}, None, 16),
        ({"lora_config": json.dumps({"alpha": 16, "rank": 2})}, None, 16),
        ({"lora_config": json.dumps({"rank": 2, "network": {"linear": 2, "linear_alpha": 16}})}, None, 16),
        (
            {"peft_config": json.dumps({"text_encoder": {"lora_alpha": 4}, "transformer": {"Alpha": 16}})},
            None,
            16,
        ),
        ({}, {"default": {"rank": 2, "alpha": 16}}, 16),
        ({"config": json.dumps({"lora_alpha": 16, "r": 2})}, None, 16),
        ({"config": json.dumps({"network": {"type": "lora", "alpha": 16}})}, None, 16),
        ({"config": json.dumps({"alpha": 16, "rank": 8})}, None, RANK),
        ({"config": json.dumps({"transformer": {"num_layers": 48}})}, None, RANK),
        ({"config": "job.yaml"}, None, RANK),
        # of other files, or no numbers
        ({}, {"r": 8, "lora_alpha": 16}, RANK),
        ({}, {"lora_alpha": 16}, RANK),
        ({"alpha": "16", "rank": "8"}, None, RANK),
        ({"alpha": "nan", "network_alpha": "None", "lora_alpha": "1e999"}, None, RANK),
        # converters of the known tuners take alpha into the factors and leave what the training wrote
        ({"ss_network_alpha": "16", "ss_network_dim": "2", "ss_network_module": "networks.lora"}, None, RANK),
        ({}, None, RANK),
    ],
)
def test_the_alpha_counts_wherever_a_file_has_it(
    model: Path, metadata: dict[str, str], config: Any, alpha: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tensors, _ = plain("transformer.single_transformer_blocks.0.proj_out", "single_blocks.0.linear2")
    path = write(model, tensors, metadata)
    if config is not None:
        path.with_name("adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    wanted = product(*tensors.values(), alpha / RANK)

    check(model, path, {"single_blocks.0.linear2": wanted})

    assert ("no alpha in it: the rank is used instead" in caplog.text) == (alpha == RANK)
    assert ("is not a number" in caplog.text) == ("nan" in metadata.values())
    with open_checkpoint(path) as checkpoint:
        assert ("alpha 16" in str(describe_lora(checkpoint))) == (alpha == 16)
    # a conversion writes the strength for good, and nothing that could count twice
    other = path.with_name("other.safetensors")
    convert_lora.main(["--input", str(path), "--output", str(other), "--target", "other", "--family", "flux"])
    check(model, other, {"single_blocks.0.linear2": wanted})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("single_transformer_blocks.0.proj_out", "lora_unet_single_blocks_0_linear2"),
        ("transformer_blocks.0.attn.to_k", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("transformer_blocks.0.attn.to_out.0", "diffusion_model.double_blocks.0.img_attn.proj"),
        ("single_blocks.0.linear2", "lora_unet_single_blocks_0_linear2"),
    ],
)
def test_a_file_that_names_a_layer_in_two_dialects_is_refused(model: Path, first: str, second: str) -> None:
    parts = {f"{first}.lora_A.weight": torch.ones(2, 8), f"{first}.lora_B.weight": torch.ones(8, 2)}
    more = {f"{second}.lora_down.weight": torch.ones(2, 8), f"{second}.lora_up.weight": torch.zeros(8, 2)}
    path = write(model, {f"transformer.{key}": one for key, one in parts.items()} | more)
    with pytest.raises(CheckpointError, match="changes one layer under two names: ") as told:
        read_lora(path)
    bare = [one.split("_0_")[-1].split(".0.")[-1] for one in (first, second)]
    assert all(name in str(told.value) for name in bare)


def test_files_of_nunchaku_are_called_by_its_name(model: Path) -> None:
    parts = [f"transformer_blocks.0.{one}" for one in ("qkv_proj", "mlp_fc1")]
    lora = {f"{part}.lora_{end}": torch.ones(64, 16) for part in parts for end in ("down", "up")}
    with pytest.raises(
        CheckpointError, match="of the kind LoRA as nunchaku packs it, which is not supported"
    ):
        read_lora(write(model, lora))
    full = {
        f"{part}.{end}": torch.ones(2, 2, dtype=torch.int32)
        for part in parts
        for end in ("qweight", "wscales")
    }
    with pytest.raises(CheckpointError, match="not supported .*nunchaku"):
        read_lora(write(model, full))


TE1, TE3 = "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("text_encoder.lora_alpha", TE1),
        ("lora_te1.alpha", TE1),
        ("te1_alpha", TE1),
        ("text_encoder_2.alpha", TE3),
        ("te3.network_alpha", TE3),
    ],
)
def test_the_alpha_of_one_text_encoder_is_of_that_alone(model: Path, key: str, module: str) -> None:
    tensors, _ = plain("transformer.double_blocks.0.img_attn.proj")
    for name in (TE1, TE3):
        tensors |= {f"{name}.lora_down.weight": drawn(RANK, 8), f"{name}.lora_up.weight": drawn(8, RANK)}
    lora = read_lora(write(model, tensors, {key: "16"}), with_texts=True)
    alphas = {name: float(one) for name, one in lora.text_tensors.items() if name.endswith(".alpha")}
    assert alphas == {f"{module}.alpha": 16.0}
    assert not any(name.endswith(".alpha") for name in lora.tensors)


@pytest.mark.parametrize("empty", [slice(0), slice(WIDTH, 2 * WIDTH)], ids=["all", "without k"])
def test_a_whole_difference_of_a_joined_weight_is_cut_for_diffusers(model: Path, empty: slice) -> None:
    change, bias = drawn(*SHAPES[QKV]), drawn(3 * WIDTH, seed=4)
    change[empty] = 0
    bias[empty] = 0
    name = f"lora_unet_{QKV.replace('.', '_')}"
    path = write(model, {f"{name}.diff": change, f"{name}.diff_b": bias}, {"modelspec.architecture": "flux"})
    there = path.with_name("there.safetensors")
    convert_lora.main(["--input", str(path), "--output", str(there), "--target", "diffusers"])
    made = {key.removeprefix("transformer."): one.numpy() for key, one in load_file(there).items()}
    start = "transformer_blocks.0.attn"
    for place, character in enumerate("qkv"):
        rows = slice(place * WIDTH, (place + 1) * WIDTH)
        part = f"{start}.to_{character}.lora_"
        if rows == empty:
            assert f"{part}A.weight" not in made
            continue
        product = made[f"{part}B.weight"] @ made[f"{part}A.weight"]
        np.testing.assert_allclose(product, change[rows].numpy(), atol=1e-6)
        np.testing.assert_array_equal(made[f"{part}B.bias"], bias[rows].numpy())
    check(model, there, {QKV: change.double().numpy()})


def test_two_alphas_that_differ_are_refused_and_tensors_count_before_both(model: Path) -> None:
    tensors, expected = plain("transformer.double_blocks.0.img_attn.proj", scale=3 / RANK)
    metadata = {"alpha": "16", "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    with pytest.raises(CheckpointError, match=r"two alphas: 16 in .*\(alpha\) and 8 in .*adapter_metadata"):
        read_lora(write(model, tensors, metadata))
    alpha = {"transformer.double_blocks.0.img_attn.proj.alpha": torch.tensor(3.0)}
    check(model, write(model, tensors | alpha, metadata), expected)


@pytest.mark.parametrize("name", [".lora_alpha", ".lora.alpha", ".alpha", "lora_alpha", "alpha"])
@pytest.mark.parametrize("alpha", [torch.tensor([16]), torch.tensor(16.0, dtype=torch.bfloat16)])
def test_alphas_are_read_under_other_names_of_tensors(model: Path, name: str, alpha: Tensor) -> None:
    tensors, expected = plain(f"diffusion_model.{PROJ}", scale=16 / RANK)
    key = f"diffusion_model.{PROJ}{name}" if name[0] == "." else name
    check(model, write(model, tensors | {key: alpha}), expected)


@pytest.mark.parametrize(
    "factors",
    [
        "lora.A lora.B",
        "lora_a lora_b",
        "lora_A.my.adapter lora_B.my.adapter",
        "lora_down.default lora_up.default",
    ],
)
def test_factors_are_read_in_other_spellings(model: Path, factors: str) -> None:
    check(model, *_one(model, plain(f"diffusion_model.{PROJ}", factors=factors)))


@pytest.mark.parametrize(
    ("name", "factors", "words"),
    [
        (
            f"diffusion_model.{PROJ}.inner",
            "lora_A lora_B",
            r"names have \.inner after the module name, which is not",
        ),
        (
            f"diffusion_model.{PROJ}",
            "down up",
            r"is not a LoRA|factors have names that are not known, such as .*down",
        ),
    ],
)
def test_names_that_are_not_known_are_said(model: Path, name: str, factors: str, words: str) -> None:
    tensors, _ = plain(name, factors=factors)
    tensors[f"{name}.alpha"] = torch.tensor(2.0)
    with pytest.raises(CheckpointError, match=words):
        check(model, write(model, tensors), {})


TOGETHER = "double_blocks_0_img_attn_proj"


@pytest.mark.parametrize(
    "name",
    [
        *("transformer.base_model.model.", "base_model.model.transformer.", "module._orig_mod.model."),
        *(
            "diffusion_model._orig_mod.",
            "pipe.dit.module.",
            "model.diffusion_model.base_model.model.",
            "net.",
            "lora_transformer-",
        ),
    ],
)
def test_starts_of_names_come_off_in_any_order(model: Path, name: str) -> None:
    check(model, *_one(model, plain(f"{name}double_blocks.0.img_attn.proj")))


@pytest.mark.parametrize(
    "name",
    [
        *(f"lora_unet_{TOGETHER}_", f"lora_unet__orig_mod_{TOGETHER}", f"Hunyuan_video_I2V_lora_{TOGETHER}"),
        *(
            f"lora_transformer_base_model_model_{TOGETHER}",
            "transformer.double_blocks.0._orig_mod.img_attn.proj",
            f"diffusion_model.{PROJ}._orig_mod",
        ),
    ],
)
def test_underscored_names_and_wrappers_inside_are_read(model: Path, name: str) -> None:
    check(model, *_one(model, plain(name, factors="lora_down lora_up")))


def _one(model: Path, given: tuple[Any, Changes]) -> tuple[Path, Changes]:
    return write(model, given[0]), given[1]


def test_xlabs_factors_are_those_of_both_streams_and_of_single_blocks(model: Path) -> None:
    tensors, expected = {}, {}
    for old, module in {
        "double_blocks.0.processor.qkv_lora1": QKV,
        "double_blocks.0.processor.proj_lora1": PROJ,
        "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
        "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
        "single_blocks.0.processor.proj_lora": "single_blocks.0.linear2",
    }.items():
        factors, change = plain(old, module)
        tensors |= {
            key.replace("lora_A", "down").replace("lora_B", "up"): one for key, one in factors.items()
        }
        expected |= change
    down, up = drawn(RANK, WIDTH), drawn(3 * WIDTH, RANK)
    single = "single_blocks.0.processor.qkv_lora"
    tensors |= {f"{single}.down.weight": down, f"{single}.up.weight": up}
    expected["single_blocks.0.linear1"] = np.vstack([product(down, up), np.zeros((4 * WIDTH, WIDTH))])

    check(model, write(model, tensors), expected)
    assert read_lora(write(model, tensors)).metadata["ss_base_model_version"] == "flux"


@pytest.mark.parametrize(("stream", "layer"), [("img", "to_qkv"), ("txt", "to_added_qkv")])
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_fused_layers_of_diffusers_are_queries_keys_and_values(
    model: Path, stream: str, layer: str, alpha: float | None
) -> None:
    down, up = drawn(RANK, WIDTH), drawn(3 * WIDTH, RANK)
    name = f"transformer.transformer_blocks.0.attn.{layer}"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    tensors |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}

    expected = product(down, up, 1.0 if alpha is None else alpha / RANK)
    check(model, write(model, tensors), {f"double_blocks.0.{stream}_attn.qkv": expected})


def test_keys_and_values_of_fewer_heads_are_told_by_the_sizes() -> None:
    """As in Krea 2: queries of 48 heads, keys and values of 12; in its text blocks of equally many."""
    fused = {"transformer_blocks.3": 12, "text_fusion.refiner_blocks.1": 48}
    down, tensors, expected = drawn(RANK, 48), {}, {}
    for path, rows in fused.items():
        up, magnitudes = drawn(48 + 2 * rows, RANK, seed=rows), drawn(48 + 2 * rows, seed=rows)
        ends = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitudes}
        tensors |= {f"transformer.{path}.attn.to_qkv.{end}": tensor for end, tensor in ends.items()}
        for character, place in {"q": (0, 48), "k": (48, 48 + rows), "v": (48 + rows, 48 + 2 * rows)}.items():
            name = f"lora_unet_{path.replace('.', '_')}_attn_to_{character}"
            expected |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up[slice(*place)]}
            expected[f"{name}.dora_scale"] = magnitudes[slice(*place), None]

    found = to_native(tensors)

    assert found.family is not None
    assert found.family.name == "krea2"
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())
    odd = {name: tensor[:-1] if "lora_B" in name else tensor for name, tensor in tensors.items()}
    assert rewrite(odd)[0].keys() == odd.keys()


@pytest.mark.parametrize("place", ["{name}.lora_down.{n}.weight", "{name}_{n}.lora_down.weight"])
@pytest.mark.parametrize("where", ["beside", "bare", "header"])
def test_numbered_factors_are_the_parts_of_a_joined_layer(model: Path, place: str, where: str) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    key = {"beside": f"{name}.alpha", "bare": "alpha"}.get(where)
    tensors, parts = ({key: torch.tensor(1.0)} if key else {}), []
    for n in range(3):
        down, up = drawn(RANK, WIDTH, seed=n), drawn(WIDTH, RANK, seed=n + 5)
        key = place.format(name=name, n=n)
        tensors |= {key: down, key.replace("down", "up"): up}
        parts.append(product(down, up, 1 / RANK))

    header = {"alpha": "1", "rank": str(RANK)} if where == "header" else None
    check(model, write(model, tensors, header), {QKV: np.vstack(parts)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alphas_of_whole_lokr_matrices_are_not_judged(model: Path, dtype: torch.dtype) -> None:
    first, second = drawn(2, 2).to(dtype), drawn(4, 4).to(dtype)
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    alpha = torch.tensor(9999999999.0).to(dtype)  # ai-toolkit's for full rank: infinite in float16
    path = write(model, {f"{name}.lokr_w1": first, f"{name}.lokr_w2": second, f"{name}.alpha": alpha})

    check(model, path, {PROJ: np.kron(first.double().numpy(), second.double().numpy())})


def test_magnitudes_of_ai_toolkit_are_one_number_a_row(model: Path) -> None:
    tensors, change = plain(f"diffusion_model.{PROJ}")
    magnitudes = drawn(WIDTH, seed=4).abs()
    weight = drawn(WIDTH, WIDTH, seed=9).double().numpy()
    changed = weight + change[PROJ]
    norms = np.linalg.norm(changed, axis=1, keepdims=True)

    path = write(model, {**tensors, f"diffusion_model.{PROJ}.magnitude": magnitudes})
    check(model, path, {PROJ: magnitudes.double().numpy()[:, None] * changed / norms - weight})


@pytest.mark.parametrize("names", ["transformer_1 transformer_2", "high_noise_model low_noise_model"])
@pytest.mark.parametrize("start", ["diffusion_model.", ""])
def test_one_file_for_both_experts_of_wan_is_taken_apart(tmp_path: Path, start: str, names: str) -> None:
    path = tmp_path / "both.safetensors"
    factors = {"lora_A": drawn(2, 4), "lora_B": drawn(4, 2)}
    tensors = {
        f"{start}{names.split()[n - 1]}.blocks.0.self_attn.q.{factor}.weight": n * one
        for n in (1, 2)
        for factor, one in factors.items()
    }
    save_file(tensors, path)
    parts = read_lora(path, by_expert=True).loras_by_expert
    for expert, n in (("high_noise", 1), ("low_noise", 2)):
        assert torch.equal(
            parts[expert].tensors["lora_unet_blocks_0_self_attn_q.lora_down.weight"], n * factors["lora_A"]
        )


@torch.no_grad()
def test_training_and_generation_read_the_alpha_of_the_header(tmp_path: Path) -> None:
    dit = tiny_dit(tmp_path)
    names = {
        name: 0.05 * drawn(*one.shape, seed=3)
        for name, one in wan_network(dit, 4, 4).state_dict().items()
        if one.ndim
    }
    save_file(names, tmp_path / "x.safetensors", {"alpha": "16", "rank": "4"})
    network = wan_network(dit, 4, 2)
    network.load_weights(tmp_path / "x.safetensors")
    assert {float(one) for name, one in network.state_dict().items() if name.endswith("alpha")} == {16.0}
    network.attach()
    trained = dit(**inputs(dit))

    other = add_lora(tiny_dit(tmp_path), tmp_path / "x.safetensors")
    torch.testing.assert_close(trained, other(**inputs(other)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["pipe.dino_resampler.layers.0.to_q.weight"], "belong to another network, pipe.dino_resampler, and"),
        (["double_blocks.0.img_attn.norm.query_norm.scale"], "are complete norms of the model"),
        (["diffusion_model.double_blocks.0.img_attn.proj.bias"], "are complete biases of the model"),
        (
            [f"diffusion_model.{PROJ}.reshape_weight"],
            "are parts of layers called reshape_weight, which are not",
        ),
        (
            [f"lora_unet_{PROJ.replace('.', '_')}.lora_gate.weight"],
            "are parts of layers called lora_gate, which are not",
        ),
        (["bundle_emb.word.string_to_param"], "are word embeddings"),
        (
            ["bundle_emb.ohwx.string_to_param"],
            "so that ohwx means nothing in a prompt here",
        ),
        (["bundle_emb.my.ohwx.clip_l"], "so that my.ohwx means nothing in a prompt here"),
        (["bundle_emb.ohwx.clip_l"], "know the word if this file is one of their LoRAs"),
        (
            ["img_encoder.x.lora_A.weight", "img_encoder.x.lora_B.weight"],
            "no known model has layers of these names",
        ),
    ],
)
def test_what_is_left_over_is_named_for_what_it_is(
    model: Path, keys: list[str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, expected = plain(f"diffusion_model.{PROJ}")
    check(model, write(model, tensors | {key: torch.ones(8, 8) for key in keys}), expected)
    assert words in caplog.text
    assert "damaged or for another model" not in caplog.text


def test_text_connectors_are_named_where_they_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _merge_two(
        tmp_path, ("transformer_blocks.0.attn1.to_q", "text_embedding_projection.video_aggregate_embed")
    )
    assert "they change the text connectors" in caplog.text
    assert "damaged" not in caplog.text


def _merge_two(tmp_path: Path, names: tuple[str, str]) -> None:
    """Merge a LoRA for two modules into a model that has the first."""
    tensors = {f"diffusion_model.{name}.lora_{x}.weight": torch.ones(4, 4) for name in names for x in "AB"}
    save_file(tensors, tmp_path / "lora.safetensors")
    save_file({f"{name}.weight": torch.ones(4, 4) for name in names[:1]}, tmp_path / "dit.safetensors")
    given = ("--lora_weight", "lora", "--dit", "dit", "--save_merged_model", "merged")
    merge_lora.main([one if one[0] == "-" else str(tmp_path / f"{one}.safetensors") for one in given])


def test_a_lora_of_another_size_is_named_for_its_model(model: Path) -> None:
    tensors, _ = plain("lora_unet_single_blocks_0_linear1", "single_blocks.0.linear1", "lora_down lora_up")
    save_file({"single_blocks.0.linear1.weight": torch.ones(9 * WIDTH, WIDTH)}, model)
    path = write(model, tensors, {"ss_base_model_version": "flux1"})
    with pytest.raises(CheckpointError, match=r"for single_blocks\.0\.linear1\.weight .* It is for flux\."):
        check(model, path, {})


def test_the_sound_of_a_lora_is_named_where_there_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.audio_attn1.to_q")
    _merge_two(tmp_path, names)
    assert "a stream that this run is without" in caplog.text

    caplog.clear()
    _merge_two(tmp_path, ("transformer_blocks.0.attn1.to_q", "transformer_blocks.7.attn1.to_q"))
    assert "another model of ltx_2" in caplog.text
    assert "other models of ltx_2 have them" in caplog.text


def test_a_start_that_is_not_known_is_named(model: Path) -> None:
    tensors, _ = plain("own.wrapper.double_blocks.0.img_attn.proj")
    with pytest.raises(CheckpointError, match=r"its names begin with own\.wrapper\., which is not known"):
        check(model, write(model, tensors), {})

"""LoRAs of small effect in weights of 16 bits: --lora_rounding where LoRAs are merged."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge_lora
import wan_generate_video
from checkpoints.writing import LATE_BYTES, stream_tensors
from modules.errors import OptionError
from networks import flux_merge_lora, sdxl_merge_lora
from networks.apply import LoraPatch, OriginalWeights
from networks.loading import LoraFile, WeightedLora, read_lora
from networks.rounding import MAX_METADATA, METADATA_KEY, LoraRounding, RandomRounding, narrow_dtype
from networks.text_loras import TextLoras
from networks.use_options import AUTO, NEAREST, STOCHASTIC
from protocols.loading import Placement, TensorInfo
from tests.tiny.wan import TinyWan, write_tiny_wan
from tests.training import toy
from wan.checkpoints import load_dit

CPU = torch.device("cpu")
NAME = "a.weight"
SIZE = 1100  # rows and columns: more elements than are changed at once


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors_of(kind: str, rows: int, columns: int, seed: int = 1) -> dict[str, Tensor]:
    """Random factors of one module."""
    up, down = normal(rows, 4, seed=seed), normal(4, columns, seed=seed + 1)
    if kind == "LoHa":
        second = {"hada_w2_a": normal(rows, 4, seed=seed + 2), "hada_w2_b": normal(4, columns, seed=seed + 3)}
        return {"hada_w1_a": up, "hada_w1_b": down, **second}
    if kind == "LoKr":
        return {"lokr_w1": normal(2, 2, seed=seed), "lokr_w2": normal(rows // 2, columns // 2, seed=seed + 1)}
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(4.0)}


def use_of(factors: Mapping[str, Tensor], strength: float, file: str = "style.safetensors") -> WeightedLora:
    tensors = {f"lora_unet_a.{part}": tensor for part, tensor in factors.items()}
    return WeightedLora(LoraFile(Path(file), tensors, {}, "ours"), strength)


def change_of(use: WeightedLora, weight: Tensor) -> Tensor:
    """What the LoRA adds to a weight, in float32."""
    return LoraPatch([use])(NAME, weight.float()) - weight.float()


def scaled(use: WeightedLora, weight: Tensor, size: float) -> WeightedLora:
    """The LoRA at the strength at which its change has this share of the weight's norm."""
    share = float(change_of(use, weight).norm() / weight.float().norm())
    return WeightedLora(use.lora, use.multiplier * size / share)


def share_kept(changed: Tensor, weight: Tensor, change: Tensor) -> float:
    """<W' - W, d> / <d, d>."""
    difference = changed.double() - weight.double()
    change = change.double()
    return float((difference * change).sum() / change.square().sum())


def bf16(rows: int = SIZE, columns: int = SIZE, seed: int = 0) -> Tensor:
    return (0.02 * normal(rows, columns, seed=seed)).bfloat16()


def patch(rule: str, *uses: WeightedLora) -> LoraPatch:
    return LoraPatch(uses, rounding=LoraRounding(rule))


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr"])
def test_a_small_lora_keeps_its_effect_and_the_line_says_what_the_nearest_keeps(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    weight = bf16()
    use = scaled(use_of(factors_of(kind, SIZE, SIZE), 1.0), weight, 0.0003)
    change = change_of(use, weight)
    merging = patch(AUTO, use)

    changed = merging(NAME, weight)

    nearest = share_kept(LoraPatch([use])(NAME, weight), weight, change)
    assert nearest < 0.35
    assert abs(share_kept(changed, weight, change) - 1) < 0.01
    assert torch.equal(patch(AUTO, use)(NAME, weight), changed), "runs repeat to the bit"
    assert torch.equal(patch(STOCHASTIC, use)(NAME, weight), changed)
    merging.check()
    start = "16-bit weights cannot hold such small changes: rounded to the nearest they would keep only "
    end = " % of style.safetensors. 1 of 1 are therefore rounded up or down at random, which keeps the effect"
    (line,) = [line for line in caplog.messages if line.startswith(start)]
    percent = float(line.removeprefix(start).partition(end)[0])
    assert abs(percent - 100 * nearest) < 10, "of a sample of rows"
    caplog.clear()
    merging.check()
    assert start not in caplog.text, "it is said once"


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr"])
def test_a_usual_lora_is_merged_as_before_to_the_bit(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    weight = bf16()
    use = scaled(use_of(factors_of(kind, SIZE, SIZE), 1.0), weight, 0.03)
    merging = patch(AUTO, use)

    assert torch.equal(merging(NAME, weight), LoraPatch([use])(NAME, weight))
    merging.check()
    assert "rounded" not in caplog.text


def test_the_change_of_a_dora_is_kept_too() -> None:
    weight = bf16()
    factors = factors_of("LoRA", SIZE, SIZE)
    norms = weight.float().norm(dim=1, keepdim=True)
    use = use_of({**factors, "dora_scale": norms}, 1.0)
    use = scaled(use, weight, 0.0003)
    change = change_of(use, weight)

    assert share_kept(LoraPatch([use])(NAME, weight), weight, change) < 0.35
    assert abs(share_kept(patch(AUTO, use)(NAME, weight), weight, change) - 1) < 0.01


def test_several_loras_are_rounded_once_and_each_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Two small ones that lose most alone; beside a large one, a small one is kept by rounding to the
    nearest.
    """
    caplog.set_level(logging.INFO)
    weight = bf16()
    small = [
        scaled(use_of(factors_of("LoRA", SIZE, SIZE, seed), 1.0, f"{seed}.safetensors"), weight, 0.0003)
        for seed in (10, 20)
    ]
    large = scaled(use_of(factors_of("LoRA", SIZE, SIZE, 30), 1.0, "large.safetensors"), weight, 0.03)
    changes = [change_of(use, weight) for use in small]
    merging = patch(AUTO, *small)

    changed = merging(NAME, weight)

    assert abs(share_kept(changed, weight, changes[0] + changes[1]) - 1) < 0.01
    merging.check()
    assert "% of 10.safetensors" in caplog.text
    assert "% of 20.safetensors" in caplog.text
    assert torch.equal(patch(AUTO, small[0], large)(NAME, weight), LoraPatch([small[0], large])(NAME, weight))


def test_a_lora_of_a_part_of_a_weight_is_not_judged_by_that_of_another_part() -> None:
    """A small one of queries, and a large one of values, in one joined weight."""
    rows = 3 * 512
    weight = bf16(rows, 1024)
    name = "double_blocks.0.img_attn.qkv.weight"
    parts = {}
    for part, size, seed in (("q", 0.0003, 1), ("v", 0.03, 5)):
        factors = factors_of("LoRA", 512, 1024, seed)
        start = f"lora_unet_transformer_blocks_0_attn_to_{part}."
        lora = LoraFile(
            Path(f"{part}.safetensors"), {start + key: value for key, value in factors.items()}, {}, "ours"
        )
        change = LoraPatch([WeightedLora(lora)])(name, weight.float()) - weight.float()
        assert float(change.norm()) > 0
        rows_norm = float(weight[:512].float().norm())
        parts[part] = WeightedLora(lora, size * rows_norm / float(change.norm()))
    change = LoraPatch([parts["q"]])(name, weight.float()) - weight.float()

    changed = patch(AUTO, *parts.values())(name, weight)

    assert abs(share_kept(changed[:512], weight[:512], change[:512]) - 1) < 0.02
    assert torch.equal(changed[512:1024], weight[512:1024]), "rows that nothing changes keep every bit"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, -0.37, 3e-3, 2e-5, -7e-7, 0.0])
def test_rounding_at_random_gives_a_neighbour_and_the_value_on_average(
    dtype: torch.dtype, value: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    bits = 16 if dtype == torch.bfloat16 else 13
    noise = torch.randint(1 << bits, (1 << 21,), generator=generator, dtype=torch.int32)
    values = torch.full((3, 400_000), value * 1.0007)
    exact = float(values[0, 0])

    RandomRounding(dtype, b"seed", noise).round(values, 0)

    assert torch.equal(values.to(dtype).float(), values), "they are numbers of the dtype"
    neighbors = sorted(set(values.flatten().tolist()))
    assert len(neighbors) <= 2
    step = neighbors[-1] - neighbors[0]
    assert neighbors[0] <= exact <= neighbors[-1]
    assert abs(float(values.double().mean()) - exact) <= 0.003 * step


def test_numbers_that_have_16_bits_and_infinite_ones_stay() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(1 << 16, (1 << 21,), generator=generator, dtype=torch.int32)
    values = torch.cat([bf16(10, 10).float().flatten(), torch.tensor([math.inf, -math.inf, 0.0, -0.0])])
    rounded = values.clone()

    RandomRounding(torch.bfloat16, b"seed", noise).round(rounded, 0)

    assert torch.equal(rounded.view(torch.int32), values.view(torch.int32))


def test_the_dtype_to_round_to_is_the_coarser_of_file_and_network() -> None:
    assert narrow_dtype(torch.float32, torch.float32) is None
    assert narrow_dtype(torch.float32, None) is None
    assert narrow_dtype(torch.float32, torch.float16) == torch.float16
    assert narrow_dtype(torch.float16, torch.bfloat16) == torch.bfloat16
    assert narrow_dtype(torch.bfloat16, torch.float32) == torch.bfloat16


def test_a_file_in_float32_that_is_loaded_in_bf16_keeps_small_loras() -> None:
    """Its values are those of bf16: rounded by the caller, they would lose the LoRA."""
    weight = bf16()
    use = scaled(use_of(factors_of("LoRA", SIZE, SIZE), 1.0), weight, 0.0003)
    change = change_of(use, weight)
    wide = weight.float()

    changed = patch(AUTO, use)(NAME, wide, torch.bfloat16)

    assert torch.equal(changed.bfloat16().float(), changed)
    assert abs(share_kept(changed, weight, change) - 1) < 0.01
    assert share_kept(patch(AUTO, use)(NAME, wide).bfloat16(), weight, change) < 0.35


@pytest.mark.parametrize("rule", [AUTO, STOCHASTIC, NEAREST])
def test_weights_in_float32_are_unchanged_by_it(rule: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    weight = bf16().float()
    use = scaled(use_of(factors_of("LoRA", SIZE, SIZE), 1.0), weight, 0.0003)
    merging = patch(rule, use)

    assert torch.equal(merging(NAME, weight), LoraPatch([use])(NAME, weight))
    merging.check()
    says = f"--lora_rounding {rule} has no effect: the weights are in float32"
    assert (says in caplog.text) == (rule != AUTO)


def test_nearest_is_as_before_and_says_what_it_keeps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    weight = bf16()
    use = scaled(use_of(factors_of("LoRA", SIZE, SIZE), 1.0), weight, 0.0003)
    merging = patch(NEAREST, use)

    assert torch.equal(merging(NAME, weight), LoraPatch([use])(NAME, weight))
    merging.check()
    assert "rounded to the nearest, as set by --lora_rounding nearest: that keeps 2" in caplog.text


def test_beside_weights_of_8_bits_it_says_that_it_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    use = use_of(factors_of("LoRA", 64, 64), 1.0)
    for rule in (AUTO, STOCHASTIC):
        beside = patch(rule, use)
        assert beside.leave_unmerged(NAME, (64, 64))
        beside.check()
    says = "has no effect: the weights stay in 8 or 4 bits, and LoRAs are computed separately"
    assert caplog.text.count(says) == 1


def test_small_weights_and_numbers_are_rounded_too() -> None:
    weight = torch.tensor(1.0).bfloat16()
    use = use_of({"diff": torch.tensor(0.001)}, 1.0)
    assert float(patch(STOCHASTIC, use)(NAME, weight)) in {1.0, 1.0078125}
    assert float(patch(AUTO, use)(NAME, weight)) in {1.0, 1.0078125}
    bias = torch.ones(512).bfloat16()
    use = use_of({"diff": torch.full((512,), 0.001)}, 1.0)
    assert abs(float(patch(AUTO, use)(NAME, bias).float().mean()) - 1.001) < 0.0005


def test_the_seed_is_of_the_name_and_the_file() -> None:
    weight = bf16(64, 64)
    factors = factors_of("LoRA", 64, 64)
    use = scaled(use_of(factors, 1.0), weight, 0.0003)
    of_a = patch(STOCHASTIC, use)(NAME, weight)
    renamed = {name.replace("unet_a", "unet_b"): one for name, one in use.lora.tensors.items()}
    other_name = WeightedLora(LoraFile(use.lora.path, renamed, {}, "ours"), use.multiplier)
    later = WeightedLora(LoraFile(Path("again.safetensors"), use.lora.tensors, {}, "ours"), use.multiplier)

    assert not torch.equal(patch(STOCHASTIC, other_name)("b.weight", weight), of_a)
    assert torch.equal(patch(STOCHASTIC, later)(NAME, weight), of_a), "a file may be renamed"


def test_switching_loras_gives_what_loading_gives(caplog: pytest.LogCaptureFixture) -> None:
    network = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64, bias=False).bfloat16()})
    weight = network["a"].weight.detach().clone()
    use = scaled(use_of(factors_of("LoRA", 64, 64), 1.0), weight, 0.0003)
    originals = OriginalWeights([use], rounding=AUTO)
    originals.keep(network)

    originals.switch(network, [use])

    assert torch.equal(network["a"].weight, patch(AUTO, use)(NAME, weight))
    assert not torch.equal(network["a"].weight, LoraPatch([use])(NAME, weight))
    originals.switch(network, [])
    assert torch.equal(network["a"].weight, weight)


# --- commands


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    """A tiny Wan in bf16 with LoRAs of all its attention and feed-forward layers."""
    folder = tmp_path_factory.mktemp("rounding")
    files = write_tiny_wan(folder, dtype=torch.bfloat16)
    weights = load_file(files.dit)
    names = [
        name
        for name, one in weights.items()
        if name.startswith("blocks.") and one.ndim == 2 and name.endswith(".weight")
    ]
    assert len(names) > 10
    for file, size in (("small", 0.0003), ("usual", 0.03)):
        tensors = {}
        for number, name in enumerate(names):
            weight = weights[name].float()
            factors = factors_of("LoRA", *weight.shape, seed=10 * number)
            change = factors["lora_up.weight"] @ factors["lora_down.weight"]
            factors["lora_up.weight"] *= size * weight.norm() / change.norm()
            module = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            tensors |= {f"{module}.{part}": tensor for part, tensor in factors.items()}
        save_file(tensors, folder / f"{file}.safetensors")
    return files


def lora(files: TinyWan, name: str) -> Path:
    return files.dit.with_name(f"{name}.safetensors")


def total_share(files: TinyWan, merged: Path, name: str) -> float:
    """The share of the effect of a LoRA that a merged file keeps, of all weights."""
    before, after = load_file(files.dit), load_file(merged)
    exact = LoraPatch([WeightedLora(read_lora(lora(files, name)))])
    products, squares = 0.0, 0.0
    for key, weight in before.items():
        change = (exact(key, weight.float()) - weight.float()).double()
        products += float(((after[key].double() - weight.double()) * change).sum())
        squares += float(change.square().sum())
    return products / squares


def merge(files: TinyWan, output: Path, name: str, *more: str) -> Path:
    words = ["--dit", files.dit, "--lora_weight", lora(files, name), "--device", "cpu"]
    merge_lora.main([str(word) for word in (*words, "--save_merged_model", output, *more)])
    return output


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def test_merged_files_keep_a_small_lora_and_say_so(
    tmp_path: Path, files: TinyWan, caplog: pytest.LogCaptureFixture
) -> None:
    """merge_lora.py and --save_merged_model, the same to the bit; and what a generation loads."""
    caplog.set_level(logging.INFO)
    merged = merge(files, tmp_path / "merged.safetensors", "small")
    says = "rounded to the nearest they would keep only"
    assert caplog.text.count(says) == 1
    saved = tmp_path / "saved.safetensors"
    words = [*files.models, "--task", "t2v-1.3B", "--save_path", tmp_path, "--device", "cpu"]
    words += ["--lora_weight", lora(files, "small"), "--save_merged_model", saved]
    wan_generate_video.main([str(word) for word in words])

    assert abs(total_share(files, merged, "small") - 1) < 0.01
    assert saved.read_bytes() == merged.read_bytes()
    assert merge(files, tmp_path / "again.safetensors", "small").read_bytes() == merged.read_bytes()
    said = metadata_of(merged)
    assert says in said[METADATA_KEY]
    assert "small.safetensors" in said["modelspec.merged_from"]
    merging = patch(AUTO, WeightedLora(read_lora(lora(files, "small"))))
    loaded = load_dit(files.dit, Placement(CPU, patch=merging))
    plain = load_dit(merged, Placement(CPU))
    assert all(torch.equal(one, plain.state_dict()[name]) for name, one in loaded.state_dict().items())


def test_merged_files_of_a_usual_lora_are_those_of_rounding_to_the_nearest(
    tmp_path: Path, files: TinyWan, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    merged = merge(files, tmp_path / "merged.safetensors", "usual")
    assert "at random" not in caplog.text
    nearest = merge(files, tmp_path / "nearest.safetensors", "usual", "--lora_rounding", "nearest")

    assert METADATA_KEY not in metadata_of(merged)
    assert merged.read_bytes() == nearest.read_bytes()
    lost = merge(files, tmp_path / "lost.safetensors", "small", "--lora_rounding", "nearest")
    assert total_share(files, lost, "small") < 0.35


def test_the_option_is_refused_where_no_lora_is_merged(tmp_path: Path, files: TinyWan) -> None:
    rounding = ("--lora_rounding", "nearest")
    output = str(tmp_path / "x.safetensors")
    wan = [*files.models, "--task", "t2v-1.3B", "--save_path", str(tmp_path), "--prompt", "a"]
    with pytest.raises(OptionError, match="--lora_rounding nearest needs --lora_weight"):
        wan_generate_video.main([*wan, *rounding])
    with pytest.raises(OptionError, match="--lora_rounding nearest needs --lora_weight"):
        merge_lora.main(["--dit", str(files.dit), "--save_merged_model", output, *rounding])
    to_lora = ["--models", str(lora(files, "small")), "--ratios", "1", "--save_to", output, *rounding]
    with pytest.raises(OptionError, match="--lora_rounding needs --sd_model"):
        sdxl_merge_lora.main(to_lora)
    with pytest.raises(OptionError, match="--lora_rounding needs --flux_model"):
        flux_merge_lora.main(to_lora)
    toy.write_caches(tmp_path)
    with pytest.raises(OptionError, match="--lora_rounding nearest needs --base_weights"):
        toy.train_toy(tmp_path, *rounding)
    for wrong in ("random", ""):
        with pytest.raises(SystemExit):
            wan_generate_video.main([*wan, "--lora_rounding", wrong])


def test_base_weights_are_merged_as_the_option_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    toy.write_caches(tmp_path)
    factors = {"lora_down.weight": normal(2, 8, seed=1), "lora_up.weight": 2e-4 * normal(16, 2, seed=2)}
    path = tmp_path / "base.safetensors"
    save_file({f"lora_unet_blocks_0_up.{part}": one for part, one in factors.items()}, path)
    family = toy.ToyFamily(dtype=torch.bfloat16)

    def train(*words: str) -> dict[str, Tensor]:
        return toy.train_toy(tmp_path, "--base_weights", path, "--overwrite", *words, family=family)

    first = train("--lora_rounding", "stochastic")
    assert "1 weights are rounded up or down at random" in caplog.text
    assert toy.same(train("--lora_rounding", "stochastic"), first)
    assert not toy.same(train("--lora_rounding", "nearest"), first)


def test_text_encoders_keep_small_loras(caplog: pytest.LogCaptureFixture) -> None:
    class Encoder:
        name = "clip"
        lora_prefix = "lora_te1"
        num_blocks = 1

        def __init__(self) -> None:
            layer = torch.nn.Linear(256, 256, bias=False)
            self.network = torch.nn.ModuleDict({"layer": layer.bfloat16()})

    encoder = Encoder()
    weight = encoder.network["layer"].weight.detach().clone()
    factors = factors_of("LoRA", 256, 256)
    change = factors["lora_up.weight"] @ factors["lora_down.weight"]
    factors["lora_up.weight"] *= 0.0003 * weight.float().norm() / change.norm()
    change = factors["lora_up.weight"] @ factors["lora_down.weight"]
    texts = {f"lora_te1_layer.{part}": tensor for part, tensor in factors.items()}
    use = WeightedLora(LoraFile(Path("text.safetensors"), {}, {}, "ours", text_tensors=texts))
    with caplog.at_level(logging.INFO):
        loras = TextLoras([use], AUTO)
        loras._merge(
            [WeightedLora(LoraFile(use.lora.path, _as_unet(texts), {}, "ours"))], encoder.network, "clip"
        )

    assert abs(share_kept(encoder.network["layer"].weight.detach(), weight, change) - 1) < 0.05
    assert "would keep" in caplog.text


def _as_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("lora_te1", "lora_unet"): tensor for name, tensor in tensors.items()}


# --- metadata that are known when all tensors are written


def test_late_metadata_are_in_the_header(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    infos = {name: TensorInfo(one.dtype, tuple(one.shape)) for name, one in tensors.items()}
    path = tmp_path / "x.safetensors"
    longest = "é\n" * (MAX_METADATA // 2)

    stream_tensors(
        path, infos, tensors.__getitem__, {"old": "1"}, late_metadata=lambda: {METADATA_KEY: longest}
    )
    assert metadata_of(path) == {"old": "1", METADATA_KEY: longest}
    found = load_file(path)
    assert all(torch.equal(found[name], one) for name, one in tensors.items())
    stream_tensors(path, infos, tensors.__getitem__, late_metadata=dict)
    assert metadata_of(path) == {}
    assert load_file(path).keys() == tensors.keys()
    with pytest.raises(ValueError, match="do not fit"):
        stream_tensors(path, infos, tensors.__getitem__, late_metadata=lambda: {"x": "y" * LATE_BYTES})

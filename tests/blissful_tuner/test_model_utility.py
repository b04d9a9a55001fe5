"""blissful_tuner/model_utility.py: what files are, and files written in other dtypes, names and shards."""

import hashlib
import json
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from blissful_tuner.model_utility import main
from blissful_tuner.model_utility_options import ModelUtilityOptions
from blissful_tuner.taehv import load_taehv
from frame_pack.checkpoints import load_dit as load_framepack
from hunyuan_model.checkpoints import load_dit as load_hunyuan
from modules.checkpoints.opening import open_checkpoint
from modules.contract.loading import Placement
from networks.metadata import add_hashes
from post.upscaling.files import load_upscaler
from tests.commands import run_script
from tests.manifests import tensor_list, write_hollow
from tests.tiny import dits, post_faces, post_restorers, post_upscaling
from tests.tiny.post_flowformer import write_flowformer
from tests.tiny.post_restorers import write_model
from tests.tiny.taehv import write_taehv
from wan.checkpoints import load_dit as load_wan
from wan.spec import LATENT

SCRIPT = "blissful_tuner/model_utility.py"
CPU = torch.device("cpu")
STATE = {
    "model.a.weight": torch.arange(12.0).reshape(3, 4),
    "model.a.bias": torch.ones(3),
    "model.b.weight": torch.full((2, 2), 0.1),
    "count": torch.tensor(7),
}


def write(path: Path, state: Mapping[str, Tensor] = STATE, metadata: dict[str, str] | None = None) -> Path:
    save_file(dict(state), path, metadata)
    return path


def run(path: Path, *words: object) -> None:
    main(["--input", str(path), *map(str, words)])


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


# --- what a file is ---


def test_a_file_is_described_with_its_dtypes_sizes_and_metadata(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write(tmp_path / "a.safetensors", metadata={"note": "x" * 5000}))

    out = capsys.readouterr().out
    assert "an unknown model with tensors such as count, model.a.bias, model.a.weight" in out
    assert "container: safetensors" in out
    assert "tensors: 4, with 20 numbers" in out
    assert "float32: 3 tensors, 76 bytes" in out
    assert "int64: 1 tensor, 8 bytes" in out
    assert max(len(line) for line in out.splitlines()) < 300


def test_names_and_metadata_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.safetensors", {"\x1b[2J" * 1000: torch.ones(1)}, {"\x1b[1m": "a\nb\x1b[31m"})

    run(path)

    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"  \x1b[1m: a\nb\x1b[31m" in out
    assert len(out) < 5000


@pytest.mark.parametrize(
    ("manifest", "what"),
    [
        ("wan2.1-t2v-1.3b", "a Wan transformer (--dit) for --task t2v-1.3B"),
        ("skyreels-v1-i2v", "SkyReels"),
        ("framepack-dit", "FramePack"),
        ("umt5-xxl-enc-wan", "umT5"),
        ("retinaface-resnet50", "RetinaFace"),
        ("llava-llama3-single", "language model"),
    ],
)
def test_a_file_of_full_size_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], manifest: str, what: str
) -> None:
    run(write_hollow(tmp_path / "a.safetensors", tensor_list(manifest)), "--json")

    assert what in said(capsys)["what"]


def test_a_lora_is_described_by_rank_alpha_and_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write(tmp_path / "a.safetensors", lora()), "--json")

    what = said(capsys)["what"]
    assert what.startswith("a LoRA for wan")
    assert "rank 4, alpha 2, 3 layers: blocks_N_self_attn_q (3)" in what


def test_tensors_are_listed_by_parts_of_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.safetensors")

    run(path, "--inspect", "--target_keys", "model.", "--exclude_keys", "bias")

    assert capsys.readouterr().out.splitlines()[-2:] == [
        "model.a.weight: [3, 4] (float32)",
        "model.b.weight: [2, 2] (float32)",
    ]


def test_checksums_are_those_of_the_file_of_its_data_and_of_its_lora(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = add_hashes(lora(), {"ss_network_dim": "4"})
    path = write(tmp_path / "a.safetensors", lora(), metadata)

    run(path, "--hash", "--json")
    found = said(capsys)
    run(path, "--hash")

    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert found["hashes"][0]["sha256"] == hashlib.sha256(data).hexdigest()
    assert found["hashes"][0]["data_sha256"] == hashlib.sha256(data[start:]).hexdigest()
    assert found["lora_hashes"]["sshs_model_hash"] == metadata["sshs_model_hash"]
    assert f"sshs_model_hash: {metadata['sshs_model_hash']} (as the metadata say)" in capsys.readouterr().out


def test_the_oldest_checksum_is_over_64_kib_at_1_mib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.safetensors", {"a": torch.randn(300_000)})

    run(path, "--hash", "--json")

    piece = path.read_bytes()[0x100000:0x110000]
    assert said(capsys)["hashes"][0]["old"] == hashlib.sha256(piece).hexdigest()[:8]


# --- writing ---


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_floats_are_cast_integers_and_excluded_names_stay(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    path = write(tmp_path / "a.safetensors", metadata={"note": "kept"})

    run(path, "--convert", tmp_path / "b.safetensors", "--dtype", name, "--exclude_keys", "bias")

    made = load_file(tmp_path / "b.safetensors")
    assert made["model.a.weight"].dtype == made["model.b.weight"].dtype == dtype
    assert made["model.a.bias"].dtype == torch.float32
    assert made["count"].dtype == torch.int64
    assert torch.equal(made["model.b.weight"], STATE["model.b.weight"].to(dtype))
    assert metadata_of(tmp_path / "b.safetensors") == {"format": "pt", "note": "kept"}


def test_both_spellings_of_options_do_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")

    run(path, "--convert", tmp_path / "b.safetensors", "--dtype", "bf16", "--target_keys", "model.a")
    run(
        path, "--output_path", tmp_path / "c.safetensors", "--dtype", "bf16", "--dtype_target_keys", "model.a"
    )

    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    assert load_file(tmp_path / "b.safetensors")["model.b.weight"].dtype == torch.float32


def test_prefixes_are_cut_off_and_put_before(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")

    run(path, "--convert", tmp_path / "b.safetensors", "--strip_prefix", "model.", "a.", "--add_prefix", "x.")

    assert set(load_file(tmp_path / "b.safetensors")) == {"x.weight", "x.bias", "x.b.weight", "x.count"}


def test_tensors_can_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    options = ["--full_target_keys", "model.", "--full_exclude_keys", ".b."]

    run(path, "--convert", tmp_path / "b.safetensors", *options)

    assert set(load_file(tmp_path / "b.safetensors")) == {"model.a.weight", "model.a.bias"}


@pytest.mark.parametrize("name", ["a.pth", "a.bin"])
def test_a_pickle_becomes_safetensors_with_tied_tensors_written_for_each_name(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tied = torch.randn(4, 6)
    state = {"a": tied, "b": tied, "turned": tied.T, "part": tied[1:2]}
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / name)

    with caplog.at_level("INFO"):
        run(tmp_path / name, "--convert", tmp_path / "out.pth")

    made = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(made[key], value) for key, value in state.items())
    assert not (tmp_path / "out.pth").exists()
    assert "only tensors are written, not epoch, optimizer" in caplog.text


def test_shards_are_laid_out_as_on_the_hub_and_joined_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"w{i}": torch.randn(100, 100) for i in range(5)}, {"k": "v"})

    run(path, "--convert", tmp_path / "b.safetensors", "--shard_size", "85kB")
    run(tmp_path / "b-00002-of-00003.safetensors", "--convert", tmp_path / "c.safetensors")
    run(tmp_path / "b.safetensors.index.json", "--convert", tmp_path / "d.safetensors")

    index = json.loads((tmp_path / "b.safetensors.index.json").read_text(encoding="utf-8"))
    names = [f"b-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == 5 * 40_000
    assert all((tmp_path / name).stat().st_size < 86_000 for name in names)
    assert all(metadata_of(tmp_path / name)["k"] == "v" for name in names)
    for joined in ("c", "d"):
        made = load_file(tmp_path / f"{joined}.safetensors")
        assert all(torch.equal(made[name], tensor) for name, tensor in load_file(path).items())


def test_shards_can_be_written_into_a_folder_that_takes_the_place_of_older_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"w{i}": torch.randn(100, 100) for i in range(5)})
    (tmp_path / "out").mkdir()
    run(path, "--convert", tmp_path / "out", "--shard_size", "45kB")

    run(path, "--convert", tmp_path / "out", "--shard_size", "0.12MB", "--yes")

    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_model_of_one_file_takes_the_place_of_shards_and_shards_that_of_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"w{i}": torch.randn(100, 100) for i in range(3)})
    out = tmp_path / "out"
    for size, names in (
        ("1GB", ["model.safetensors"]),
        ("100kB", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ("1GB", ["model.safetensors"]),
    ):
        run(path, "--convert", out, "--shard_size", size, "--yes")

        assert sorted(file.name for file in out.glob("*.safetensors")) == names


def test_a_folder_of_files_becomes_one(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, folder / "1.pth")
    write(folder / "2.safetensors", {"b": torch.ones(3), "same": torch.zeros(2)})
    write(folder / "3.sft", {"c": torch.ones(4), "same": torch.zeros(2)})

    run(folder, "--convert", tmp_path / "all.safetensors")

    assert {name: len(tensor) for name, tensor in load_file(tmp_path / "all.safetensors").items()} == {
        **{"a": 2, "b": 3, "c": 4},
        "same": 2,
    }


def test_hashes_of_the_old_tensors_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.safetensors", lora(), add_hashes(lora(), {"ss_network_dim": "4"}))

    with caplog.at_level("INFO"):
        run(path, "--convert", tmp_path / "b.safetensors", "--dtype", "bf16")

    assert metadata_of(tmp_path / "b.safetensors") == {"format": "pt", "ss_network_dim": "4"}
    assert "sshs_model_hash is left out" in caplog.text


def test_weights_in_8_bits_are_multiplied_by_their_scales_or_kept_with_them(tmp_path: Path) -> None:
    state = {
        "a.weight": torch.randn(8, 4).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.tensor(0.5),
        "b.weight": torch.randn(8, 4).to(torch.float8_e4m3fn),
        "b.weight_scale": torch.full((8,), 2.0),
        "norm": torch.ones(3),
    }
    layers = {name: {"format": "float8_e4m3fn"} for name in ("a", "b")}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    path = write(tmp_path / "a.safetensors", state, metadata)

    run(path, "--convert", tmp_path / "plain.safetensors", "--dtype", "bf16")
    run(path, "--convert", tmp_path / "half.safetensors", "--dtype", "bf16", "--target_keys", "a.")
    run(path, "--convert", tmp_path / "kept.safetensors", "--add_prefix", "net.")

    plain, half = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "half.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")
    assert plain.keys() == {"a.weight", "b.weight", "norm"}
    assert torch.equal(plain["a.weight"], (state["a.weight"].float() * 0.5).bfloat16())
    assert torch.equal(plain["b.weight"], (state["b.weight"].float() * 2).bfloat16())
    assert "_quantization_metadata" not in metadata_of(tmp_path / "plain.safetensors")
    assert half.keys() == {"a.weight", "b.weight", "b.weight_scale", "norm"}
    assert half["b.weight"].dtype == torch.float8_e4m3fn
    assert half["norm"].dtype == torch.float32
    assert list(record(tmp_path / "half.safetensors")) == ["b"]
    assert kept["net.a.weight"].dtype == torch.float8_e4m3fn
    assert list(record(tmp_path / "kept.safetensors")) == ["net.a", "net.b"]


LOADERS = {"wan": load_wan, "hunyuan": load_hunyuan, "framepack": load_framepack}


@pytest.mark.parametrize("family", dits.ONE_OF_EACH, ids=lambda family: family.name)
def test_a_converted_transformer_computes_the_same(family: dits.TinyDit, tmp_path: Path) -> None:
    dit = family.make(1)
    path = write(tmp_path / "dit.safetensors", dit.state_dict())
    inputs = family.inputs((3, 4, 4, 5), 1)

    run(path, "--convert", tmp_path / "prefixed.safetensors", "--add_prefix", "model.diffusion_model.")
    run(tmp_path / "prefixed.safetensors", "--convert", tmp_path / "shards", "--shard_size", "300kB")

    loaded = LOADERS[family.name.split()[0]](tmp_path / "shards", Placement(CPU))
    with torch.no_grad():
        assert torch.equal(dit.eval()(**inputs), loaded(**inputs))


def test_a_converted_taehv_decodes_the_same(tmp_path: Path) -> None:
    path = write_taehv(tmp_path / "taehv.pth")

    run(path, "--convert", tmp_path / "a.safetensors", "--dtype", "fp32")

    expected, found = (load_taehv(one, LATENT, CPU).weights for one in (path, tmp_path / "a.safetensors"))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


# a part of what it is called -> how it is written to a .pth file
TOOLS: dict[str, Callable[[Path], Path]] = {
    "SwinIR": post_upscaling.write_swinir,
    "Real-ESRGAN": post_upscaling.write_rrdb,
    "an ESRGAN upscaler with old names": lambda path: post_upscaling.write(
        path, post_upscaling.in_old_names(post_upscaling.rrdb_weights())
    ),
    "an ESRGAN or BSRGAN": lambda path: post_upscaling.write(
        path, post_upscaling.in_middle_names(post_upscaling.rrdb_weights())
    ),
    "RetinaFace": post_faces.write_red_detector,
    "GFPGAN": lambda path: write_model(path, post_restorers.gfpgan_weights(), "params_ema"),
    "CodeFormer": lambda path: write_model(path, post_restorers.codeformer_weights(), "params_ema"),
    "ParseNet": lambda path: write_model(path, post_restorers.parsenet_weights()),
    "FlowFormer": lambda path: write_flowformer(path, "module."),
}


@pytest.mark.parametrize("what", TOOLS)
def test_networks_of_tools_are_named_and_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    path = TOOLS[what](tmp_path / "a.pth")

    run(path, "--convert", tmp_path / "b.safetensors", "--json")

    assert what in said(capsys)["what"]
    with open_checkpoint(path) as old, open_checkpoint(tmp_path / "b.safetensors") as new:
        assert old.tensors == new.tensors
        assert all(torch.equal(old.read(name), new.read(name)) for name in old.tensors)


@pytest.mark.parametrize("what", ["SwinIR", "an ESRGAN upscaler with old names"])
def test_a_converted_upscaler_computes_the_same(tmp_path: Path, what: str) -> None:
    path = TOOLS[what](tmp_path / "a.pth")
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    run(path, "--convert", tmp_path / "b", "--shard_size", "20kB")

    with torch.no_grad():
        before, after = (
            load_upscaler(one, CPU, torch.float32).network(pixels) for one in (path, tmp_path / "b")
        )
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, dtype: str | None) -> None:
    largest, count = 1_000_000, 12
    path = write(tmp_path / "a.safetensors", {f"w{i}": torch.zeros(largest // 4) for i in range(count)})
    words = ["--convert", tmp_path / "b.safetensors", "--shard_size", "5MB"]

    peak = peak_bytes(lambda: run(path, *words, *(["--dtype", dtype] if dtype else [])))

    assert largest <= peak <= 1.6 * largest  # a cast has both in memory


# --- the command line ---


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2 << 30), ("1.5m", 1_500_000), ("4096", 4096)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    options = ModelUtilityOptions(input=Path("a"), convert=Path("b"), shard_size=text)

    assert options.shard_bytes == size


def test_the_script_runs_as_a_file_from_any_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")

    run_script(SCRIPT, "--input", "a.safetensors", "--convert", "b.safetensors", folder=tmp_path)

    assert load_file(tmp_path / "b.safetensors").keys() == STATE.keys()


def lora() -> dict[str, Tensor]:
    """A LoRA of three layers under our names."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for block in range(3):
        name = f"lora_unet_blocks_{block}_self_attn_q"
        state[f"{name}.lora_down.weight"] = torch.randn(4, 16, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(16, 4, generator=generator)
        state[f"{name}.alpha"] = torch.tensor(2.0)
    return state


def record(path: Path) -> dict[str, Any]:
    """What a file says of its layers in 8 bits."""
    found: dict[str, Any] = json.loads(metadata_of(path)["_quantization_metadata"])["layers"]
    return found


def peak_bytes(call: Callable[[], None]) -> int:
    """The largest sum of what torch has allocated on the CPU during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes))

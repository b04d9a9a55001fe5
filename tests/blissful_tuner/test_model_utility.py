"""blissful_tuner/model_utility.py: what files are, and files written in other dtypes, names and shards;
and files that are odd, damaged, or made to mislead.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blissful_tuner.model_utility import main
from modules.errors import CheckpointError, OptionError, OutputError
from modules.output_files import Answer, ask_at_console, ask_to_replace
from networks.metadata import add_hashes
from stable_diffusion.folders import read_folder_unet
from tests.commands import run_script
from tests.tiny.stable_diffusion import write_folder

SCRIPT = "blissful_tuner/model_utility.py"
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
    assert f"sshs_model_hash: {metadata['sshs_model_hash']} (as the metadata says)" in capsys.readouterr().out


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

    run(path, "--convert", tmp_path / "b.safetensors", "--max_shard_size", "85kB")  # diffusers' name of it
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


def test_diffusers_and_we_read_a_network_that_was_cut(tmp_path: Path) -> None:
    folder = write_folder("sd1", tmp_path / "model")
    full = folder / "unet" / "diffusion_pytorch_model.safetensors"
    expected = load_file(full)

    run(full, "--convert", tmp_path / full.name, "--max_shard_size", "500KB")
    full.unlink()
    shards = sorted(tmp_path.glob("diffusion_pytorch_model*"))
    assert len(shards) > 3
    for shard in shards:
        shard.rename(folder / "unet" / shard.name)

    theirs = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    with contextlib.ExitStack() as files:
        ours = read_folder_unet(folder, files).checkpoint
        for name, tensor in expected.items():
            assert torch.equal(theirs[name], tensor)
            assert torch.equal(ours.read(name), tensor)


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


# --- the command line ---


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


@pytest.mark.parametrize("name", ["../b.safetensors", "{}/b.safetensors"])
def test_an_index_leads_to_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    save_file({"b": torch.ones(1)}, tmp_path / "b.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "a.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": name.format(tmp_path)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    with pytest.raises(CheckpointError, match=r"b\.safetensors is not in its folder"):
        run(folder)


# --- what would be lost ---


def answer(typed: str) -> Callable[[str], Answer | None]:
    """Return somebody at a terminal who types that."""
    return lambda question: ask_at_console(question, lambda _: typed, lambda: True, offers_name=False)


def test_what_exists_is_replaced_only_if_that_is_wanted(tmp_path: Path) -> None:
    path, there = write(tmp_path / "a.safetensors"), write(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    before = there.read_bytes()

    with pytest.raises(OutputError, match=r"b\.safetensors exists already. Pass another name, or --yes"):
        run(path, "--convert", there)
    with pytest.raises(OutputError, match="is kept"):
        ask_to_replace([there], yes=False, ask=answer("f"))  # no other name is offered
    assert there.read_bytes() == before

    ask_to_replace([there], yes=False, ask=answer("Y"))
    run(path, "--convert", there, "-y")
    assert load_file(there).keys() == STATE.keys()


def test_a_file_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"w{i}": torch.randn(100) for i in range(4)})
    run(path, "--convert", tmp_path / "s.safetensors", "--shard_size", "1kB")
    shard = tmp_path / "s-00001-of-00002.safetensors"

    for source, target in ((path, path), (shard, shard), (tmp_path / "s.safetensors.index.json", shard)):
        with pytest.raises(OptionError, match="would be lost"):
            run(source, "--convert", target, "-y")
    with pytest.raises(OptionError, match="would be lost"):
        run(shard, "--convert", tmp_path / "s.safetensors", "--shard_size", "1kB", "-y")


def test_nothing_is_left_of_a_file_that_cannot_be_written_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": torch.ones(9), "b": torch.tensor([1e6])})
    out = tmp_path / "out"

    with pytest.raises(CheckpointError, match="b has values that float16 cannot represent"):
        run(path, "--convert", out / "b.safetensors", "--dtype", "fp16")
    with pytest.raises(CheckpointError, match="b has values that float16 cannot represent"):
        run(path, "--convert", out, "--dtype", "fp16", "--shard_size", "1000")

    assert list(out.iterdir()) == []

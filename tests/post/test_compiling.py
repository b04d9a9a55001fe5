"""Compiled parts of a tool's network compute what they did, and blocks of a list share one compilation."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import post.stages
from modules.compile_options import Compilation
from modules.errors import OptionError
from post.chain_options import read_chain
from post.options import ToolNetworkOptions, UpscalerOptions
from post.run import run_chain
from post.tiling import compile_parts
from post.upscaling.files import load_upscaler
from tests.post.stages_here import write_clip
from tests.tiny.post_upscaling import write_rrdb, write_swinir

CPU = torch.device("cpu")
EAGER = Compilation("eager", fullgraph=True)


pytestmark = pytest.mark.usefixtures("nothing_compiled")


def options(compile: bool) -> ToolNetworkOptions:
    return ToolNetworkOptions(model=Path("x.pth"), compile=compile)


@pytest.mark.parametrize(
    ("write", "forms"),
    # of SwinIR's block for 6 windows, then for any number, and for one
    [(write_rrdb, 1), (partial(write_swinir, heads=(3,), depths=(2,)), 3)],
)
def test_compiled_networks_compute_the_same(tmp_path: Path, write: object, forms: int) -> None:
    assert callable(write)
    network = load_upscaler(write(tmp_path / "x.pth"), CPU, torch.float32).network
    images = torch.rand(1, 3, 8, 12).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = network(images)
        compile_parts(options(False), network.repeated, EAGER)
        assert torch.equal(network(images), plain)
        assert not counters["stats"]
        compile_parts(options(True), network.repeated, EAGER)
        compiled = network(images)

    assert counters["stats"]["unique_graphs"] == forms
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-6)


@pytest.fixture
def no_compiler() -> Iterator[None]:
    import torch._inductor.cpp_builder

    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_it_is_refused_for_a_later_tool_before_any_network_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, model = write_clip(tmp_path / "a.mp4"), str(write_rrdb(tmp_path / "x.safetensors"))
    words = ["--input", str(clip), "--model", model, "--device", "cpu"]
    words += ["--output", str(tmp_path / "new/a.mkv")]
    chain = read_chain("upscaler", "", [*words, "--then", "upscaler", "--model", model, "--compile"])
    loaded: list[object] = []
    check, _ = post.stages.TOOLS[UpscalerOptions]
    make = (check, lambda *given: loaded.append(given))
    monkeypatch.setitem(post.stages.TOOLS, UpscalerOptions, make)

    with pytest.raises(OptionError, match=r"--then upscaler: .*needs a C\+\+ compiler"):
        run_chain(chain)

    assert not loaded
    assert not (tmp_path / "new").exists()

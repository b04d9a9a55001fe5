"""The environment of the two front doors, devices, private names of torch, modules of the user."""

import ast
import importlib.util
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules import devices
from modules.devices import IN_COMMAND, empty_pinned, select_device, send_ahead, tensor_on, warn_if_emulated
from modules.environment import _install, create_environment, provide_pip
from modules.errors import OptionError, UserError
from modules.installation import hide_packages
from modules.nvidia_driver import NvidiaCard
from tests.commands import ROOT
from tests.test_size import NOT_PRODUCT, product_files


def test_a_folder_that_cannot_be_made_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")

    with pytest.raises(UserError, match="a file"):
        create_environment(tmp_path / "a file" / ".venv")


@pytest.mark.slow
def test_an_environment_without_pip_is_given_one(tmp_path: Path) -> None:
    """As an interrupted run leaves it, and as uv makes it; in a folder with a blank in its name."""
    folder = tmp_path / "my project" / ".venv"
    create_environment(folder)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    provide_pip(python)

    assert subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_a_python_that_cannot_install_pip_is_told_what_to_do(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", symlinks=sys.platform != "win32")
    python = tmp_path / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([str(python), "-c", ask], text=True).strip())
    # as Debian leaves it out
    (packages / "sitecustomize.py").write_text("import sys; sys.modules['ensurepip'] = None")

    with pytest.raises(UserError, match="python3-venv"):
        provide_pip(python)


def stand_in(path: Path, name: str, code: int) -> None:
    """A program that writes its name and arguments into a file beside it, and ends with a code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_name("log.txt")
    text = f"#!/bin/sh\necho {name} \"$@\" >> '{log}'\nexit {code}\n"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are scripts of a Unix shell")
@pytest.mark.parametrize(
    ("code", "settings", "expected"),
    [
        (0, "", ["uv pip install --quiet --python PYTHON torch==2.13.0", "uv pip install --quiet"]),
        (2, "", ["uv pip install", "python -m pip install --quiet"]),
        (0, "include-system-site-packages = true\n", ["python -m pip install --quiet"]),
    ],
    ids=["uv", "uv fails", "an environment that uv does not see through"],
)
def test_uv_installs_if_it_is_there_and_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, settings: str, expected: list[str]
) -> None:
    folder = tmp_path / "a b ü" / "bin"
    python = folder / "python"
    stand_in(folder / "uv", "uv", code)
    stand_in(python, "python", 0)
    has_no_torch = "case $2 in *torch*) exit 1;; esac\n"
    python.write_text(python.read_text(encoding="utf-8").replace("echo", f"{has_no_torch}echo"), "utf-8")
    (folder.parent / "pyvenv.cfg").write_text(settings, encoding="utf-8")
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    _install(python, ["torch==2.13.0", "einops>=0.8"])

    log = (folder / "log.txt").read_text(encoding="utf-8").replace(str(python), "PYTHON").splitlines()
    installs = [line for line in log if "install" in line.split()]
    for line in expected:
        assert any(line in each for each in installs), installs
    if not code:
        assert len({each.split()[0] for each in installs}) == 1
        assert len(installs) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are scripts of a Unix shell")
@pytest.mark.parametrize(
    ("of_uv", "of_pip", "message"),
    [
        (
            "No space left on device (os error 28)",
            "",
            r"^uv could not install einops: the disk of .*a b ü is full",
        ),
        (
            "dns error",
            "[Errno 28] No space left on device",
            r"^pip could not install einops: the disk of .* is full",
        ),
        ("dns error", "Temporary failure in name resolution", "the package index does not answer. Check the"),
        (
            "no version",
            "No matching distribution",
            "einops: See its message above, fix the cause and run again",
        ),
    ],
)
def test_why_an_installation_failed_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    of_uv: str,
    of_pip: str,
    message: str,
) -> None:
    folder = tmp_path / "a b ü" / "bin"
    for name, said in (("uv", of_uv), ("python", of_pip)):
        stand_in(folder / name, name, 2)
        text = (folder / name).read_text(encoding="utf-8")
        ends = "case $* in *--version*) exit 0;; esac\n"  # it has pip
        (folder / name).write_text(
            text.replace("echo", f"{ends}echo '{said}' >&2\necho", 1), encoding="utf-8"
        )
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    with pytest.raises(UserError, match=message):
        _install(folder / "python", ["einops"])

    assert of_uv in capfd.readouterr().err


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two GPUs; which of them were made the current one."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    return made


def test_a_gpu_that_is_named_becomes_the_current_one(current: list[torch.device]) -> None:
    assert select_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(OptionError, match="torch sees 2 CUDA devices, counted from cuda:0"):
        select_device("cuda:2")
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize("typed", [None, "cuda"])
def test_a_card_that_torch_does_not_see_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, typed: str | None
) -> None:
    card = NvidiaCard("NVIDIA Card", "470.1", (8, 9))
    monkeypatch.setattr("modules.nvidia_driver.find_nvidia_cards", lambda: [card])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_warn_of_undetected_card", devices._warn_of_undetected_card.__wrapped__)
    sentence = f"the NVIDIA driver is 470.1, and torch {torch.__version__} with CUDA 13.0 needs 580 or later."

    if typed is None:
        assert select_device(None).type != "cuda"
        assert f"This runs on the CPU: {sentence}" in caplog.text
    else:
        with pytest.raises(OptionError, match=re.escape(sentence)):
            select_device(typed)


def test_a_launcher_chooses_the_current_gpu_where_none_is_named(current: list[torch.device]) -> None:
    assert select_device(None) == select_device("cuda") == torch.device("cuda")
    assert select_device("cpu") == torch.device("cpu")
    assert current == []


def test_numbers_are_sent_in_rows_and_as_the_dtype_asked_for() -> None:
    device = torch.device("cpu")
    assert torch.equal(tensor_on(device, [[1, 1 << 40], [3, 4]]), torch.tensor([[1, 1 << 40], [3, 4]]))
    assert tensor_on(device, [True, False], torch.float32).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("refuses", [False, True])
def test_only_what_does_not_fit_a_command_is_pinned_before_it_is_sent_ahead(
    monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    log: list[tuple[str, int]] = []

    def pin(tensor: Tensor) -> Tensor:
        if refuses:
            raise RuntimeError("CUDA error: out of memory")
        log.append(("pin", tensor.nbytes))
        return tensor.clone()

    def to(tensor: Tensor, device: torch.device, **named: Any) -> Tensor:
        assert (device, named) == (torch.device("cuda"), {"non_blocking": True})
        log.append(("send", tensor.nbytes))
        return tensor

    monkeypatch.setattr(Tensor, "is_pinned", lambda _: False)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    small, large = torch.zeros(IN_COMMAND, dtype=torch.uint8), torch.ones(IN_COMMAND + 1, dtype=torch.uint8)

    assert send_ahead(small, torch.device("cuda")) is small
    assert torch.equal(send_ahead(large, torch.device("cuda")), large)

    pinned = [] if refuses else [("pin", large.nbytes)]
    assert log == [("send", small.nbytes), *pinned, ("send", large.nbytes)]


@pytest.mark.parametrize(
    ("processor", "device", "dtype", "is_told"),
    [
        ("AVX2", "cpu", torch.bfloat16, True),
        ("AVX512", "cpu", torch.bfloat16, False),
        ("AVX2", "cpu", torch.float32, False),
        ("AVX2", "cuda", torch.bfloat16, False),
    ],
)
def test_bfloat16_on_a_processor_without_it_is_told(
    processor: str,
    device: str,
    dtype: torch.dtype,
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)

    warn_if_emulated(torch.device(device), dtype, "the VAE")

    assert ("the VAE computes in bfloat16" in caplog.text) == is_told


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's driver would lock the memory")
def test_memory_that_cannot_be_locked_serves_too() -> None:
    assert empty_pinned([2, 3], torch.float64).shape == (2, 3)


HERE = "modules/private_torch.py"
NAMES = {
    "torch._C",
    "torch._C._host_emptyCache",
    "torch._compile._disable_dynamo",
    "torch._dynamo",
    "torch._foreach_copy_",
    "torch._foreach_lerp_",
    "torch._foreach_mul_",
    "torch._inductor.cpp_builder.get_cpp_compiler",
    "torch._inductor.exc",
    "torch._int_mm",
    "torch._scaled_mm",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._subclasses.fake_tensor.unset_fake_temporarily",
    "torch.fx.experimental._config",
    "torch.ops._c10d_functional",
    "torch.ops.aten._local_scalar_dense",
    "torch.ops.aten._local_scalar_dense.default",
    "torch.overrides._get_current_function_mode_stack",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map_only",
    "torch.utils._triton",
}


def dotted_names(tree: ast.AST) -> Iterator[str]:
    """All names with a full stop: imported, spelled out, or asked for by `getattr`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (each.name for each in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield from (f"{module}.{each.name}" for each in names)
            case ast.Attribute():
                yield ast.unparse(node)
            case ast.Call(func=ast.Name("getattr"), args=[owner, ast.Constant(str(name)), *_]):
                yield f"{ast.unparse(owner)}.{name}"


def private_names(path: Path) -> set[str]:
    names = dotted_names(ast.parse(path.read_bytes()))
    found = {name for name in names if re.fullmatch(r"torch\.[\w.]+", name)}
    return {name for name in found if any(part[:1] == "_" != part[1:2] for part in name.split("."))}


def test_private_names_of_torch_stand_in_one_file() -> None:
    root = Path(__file__).parent.parent.parent
    paths = [path for room, path in product_files() if room not in NOT_PRODUCT]
    found = {path.relative_to(root).as_posix(): private_names(path) for path in paths}
    assert {path: names for path, names in found.items() if names and path != HERE} == {}
    assert found[HERE] == NAMES


def test_a_hidden_package_is_missing_inside_the_block_only() -> None:
    sys.modules.pop("this", None)
    with hide_packages("this"):
        assert importlib.util.find_spec("this") is None
        with pytest.raises(ModuleNotFoundError):
            import this  # noqa: F401
    assert importlib.util.find_spec("this") is not None
    with hide_packages("pytest"):
        assert sys.modules["pytest"] is pytest  # what is loaded stays


DYNAMO = """
import sys, torch
from modules.private_torch import without_dynamo
weight = torch.nn.Parameter(torch.zeros(2))
with without_dynamo():
    torch.optim.AdamW([weight])
print("torch._dynamo" in sys.modules)
torch.optim.AdamW([weight])
print("torch._dynamo" in sys.modules)
with without_dynamo():
    torch.optim.AdamW([weight])
"""


def test_an_optimizer_is_made_for_a_check_without_the_compiler() -> None:
    """Its import takes as long as torch's. Outside of the block torch excludes what it wants as before."""
    done = subprocess.run(
        [sys.executable, "-c", DYNAMO], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["False", "True"]

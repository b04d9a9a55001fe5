"""Private names of torch, which a release may change without notice, stand in one file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.test_size import NOT_PRODUCT, product_files

HERE = "modules/private_torch.py"
NAMES = {
    "torch._C",
    "torch._C._host_emptyCache",
    "torch._compile._disable_dynamo",
    "torch._dynamo",
    "torch._foreach_lerp_",
    "torch._inductor.cpp_builder.get_cpp_compiler",
    "torch._inductor.exc",
    "torch._scaled_mm",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._subclasses.fake_tensor.unset_fake_temporarily",
    "torch.ops.aten._local_scalar_dense",
    "torch.ops.aten._local_scalar_dense.default",
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

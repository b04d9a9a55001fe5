"""Sinusoids of diffusers with frequencies that are the same on every processor.

diffusers takes float32 powers, which processors round differently, by up to five last digits; timesteps and
guidance multiply that by up to 10000. Comparisons of the last digits need those of float64, as ours are.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE = "diffusers.models.embeddings"


def make_exact() -> None:
    """Have the module, whenever it is imported, take powers in float64."""
    if MODULE in sys.modules:
        _take_float64_powers(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, own: importlib.abc.Loader) -> None:
        self._own = own

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _take_float64_powers(module)


def _take_float64_powers(module: ModuleType) -> None:
    import torch  # slow: many tests need no torch
    from torch.overrides import TorchFunctionMode

    class Float64Powers(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
            if function is torch.exp:
                return given[0].double().exp().to(given[0].dtype)
            return function(*given, **(options or {}))

    theirs = module.get_timestep_embedding

    def get_timestep_embedding(*given: Any, **options: Any) -> Any:
        with Float64Powers():
            return theirs(*given, **options)

    module.get_timestep_embedding = get_timestep_embedding  # type: ignore[attr-defined]

"""Start without torch's compiler, and load it when something really uses it.

torch's optimizers, torchvision and timm load `torch._dynamo` (with sympy and more: 7 s of CPU time, two
fifths of a start) only to mark functions that must not be compiled. A stand-in takes the marks, which mean
nothing in a process that compiles nothing, and gives way to the real package at any other use.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COMPILER, HELPERS = "torch._dynamo", "torch._dynamo.utils"


class _StandIn(ModuleType):
    """Stands for torch._dynamo until an attribute that it does not have is asked for."""

    def __init__(self) -> None:
        super().__init__(COMPILER)
        self.__path__: list[str] = []

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        return (lambda function: function) if fn is None else fn

    def assume_constant_result(self, fn: Any) -> Any:
        fn._dynamo_marked_constant = True  # as the real one does
        return fn

    def graph_break(self, *message: Any, **options: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(load_compiler(), name)


class _Helpers(ModuleType):
    """Stands for torch._dynamo.utils, of which torchvision takes a function that it may call later."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "is_compile_supported":
            return lambda *arguments: load_compiler().utils.is_compile_supported(*arguments)
        return getattr(load_compiler().utils, name)


class _Finder:
    """Loads the real package where one of its other modules is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(f"{COMPILER}."):
            return None
        load_compiler()
        loaded: Any = _Loaded(importlib.import_module(name))
        return importlib.util.spec_from_loader(name, loaded)


class _Loaded:
    """Gives the import system a module that was loaded meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


_FINDER: Any = _Finder()


def postpone_compiler() -> None:
    """Put the stand-in in place, unless the compiler is loaded already."""
    if COMPILER not in sys.modules:
        sys.modules |= {COMPILER: _StandIn(), HELPERS: _Helpers(HELPERS)}
        sys.meta_path.insert(0, _FINDER)


def load_compiler() -> Any:
    """Return the real torch._dynamo, in place of the stand-in."""
    if isinstance(sys.modules.get(COMPILER), _StandIn):
        sys.meta_path.remove(_FINDER)
        del sys.modules[COMPILER], sys.modules[HELPERS]
    return importlib.import_module(COMPILER)

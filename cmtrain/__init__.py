"""cmtrain: trains CMT vision models (arXiv 2107.06263) from JPEG files.

Importing this package is light: the command line answers `--help` and configuration errors without loading torch.
The models register themselves with timm as soon as timm is in the process, whichever of the two is imported first,
so that `timm.create_model("cmt_ti")` works after a plain `import cmtrain`.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


class _RegisterModelsAfterTimm(importlib.abc.MetaPathFinder):
    """Finds timm as usual, then imports cmtrain.models right after it. Removes itself on first use."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("timm")
        if spec is not None and spec.loader is not None:
            run_timm = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run_timm(module)
                importlib.import_module("cmtrain.models")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def __getattr__(name: str) -> ModuleType:
    if name == "models":
        return importlib.import_module("cmtrain.models")
    raise AttributeError(f"module 'cmtrain' has no attribute {name!r}")


if "timm" in sys.modules:
    importlib.import_module("cmtrain.models")
else:
    sys.meta_path.insert(0, _RegisterModelsAfterTimm())

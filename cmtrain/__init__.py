"""Train CMT vision models (arXiv 2107.06263) from JPEG files.

`import timm, cmtrain` registers the models with timm. Without timm this package loads neither timm nor
torch, so that the command line answers `--help` and configuration errors at once.
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    if name == "models":  # loaded at its first use
        return importlib.import_module("cmtrain.models")
    raise AttributeError(f"module 'cmtrain' has no attribute {name!r}")


if "timm" in sys.modules:
    importlib.import_module("cmtrain.models")

"""Hide DALI from a Python process that has this folder on its PYTHONPATH: it looks as if not installed."""

import sys
from importlib import metadata

NAME = "nvidia.dali"


class Hidden:
    """A finder that knows no DALI, and keeps the finders behind it from being asked."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == NAME or name.startswith(f"{NAME}."):
            raise ModuleNotFoundError(f"No module named {NAME!r}", name=NAME)


def without_dali(*context, find=metadata.MetadataPathFinder.find_distributions):
    return (package for package in find(*context) if "nvidia-dali" not in (package.metadata["Name"] or ""))


sys.meta_path.insert(0, Hidden)
metadata.MetadataPathFinder.find_distributions = staticmethod(without_dali)

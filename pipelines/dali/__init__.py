"""Build the DALI graphs. The only folder that imports DALI; cmtrain imports it where a loader is made."""

from pipelines.spec import DataError

try:
    import nvidia.dali  # noqa: F401
except (ImportError, OSError) as error:
    is_missing = isinstance(error, ImportError) and error.name in ("nvidia", "nvidia.dali")
    why = "is not installed" if is_missing else f"cannot be loaded ({' '.join(str(error).split())})"
    advice = "install nvidia-dali-cuda130 (or -cuda120 for drivers of CUDA 12), or run make setup"
    raise DataError(f"DALI {why}: {advice}") from error

"""Write down at the end of a run by what its records and checkpoints can be known again (receipt.json)."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmtrain.monitoring.machine import environment
from cmtrain.processes.preflight import version_of_code
from cmtrain.storage.checkpoint import checkpoint_path, checkpoint_steps
from cmtrain.storage.records import replace_file
from cmtrain.storage.run_folder import CLASSES_NAME, RECEIPT_NAME

FILES = ("config.yaml", "log.jsonl", "summary.csv", CLASSES_NAME)


def write_receipt(run: Path, result: Mapping[str, Any] | None) -> None:
    """Write receipt.json: code, versions, result, and digests of records and checkpoints as of `hashes`."""
    receipt = {"code": version_of_code(), "environment": environment(), "result": result}
    text = json.dumps(receipt | {"sha256": hashes(run)}, indent=1, default=str)
    replace_file(run / RECEIPT_NAME, f"{text}\n")


def hashes(run: Path) -> dict[str, str]:
    """Return the SHA-256 of each of FILES and of each checkpoint's manifest, which has its content's."""
    root = run / "checkpoints"
    manifests = [checkpoint_path(root, step) / "manifest.json" for step in checkpoint_steps(root)]
    files = [path for path in (*(run / name for name in FILES), *manifests) if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

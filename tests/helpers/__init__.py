"""Prepare this process, and those it starts, for the tests: runs before any helper loads torch."""

import os
import signal
from pathlib import Path

# One thread each: several ranks on few cores spin at each other's barriers otherwise. The proxy setting
# keeps requests to the metrics port on this machine. Scripts in this folder import each other as
# `helpers.x`.
os.environ |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
os.environ["PYTHONPATH"] = os.pathsep.join(
    dict.fromkeys(
        [str(Path(__file__).parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    )
)
if not Path(
    "/dev/nvidiactl"
).exists():  # before anything imports Triton, which without a GPU can only interpret
    os.environ["TRITON_INTERPRET"] = "1"

# nohup and a shell's `&` switch these off for every process they start; the tests send these signals.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

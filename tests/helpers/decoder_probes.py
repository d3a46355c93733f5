"""Stand for a GPU's decoder that ends its process or never answers, in tests of the decoder probe.

Run as a program with the fault's name; the request of decoder_probe.py comes after it.
"""

import os
import signal
import sys
import time


def program(fault: str) -> list[str]:
    return [sys.executable, __file__, fault]


if __name__ == "__main__":
    print("[WARNING] a decoder prints what it likes")
    if sys.argv[1] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if sys.argv[1] == "hang":
        time.sleep(600)
    raise RuntimeError("nvjpeg error\nINTERNAL_ERROR (8)")

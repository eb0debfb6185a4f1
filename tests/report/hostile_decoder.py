"""As pipeline.page.decoder, with little memory and files that do with it what they like."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection

from pipeline.page.decoder import MADE, reply
from pipeline.tensors.worker import limit_memory

if __name__ == "__main__":
    pipe = Connection(int(sys.argv[1]))
    limit_memory(40 << 20)
    pipe.send_bytes(MADE)
    while True:
        data = pipe.recv_bytes()
        if data == b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if data == b"hang":
            time.sleep(60)
        if data == b"end":
            os._exit(3)
        pipe.send_bytes(reply(data, int(sys.argv[2])))

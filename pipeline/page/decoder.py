"""The process that makes thumbnails: python -m pipeline.page.decoder DESCRIPTOR MAX_IMAGE_PIXELS.

It is asked for encoded pictures over the pipe DESCRIPTOR, and answers MADE and a WebP, or FAILED and a sentence.
"""

from __future__ import annotations

import os
import signal
import sys
from io import BytesIO
from multiprocessing.connection import Connection

from PIL import Image

from pipeline.errors import RowFault
from pipeline.prompt.image import decode_image
from pipeline.records import ImageRef
from pipeline.tensors.worker import limit_memory, silenced_libraries

MADE, FAILED = b"+", b"-"
_SIDE_PIXELS = 320  # of the longer side: twice what a card shows, for fine screens
_QUALITY = 72  # of WebP: 5 to 12 kB for a photograph
_MEMORY_BYTES = 1 << 30  # above what the process has: a picture of 100 megapixels takes 700 MB
_MOST_SECONDS = (
    120  # of one picture, after which the process ends by itself: its parent, who has less patience, is gone
)
_TOO_MUCH = b"not shown: decoding it takes too much memory"


def serve(pipe: Connection, max_image_pixels: int) -> None:
    """Answer pictures with thumbnails until nobody asks any more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent, which ends this process
    os.nice(10)
    limit_memory(_MEMORY_BYTES)
    with silenced_libraries():
        try:
            pipe.send_bytes(MADE)  # ready
            while True:
                data = pipe.recv_bytes()
                signal.alarm(_MOST_SECONDS)
                pipe.send_bytes(reply(data, max_image_pixels))
                signal.alarm(0)
        except (EOFError, OSError):  # nobody is there any more
            return


def reply(data: bytes, max_image_pixels: int) -> bytes:
    """A thumbnail of an encoded picture, or why there is none."""
    try:
        opened = decode_image(
            ImageRef(data=data), data, max_image_pixels=max_image_pixels, least_side_pixels=2 * _SIDE_PIXELS
        )
        image = opened.image
        image.thumbnail((_SIDE_PIXELS, _SIDE_PIXELS), Image.Resampling.LANCZOS)
        small = BytesIO()
        image.save(small, "WEBP", quality=_QUALITY)
        return MADE + small.getvalue()
    except RowFault as fault:
        if fault.kind == "MemoryError":
            return FAILED + _TOO_MUCH
        reason = fault.message.removeprefix("image bytes: ")
        return FAILED + f"not shown: {reason}".encode("utf-8", "replace")
    except MemoryError:
        return FAILED + _TOO_MUCH


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))

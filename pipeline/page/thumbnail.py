"""Thumbnails, made in processes of their own: a picture that crashes its decoder, hangs it or fills its memory costs
one thumbnail."""

from __future__ import annotations

import base64
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from PIL import Image

from pipeline.errors import RowFault
from pipeline.prompt.image import decode_image
from pipeline.records import ImageRef
from pipeline.tensors.worker import ending, limit_memory, silenced_libraries

Key = TypeVar("Key")

_SIDE_PIXELS = 320  # of the longer side: twice what a card shows, for fine screens
_QUALITY = 72  # of WebP: 5 to 12 kB for a photograph
_TASK_SECONDS, _START_SECONDS = 20.0, 120.0
_MEMORY_BYTES = 1 << 30  # above what the process has: a picture of 100 megapixels takes 700 MB
_MOST_ENCODED_BYTES = 1 << 28
_MOST_PROCESSES = 4
_MADE, _FAILED = b"+", b"-"
_TOO_MUCH = b"not shown: decoding it takes too much memory"


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small picture as a data: URI; or why there is none, as a sentence."""

    uri: str | None
    problem: str | None = None


class Thumbnails(Generic[Key]):
    """Makes thumbnails of encoded pictures, a few at a time.

    Args:
        max_image_pixels: a picture with more is not decoded.
        seconds: a picture that takes longer is given up.
    """

    def __init__(self, max_image_pixels: int, seconds: float = _TASK_SECONDS) -> None:
        self._max_image_pixels, self._seconds = max_image_pixels, seconds
        self._num_processes = min(_MOST_PROCESSES, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self._num_processes, thread_name_prefix="thumbnails")
        self._own = threading.local()  # each thread has a decoder
        self._decoders: list[_Decoder] = []

    def made(self, pictures: Iterable[tuple[Key, bytes]]) -> Iterator[tuple[Key, Thumbnail]]:
        """A thumbnail for each picture, in order; few pictures are held at a time."""
        under_way: deque[tuple[Key, Future[Thumbnail]]] = deque()
        for key, data in pictures:
            under_way.append((key, self._threads.submit(self._one, data)))
            if len(under_way) > 2 * self._num_processes:
                first, future = under_way.popleft()
                yield first, future.result()
        for first, future in under_way:
            yield first, future.result()

    def close(self) -> None:
        """End the processes, also those that are at work."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _ in range(2):  # a thread may just be starting one
            for decoder in self._decoders:
                decoder.end()
            self._threads.shutdown()

    def __enter__(self) -> Thumbnails[Key]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _one(self, data: bytes) -> Thumbnail:
        if len(data) > _MOST_ENCODED_BYTES:
            return Thumbnail(None, f"not shown: {len(data):,} bytes")
        decoder: _Decoder | None = getattr(self._own, "decoder", None)
        if decoder is None:
            decoder = self._own.decoder = _Decoder(self._max_image_pixels, self._seconds)
            self._decoders.append(decoder)
        return decoder.thumbnail(data)


class _Decoder:
    """A process that decodes, started when it is needed and again after it died."""

    def __init__(self, max_image_pixels: int, seconds: float) -> None:
        self._max_image_pixels, self._seconds = max_image_pixels, seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def thumbnail(self, data: bytes) -> Thumbnail:
        try:
            pipe = self._pipe or self._started()
            pipe.send_bytes(data)
            if not pipe.poll(self._seconds):
                self.end()
                return Thumbnail(None, f"not shown: decoding it took longer than {self._seconds:g} s")
            reply = pipe.recv_bytes()
        except (EOFError, OSError):
            return Thumbnail(None, f"not shown: its decoder crashed ({ending(self.end())})")
        if reply[:1] == _FAILED:
            return Thumbnail(None, reply[1:].decode("utf-8", "replace"))
        return Thumbnail("data:image/webp;base64," + base64.b64encode(reply[1:]).decode())

    def end(self) -> int | None:
        """End the process, however it is; its exit code."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if process is None or pipe is None:
            return None
        pipe.close()
        process.join(0.2)  # it may have died just now; one that hangs is killed
        if process.is_alive():
            process.kill()
        process.join()
        return process.exitcode

    def _started(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # what the caller holds (a model, CUDA) stays with it
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._max_image_pixels), name="thumbnail-decoder", daemon=True
        )
        self._process.start()
        theirs.close()
        if not self._pipe.poll(_START_SECONDS):  # imports are no part of a picture's time
            raise OSError("it did not start")
        self._pipe.recv_bytes()
        return self._pipe


def _serve(pipe: Connection, max_image_pixels: int) -> None:
    """Answer pictures with thumbnails until nobody asks any more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent, which ends this process
    os.nice(10)
    limit_memory(_MEMORY_BYTES)
    with silenced_libraries():
        try:
            pipe.send_bytes(_MADE)
            while True:
                pipe.send_bytes(_reply(pipe.recv_bytes(), max_image_pixels))
        except (EOFError, OSError):  # nobody is there any more
            return


def _reply(data: bytes, max_image_pixels: int) -> bytes:
    try:
        opened = decode_image(
            ImageRef(data=data), data, max_image_pixels=max_image_pixels, least_side_pixels=2 * _SIDE_PIXELS
        )
        image = opened.image
        image.thumbnail((_SIDE_PIXELS, _SIDE_PIXELS), Image.Resampling.LANCZOS)
        small = BytesIO()
        image.save(small, "WEBP", quality=_QUALITY)
        return _MADE + small.getvalue()
    except RowFault as fault:
        if fault.kind == "MemoryError":
            return _FAILED + _TOO_MUCH
        reason = fault.message.removeprefix("image bytes: ")
        return _FAILED + f"not shown: {reason}".encode("utf-8", "replace")
    except MemoryError:
        return _FAILED + _TOO_MUCH

"""The error streams of the ranks: shown at once, kept for the report, and tracebacks held back until it is known who
failed first.

Vocabulary: a *stream* is what one rank writes to stderr (with per-rank logs: stdout too). Its *tail* is the end of
it, for the report. A traceback is *held*: not shown until the rank has ended (then it belongs to the report) or
HOLD_SECONDS have passed (then somebody merely logged a caught exception, and it is shown). `sign` is when a rank
first showed that it fails: its held traceback, else the end of its stream. Invariants: apart from held tracebacks
bytes are passed on at once and unchanged, partial lines and carriage returns included, so that progress bars live;
where the launcher's stderr is a terminal, so is the rank's. One thread serves all streams.
"""

from __future__ import annotations

import os
import selectors
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

HOLD_SECONDS = 2.0
TAIL_NBYTES = 65536
_TRACEBACK = b"Traceback (most recent call last):"
_CHAINED = (b"another exception occurred:", b"direct cause of the following exception:")


@dataclass
class Stream:
    """What one rank writes, and where it goes."""

    rank: int
    read_fd: int
    sink_fd: int
    """Where bytes are passed on to: the launcher's stderr, or the rank's log file."""
    owns_sink: bool = False
    tail: bytearray = field(default_factory=bytearray)
    held: bytearray = field(default_factory=bytearray)
    held_since: float | None = None
    sign: float | None = None
    """time.monotonic() of the first sign of failure: a traceback that was not a false alarm, or the end of the stream.
    """
    closed: bool = False

    def feed(self, data: bytes, now: float) -> None:
        """Takes in what the rank wrote at `now`."""
        self.tail += data
        if len(self.tail) > TAIL_NBYTES:
            del self.tail[:-TAIL_NBYTES]
        if self.owns_sink:  # a log file gets everything in order; only its clock is needed here
            self._show(data)
            if _TRACEBACK in data:
                self.held_since = now
            return
        if self.held_since is None and _TRACEBACK not in data:
            self._show(data)
            return
        self.held += data
        if _TRACEBACK in data:
            # What came before was not the end of this rank: only its last traceback can be.
            start = _last_chain(self.held)
            self._show(bytes(self.held[:start]))
            del self.held[:start]
            self.held_since = now

    def release_if_due(self, now: float) -> None:
        """Shows a held traceback whose rank lives on."""
        if self.held_since is not None and now - self.held_since >= HOLD_SECONDS:
            self.release()

    def release(self) -> None:
        """Shows what is held: it was not the end of this rank."""
        self._show(bytes(self.held))
        self.held.clear()
        self.held_since = None

    def end(self, now: float) -> None:
        """The rank has closed its stream: the held traceback, if any, is what it died of."""
        self.closed = True
        self.sign = self.held_since if self.held_since is not None else now
        with suppress(OSError):
            os.close(self.read_fd)
        if self.owns_sink:
            with suppress(OSError):
                os.close(self.sink_fd)

    def _show(self, data: bytes) -> None:
        with suppress(OSError):  # a reader that went away (`deepspeed ... | head`) must not stop the job
            while data:
                data = data[os.write(self.sink_fd, data) :]


class StreamPump:
    """Reads all streams in one thread until they end or `close` is called."""

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="deepspeed-launcher-streams", daemon=True)
        self._stop = threading.Event()

    def open(self, rank: int, log_path: Path | None = None) -> int:
        """Makes the stream of `rank` and returns the file descriptor that the rank is to write to; the caller closes
        it after the start.
        """
        terminal = log_path is None and sys.stderr.isatty() and os.name == "posix"
        read_fd, write_fd = _open_terminal() if terminal else os.pipe()
        if log_path is None:
            self.streams[rank] = Stream(rank, read_fd, sink_fd=2)
        else:
            log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self.streams[rank] = Stream(rank, read_fd, sink_fd=log, owns_sink=True)
        return write_fd

    def start(self) -> None:
        """Starts reading; all streams are open by now."""
        for stream in self.streams.values():
            self._selector.register(stream.read_fd, selectors.EVENT_READ, stream)
        self._thread.start()

    def close(self, timeout: float = 1.0) -> None:
        """Waits until the streams of the ended ranks are read to their end; a grandchild that keeps one open is waited
        for `timeout` seconds.
        """
        if self._thread.is_alive():
            self._thread.join(timeout)
            self._stop.set()
            self._thread.join()
        for stream in self.streams.values():
            if not stream.closed:
                stream.end(time.monotonic())
        self._selector.close()

    def holding(self) -> list[int]:
        """Ranks with a held traceback that have not ended."""
        return [stream.rank for stream in self.streams.values() if stream.held_since is not None and not stream.closed]

    def _run(self) -> None:
        while self._selector.get_map() and not self._stop.is_set():
            ready = self._selector.select(timeout=0.1)
            now = time.monotonic()
            for key, _ in ready:
                stream: Stream = key.data
                try:
                    data = os.read(stream.read_fd, 65536)
                except OSError:  # EIO: the last writer of a terminal has gone
                    data = b""
                if data:
                    stream.feed(data, now)
                else:
                    self._selector.unregister(stream.read_fd)
                    stream.end(now)
            for stream in self.streams.values():
                if not stream.closed:
                    stream.release_if_due(now)


def _last_chain(text: bytearray) -> int:
    """Where the last traceback of `text` begins, with the exceptions that led to it."""
    start = len(text)
    while True:
        found = text.rfind(_TRACEBACK, 0, start)
        if found < 0:
            return start
        start = max(text.rfind(b"\n", 0, found), text.rfind(b"\r", 0, found)) + 1
        if not text[:start].rstrip().endswith(_CHAINED):
            return start


def _open_terminal() -> tuple[int, int]:
    """A pseudo terminal with the size of ours that passes bytes through unchanged: (read side, rank's side)."""
    import fcntl
    import termios

    master, slave = os.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST  # the real terminal translates line ends
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    with suppress(OSError):
        fcntl.ioctl(slave, termios.TIOCSWINSZ, fcntl.ioctl(2, termios.TIOCGWINSZ, b"\0" * 8))
    return master, slave

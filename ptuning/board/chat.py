"""The chat with a run's checkpoint: the chat page's own program, which holds the model, ends when it is left.

Answers to nothing in the official scripts, and to the complaint that unloading a model frees no memory: a process that has
ended has none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

from board.commands import Command
from board.runs import tail_of
from board.starting import begin

PATIENCE = 90  # seconds without word of a browser that shows the chat; a hidden one sends it once a minute
END_SECONDS = 5
ROOT_PATH = "/chat"  # where doors.py shows its page
PEAK = re.compile(r"^Estimated peak memory, .*?: ([\d.]+) (MB|GB)", re.MULTILINE)


class Refused(Exception):
    """No chat now: `name` of the page's words, and what they need."""

    def __init__(self, name: str, **more):
        super().__init__(name)
        self.name, self.more = name, more


def outstanding_bytes(printed: str, held: int) -> int | None:
    """What a run may still take: its own estimate less what it holds; None where it has not estimated yet."""
    found = PEAK.findall(printed)
    if not found:
        return None
    size, unit = found[-1]
    return max(0, int(float(size) * (1e9 if unit == "GB" else 1e6)) - held)


def check_room(name: str, need: int, free: int, outstanding: int | None) -> None:
    """Refused where a run leaves too little memory for a chat that takes `need` bytes; `outstanding` as above."""
    if outstanding is None:
        raise Refused("chat_waits", run=name)
    if need > 0.9 * (free - outstanding):
        raise Refused("chat_refused", run=name, need=need, free=free - outstanding, outstanding=outstanding)


class Chat:
    """At most one chat. `tend` is called again and again by the thread that lives as long as the page's program.

    The process is started and ended there: the system ends it with the thread that has started it, so that not even
    kill -9 of the page leaves it behind.
    """

    def __init__(self, log: Path):
        self.log = log
        self.process, self.port, self.name = None, 0, ""
        self.wanted, self.lock = None, threading.Lock()  # ("open", name, words, folder) or ("end",)
        self.viewers = {}  # session of a browser that shows the chat -> when it last said so
        self.state, self.message = "none", ""

    def open(self, name: str, words: list[str]) -> None:
        """Ask for a chat in place of the one that is there."""
        with self.lock:
            self.wanted, self.state, self.name, self.message = ("open", words), "loading", name, ""

    def end(self) -> None:
        """Ask for its end."""
        with self.lock:
            if self.process or self.state == "loading":
                self.wanted = ("end",)

    def shown(self, session: str, shown: bool) -> None:
        """A browser shows the chat, or no longer does; the last one to leave ends it."""
        if shown:
            self.viewers[session] = time.monotonic()
        elif self.viewers.pop(session, None) and not self.viewers:
            self.end()

    def tend(self) -> None:
        """Do what was asked for, end what nobody looks at, and see whether the chat's page answers."""
        with self.lock:
            wanted, self.wanted = self.wanted, None
        for session, seen in list(self.viewers.items()):
            if time.monotonic() - seen > PATIENCE:
                self.shown(session, False)
        if wanted:
            self.close()
            self.state = "ended"
        if wanted and wanted[0] == "open":
            try:
                self.launch(wanted[1])
            except OSError as error:  # a full disk
                self.state, self.message = "failed", str(error)
        if self.process and self.process.poll() is not None:
            self.process, self.state = None, "failed"
            self.message = tail_of(self.log).strip()[-1500:]
        elif self.process and self.state == "loading":
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=0.2):
                self.state = "open"

    def launch(self, words):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        system = ctypes.CDLL(None)
        words = [*words, "--server_name", "127.0.0.1", "--server_port", str(self.port)]
        program = Command(["python", "ptuning/web_demo.py"], {"GRADIO_ROOT_PATH": ROOT_PATH}, words)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.state = "loading"
        with open(self.log, "wb") as log:
            self.process = begin(program, log, preexec_fn=lambda: system.prctl(1, signal.SIGKILL))  # PR_SET_PDEATHSIG

    def close(self):
        """End the process now; its memory is free when this returns."""
        process, self.process = self.process, None
        if not process:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
                return

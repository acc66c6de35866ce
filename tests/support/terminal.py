"""A terminal of 110 x 40 for a program, and what stands on it in the end."""

import fcntl
import os
import pty
import struct
import subprocess
import termios

from conftest import ROOT


def run_in_terminal(command, columns=110, cwd=ROOT, **environment):
    """(exit status, all bytes written as text) of a command whose stdin, stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "WANDB_MODE": "disabled", "LC_ALL": "C.UTF-8", "TERM": "xterm", **environment}
    for name in ("COLUMNS", "LINES"):  # they would count more than the terminal's own size
        environment.pop(name, None)
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=environment, start_new_session=True
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # EIO: nobody has the terminal open any more
                break
            if not piece:
                break
            written += piece
        os.close(ours)
    return process.returncode, written.decode()


def screen(written):
    """The lines that stay: of each line what was written last, behind its last carriage return."""
    lines = written.replace("\r\n", "\n").split("\n")
    return [line.rsplit("\r", 1)[-1].rstrip() for line in lines]

"""A page to train in the browser: it starts the scripts, reads what they write, and can be closed.

Answers to no official file, and to the all-in-one page of ChatGLM-Efficient-Tuning. It computes nothing and holds no run: a
run is a process of its own, in a session of its own, and all that is shown of it is read from its files.

    bash train_web.sh
    python ptuning/train_web.py --server_port 7871 --root /data
"""

import argparse
import ipaddress
import os
import sys
import time
from pathlib import Path

from arguments import parse_words
from common.failure import catch_signals, leave_on_signal
from common.processes import check_port
from common.start import look_first, work
from common.text import decode_text

AUTH = "PTUNING_AUTH"  # environment variable with user:password
PROJECT = Path(__file__).resolve().parents[1]


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="train_web.py", description="A page to train in the browser.")
    parser.add_argument(
        "--server_name", default="127.0.0.1", help="Address to listen on; others need --auth [127.0.0.1]."
    )
    parser.add_argument("--server_port", type=int, default=7870, help="Port to listen on [7870].")
    parser.add_argument(
        "--auth",
        metavar="FILE",
        help=f"File with user:password, which visitors are asked for. The environment variable {AUTH} holds them instead.",
    )
    parser.add_argument(
        "--root",
        metavar="FOLDER",
        action="append",
        help="Folder whose files the page may use; may be given again [the project, the home folder].",
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    args = parse_words(parser, argv)
    args.auth = read_auth(args.auth)
    if not is_loopback(args.server_name) and not args.auth:
        raise ValueError(
            f"--server_name {args.server_name}: others could reach this page, which starts programs. Give --auth FILE with "
            f"user:password in it, or {AUTH}=user:password in front; or reach it through ssh -L 7870:127.0.0.1:7870."
        )
    args.root = args.root or [str(PROJECT), str(Path.home())]
    for folder in args.root:
        if not Path(folder).expanduser().is_dir():
            raise ValueError(f"--root {folder}: there is no such folder.")
    check_port(args.server_name, args.server_port)
    return args


def read_auth(file):
    """(user, password) of a file or of the environment, None without one. No other user sees them among the processes."""
    text = os.environ.get(AUTH, "")
    if file:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--auth {file}: there is no such file; it holds one line, user:password.")
        text = decode_text(Path(file).read_bytes(), f"--auth {file}")[:1000].strip()
    if not file and not text:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and len(password) >= 8) or "\n" in text:
        place = f"--auth {file}" if file else AUTH
        raise ValueError(f"{place}: expected one line, user:password, with a password of at least 8 characters.")
    return user, password


def is_loopback(name):
    """True for an address that only this machine reaches."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":  # --help and mistakes are answered now: gradio takes seconds to load
    look_first(parse_arguments, sys.argv[1:])

from starlette.middleware import Middleware

from board.chat import Chat
from board.doors import Bodies, ChatDoor, OwnSiteOnly
from board.events import Page
from board.files import MAX_UPLOAD_BYTES, OUTPUT, UPLOADS, Roots
from board.page import build
from board.starting import Starter
from board.words import TEXTS
from common.environment import before_uploads
from serving.opening import address_of, open_page, prepare_page

FILES = Path(__file__).parent / "board"  # page.css and page.js
AT_ONCE = 16  # questions of browsers that are answered at the same time


def launch(page, *, server_name="127.0.0.1", server_port=7870, auth=None):
    """Open the page and return it as gr.Blocks; the caller lets `page.chat.tend` be called again and again."""
    output = page.output
    (output / UPLOADS).mkdir(parents=True, exist_ok=True)
    before_uploads(str(output / UPLOADS / ".incoming"))
    blocks, i18n = build(page)
    blocks.queue(api_open=False, max_size=64, default_concurrency_limit=AT_ONCE)
    open_page(
        blocks,
        i18n,
        FILES,
        TEXTS,
        middleware=[
            Middleware(OwnSiteOnly, not auth, output),
            Middleware(ChatDoor, page.chat),
            Middleware(Bodies, output),
        ],
        server_name=server_name,
        server_port=server_port,
        auth=auth,
        max_threads=AT_ONCE + 24,
        max_file_size=MAX_UPLOAD_BYTES,
        allowed_paths=[str(output / "_exports")],
    )
    return blocks


def main(argv):
    args = parse_arguments(argv)
    prepare_page()
    roots = Roots(args.root)
    page = Page(roots, Starter(OUTPUT), Chat(OUTPUT / UPLOADS / "chat.log"))
    launch(page, server_name=args.server_name, server_port=args.server_port, auth=args.auth)
    print(f"Open {address_of(args)}  (Ctrl-C ends; runs go on)", flush=True)
    told = []
    catch_signals(lambda number, frame: told.append(number))
    while not told:
        page.chat.tend()  # on this thread: the system ends the chat with it
        time.sleep(0.2)
    page.chat.close()
    leave_on_signal(told[0], None)


if __name__ == "__main__":
    work(main, sys.argv[1:])

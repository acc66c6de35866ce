"""Talk to the tuned model in a terminal, or send it a file of prompts through a pipe.

Answers to the official `cli_demo.py` of ChatGLM2-6B, whose commands `clear` and `stop` it keeps. It differs in
that an answer is written on as it grows instead of clearing the screen, in switching prefixes, and in that
Ctrl-C ends an answer and not the program.

    python ptuning/cli_demo.py --ptuning_checkpoint output/my-run
    python ptuning/cli_demo.py --ptuning_checkpoint output/my-run --temperature 0 < prompts.txt > answers.txt
"""

import argparse
import os
import signal
import sys

from arguments import add_model_arguments, parse_demo_words
from common.failure import printable
from common.start import look_first, work
from first_look import look_at_demo


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="cli_demo.py", description="Talk to the tuned model in a terminal.")
    add_model_arguments(parser)
    parser.add_argument("--seed", type=int, help="Makes sampled answers repeatable.")
    return parse_demo_words(parser, argv)


if __name__ == "__main__":  # --help and mistakes are answered now: torch takes seconds to load
    look_first(lambda argv: look_at_demo(parse_arguments(argv)), sys.argv[1:])

from serving.auto import AUTO
from serving.loading import load_server
from serving.server import Sampling

try:
    import readline  # noqa: F401 - gives input() its history and line editing
except ImportError:  # not on every system
    pass

HELP = """\
Type a message. Commands, each on a line of its own:
  clear          start a new conversation
  prefix on|off  answer with the trained prefix, or as the base model
  prefix auto    let each question decide which of them answers
  prefix NAME    answer with this one of several prefixes
  other          ask the last question of the other one
  checkpoint N   answer with checkpoint-N of the run
  help, ?        show this, and the checkpoints of the run
  exit, stop     leave (Ctrl-D too); Ctrl-C stops an answer"""


class Terminal:
    """A conversation: its turns, the model that answers, and how."""

    def __init__(self, server, sampling):
        self.server, self.sampling = server, sampling
        self.tuned, self.model = server.default, server.usual
        self.history = []
        self.answered = self.other = None  # who has answered the last question of auto, and who has not

    def command(self, line):
        """The answer to a command, None for a line that is no command."""
        words = line.split()
        if line == "clear":
            self.history, self.other = [], None
            return "A new conversation."
        if line in ("help", "?", "？"):
            return f"{HELP}\nHere there are: {', '.join(self.server.models())}. Answering: {self.model}."
        if len(words) == 2 and words[0] == "prefix" and words[1] in ("on", "off"):
            if words[1] == "on" and self.tuned == self.server.base:
                return "There is no prefix to switch on; start with --ptuning_checkpoint."
            return self.use(self.tuned if words[1] == "on" else self.server.base)
        if len(words) == 2 and words[0] == "prefix" and words[1] in (AUTO, *self.server.models()):
            return self.use(words[1])
        if line == "other":
            return self.ask_other()
        if len(words) == 2 and words[0] == "checkpoint" and words[1].removeprefix("checkpoint-").isdecimal():
            return self.use(f"checkpoint-{words[1].removeprefix('checkpoint-')}")
        return None

    def use(self, model):
        try:
            if model == AUTO:
                names = [*self.server.signatures(), self.server.base]
                self.model = AUTO
                return f"Each question decides: {' or '.join(names)}."
            facts = self.server.facts(model)
        except (ValueError, OSError) as error:
            return str(error)
        self.model = model
        self.tuned = model if model != self.server.base else self.tuned
        return f"Answering: {model}, {facts['pre_seq_len']} virtual tokens."

    def ask_other(self):
        """Ask the last question again, of the model that has not answered it."""
        if self.other is None:
            return "There is no other one to ask; it is there after an answer of prefix auto."
        turn = self.history.pop()
        try:
            return self.answer(turn[0], self.other)
        except ValueError:
            self.history.append(turn)
            raise

    def answer(self, question, model=None):
        """Write the answer as it grows, remember the turn, and return one line about it."""
        model = model or self.model
        token_ids, dropped = self.server.fit(question, self.history, self.sampling.max_new_tokens, model)
        if dropped:
            print(f"(the oldest {dropped} turns no longer fit and were left out)")
        written, answer = "", None
        stream = self.server.stream(token_ids, model=model, sampling=self.sampling, session="terminal")
        try:
            for answer in stream:
                print(printable(answer.text[len(written) :]), end="", flush=True)
                written = answer.text
            reason = {"error": f"failed: {answer.error}"}.get(answer.finish_reason, answer.finish_reason)
        except KeyboardInterrupt:
            reason = "stopped"
        finally:
            stream.close()
            print()
        self.history.append((question, written))
        speed = f"{len(answer.response_ids)} tokens, {answer.tokens_per_second:.1f} tokens/s · " if answer else ""
        return f"[{self.describe(answer, model)} · {speed}{reason}]"

    def describe(self, answer, model):
        """Who answers, and how sure that is; remembers who else could."""
        if answer is None or answer.decision is None:
            self.answered, self.other = model, self.answered if model == self.other else None
            return model
        self.answered, self.other = answer.model, answer.decision.other
        return f"{answer.model}, chosen by the question, {answer.decision.sure:.0%} sure"


def talk(server, sampling):
    """The conversation at a terminal."""
    terminal = Terminal(server, sampling)
    print(HELP)
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(exit leaves)")
            continue
        if line in ("exit", "stop"):
            return
        if not line:
            continue
        said = terminal.command(line)
        if said is None:
            try:
                said = terminal.answer(line)
            except ValueError as error:  # the question is too long
                said = f"error: {error}"
        print(said)


def answer_lines(server, sampling, lines):
    """One answer a line for one prompt a line, each without history; a line break in an answer is written as \\n."""
    for number, line in enumerate(lines, start=1):
        text = ""
        if line.strip():
            try:
                token_ids, _ = server.fit(line.rstrip("\r\n"), [], sampling.max_new_tokens, server.usual)
            except ValueError as error:
                raise ValueError(f"Line {number}: {error}") from error
            *_, answer = server.stream(token_ids, model=server.usual, sampling=sampling)
            if answer.error:
                raise ValueError(f"Line {number}: {answer.error}")
            text = printable(answer.text).replace("\n", "\\n")
        print(text, flush=True)


def main(argv):
    args = parse_arguments(argv)
    sampling = Sampling(**args.sampling, seed=args.seed)
    server = load_server(args, say=lambda line: print(printable(line), file=sys.stderr))
    try:
        if sys.stdin.isatty():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C stops an answer
            talk(server, sampling)
        else:
            answer_lines(server, sampling, sys.stdin)
    except BrokenPipeError:  # whoever reads the answers has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        server.close()


if __name__ == "__main__":
    work(main, sys.argv[1:])

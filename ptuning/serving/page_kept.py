"""What a visitor's browser keeps of the page: a conversation with each model, and what was chosen.

Answers to nothing in the official `web_demo.py`, whose conversation ends with a reload. The server keeps none of this: the
browser sends it with every event, so it is checked like all that a stranger sends.
"""

import json
import os
import threading
from itertools import takewhile

# mode -> the conversations shown; that of `auto` is answered by whom each question chooses
COLUMNS = {"tuned": ("tuned",), "base": ("base",), "both": ("tuned", "base"), "auto": ("auto",)}
CONVERSATIONS = ("tuned", "base", "auto")
MAX_CHARACTERS = 100_000  # of a conversation, more than a model reads; two of them fit into a request
MAX_ASKED_AGAIN = 8  # turns that another model is asked when it joins a conversation
MAX_FEEDBACK_BYTES = 64 * 2**20


def empty():
    """What is kept at first. A conversation is [[question, answer]]; `earlier` holds the last answers before a retry.

    `other` is the model that could have given the last answer of the conversation `auto`, None where that is not known.
    """
    texts = {"draft": "", "mode": None, "checkpoint": None, "other": None}
    return {**{name: [] for name in CONVERSATIONS}, "earlier": {}, **texts}


def checked(value):
    """What a browser sent, cut to its bounds; empty() where it has another form."""
    new = empty()
    if not isinstance(value, dict):
        return new
    for name in CONVERSATIONS:
        turns, earlier = value.get(name, []), value.get("earlier")
        if not is_turns(turns):
            return empty()
        new[name] = bounded(turns)
        if isinstance(earlier, dict) and isinstance(earlier.get(name), str):
            new["earlier"][name] = earlier[name]
    new.update({name: value[name] for name in ("mode", "checkpoint", "other") if isinstance(value.get(name), str)})
    new["draft"] = value["draft"] if isinstance(value.get("draft"), str) else ""
    return new


def is_turns(value):
    """True for a list of [text, text]."""
    return isinstance(value, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in value
    )


def bounded(turns):
    """The newest turns that have MAX_CHARACTERS together; the last one in any case."""
    room = MAX_CHARACTERS
    for place in range(len(turns) - 1, -1, -1):
        room -= sum(map(len, turns[place]))
        if room < 0:
            return turns[min(place + 1, len(turns) - 1) :]
    return turns


def to_ask(kept, old_mode, mode):
    """({name: (turns it has answered, questions it has not)}, oldest turns left out) of the models that `mode` shows.

    A model answers for itself only: what another one has said never becomes its own history.
    """
    questions = [question for question, _ in kept[COLUMNS[old_mode][0]]]
    plan, left_out = {}, 0
    for name in COLUMNS[mode]:
        pairs = takewhile(lambda pair: pair[0][0] == pair[1], zip(kept[name], questions, strict=False))
        answered = [turn for turn, _ in pairs]
        late = questions[len(answered) :]
        if len(late) > MAX_ASKED_AGAIN:
            answered, late, left_out = [], questions[-MAX_ASKED_AGAIN:], len(questions) - MAX_ASKED_AGAIN
        plan[name] = answered, late
    return plan, left_out


def preference(kept, mode, name, place, liked):
    """The row that a thumb at an answer means, or None where no other answer to its question and history is known."""
    turns = kept[name]
    if mode not in COLUMNS or not 0 <= place < len(turns):
        return None
    prompt, answer = turns[place]
    other = kept["earlier"].get(name) if place == len(turns) - 1 else None
    for beside in COLUMNS[mode]:
        if other is None and beside != name and kept[beside][:place] == turns[:place]:
            other = next((text for question, text in kept[beside][place : place + 1] if question == prompt), None)
    if other is None or other == answer:
        return None
    chosen, rejected = (answer, other) if liked else (other, answer)
    return {"prompt": prompt, "history": turns[:place], "chosen": chosen, "rejected": rejected}


class FeedbackFile:
    """The operator's file of preferences, one JSON a line; it grows up to MAX_FEEDBACK_BYTES."""

    def __init__(self, path):
        self.path, self.lock, self.last = path, threading.Lock(), None
        with open(path, "ab"):  # OSError now, not at the first thumb
            pass

    def append(self, row):
        """False where the file is full. A row that repeats the last one is there already. Raises OSError."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="replace")
        with self.lock:
            if line == self.last:
                return True
            if os.path.getsize(self.path) + len(line) > MAX_FEEDBACK_BYTES:
                return False
            with open(self.path, "ab") as file:
                file.write(line)
            self.last = line
        return True

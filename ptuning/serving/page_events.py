"""What happens when a visitor of the page asks, stops, edits, retries or judges.

Answers to `predict` of the official `web_demo.py`, which knows one model and one conversation.
"""

import html
import logging
import threading
import time
from itertools import zip_longest

import gradio as gr

from serving.auto import AUTO
from serving.limits import client_key
from serving.markdown import as_markdown, literally
from serving.page_kept import COLUMNS, CONVERSATIONS, bounded, checked, empty, is_turns, preference, to_ask
from serving.page_words import said_in
from serving.prompts import TooLong
from serving.server import BASE, Busy, Sampling

SIDES = ("left", "right")  # the places of the columns; the right one is there in mode both only
YIELD_SECONDS = 0.05  # a page that is told of every token does little else
LONG_TEXT = 4000  # characters; one that is longer is refreshed less often, because all of it is rendered anew
EXPECTED = 'Expected a text, and a history such as [["question", "answer"]].'
CUT_SHORT = ("cancelled", "error")  # why no further question is asked
NOTHING = "\u200b"  # without a character there would be no bubble


def bubble(role, text, **more):
    """A message of the chat. As a dictionary the text keeps its indentation."""
    return {"role": role, "content": [{"type": "text", "text": text or NOTHING}], **more}


def bubbles(turns):
    """The chat's messages from [[question, answer]]."""
    parts = (("user", literally, 0), ("assistant", as_markdown, 1))
    return [bubble(role, render(turn[place])) for turn in turns for role, render, place in parts]


def as_status(lines, kind=""):
    """HTML of the line below the chat: an error is read out at once, and what changes with every token never."""
    text = "<br>".join(html.escape(line) for line in lines)
    attributes = {"error": ' class="error" role="alert"', "growing": ' aria-hidden="true"'}
    return f"<p{attributes.get(kind, '')}>{text}</p>"


def place_of(event):
    """The turn that an event of a chat is about; -1 where the browser sent something else."""
    return event.index // 2 if isinstance(event.index, int) else -1


def modes_of(server):
    """The modes that a server's page offers."""
    if server.default == server.base:
        return ["base"]
    return [mode for mode in COLUMNS if mode != AUTO or server.offers_auto()]


def first_mode(server):
    """The mode that a page begins with."""
    return AUTO if server.usual == AUTO else modes_of(server)[0]


class Page:
    """Handlers of the page's events. `kept` is what page_kept.py describes; most yield values for its `outputs`."""

    def __init__(self, server, feedback=None):
        self.server, self.feedback = server, feedback
        self.running = {}  # session of the page -> its answers that are being computed

    # ---- asking

    def respond(self, request: gr.Request, question, kept, *settings):
        """Ask every model that is shown."""
        kept = checked(kept)
        if not question.strip():
            yield self.update()
            return
        plan = {name: (kept[name], [question]) for name in COLUMNS[settings[0]]}
        yield from self.ask(request, plan, {**kept, "earlier": {}}, settings, draft=question)

    def example(self, request: gr.Request, event: gr.SelectData, kept, *settings):
        """Ask the question of the card that was clicked."""
        yield from self.respond(request, str(event.value.get("text")), kept, *settings)

    def retry(self, request: gr.Request, kept, *settings):
        """Ask the last question again; the answers before it stay, for a thumb to compare with."""
        kept = checked(kept)
        last = {name: kept[name][-1] for name in COLUMNS[settings[0]] if kept[name]}
        plan = {name: (kept[name][:-1], [question]) for name, (question, _) in last.items()}
        earlier = {name: answer for name, (_, answer) in last.items()}
        yield from self.ask(request, plan, kept, settings, earlier=earlier)

    def other(self, request: gr.Request, kept, *settings):
        """Ask the last question again, of the model that auto has not chosen; both answers stay for a thumb."""
        kept = checked(kept)
        if settings[0] != AUTO or not kept[AUTO] or kept["other"] not in self.server.models():
            yield self.update()
            return
        question, answer = kept[AUTO][-1]
        plan = {AUTO: (kept[AUTO][:-1], [question])}
        yield from self.ask(request, plan, kept, settings, earlier={AUTO: answer}, model=kept["other"])

    def edit(self, request: gr.Request, event: gr.EditData, kept, *settings):
        """Ask a changed question; what came behind it is left out."""
        kept, shown = checked(kept), COLUMNS[settings[0]]
        behind = len(kept[shown[SIDES.index(event.target.elem_id)]]) - place_of(event)
        asks_anew = isinstance(event.value, str) and event.value.strip() and behind >= 1
        plan = {name: (kept[name][:-behind], [event.value]) for name in shown if asks_anew}
        yield from self.ask(request, plan, {**kept, "earlier": {}}, settings)

    def switch(self, request: gr.Request, kept, *settings):
        """Show other models; one that joins is asked the questions that it has not had."""
        kept, mode = checked(kept), settings[0]
        plan, left_out = to_ask(kept, kept["mode"] if kept["mode"] in COLUMNS else mode, mode)
        notes = [said_in(request)["asked_late"].format(count=left_out)] if left_out else []
        yield from self.ask(request, plan, {**kept, "earlier": {}}, settings, notes=notes)

    def ask(self, request, plan, kept, settings, draft="", earlier=None, notes=(), model=None):
        """Ask each model of {name: (turns, questions)} one question after the other; `model` instead of auto."""
        mode, checkpoint, *how = settings
        session, words = request.session_hash, said_in(request)
        if session in self.running:
            yield self.update()
            return
        kept = {**kept, "mode": mode, "checkpoint": checkpoint, "draft": "", "other": None}
        new = {**kept, "earlier": earlier or {}, **{name: turns for name, (turns, _) in plan.items()}}
        answers = self.running[session] = {}
        try:
            sampling = Sampling(max_new_tokens=int(how[0]), top_p=how[1], temperature=how[2])
            rounds = list(zip_longest(*(questions for _, questions in plan.values())))
            # A reload from now on finds what was there, and in the box what was typed.
            start = {**kept, "draft": draft} if rounds else new
            yield self.update("" if rounds else None, self.columns(new, mode, words), kept=start, busy=bool(rounds))
            for left, questions in zip(range(len(rounds) - 1, -1, -1), rounds, strict=True):
                asked = {name: text for name, text in zip(plan, questions, strict=True) if text is not None}
                how = {
                    "mode": mode,
                    "checkpoint": checkpoint,
                    "sampling": sampling,
                    "notes": list(notes),
                    "auto": model,
                }
                kept = new = yield from self.answer(request, asked, new, answers, is_last=not left, **how)
                if any(answer.finish_reason in CUT_SHORT for answer in answers.values()):
                    break
        except Exception as error:  # whatever it is, the buttons come back
            foreseen = isinstance(error, (ValueError, OSError, Busy))
            status = as_status([self.explain(error if foreseen else type(error).__name__, words)], "error")
            yield self.update(draft or None, self.columns(kept, mode, words), status, {**kept, "draft": draft}, False)
            if not foreseen:
                logging.getLogger(__name__).exception("An answer of the page failed.")
        finally:  # also where the page was closed
            self.cancel(answers)
            self.running.pop(session, None)

    def answer(self, request, asked, kept, answers, *, is_last, mode, checkpoint, sampling, notes, auto):
        """Ask {name: question} and yield the growing answers until all have ended; returns `kept` with them.

        `auto` answers in that conversation, None where the question chooses.
        """
        words, client, changed = said_in(request), client_key(request.client.host), threading.Event()
        answers.clear()
        for name, question in asked.items():
            chosen = checkpoint or self.server.default
            model = {"base": self.server.base, "tuned": chosen, AUTO: auto or AUTO}[name]
            among = () if len(self.server.candidates) > 1 else (chosen,)
            with self.server.preparing(client):
                token_ids, dropped = self.server.fit(question, kept[name], sampling.max_new_tokens, model, among)
            notes += [words["dropped"].format(count=dropped)] if dropped else []
            answers[name] = self.server.submit(
                token_ids,
                model=model,
                sampling=sampling,
                notify=lambda answer: changed.set(),
                session=(request.session_hash, name),
                client=client,
            )
        before = {name: bubbles(kept[name]) for name in answers}  # once, not at every refresh
        while True:
            reasons = [answer.finish_reason for answer in answers.values()]
            ended, failed, cut = all(reasons), "error" in reasons, any(reason in CUT_SHORT for reason in reasons)
            new = {name: [*kept[name], [asked[name], answer.text]] for name, answer in answers.items()}
            last = {name: self.last_bubbles(asked[name], answer, words) for name, answer in answers.items()}
            lines = [self.status(answer, words) for answer in answers.values()]
            if ended:
                kept = {**kept, **{name: bounded(turns) for name, turns in new.items()}}
                if AUTO in answers:
                    kept["other"] = self.other_than(answers[AUTO], checkpoint)
            yield self.update(
                columns=[[*before[name], *last[name]] if name in last else gr.skip() for name in COLUMNS[mode]],
                status=as_status([*lines, *notes], "error" if failed else "" if ended else "growing"),
                kept=kept if ended else None,
                busy=False if ended and (is_last or cut) else None,
            )
            if ended:
                return kept
            time.sleep(YIELD_SECONDS * (1 + sum(len(answer.text) for answer in answers.values()) / LONG_TEXT))
            changed.wait(timeout=1)  # not longer: a yield lets the page close this generator
            changed.clear()

    def other_than(self, answer, checkpoint):
        """The model that could have given an answer in its place."""
        if answer.decision:
            return answer.decision.other
        return self.server.base if answer.model != self.server.base else checkpoint or self.server.default

    def last_bubbles(self, question, answer, words):
        """The turn that is on its way: the chat turns a wheel beside the title of what is pending."""
        if answer.text or answer.finish_reason:
            return bubbles([[question, answer.text]])
        ahead = self.server.ahead(answer)
        title = words["ahead"].format(ahead=ahead) if ahead else words["waiting"]
        waits = bubble("assistant", "", metadata={"title": title, "status": "pending"})
        return [bubble("user", literally(question)), waits]

    def explain(self, error, words):
        """What went wrong, in the visitor's language as far as it is known before."""
        if isinstance(error, Busy):
            return words["busy"]
        if isinstance(error, TooLong):
            return words["too_long"].format(limit=f"{self.server.model.config.seq_length:,}")
        return words["end_error"].format(error=error)

    @staticmethod
    def columns(kept, mode, words):
        """Both places for conversations: whose each is, and what it holds."""
        shown = COLUMNS[mode]
        left = gr.update(label=words[shown[0]], value=bubbles(kept[shown[0]]))
        right = gr.update(visible=True, value=bubbles(kept["base"])) if len(shown) > 1 else gr.update(visible=False)
        return [left, right]

    @staticmethod
    def update(box=None, columns=(), status=None, kept=None, busy=None):
        """Values for `outputs` of web_demo.build; None leaves one as it is."""
        columns = [*columns, *[None] * (len(SIDES) - len(columns))]
        values = [gr.skip() if value is None else value for value in (box, *columns, status, kept)]
        if busy is None:
            return [*values, *[gr.skip()] * 4]
        return [*values, gr.update(visible=busy), gr.update(visible=not busy), *[gr.update(interactive=not busy)] * 2]

    # ---- what is there

    def status(self, answer, words):
        """One line: model, checkpoint, prefix, bits, device, speed, why the answer ended."""
        parts = [self.describe(answer.model, words)]
        if answer.decision:
            parts.append(words["chosen"].format(sure=answer.decision.sure))
        if answer.response_ids:
            parts.append(words["speed"].format(tokens=len(answer.response_ids), speed=answer.tokens_per_second))
        if answer.finish_reason:
            parts.append(words[f"end_{answer.finish_reason}"].format(error=answer.error))
        return " · ".join(parts)

    def describe(self, model, words):
        """What answers: base model, prefix or checkpoint, bits and device."""
        facts = self.server.facts(self.server.base if model == AUTO else model)
        prefix = words["prefix"].format(**facts) if facts["pre_seq_len"] else words["no_prefix"]
        if model == AUTO:
            prefix = words["chooses"].format(names=", ".join([*self.server.candidates, self.server.base]))
        elif not facts["pre_seq_len"] and model != BASE:  # weights that were tuned themselves
            prefix = model
        drift = words["drift"].format(**facts) if "drift" in facts else None
        parts = [facts["base_model"], prefix, drift, facts["weights"], facts["device"], facts.get("slow_because")]
        return " · ".join(filter(None, parts))

    def choose(self, request: gr.Request, checkpoint):
        """Read the prefix of a checkpoint, so that the first question need not wait for it."""
        words = said_in(request)
        try:
            return as_status([self.describe(checkpoint, words)])
        except (ValueError, OSError) as error:
            return as_status([self.explain(error, words)], "error")

    def opened(self, request: gr.Request, kept):
        """The page as the browser kept it, with the checkpoints of now: a running training gets new ones."""
        kept, words, names = checked(kept), said_in(request), self.server.models()[:-1]
        mode = kept["mode"] if kept["mode"] in modes_of(self.server) else first_mode(self.server)
        chosen = kept["checkpoint"] if kept["checkpoint"] in names else self.server.default
        status = as_status([self.describe({"base": self.server.base, AUTO: AUTO}.get(mode, chosen), words)])
        choices = gr.update(choices=names, value=chosen if names else None)
        draft, kept = kept["draft"] or gr.skip(), {**kept, "mode": mode, "draft": ""}  # what was typed meanwhile stays
        return [choices, mode, *self.columns(kept, mode, words), draft, status, kept]

    # ---- what else the buttons do

    def undo(self, request: gr.Request, kept, mode):
        """Take back the last turn; its question returns to the box."""
        kept, shown = checked(kept), COLUMNS[mode]
        if not kept[shown[0]] or request.session_hash in self.running:
            return self.update()
        question = kept[shown[0]][-1][0]
        kept = {**kept, "earlier": {}, **{name: kept[name][:-1] for name in shown}}
        return self.update(question, self.columns(kept, mode, said_in(request)), "", kept)

    def clear(self, request: gr.Request, mode, checkpoint):
        """Start a new conversation with every model, however long the one that was kept."""
        if request.session_hash in self.running:
            return self.update()
        self.close(request)
        kept = {**empty(), "mode": mode, "checkpoint": checkpoint}
        return self.update("", self.columns(kept, mode, said_in(request)), "", kept)

    def judge(self, request: gr.Request, event: gr.LikeData, kept, mode):
        """Write down which of two answers a thumb prefers."""
        words = said_in(request)
        if not isinstance(event.liked, bool):  # the thumb was taken back
            return gr.skip()
        name = COLUMNS[mode][SIDES.index(event.target.elem_id)]
        row = preference(checked(kept), mode, name, place_of(event), event.liked)
        if row is None:
            return as_status([words["nothing_to_compare"]])
        try:
            return (
                as_status([words["saved"]])
                if self.feedback.append(row)
                else as_status([words["feedback_full"]], "error")
            )
        except OSError:
            return as_status([words["feedback_failed"]], "error")

    @staticmethod
    def cancel(answers):
        for answer in list(answers.values()):
            answer.cancel()

    def stop(self, request: gr.Request):
        self.cancel(self.running.get(request.session_hash, {}))

    def close(self, request: gr.Request):
        """The page was closed: nothing of it stays."""
        self.stop(request)
        for name in CONVERSATIONS:
            self.server.forget((request.session_hash, name))

    # ---- for programs

    def chat(self, request: gr.Request, prompt: str, history: list[list[str]] | None = None) -> str:
        """The growing answer to a question; `history` is [[question, answer]]. A client that goes away stops it."""
        history = [] if history is None else history
        if not (isinstance(prompt, str) and is_turns(history)):
            raise gr.Error(EXPECTED, print_exception=False)
        client = client_key(request.client.host)
        try:
            with self.server.preparing(client):
                sampling = Sampling(**self.server.sampling)
                token_ids, _ = self.server.fit(prompt, history, sampling.max_new_tokens, self.server.usual)
            for answer in self.server.stream(token_ids, model=self.server.usual, sampling=sampling, client=client):
                yield answer.text
        except (ValueError, OSError, Busy) as error:
            raise gr.Error(self.explain(error, said_in(request)), print_exception=False) from error
        if answer.finish_reason == "error":
            raise gr.Error(self.explain(answer.error, said_in(request)), print_exception=False)

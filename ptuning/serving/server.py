"""Answer with a tuned model, many conversations at once, for the page, the terminal or the API.

Answers to the loading code that the official `web_demo.py`, `cli_demo.py` and `api.py` each carry, and to their
use of `stream_chat`. It differs in three ways.

One model in memory answers with any prefix, or with none: the prefix is not a part of the model here but the
first entries of an answer's KV cache, so two answers that are computed side by side may have different ones.

Answers are computed together, by the Batch of chatglm2/generation.py. A worker thread owns the model; in every step it
feeds one token of each running answer. New answers join and finished ones leave between steps.

A conversation's cache is kept after its answer. The next prompt is compared with the tokens in it, and only
what follows the part they share is computed: an edited history simply shares less.

Places are shared: a client that has none does not wait for one that has many. See `_make_room`.
"""

import contextlib
import random
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import partial

import torch

from chatglm2.generation import Batch, choose
from chatglm2.prefix_encoder import PrefixEncoder
from checkpoints.file_names import SIGNATURE_FILE
from checkpoints.prefix import fill_prefix_encoder, read_prefix_settings
from checkpoints.run_folder import check_holds, list_checkpoints
from checkpoints.sidecar import read_sidecar
from common.messages import dtype_name
from common.slowness import slow_because
from common.values import is_number
from serving.answers import Answer, Sampling, hold_back, read_answer, shared_length
from serving.auto import AUTO, StateMean, decide
from serving.json_mode import JsonMode, check_schema
from serving.limits import Turns, fair_share
from serving.probabilities import log_probabilities
from serving.prompts import Prompts
from tuning.signature import read_signature

BASE = "base"  # name of the model without a prefix
SCORED_AT_ONCE = 128  # tokens of a prompt: bounds the memory of their logits, 33 MB of ChatGLM2 in float32
NOTHING_KEPT = (None, [], [])  # of a conversation: model, token ids, layers
TOKENIZE_AT_ONCE = 2  # texts of clients; each may take a second of a core


class Busy(RuntimeError):
    """All places are taken and the queue is full."""


@dataclass(eq=False)
class BatchRow:
    """A running answer as the worker knows it; its cache is in the batch."""

    answer: Answer
    generator: random.Random
    started: float
    next_id: int = 0
    next_logprob: tuple | None = None


class ChatServer(Prompts):
    """A model, the prefixes of a run, and the thread that answers with them. See `submit` and `stream`.

    `base` is what the model is called without a prefix: the checkpoint's name where its weights were tuned, with
    `source_prefix` before every prompt.
    `max_batch` answers are computed at once and `max_queue` more wait; `max_sessions` conversations keep
    their cache, the one that was idle longest goes first.
    """

    def __init__(
        self,
        model,
        tokenizer,
        checkpoints=None,
        *,
        default=None,
        base=BASE,
        source_prefix="",
        max_batch=8,
        max_queue=64,
        max_sessions=32,
    ):
        self.model, self.tokenizer, self.default, self.base = model, tokenizer, default or base, base
        self.max_batch, self.max_queue, self.max_sessions = max_batch, max_queue, max_sessions
        self.name = BASE  # of the base model, for people
        self.run_folder = None  # rescanned for new checkpoints
        self.sampling = {}  # of an answer, where who asks says nothing
        self.gate = None  # an AdapterGate, where a row of the batch may go around an adapter
        self.given_source_prefix = None  # before every prompt, whatever a model was trained with
        self.candidates = ()  # models that auto chooses among, beside the base
        self.usual = self.default  # where who asks names no model: this one, or auto
        self._checkpoints = dict(checkpoints or {})
        self._prefixes, self._source_prefixes = {base: []}, {base: source_prefix}
        self._drifts = {}  # of the checkpoints whose runs have measured it
        self._signatures = {}
        self._prefixes_of_worker = {}  # on the model's device; only the worker computes there
        self._kept_caches = OrderedDict()  # session -> (model, token ids, layers) between two answers
        self._running = []  # rows; row i is row i of the batch
        self._batch = Batch(model, max_batch)
        self._waiting = []
        self._unfinished = 0  # answers waiting, starting and running
        self._held = Counter()  # client -> its unfinished answers and texts being tokenized
        self._tokenizing = Turns(TOKENIZE_AT_ONCE)
        self._ending = self._closed = False
        self._changed = threading.Condition()
        self._loading = threading.Lock()
        self._json_mode = None
        self._worker = threading.Thread(target=self._work, name="chat-server", daemon=True)
        self._worker.start()

    # ---- models

    def checkpoints(self):
        """{name: folder} of the prefixes that can be asked for, new ones of a run that is still training too."""
        return list_checkpoints(self.run_folder) if self.run_folder else self._checkpoints

    def models(self):
        """Names for `model`: every checkpoint, then the base model."""
        return [*self.checkpoints(), self.base]

    def prefix(self, name):
        """Key and value (1, G, P, D) of every layer for the prefix `name`, on the CPU; empty for the base model.

        Read once and kept. Raises ValueError for an unknown name or a checkpoint that does not fit the model.
        """
        if name in self._prefixes:  # without waiting for another one that is being read
            return self._prefixes[name]
        with self._loading:
            if name not in self._prefixes:
                checkpoints = self.checkpoints()
                if name not in checkpoints:
                    raise ValueError(f"There is no model {name!r}; there are {', '.join(self.models())}.")
                adapter = self.gate is not None  # a part of the model
                settings = (read_sidecar if adapter else read_prefix_settings)(checkpoints[name])
                self._source_prefixes[name] = settings.get("source_prefix") or ""
                if is_number(settings.get("drift")):
                    self._drifts[name] = settings["drift"]
                self._prefixes[name] = [] if adapter else self._read_prefix(checkpoints[name], settings)
            return self._prefixes[name]

    @torch.inference_mode()
    def _read_prefix(self, checkpoint, settings):
        shape = {name: settings[name] for name in ("pre_seq_len", "prefix_projection")}
        encoder = PrefixEncoder(type(self.model.config)(**{**self.model.config.to_dict(), **shape})).eval()
        fill_prefix_encoder(encoder, checkpoint)
        return encoder(1, self.model.transformer.dtype_of_blocks)

    def signatures(self, among=()):
        """{name: what its training prompts look like} of models, by default the candidates; each is read once.

        Raises ValueError where there is none, and as read_signature.
        """
        names = among or self.candidates
        if not names:
            raise ValueError(
                f"There is nothing that {AUTO} could choose: start with --ptuning_checkpoint, and for a LoRA adapter with "
                "--auto, too."
            )
        with self._loading:
            for name in names:
                if name not in self._signatures:
                    checkpoint = self.checkpoints()[name]
                    check_holds(checkpoint, SIGNATURE_FILE, name)
                    self._signatures[name] = read_signature(checkpoint, self.model.config.hidden_size)
            return {name: self._signatures[name] for name in names}

    def offers_auto(self):
        """True where `auto` can be asked for: every candidate has a signature that fits."""
        try:
            return bool(self.signatures())
        except (ValueError, OSError):
            return False

    def prefix_length(self, name):
        """Virtual tokens of a prefix that has been read, 0 for the base model."""
        layers = self.prefix(name)
        return layers[0][0].shape[2] if layers else 0

    # ---- asking

    @contextlib.contextmanager
    def preparing(self, client):
        """A client's turn to have text tokenized: one of its own and two in all at once. Raises Busy."""
        with self._changed:
            self._take(client)
        try:
            with self._tokenizing.turn(client):
                yield
        finally:
            with self._changed:
                self._held -= Counter([client])

    def _take(self, client):
        """Count one more of a client; Busy where all places are taken, or its share of them is."""
        places = self.max_batch + self.max_queue
        if self._ending:
            raise Busy("The server is shutting down.")
        if self._held.total() >= places:
            raise Busy(f"All {self.max_batch} places are taken and {self.max_queue} requests wait. Try again later.")
        share = fair_share(places, self._held, client)
        if client is not None and self._held[client] >= share:
            raise Busy(
                f"This client has {self._held[client]} requests here, and its share is {share} of {places}. "
                "Try again when one of them has ended."
            )
        self._held[client] += 1

    def submit(self, token_ids, *, model=None, sampling=None, notify=None, session=None, client=None):
        """Ask for the answer to a prompt and return it at once, as an `Answer` that fills up.

        `notify(answer)` runs on the worker's thread and must not block. `session`: any key; answers with the
        same one continue each other's cache. `client`: any key; none has more than its share, None has no bound.
        Raises Busy, and ValueError as `prefix`, `check_length` and check_schema() do.
        """
        self.check_length(token_ids)
        model = model or self.default
        signatures = self.signatures(getattr(token_ids, "among", ())) if model == AUTO else {}
        for name in signatures or [model]:
            self.prefix(name)
            self.check_length(getattr(token_ids, "others", {}).get(name, ()))
        answer = Answer(token_ids, model, sampling or Sampling(), notify, session, client, signatures=signatures)
        if answer.sampling.schema is not None:
            check_schema(answer.sampling.schema)
            with self._loading:
                self._json_mode = self._json_mode or JsonMode(self.tokenizer)
            answer.format = self._json_mode.begin(answer.sampling.schema)
        with self._changed:
            self._take(client)
            self._waiting.append(answer)
            self._unfinished += 1
            self._changed.notify_all()
        return answer

    def stream(self, token_ids, **how):
        """Yield the `Answer` whenever it changes, the last time with its finish_reason; closing it cancels."""
        changed, finished = threading.Event(), False
        answer = self.submit(token_ids, notify=lambda answer: changed.set(), **how)
        try:
            while not finished:
                changed.wait(timeout=1)  # not longer: the caller may want to close this generator
                changed.clear()
                finished = answer.finish_reason is not None
                yield answer
        finally:
            answer.cancel()

    def ahead(self, answer):
        """How many answers wait longer than this one; 0 for one that is computed."""
        with self._changed:
            return self._waiting.index(answer) if answer in self._waiting else 0

    def load(self):
        """(answers being computed, answers waiting)."""
        with self._changed:
            return self._unfinished - len(self._waiting), len(self._waiting)

    def facts(self, name):
        """{name: value} that describe a model that can be asked for; its prefix is loaded if need be."""
        bits = self.model.config.quantization_bit
        return {
            "base_model": self.name,
            "model": name,
            "pre_seq_len": self.prefix_length(name),
            "weights": f"int{bits}" if bits else dtype_name(self.model.transformer.dtype_of_blocks),
            "device": ", ".join(map(str, self.model.devices)),
            **({"drift": self._drifts[name]} if name in self._drifts else {}),
            **slow_because(),
        }

    def forget(self, session):
        """Drop the cache of a conversation."""
        with self._changed:
            self._kept_caches.pop(session, None)

    def close(self, seconds=0):
        """Take no more, give what is on its way some seconds, and end the worker; what is left ends as cancelled."""
        with self._changed:
            self._ending = True
            self._changed.wait_for(lambda: not self._unfinished, timeout=seconds)
            self._closed = True
            self._changed.notify_all()
        self._worker.join()

    # ---- the worker's thread

    def _work(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
                if self._closed:
                    for answer in [row.answer for row in self._running] + self._waiting:
                        self._end(answer, "cancelled")
                    return
                gone = [answer for answer in self._waiting if answer.cancelled]
                self._waiting = [answer for answer in self._waiting if not answer.cancelled]
            for answer in gone:
                self._end(answer, "cancelled")
            with contextlib.suppress(RuntimeError):  # no memory to put a cache aside: then nobody makes room
                self._make_room()
            arrived = self._next_answers()
            try:
                self._advance(arrived)
            except RuntimeError as error:  # out of memory, most likely: give all of it back and go on
                answers = [row.answer for row in self._running] + arrived
                with self._changed:
                    self._running, self._batch = [], None
                self._batch = Batch(self.model, self.max_batch)
                for answer in answers:
                    if answer.finish_reason is None:
                        self._end(answer, "error", error)

    @torch.inference_mode()
    def _make_room(self):
        """Pause the newest answer of the client with the most places for one that has at least two fewer."""
        with self._changed:
            running = Counter(row.answer.client for row in self._running)
            fewest = min((running[answer.client] for answer in self._waiting), default=self.max_batch)
            num_paused = sum(bool(answer.paused) for answer in self._waiting)
        if len(self._running) < self.max_batch or num_paused >= self.max_batch:
            return
        client, most = running.most_common(1)[0]
        if most < fewest + 2:
            return
        row = max((row for row in self._running if row.answer.client == client), key=lambda row: row.started)
        layers = self._copy_cache(row)
        self._remove(row)
        row.answer.paused = row, layers
        with self._changed:
            self._waiting.insert(0, row.answer)

    def _next_answers(self):
        """Those to start now, taken off the queue: of the client with the fewest places, the one that came first."""
        arrived = []
        with self._changed:
            running = Counter(row.answer.client for row in self._running)
            while self._waiting and len(self._running) + len(arrived) < self.max_batch:
                answer = min(self._waiting, key=lambda answer: running[answer.client])
                self._waiting.remove(answer)
                arrived.append(answer)
                running[answer.client] += 1
        return arrived

    @torch.inference_mode()
    def _advance(self, arrived):
        """Feed the prompts that arrived, hand out the token each answer has chosen, and compute the next ones."""
        for answer in arrived:
            try:
                if answer.paused:
                    self._resume(answer)
                    continue
                logits = self._start(answer)
            except RuntimeError as error:  # the others go on
                self._end(answer, "error", error)
            else:
                self._choose(self._running[-1:], logits)
        ended = [(row, reason) for row in self._running if (reason := self._accept(row))]
        for row, reason in ended:
            self._keep_cache(row)
            self._remove(row)
            self._end(row.answer, reason)
        if self._running:
            self._step()

    def _start(self, answer):
        """Feed the part of the prompt that is not in the conversation's cache; logits (1, V) of the first token."""
        started = time.monotonic()
        with self._changed:
            kept = self._kept_caches.pop(answer.session, NOTHING_KEPT)
        logits = self._decide(answer, kept) if answer.signatures else self._admit(answer, kept)
        with self._changed:
            self._running.append(BatchRow(answer, random.Random(answer.sampling.seed), started))
        return logits

    def _admit(self, answer, kept, *watches):
        """Give an answer a row of the batch, with what the conversation's cache `kept` has of its prompt; logits (1, V)."""
        prefix_length, layers = self.prefix_length(answer.model), self._prefix_on_device(answer.model)
        model, token_ids, cache = kept
        answer.reused_tokens = 0
        if model == answer.model:
            answer.reused_tokens = shared_length(token_ids, answer.token_ids[:-1])
            length = prefix_length + answer.reused_tokens
            layers = [(key[:, :, :length], value[:, :, :length]) for key, value in cache]
        if answer.sampling.score_prompt:
            watches = [*watches, partial(self._score, answer)]
        fed = answer.token_ids[answer.reused_tokens :]
        self._open_gate([answer])
        watch = (lambda hidden: [each(hidden) for each in watches]) if watches else None
        return self._feed(self._batch.admit, [fed], layers, prefix_length, watch)

    def _decide(self, answer, kept):
        """Let the base read the last turn alone, and the model that is chosen by that answer; logits (1, V).

        Where nothing was said before, the base has then read its whole prompt.
        """
        prompt, answer.model, states = answer.token_ids, self.base, StateMean()
        alone = self.tokenizer.last_turn(list(prompt), self.source_prefix(self.base))
        answer.token_ids = alone
        logits = self._admit(answer, NOTHING_KEPT, states)
        answer.decision = decide(answer.signatures, states.value, self.base)
        answer.model = answer.decision.model
        answer.token_ids = getattr(prompt, "others", {}).get(answer.model, prompt)
        if answer.model != self.base or alone != prompt:
            self._batch.remove(len(self._batch.lengths) - 1)
            answer.prompt_logprobs = []
            logits = self._admit(answer, kept)
        return logits

    def _score(self, answer, hidden):
        """Keep the log-probabilities of the tokens that follow those of `hidden` (1, S, H)."""
        for rows in hidden[0].split(SCORED_AT_ONCE):
            start = len(answer.prompt_logprobs) + 1
            if following := answer.token_ids[start : start + len(rows)]:
                logits = self._feed(self.model.transformer.output_layer, rows[: len(following)])
                answer.prompt_logprobs += log_probabilities(logits, following, answer.sampling.logprobs)

    def _prefix_on_device(self, name):
        """The prefix `name` where the layers are, moved there once for all answers."""
        kept, layers = self._prefixes_of_worker, self.prefix(name)
        if name not in kept:
            devices = self.model.layer_devices or [self.model.device] * len(layers)
            kept[name] = [
                (key.to(device), value.to(device)) for (key, value), device in zip(layers, devices, strict=False)
            ]
        return kept[name]

    def _resume(self, answer):
        """Give an answer its place again. A row needs a token to be fed: the last one of its cache, once more."""
        (row, layers), answer.paused = answer.paused, ()
        layers = [(key[:, :, :-1], value[:, :, :-1]) for key, value in layers]
        token_ids = answer.token_ids + answer.response_ids
        self._open_gate([answer])
        prompt_lengths = [self.model.prompt_length(answer.token_ids)]
        self._feed(self._batch.admit, [token_ids[-1:]], layers, self.prefix_length(answer.model), None, prompt_lengths)
        with self._changed:
            self._running.append(row)

    def _open_gate(self, answers):
        """Let the adapter take part in the rows that are fed next, where it is asked for."""
        if self.gate is not None:
            self.gate.open([answer.model != self.base for answer in answers])

    def _feed(self, feed, *inputs):
        """Logits (rows, V) from admit() or step() of the batch or the output layer, of the ids that are tokens."""
        return feed(*inputs)[:, : len(self.tokenizer)]

    def _step(self):
        """Feed the chosen token of every running answer, and choose the next."""
        self._open_gate([row.answer for row in self._running])
        self._choose(self._running, self._feed(self._batch.step, [row.next_id for row in self._running]))

    def _choose(self, rows, logits):
        settings = [row.answer.sampling for row in rows]
        temperatures, top_ps = [each.temperature for each in settings], [each.top_p for each in settings]
        possible = logits
        if any(row.answer.format for row in rows):
            possible = torch.stack(
                [
                    row.answer.format.mask(each) if row.answer.format else each
                    for row, each in zip(rows, logits, strict=True)
                ]
            )
        chosen = choose(possible, temperatures, top_ps, [row.generator.random() for row in rows])
        for row, token_id in zip(rows, chosen, strict=True):
            row.next_id = token_id
            if row.answer.format:
                row.answer.format.take(token_id)
        for place, (row, each) in enumerate(zip(rows, settings, strict=True)):
            if each.logprobs is not None:
                [row.next_logprob] = log_probabilities(logits[place : place + 1], [row.next_id], each.logprobs)

    def _remove(self, row):
        """Take an answer out of the batch."""
        place = self._running.index(row)
        self._batch.remove(place)
        with self._changed:
            self._running[place] = self._running[-1]
            self._running.pop()

    def _accept(self, row):
        """Add the chosen token to the answer; the finish_reason if it is over, else None."""
        answer, sampling = row.answer, row.answer.sampling
        if answer.cancelled:
            return "cancelled"
        if answer.format and (problem := answer.format.problem()):
            answer.error = f"The answer's schema asks too much: {problem}"
            return "error"
        ends = (self.model.config.eos_token_id, *self.tokenizer.stop_ids)
        reason = "stop" if row.next_id in ends else None
        if row.next_logprob is not None and (sampling.raw or not reason):
            answer.logprobs.append(row.next_logprob)
        if not reason:
            answer.response_ids.append(row.next_id)
            room = self.model.config.seq_length - len(answer.token_ids)
            if len(answer.response_ids) >= min(room, sampling.max_new_tokens):
                reason = "length"
        text = read_answer(self.model, self.tokenizer, answer)
        ends = [text.find(stop) for stop in sampling.stop if stop in text]
        if ends:
            text, reason = text[: min(ends)], "stop"
        answer.text = text if reason else hold_back(text, sampling.patterns)
        answer.seconds = time.monotonic() - row.started
        if not reason and answer.notify:
            answer.notify(answer)
        return reason

    def _end(self, answer, reason, error=None):
        if error is not None:
            answer.error = str(error).strip().splitlines()[0]
        answer.finish_reason = reason
        with self._changed:
            self._unfinished -= 1
            self._held -= Counter([answer.client])
            self._changed.notify_all()
        if answer.notify:
            answer.notify(answer)

    def _copy_cache(self, row):
        return [(key.clone(), value.clone()) for key, value in self._batch.layers(self._running.index(row))]

    def _keep_cache(self, row):
        """Keep the cache of a conversation; the one that was idle longest makes room."""
        answer = row.answer
        if answer.session is None or not self.model.continues_caches:
            return
        place = self._running.index(row)
        fed = self._batch.lengths[place] - self._batch.prefix_lengths[place]  # the last token may not have been
        token_ids = (answer.token_ids + answer.response_ids)[:fed]
        layers = self._copy_cache(row)
        with self._changed:
            self._kept_caches[answer.session] = answer.model, token_ids, layers
            while len(self._kept_caches) > self.max_sessions:
                self._kept_caches.popitem(last=False)

"""Answer many prompts at once: the cache, the decode step and the sampler that prediction and the servers share.

Answers to `model.generate()` in the official `main.py`. Greedy tokens are the same. It differs in this:

The key and value cache is allocated once and written in place. Rows are not padded: each begins in slot 0 and has a
length of its own, so a row's numbers do not depend on the rows beside it.

    row 0   [ prefix | prompt | answer > ........ ]     > is where its next token goes
    row 1   [ prefix | prompt | answer ------- > . ]    what lies behind it is masked
    row 2   [ prefix | prompt > ................. ]

A finished row leaves at once: the last row takes its place, so the rows in use are always the first ones, and the
others that wait join behind them. The prefix is computed once for all rows. Of a model that is spread over several
devices each layer's part of the cache lies where the layer computes.

A step of B rows reads every weight once, e bytes each, and keys and values, e 2 G D L bytes per slot in use; it
multiplies and adds 2 B numbers per weight. For the 6B model in bf16 that is 12.5 GB, and 28.7 kB per slot: up to some
hundred rows a step costs what reading the weights costs, so many rows at once are nearly free. On a GPU the hundreds
of small kernels of a step are recorded once as a CUDA graph and then launched together.

Sampling draws one number per token from a generator of the row's own, seeded by the run's seed and the row: a sampled
answer depends on nothing else, not on the batch, the device or the number of processes.
"""

import random

import torch

from chatglm2.attention import DecodeStep
from chatglm2.chat import TOP_K
from common.slowness import runs_slower

PREFILL_TOKENS = 1024  # of prompts fed at once: bounds the memory of their activations and attention mask
WIDTH_STEP = 64  # the cache grows by so many slots
KEPT_WIDTH = 4096  # a wider cache is given back when no row is left
FINE_WIDTH = (
    512  # slots up to which a CUDA graph is recorded for each multiple of WIDTH_STEP; beyond, sizes grow by 1/4
)
MOST_GRAPHS = 32  # kept; the one that was not used for longest makes room
CAPTURE_FAILURES = 3  # in a row, after which steps go on without CUDA graphs
MIN_TEMPERATURE = 1e-4  # below it the likeliest token is taken


class Batch:
    """The rows that are being answered and their cache; plays transformers' Cache for the model's forward.

    At most `max_rows` rows; `width` slots each are allocated at once, and more when they are needed. Callers keep
    a list of their own beside it: admit() appends rows, remove() puts the last row in the place of the removed one.
    """

    is_compileable = False  # forward may take it for a cache that grows

    def __init__(self, model, max_rows, width=0):
        self.model, self.max_rows = model, max_rows
        self.lengths = []  # slots in use of each row: prefix, prompt, and the answer's tokens that were fed
        self.prefix_lengths = []
        self.prompt_lengths = []  # without the prefix
        # (rows, slots) -> (CUDA graph, logits), the one used last at the end
        self.graphs = {} if model.device.type == "cuda" and not model.layer_devices else None
        self._graph_logits = None  # (rows, V): all graphs write here
        self._failures = 0  # of recordings, in a row
        self.width = 0
        self._devices = model.devices
        # Of each layer, which of the devices it is on.
        self._places = list(map(self._devices.index, model.layer_devices)) or [0] * model.config.num_layers
        self._stores = []  # for each device, (layers on it, 2, rows, G, slots, D)
        self._layers = []  # of each layer, (2, rows, G, slots, D) of its store
        self._inputs = torch.zeros(4, max_rows, dtype=torch.int64, device=model.device)
        self._row_numbers = [torch.arange(max_rows, device=device) for device in self._devices]
        self._reserve(width)

    # ---- rows

    @torch.inference_mode()
    def admit(self, prompts, prefix, prefix_length=None, watch=None, prompt_lengths=None):
        """Add a row for each of `prompts` (token ids); logits (rows, V) of the token after each.

        All of them continue `prefix`, a key and value (1, G, P, D) for each layer, [] for none. Its tokens behind
        `prefix_length` (by default none are) have positions: they are the beginning of a conversation.
        `prompt_lengths` are those of whole prompts, where only the last token of a row that has begun to answer is fed.
        `watch(hidden)` sees what the output layer would be given of all tokens, (rows, S, H) of each piece that is fed.
        """
        start = prefix[0][0].shape[2] if prefix else 0
        prompt_lengths = prompt_lengths or [self.model.prompt_length(prompt) for prompt in prompts]
        prefix_length = start if prefix_length is None else prefix_length
        rows = max(1, PREFILL_TOKENS // max(map(len, prompts)))  # fed at once
        self._reserve(start + max(map(len, prompts)) + 1)
        return torch.cat(
            [
                self._admit(prompts[i : i + rows], prompt_lengths[i : i + rows], prefix, start, prefix_length, watch)
                for i in range(0, len(prompts), rows)
            ]
        )

    def _admit(self, prompts, prompt_lengths, prefix, start, prefix_length, watch):
        first, last = len(self.lengths), len(self.lengths) + len(prompts)
        for index, (key, value) in enumerate(prefix):
            self._layers[index][0, first:last, :, :start] = key
            self._layers[index][1, first:last, :, :start] = value
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
        token_ids = torch.zeros(len(prompts), int(ends.max()) + 1, dtype=torch.int64)
        for row, prompt in enumerate(prompts):  # padded on the right, where causal attention does not look
            token_ids[row, : len(prompt)] = torch.tensor(prompt)
        hidden = []  # of the last token of each prompt
        at_once = PREFILL_TOKENS if self.model.continues_caches else token_ids.shape[1]
        for offset in range(0, token_ids.shape[1], at_once):
            chunk = token_ids[:, offset : offset + at_once].to(self.model.device)
            self._past, self._rows, self._slots = start + offset, slice(first, last), None
            position = start + offset - prefix_length
            ordinals = torch.arange(position, position + chunk.shape[1], device=chunk.device)[None]
            ends_of_prompts = torch.tensor(prompt_lengths, device=chunk.device)[:, None]
            output = self._forward(chunk, None, self.model.place(ordinals, ends_of_prompts))
            if watch:
                watch(output)
            inside = (ends >= offset) & (ends < offset + chunk.shape[1])
            hidden.append(output[inside, (ends - offset)[inside]])
            assert offset == 0 or len(prompts) == 1  # else the order of the rows would change
        self.lengths += [start + len(prompt) for prompt in prompts]
        self.prefix_lengths += [prefix_length] * len(prompts)
        self.prompt_lengths += prompt_lengths
        return self.model.transformer.output_layer(torch.cat(hidden))

    @torch.inference_mode()
    def step(self, token_ids):
        """Feed one token to every row; logits (rows, V) of the next, which the next step may overwrite."""
        rows, slots = len(self.lengths), max(self.lengths) + 1
        self._reserve(slots)
        inputs = [token_ids, self.lengths, self.prefix_lengths, self.prompt_lengths]
        logits = None
        if self.graphs is not None:
            logits = self._replay(inputs, rows, slots)
        if logits is None:
            self._inputs[:, :rows] = torch.tensor(inputs)
            logits = self._decode(rows, slots, padded=slots > min(self.lengths) + 1)
        self.lengths = [length + 1 for length in self.lengths]
        return logits[:rows]

    @torch.inference_mode()
    def remove(self, index):
        """Take a row out; the last one moves to its place."""
        last = len(self.lengths) - 1
        if index < last:
            length = self.lengths[last]
            for store in self._stores:
                store[:, :, index, :, :length] = store[:, :, last, :, :length]
        for numbers in (self.lengths, self.prefix_lengths, self.prompt_lengths):
            numbers[index] = numbers[last]
            numbers.pop()
        if not self.lengths and self.width > KEPT_WIDTH:
            self._allocate(0)

    def layers(self, index):
        """Key and value (1, G, slots in use, D) of a row in every layer: views, overwritten once the row is gone."""
        places = slice(index, index + 1), slice(None), slice(self.lengths[index])
        return [(key[places], value[places]) for key, value in self._layers]

    # ---- the cache

    def _reserve(self, width):
        if width > self.width:
            self._allocate(-(-max(width, self.width * 5 // 4) // WIDTH_STEP) * WIDTH_STEP)

    def _allocate(self, width):
        """Slots for every row, and one more that rows of a CUDA graph which are not in use may write to."""
        config, kept = self.model.config, self._stores
        shape = (2, self.max_rows, config.num_key_value_heads, width + 1, config.kv_channels)
        dtype = self.model.transformer.dtype_of_blocks
        # Zeros, because what is masked is still multiplied, by 0.
        self._stores = [
            torch.zeros(self._places.count(place), *shape, dtype=dtype, device=device)
            for place, device in enumerate(self._devices)
        ]
        if self.lengths:
            used = (slice(None), slice(None), slice(len(self.lengths)), slice(None), slice(max(self.lengths)))
            for store, before in zip(self._stores, kept, strict=True):
                store[used] = before[used]
        parts = [iter(store) for store in self._stores]
        self._layers = [next(parts[place]) for place in self._places]
        self.width = width
        if self.graphs:
            self.graphs = {}

    def get_seq_length(self, layer_index=0):
        return self._past

    def update(self, key, value, layer_index):
        """Write the keys and values (rows, G, S, D) of the tokens being fed; those of all slots up to theirs."""
        keys, values = self._layers[layer_index][:, self._rows]
        end = self._past + key.shape[2]
        if self._slots is None:  # prompts: the same slots in all rows
            keys[:, :, self._past : end], values[:, :, self._past : end] = key, value
        else:  # a step: each row has a slot of its own
            rows, slots = self._slots[self._places[layer_index]]
            keys[rows, :, slots], values[rows, :, slots] = key[:, :, 0], value[:, :, 0]
        return keys[:, :, :end], values[:, :, :end]

    def _forward(self, token_ids, mask, position_ids, step=None):
        output = self.model.transformer(token_ids, mask, position_ids, self, use_cache=True, step=step)
        return output.last_hidden_state

    def _decode(self, rows, slots, padded):
        """Logits (rows, V) after the tokens in self._inputs, where no row has more than `slots` slots in use."""
        token_ids, lengths, prefix_lengths, prompt_lengths = self._inputs[:, :rows, None]  # (rows, 1) each
        self._past, self._rows = slots - 1, slice(rows)
        mask = step = None
        if all(DecodeStep.runs(store, self.model.config) for store in self._stores):
            step = DecodeStep(self._layers, lengths[:, 0], slots)
        else:
            # Of each device: the rows, and their slots
            self._slots = [(numbers[:rows], lengths[:, 0].to(numbers.device)) for numbers in self._row_numbers]
            if padded:
                mask = torch.arange(slots, device=lengths.device) <= lengths  # (rows, slots)
                mask = mask[:, self.model.prefix_length :]  # forward adds the part of the model's own prefix
        positions = self.model.place(lengths - prefix_lengths, prompt_lengths)
        hidden = self._forward(token_ids, mask, positions, step)
        return self.model.transformer.output_layer(hidden[:, -1])

    # ---- CUDA graphs

    def _replay(self, inputs, rows, slots):
        """A step as one launch: recorded once for each power of two of rows and size of graph_slots().

        None where recording failed. After CAPTURE_FAILURES in a row, which is said once, none is tried any more.
        """
        size = min(1 << (rows - 1).bit_length(), self.max_rows), min(graph_slots(slots), self.width)
        idle = size[0] - rows
        inputs = [[*numbers, *[value] * idle] for numbers, value in zip(inputs, (0, self.width, 0, 0), strict=True)]
        self._inputs[:, : size[0]] = torch.tensor(inputs)
        try:
            self.graphs[size] = self.graphs.pop(size, None) or self._record_one_more(*size)
        except RuntimeError as error:
            self._failures += 1
            if self._failures == CAPTURE_FAILURES:
                runs_slower(f"Generating without CUDA graphs, and slower: {error}")
                self.graphs = None
            return None
        self._failures = 0
        graph, logits = self.graphs[size]
        graph.replay()
        return logits

    def _record_one_more(self, rows, slots):
        if len(self.graphs) == MOST_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return self._record(rows, slots)

    def _record(self, rows, slots):
        if self._graph_logits is None:
            dtype, weight = self.model.transformer.dtype_of_blocks, self.model.transformer.output_layer.weight
            self._graph_logits = torch.empty(self.max_rows, len(weight), dtype=dtype, device=weight.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are chosen and compiled before they are recorded
            for _ in range(2):
                self._decode(rows, slots, padded=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        # Only this thread's calls can break it: others may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self._graph_logits[:rows].copy_(self._decode(rows, slots, padded=True))
        return graph, logits


def graph_slots(slots):
    """`slots` rounded up to one of few sizes: multiples of WIDTH_STEP, beyond FINE_WIDTH each a quarter larger."""
    if slots <= FINE_WIDTH:
        return -(-slots // WIDTH_STEP) * WIDTH_STEP
    size = FINE_WIDTH
    while size < slots:
        size = -(-size * 5 // 4 // WIDTH_STEP) * WIDTH_STEP
    return size


def draw(logits: torch.Tensor, draws: list[float]) -> list[int]:
    """One token id for each row of logits (B, V), any of them as likely as they say, by a number from 0 up to 1."""
    sums = logits.double().softmax(-1).cumsum(-1)
    places = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, places, right=True).clamp(max=logits.shape[1] - 1)[:, 0].tolist()


def choose(logits: torch.Tensor, temperatures: list[float], top_ps: list[float], draws: list[float]) -> list[int]:
    """One token id for each row of logits (B, V), as a list.

    Below MIN_TEMPERATURE or with a top_p of 0 the likeliest; else from the TOP_K likeliest, at that temperature, those
    that make up `top_p` of their probability, by a number in `draws`, from 0 up to 1.
    """
    greedy = [
        temperature < MIN_TEMPERATURE or top_p == 0 for temperature, top_p in zip(temperatures, top_ps, strict=True)
    ]
    if all(greedy):
        return logits.float().argmax(-1).tolist()  # of bfloat16 it takes four times as long on a CPU
    numbers = torch.tensor([greedy, temperatures, top_ps, draws], dtype=torch.float64)  # to the GPU all at once
    greedy, temperatures, top_ps, draws = numbers.to(logits.device)[..., None]
    scores, token_ids = logits.float().topk(min(TOP_K, logits.shape[1]))  # (B, TOP_K), the likeliest first
    probabilities = (scores.double() / temperatures.clamp(min=MIN_TEMPERATURE)).softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities  # mass of the tokens before each
    kept = likelier < top_ps
    sums = probabilities.masked_fill(~kept, 0).cumsum(-1)
    places = (sums <= draws * sums[:, -1:]).sum(-1, keepdim=True)
    places = places.minimum(kept.sum(-1, keepdim=True) - 1).masked_fill(greedy.bool(), 0)
    return token_ids.gather(1, places)[:, 0].tolist()


def row_generator(seed, row):
    """Where the random numbers of a row's answer come from."""
    return random.Random(f"{seed} {row}")


@torch.inference_mode()
def answer_prompts(
    model,
    prompts,
    max_length,
    *,
    num_known,
    batch_size,
    rows,
    seed=0,
    temperature=0.0,
    top_p=1.0,
    progress=None,
    max_answer=None,
    ends=(),
):
    """Token ids of the answer to each of `prompts` (token ids), the end token included, in their order.

    `max_length` tokens at most are prompt and answer together, `max_answer` the answer. The first `num_known` ids of the
    vocabulary are the tokens that may be chosen; `ends` finish an answer as the end token does. At most `batch_size` rows are computed at once. `rows` names each prompt: with `seed`
    it decides what is sampled; `temperature` 0 is greedy, `top_p` None draws any token as likely as the model says.
    `progress()` is called for every finished row.
    """
    if not prompts:
        return []
    encoder = model.transformer.prefix_encoder
    prefix = [] if encoder is None else encoder(1, model.transformer.dtype_of_blocks)
    # Equal lengths side by side need no padding, and the short prompts, which may be answered longest, start first.
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)  # taken from the end
    batch = Batch(model, min(batch_size, len(prompts)), model.prefix_length + max_length)
    answers = [[] for _ in prompts]
    generators = {}
    running = []  # indices into prompts; running[i] is row i of the batch

    def accept(indices, logits):
        """Give each of `indices` its next token; those that are finished with it."""
        draws = (
            [generators[index].random() for index in indices] if temperature or top_p is None else [0.0] * len(indices)
        )
        if top_p is None:
            chosen = draw(logits[:, :num_known], draws)
        else:
            chosen = choose(logits[:, :num_known], [temperature] * len(indices), [top_p] * len(indices), draws)
        finished = []
        for index, token_id in zip(indices, chosen, strict=True):
            answers[index].append(token_id)
            room = min(max_length - len(prompts[index]), max_answer or max_length)
            if token_id == model.config.eos_token_id or token_id in ends or len(answers[index]) >= room:
                finished.append(index)
        return finished

    while waiting or running:
        # Prompts are fed together, a quarter of the batch at least: feeding one costs as much as a step of all.
        free = batch.max_rows - len(running)
        finished = []
        if waiting and free >= min(len(waiting), max(1, batch.max_rows // 4)):
            arrived = [waiting.pop() for _ in range(min(free, len(waiting)))]
            generators.update((index, row_generator(seed, rows[index])) for index in arrived)
            logits = batch.admit([prompts[index] for index in arrived], prefix)
            running += arrived
            finished = accept(arrived, logits)
        elif running:
            finished = accept(running, batch.step([answers[index][-1] for index in running]))
        for index in reversed(finished):  # from the end: no row that has to leave too is moved
            place = running.index(index)
            batch.remove(place)
            running[place] = running[-1]
            running.pop()
            if progress:
                progress()
    return answers

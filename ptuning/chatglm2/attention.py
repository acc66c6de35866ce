"""Attention of queries to the keys up to their own, by the fastest kernel at hand.

Answers to the official `CoreAttention`, which expands the KV groups to all heads and adds a mask of every query and
key. The shape legend is that of modeling_chatglm.py. There are four ways, which agree in their numbers:

- on a GPU, for a step of decoding many rows at once: `DecodeStep`, by a kernel that knows each row's length;
- on a GPU, in half precision and without left padding: the flash kernel, which knows what causal means;
- on a CPU, in float32, rows longer than QUERY_BLOCK without left padding: `LongAttention`, by matmul.py;
- else: torch's `scaled_dot_product_attention` with a mask of numbers, QUERY_BLOCK queries at a time.

Where torch chooses among kernels of its own, cuDNN's is left out: see `leave_out_cudnn`.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import CausalBias, CausalVariant

from chatglm2.gradients import OwnGradient, is_transformed
from chatglm2.kernels import kernels_for, num_splits
from chatglm2.matmul import multiply, onednn_runs

QUERY_BLOCK = 256  # queries that are attended for at once where there is a mask of numbers
LONG_BLOCK = 1024  # rows of scores that exist at once in LongAttention: queries times the heads of a group
LONG_STEP = 64  # it fills rows up to a multiple: oneDNN compiles a kernel for each length
LONG = "causal, for LongAttention"  # the mask of what goes there, which needs to be told no more


class CausalMask(CausalBias):
    """torch's name for a causal mask whose last query sees all keys; it has no numbers, so it lies on every device."""

    def to(self, *args, **kwargs):
        return self


def causal_lower_right(num_queries, num_keys):
    return CausalMask(CausalVariant.LOWER_RIGHT, num_queries, num_keys)


def flash_attention_runs(device, dtype):
    """True where the flash kernel runs. It takes causal attention without a mask, and KV groups as they are."""
    half = dtype in (torch.float16, torch.bfloat16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def leave_out_cudnn(device):
    """Turn cuDNN's attention off on a GPU, for this process.

    torch 2.11 and later ranks it first on an H100. It builds a plan for each shape, reported to take half a second, and
    here each prompt and each step of generate() has a shape of its own. Its gradient under a mask can be NaN
    (pytorch issue 196678).
    """
    if device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)


def long_attention_runs(device, dtype, query_length):
    """True where LongAttention runs: in float32 on an x86 CPU, for more than QUERY_BLOCK queries."""
    return query_length > QUERY_BLOCK and onednn_runs(device, dtype)


def make_mask(query_length, key_length, first_slot, padding_mask, repeats, dropout, dtype, device, contexts=None):
    """Which keys a query may see, for attend(): None where every query sees every key.

    Query i sits in slot `first_slot` + i of `key_length` and sees all slots up to its own. `padding_mask`
    (B, at most T; True for real tokens, the prefix included) hides left padding. `repeats` is R. `contexts` are as in
    mask_numbers().
    """
    leave_out_cudnn(device)
    if is_transformed():  # attend() lays no queries end to end then
        return mask_numbers(query_length, key_length, first_slot, padding_mask, 1, dtype, device, contexts)
    causal = contexts is None and padding_mask is None and query_length > 1 and key_length == first_slot + query_length
    if causal and flash_attention_runs(device, dtype):
        return causal_lower_right(query_length, key_length)  # the last query sees all keys
    if causal and not dropout and long_attention_runs(device, dtype, query_length):
        return LONG
    return mask_numbers(query_length, key_length, first_slot, padding_mask, repeats, dtype, device, contexts)


def mask_numbers(query_length, key_length, first_slot, padding_mask, repeats, dtype, device, contexts=None):
    """Masks of numbers to add to the scores; the arguments are those of make_mask(). None where every key is seen.

    The list has a mask for each QUERY_BLOCK queries, (1 or B, 1, repeats * queries, keys up to the slot of the last):
    keys behind it are not even multiplied, which is almost half of them in a long row. A query that would see
    none, padding itself, sees its own slot: some kernels make NaN of no keys, and NaN times 0 is NaN for real tokens.
    `contexts` (B,) are the slots at the beginning of each row that all its queries see, None for 0.
    """
    if query_length == 1 and first_slot + 1 == key_length and padding_mask is None:
        return None
    slots = torch.arange(key_length, device=device)
    if torch.compiler.is_compiling() or is_transformed():  # no number may decide what they record
        spans = [(0, query_length, key_length)]
    else:
        longest = 0 if contexts is None else int(contexts.max())
        stops = [*range(QUERY_BLOCK, query_length, QUERY_BLOCK), query_length]
        spans = [
            (start, stop, max(first_slot + stop, longest)) for start, stop in zip([0, *stops], stops, strict=False)
        ]
    masks = []
    for start, stop, keys in spans:
        own_slots = slots[first_slot + start : first_slot + stop, None]
        hidden = (slots[None, :keys] > own_slots)[None, None]
        if contexts is not None:
            hidden = hidden & (slots[:keys] >= contexts[:, None, None, None])
        if padding_mask is not None:
            padding = ~padding_mask[:, None, None, :keys]
            hidden = hidden | F.pad(padding, (0, keys - padding.shape[-1]), value=True)
            own = slots[None, :keys] == own_slots
            hidden = hidden & ~(own & hidden.all(-1, keepdim=True))
        numbers = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
        masks.append(numbers.repeat(1, 1, repeats, 1))
    return masks


def in_blocks(query, masks):
    """Pairs of queries (B, N, at most S, D) and their mask among `masks`, which are from mask_numbers()."""
    if masks is None or len(masks) == 1:
        return [(query, masks and masks[0])]
    return zip(query.split(QUERY_BLOCK, dim=2), masks, strict=True)


def attend(query, key, value, mask, dropout=0.0):
    """Attention of query (B, N, S, D) to key and value (B, G, T, D): (B, N, S, D). `mask` is from make_mask()."""
    if isinstance(mask, CausalBias):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, enable_gqa=True)
    if mask is LONG:
        length = query.shape[2]
        missing = (0, 0, 0, -length % LONG_STEP)  # behind all keys that a query of the row sees
        query, key, value = (F.pad(x, missing).contiguous() for x in (query, key, value))
        return LongAttention.apply(query * query.shape[-1] ** -0.5, key, value)[:, :, :length]
    if is_transformed():  # a shape folded would depend on the length
        return F.scaled_dot_product_attention(query, key, value, mask and mask[0], dropout, enable_gqa=True)
    # The R query heads of a group share their keys, so they are laid end to end as R * S queries of
    # one head: the KV groups need no expansion, and any attention kernel takes the shape.
    batch_size, _, _, head_channels = query.shape
    contexts = []
    for block, numbers in in_blocks(query, mask):
        keys = key.shape[2] if numbers is None else numbers.shape[3]
        folded = block.reshape(batch_size, key.shape[1], -1, head_channels)  # (B, G, R * S, D)
        context = F.scaled_dot_product_attention(folded, key[:, :, :keys], value[:, :, :keys], numbers, dropout)
        contexts.append(context.view(block.shape))
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=2)


def attend_showing(query, key, value, masks, dropout=0.0):
    """What attend() returns, and the probabilities (B, N, S, T) that it never holds. `masks` is from mask_numbers()."""
    batch_size, num_groups, num_keys, _ = key.shape
    shown = []
    for block, numbers in in_blocks(query, masks):
        folded = block.reshape(batch_size, num_groups, -1, block.shape[-1])  # (B, G, R * S, D)
        scores = folded @ key.transpose(2, 3) * block.shape[-1] ** -0.5
        if numbers is not None:  # rows of padding see nothing, and shall still have numbers
            numbers = F.pad(numbers, (0, num_keys - numbers.shape[3]), value=-torch.inf)
            scores = scores + numbers.clamp(min=torch.finfo(scores.dtype).min)
        probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        shown.append(probabilities.reshape(batch_size, query.shape[1], -1, num_keys))
    shown = torch.cat(shown, dim=2)
    folded = F.dropout(shown, dropout).reshape(batch_size, num_groups, -1, num_keys)
    return (folded @ value).reshape(query.shape), shown


class DecodeStep:
    """One token for each of the first rows of a cache, in a slot of the row's own, on a GPU; stands for a mask.

    `layers` are L of (2, rows, G, slots, D), the last slot that of rows which are not in use; `slots` (B,) are the
    tokens'. No row has more than `width` slots in use.
    """

    def __init__(self, layers, slots, width):
        self.layers, self.slots, self.width = layers, slots, width
        self.splits = num_splits(len(slots) * layers[0].shape[2], width, slots.device)
        self.elsewhere = {}  # of a model that is spread: {another device: the step of its layers}

    def to(self, device, **how):
        """The step of the layers on `device`."""
        if device == self.slots.device:
            return self
        if device not in self.elsewhere:
            self.elsewhere[device] = DecodeStep(self.layers, self.slots.to(device), self.width)
        return self.elsewhere[device]

    @staticmethod
    def runs(store, config):
        """True where the kernels do, for a model that lays all queries before all keys and values."""
        kernels = kernels_for(store)
        return config.multi_query_attention and None not in (kernels.rotate_into_cache, kernels.attend_step)

    def attend(self, mixed, cos, sin, layer_index):
        """The context (B, 1, N D) of queries, keys and values (B, 1, (N + 2 G) D); writes the two latter."""
        kernels, (keys, values) = kernels_for(mixed), self.layers[layer_index]
        mixed = mixed[:, 0].to(keys.dtype)
        query = kernels.rotate_into_cache(mixed, cos, sin, keys, values, self.slots)
        return kernels.attend_step(query, keys, values, self.slots, self.splits)[:, None]


class LongAttention(OwnGradient):
    """Causal attention of query (B, N, S, D), divided by √D, to key and value (B, G, T, D), the last query seeing all.

    For one row and group after the other, and for a block of queries q and the n keys k up to the last of them:

        p = softmax(q kᵀ + mask)      o = p v
        ds = p (dp - Σ p dp)  with  dp = do vᵀ      dq = ds k      dk = dsᵀ q      dv = pᵀ do

    Scores (at most LONG_BLOCK, n) exist for one block at a time and are computed again for backward, so nothing is kept
    but query, key and value. dv and dk are summed as their transposes, doᵀ p and qᵀ ds, which oneDNN multiplies three
    times as fast. torch's kernel does the same through MKL, which on an AMD EPYC with
    AVX-512 took 1.6 to 1.8 times as long.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        context = torch.empty_like(query)
        for queries, keys in LongAttention.blocks(query, key):
            probabilities = LongAttention.probabilities(query[queries], key[keys])
            context[queries] = multiply(probabilities, value[keys].t()).view_as(context[queries])
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (x.new_zeros(x.transpose(2, 3).shape) for x in (key, value))  # (B, G, D, T)
        for queries, keys in LongAttention.blocks(query, key):
            row, group, slots = keys
            probabilities = LongAttention.probabilities(query[queries], key[keys])
            block, grad_block = (x[queries].flatten(0, 1) for x in (query, gradient))  # (R * S, D)
            grad_value[row, group, :, slots] += multiply(grad_block.t(), probabilities.t())
            grad_probabilities = multiply(grad_block, value[keys])
            grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, gradient.dtype)
            grad_query[queries] = multiply(grad_scores, key[keys].t()).view_as(grad_query[queries])
            grad_key[row, group, :, slots] += multiply(block.t(), grad_scores.t())
        return grad_query, grad_key.transpose(2, 3), grad_value.transpose(2, 3)

    @staticmethod
    def blocks(query, key):
        """Indices of each block of queries, in (B, N, S, D), and of the keys that they see, in (B, G, T, D)."""
        repeats = query.shape[1] // key.shape[1]
        size = max(LONG_STEP, LONG_BLOCK // repeats)
        past = key.shape[2] - query.shape[2]
        for row, group in itertools.product(range(key.shape[0]), range(key.shape[1])):
            heads = slice(group * repeats, (group + 1) * repeats)
            for start in range(0, query.shape[2], size):
                stop = min(start + size, query.shape[2])
                yield (row, heads, slice(start, stop)), (row, group, slice(past + stop))

    @staticmethod
    def probabilities(query, key):
        """Of query (R, S, D) and the keys (n, D) up to that of the last query: (R * S, n)."""
        scores = multiply(query.flatten(0, 1), key)
        length = query.shape[1]
        hidden = torch.full((length, length), -torch.inf).triu(1)  # keys behind a query are among the last ones
        scores.unflatten(0, query.shape[:2])[..., -length:] += hidden
        return scores.softmax(-1)

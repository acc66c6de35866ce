"""Attention: every way of it gives the numbers of plain softmax in double precision."""

import itertools

import pytest
import torch
from support.pretended_gpu import causal_lower_right, plain_attention

from chatglm2 import attention
from chatglm2 import matmul as products
from chatglm2.attention import LongAttention, attend, make_mask

PAST = 5  # a prefix, or keys of earlier tokens

needs_onednn = pytest.mark.skipif(not products.ONEDNN, reason="this processor has no AVX, where torch's kernel stays")


def heads(*, rows=2, queries=70, past=PAST, groups=2, repeats=3, channels=16, seed=0):
    """Query (rows, groups * repeats, queries, channels), key and value (rows, groups, past + queries, channels)."""
    torch.manual_seed(seed)
    query = torch.randn(rows, groups * repeats, queries, channels, requires_grad=True)
    keys = (torch.randn(rows, groups, past + queries, channels, requires_grad=True) for _ in range(2))
    return query, *keys


def plain(query, key, value):
    """Causal attention, the last query seeing all keys, in double precision."""
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return plain_attention(query.double(), key.double(), value.double(), mask, enable_gqa=True)


def mask_for(query, key, padding_mask=None, dropout=0.0):
    queries, keys, repeats = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    return make_mask(queries, keys, keys - queries, padding_mask, repeats, dropout, query.dtype, query.device)


def context_and_gradients(attended, tensors):
    context = attended(*tensors)
    torch.manual_seed(1)
    weights = torch.randn(context.transpose(1, 2).shape, dtype=torch.float64).to(context.dtype).transpose(1, 2)
    return context, *torch.autograd.grad(context, tensors, weights)


def assert_plain(tensors, monkeypatch, *, long):
    """attend() of the tensors and its gradients are those of plain(), through LongAttention if `long`."""
    taken = []
    function = LongAttention.apply
    monkeypatch.setattr(LongAttention, "apply", lambda *tensors: taken.append(1) or function(*tensors))
    mask = mask_for(*tensors[:2])
    given = context_and_gradients(lambda *tensors: attend(*tensors, mask), tensors)
    for ours, wanted in zip(given, context_and_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(ours, wanted.float(), rtol=1e-5, atol=1e-5)
    assert bool(taken) is long


@needs_onednn
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"queries": 64},  # nothing to fill up
        {"queries": 200},  # several blocks, the last one shorter
        {"past": 0},
        {"rows": 1, "groups": 1, "repeats": 1},
        {"repeats": 16, "channels": 8},
    ],
    ids=str,
)
def test_long_rows_have_the_numbers_and_the_gradients_of_plain_attention(sizes, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 32)
    monkeypatch.setattr(attention, "LONG_BLOCK", 192)  # 64 queries of 3 heads
    assert_plain(heads(**sizes), monkeypatch, long=True)


@pytest.mark.parametrize("queries", [1, 7, 32, 70])
def test_other_rows_have_the_numbers_and_the_gradients_of_plain_attention(queries, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 32)
    monkeypatch.setattr(products, "ONEDNN", False)
    assert_plain(heads(queries=queries), monkeypatch, long=False)


@needs_onednn
def test_keys_and_values_may_lie_anywhere_in_memory(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 32)
    query, key, value = heads()
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (query, key, value)]
    wide = [
        torch.cat((x.detach(), x.detach()), dim=2)[:, :, : x.shape[2]].requires_grad_() for x in (query, key, value)
    ]
    assert_plain(strided, monkeypatch, long=True)
    assert_plain(wide, monkeypatch, long=True)


@needs_onednn
def test_nothing_but_query_key_and_value_is_kept_for_backward(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 32)
    tensors, kept = heads(queries=64), []
    mask = mask_for(*tensors[:2])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        attend(*tensors, mask)
    assert set(kept) == {x.shape for x in tensors}


@pytest.mark.parametrize("case", ["short", "left padding", "dropout", "half precision", "a cache with room"])
def test_what_long_attention_cannot_do_goes_to_torch(case):
    query, key, _ = heads(queries=257 if case != "short" else 256)
    if case == "half precision":
        query = query.bfloat16()
    padding = torch.ones(2, key.shape[2], dtype=torch.bool) if case == "left padding" else None
    if case == "a cache with room":  # behind the slots in use
        key = torch.cat((key, key), dim=2)
        mask = make_mask(257, key.shape[2], PAST, None, 3, 0.0, query.dtype, query.device)
    else:
        mask = mask_for(query, key, padding, dropout=0.1 if case == "dropout" else 0.0)
    assert isinstance(mask, list)


@needs_onednn
def test_a_row_longer_than_a_block_takes_long_attention():
    query, key, _ = heads(queries=257)
    assert not isinstance(mask_for(query, key), list)


@pytest.mark.parametrize("past", [0, PAST])
@pytest.mark.parametrize("room", [0, 3])
def test_every_query_sees_a_key_and_no_real_one_sees_padding(past, room, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    padding = torch.ones(2, past + 7, dtype=torch.bool)
    padding[0, past : past + 5] = False  # left padding behind a prefix that all rows have
    masks = make_mask(7, past + 7 + room, past, padding, 1, 0.0, torch.float32, torch.device("cpu"))
    for start, mask in zip((0, 4), masks, strict=True):
        for row, query in itertools.product(range(2), range(mask.shape[2])):
            slot = past + start + query
            seen = set((mask[row, 0, query] == 0).nonzero()[:, 0].tolist())
            real = {key for key in range(slot + 1) if padding[row, key]}
            assert seen == (real or {slot})

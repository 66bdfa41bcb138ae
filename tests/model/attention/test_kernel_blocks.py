"""Blocks cover each document's queries and the keys they see; rounded blocks have few shapes and the same results."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sft.model.attention import kernel as document_kernel
from sft.model.attention.kernel import attend
from sft.model.attention.kernel_blocks import Span, caches_kernels_by_shape, cut_blocks

OFFSETS = [0, 1, 128, 257, 1500]


def attended(row: list[Tensor], offsets: list[int], **options: Any) -> list[Tensor]:
    """The output and all gradients of attention over `row`, whose last tensor is the gradient of the output."""
    *inputs, upstream = row
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    query, key, value = leaves[:3]
    sinks = leaves[3] if len(leaves) > 3 else None
    torch.manual_seed(5)
    out = attend(query, key, value, torch.tensor(offsets), 0.3, sinks=sinks, **options)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def heads(tokens: int, dtype: torch.dtype, with_sinks: bool = False) -> list[Tensor]:
    """Query, key and value with 4 heads over 2, perhaps sinks, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(tokens, h, d, generator=generator).to(dtype).transpose(0, 1) for h, d in ((4, 8), (2, 8), (2, 6))
    ]
    sinks = [torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype)] if with_sinks else []
    return [*made, *sinks, torch.randn(tokens, 4, 6, generator=generator).to(dtype)]


def rounding(monkeypatch: pytest.MonkeyPatch, is_on: bool) -> None:
    monkeypatch.setattr(document_kernel, "caches_kernels_by_shape", lambda _: is_on)


# Blocks


@pytest.mark.parametrize("window", [None, 1, 7, 300])
def test_a_block_holds_at_most_128_queries_of_one_document_and_the_keys_they_see(window: int | None) -> None:
    covered: list[int] = []
    for (begin, end), spans in zip(pairwise(OFFSETS), cut_blocks(OFFSETS, window, rounded=False), strict=True):
        for span in spans:
            assert begin <= span.start <= span.first < span.stop <= end == span.end
            assert span.query_count == span.token_count <= 128
            assert span.start == max(begin, span.first - (window or end) + 1)
            covered += range(span.first, span.stop)
    assert covered == list(range(1500))


@pytest.mark.parametrize("window", [None, 1, 7, 300])
def test_rounded_blocks_cover_the_same_tokens_in_multiples_of_32(window: int | None) -> None:
    covered: list[int] = []
    for (begin, end), spans in zip(pairwise(OFFSETS), cut_blocks(OFFSETS, window, rounded=True), strict=True):
        for span in spans:
            assert begin <= span.start <= max(begin, span.first - (window or end) + 1)  # no key is left out
            assert span.first < end == span.end  # no block is without a token
            assert span.query_count % 32 == (span.stop - span.start) % 32 == 0
            assert span.query_count <= 128
            covered += range(*span.tokens.indices(1500))
        assert spans[-1].stop - end < max(32, (end - begin) / 8)
    assert covered == list(range(1500))


@pytest.mark.parametrize(("longest", "shapes"), [(512, 16), (2048, 48), (8192, 96)])
def test_documents_of_any_length_share_few_shapes(longest: int, shapes: int) -> None:
    found = {
        (span.query_count, span.stop - span.start)
        for length in range(1, longest + 1)
        for spans in cut_blocks([0, length], None, rounded=True)
        for span in spans
    }
    assert len(found) == shapes


def test_only_half_precision_on_a_cpu_is_rounded() -> None:
    assert caches_kernels_by_shape(torch.empty(1, dtype=torch.bfloat16))
    assert caches_kernels_by_shape(torch.empty(1, dtype=torch.float16))
    assert not caches_kernels_by_shape(torch.empty(1, dtype=torch.float32))
    assert not caches_kernels_by_shape(torch.empty(1, dtype=torch.bfloat16, device="meta"))


def test_tokens_of_other_documents_are_replaced_by_zeros() -> None:
    row = torch.arange(1.0, 11.0)[None, :, None]
    span = Span(start=2, first=4, stop=8, end=7, contiguous=True)
    assert span.keys_of(row).flatten().tolist() == [3, 4, 5, 6, 7, 0]
    assert span.queries_of(row).flatten().tolist() == [5, 6, 7, 0]
    assert (span.query_count, span.token_count, span.tokens) == (4, 3, slice(4, 7))


# Results


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"window": 1}, {"window": 33}, {"softcap": 1.5}, {"softcap": 1.5, "window": 50}]
)
def test_rounding_changes_neither_outputs_nor_gradients(
    options: dict[str, Any], with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets = [0, 3, 4, 200, 231, 520]
    row = heads(offsets[-1], torch.float64, with_sinks)
    rounding(monkeypatch, is_on=False)
    expected = attended(row, offsets, **options)
    rounding(monkeypatch, is_on=True)
    found = attended(row, offsets, **options)
    assert len(found) == len(expected) == 4 + with_sinks
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()  # the sinks' gradients and sums over blocks are in float32


def test_dropout_is_the_same_in_forward_and_backward_of_rounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rounding(monkeypatch, is_on=True)

    def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(query, key, value, torch.tensor([0, 4, 20]), 0.3, dropout=0.3)

    assert torch.autograd.gradcheck(repeated, [t.clone().requires_grad_() for t in heads(20, torch.float64)[:3]])


@pytest.mark.parametrize("length", [1, 31, 33, 150, 300])
def test_in_bfloat16_a_document_is_the_same_to_the_bit_beside_any_other(length: int) -> None:
    offsets = [0, 37, 37 + length, 110 + length]
    row = heads(offsets[-1], torch.bfloat16)
    own = slice(37, 37 + length)
    alone = [*(t[:, own] for t in row[:3]), row[3][own]]
    expected = attended(alone, [0, length])
    for tensor in row[:3]:
        tensor[:, :37] = tensor[:, own.stop :] = torch.nan
    out, *gradients = attended(row, offsets)
    assert torch.equal(out[own], expected[0])
    for found, other in zip(gradients, expected[1:], strict=True):
        assert torch.equal(found[:, own], other)


# Shapes


def multiplications(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """Shapes and layouts of the matrix multiplications for 200 documents of random lengths up to 512."""
    found, multiply = set(), torch.bmm

    def record(a: Tensor, b: Tensor) -> Tensor:
        for tensor in (a, b):
            if dtype == torch.bfloat16:
                assert tensor.is_contiguous() or tensor.transpose(1, 2).is_contiguous()
        found.add((a.shape, b.shape, a.is_contiguous(), b.is_contiguous()))
        return multiply(a, b)

    lengths = random.Random(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", record)
        for _ in range(10):
            offsets = [0]
            for _ in range(20):
                offsets.append(offsets[-1] + lengths.randint(1, 512))
            attended(heads(offsets[-1], dtype), offsets)
    return found


def test_in_bfloat16_all_documents_together_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(multiplications(torch.bfloat16, monkeypatch)) <= 16 * 6  # blocks, times kinds of multiplication
    assert len(multiplications(torch.float32, monkeypatch)) > 500

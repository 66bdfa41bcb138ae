"""Flat arrays of documents: selected in any order, joined, and written to disk as they are made."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.documents import Documents, DocumentStore


def made_of(*texts: list[int]) -> Documents:
    """Makes documents whose even tokens are supervised."""
    ids = np.array([t for text in texts for t in text], dtype=np.int32)
    labels = np.where(ids % 2 == 0, ids, -100).astype(np.int32)
    return Documents(ids, labels, np.array([len(t) for t in texts], dtype=np.int64), np.arange(len(texts)))


def as_lists(documents: Documents) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in documents]


def test_take_follows_the_given_order_and_repeats():
    taken = made_of([1, 2], [3], [4, 5, 6]).take(np.array([2, 0, 2]))
    assert taken.input_ids.tolist() == [4, 5, 6, 1, 2, 4, 5, 6]
    assert taken.labels.tolist() == [4, -100, 6, -100, 2, 4, -100, 6]
    assert (taken.lengths.tolist(), taken.rows.tolist()) == ([3, 2, 3], [2, 0, 2])
    assert taken.starts.tolist() == [0, 3, 5]
    assert taken.count_supervised().tolist() == [2, 1, 2]


@given(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=8), st.data())
@settings(max_examples=100, deadline=None)
def test_taking_is_indexing(texts, data):
    documents = made_of(*texts)
    order = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=9)) if texts else []
    assert as_lists(documents.take(np.array(order, dtype=np.int64))) == [as_lists(documents)[i] for i in order]
    assert documents.count_supervised().tolist() == [sum(t % 2 == 0 for t in text) for text in texts]


def test_the_store_returns_documents_in_order(tmp_path):
    store = DocumentStore(tmp_path / "new")
    parts = [made_of([1, 2], [3]), Documents.empty(), made_of([4, 5, 6])]
    for part in parts:
        store.add(part)
    assert store.count == 3
    found = store.read()
    assert as_lists(found) == as_lists(Documents.join(parts))
    assert found.rows.tolist() == [0, 1, 0]
    assert isinstance(found.input_ids, np.memmap)  # on disk, not in memory


def test_an_empty_store_returns_no_documents(tmp_path):
    assert as_lists(DocumentStore(tmp_path).read()) == as_lists(Documents.join([])) == []

"""The contestants of the data benchmark, each in its own process: `python -m benchmarks._data_contestants NAME ...`.

A contestant first imports and loads what it needs; its clock covers the work only. It reports

    seconds        of the work
    cpu_s          processor time of the work, finished child processes included: far below seconds x cores means that
                   the work waited, or that something else ran on the machine
    tokens         tokens prepared, without padding
    packed_rows    sequences of at most `MAX_LENGTH` tokens that hold them
    ready_s        from the start of the process to the start of the work
    ready_mib      memory at the start of the work
    own_peak_mib   peak memory of this process
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks._inputs import (
    build_tokenizer,
    log_normal_lengths,
    name_source,
    read_questions,
    write_chats,
    write_rendered,
)
from benchmarks._measure import age_of_this_process, peak_of_this_process, run_as_worker

MAX_LENGTH = 2048
MEAN_LENGTH = 196
BATCH = 1000  # texts per call of the bare tokenizer, and rows that TRL packs at a time


class Clock:
    """Sums the time of its `with` blocks; everything before the first is preparation."""

    def __init__(self) -> None:
        self.report: dict[str, float] = {"seconds": 0.0, "cpu_s": 0.0}

    def __enter__(self) -> Clock:
        self.report.setdefault("ready_mib", peak_of_this_process())
        self.report.setdefault("ready_s", age_of_this_process())
        self._started, self._cpu_started = time.perf_counter(), _cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.report["seconds"] += time.perf_counter() - self._started
        self.report["cpu_s"] += _cpu_seconds() - self._cpu_started
        self.report["done_s"] = age_of_this_process()


def _cpu_seconds() -> float:
    return sum(os.times()[:4])  # user and system time, of this process and of its finished children


def _rows_and_tokens(dataset: Any) -> dict[str, Any]:
    import pyarrow.compute as pc

    lengths = pc.list_value_length(dataset.data["input_ids"])  # reads the offsets of the rows, not the tokens
    return {"packed_rows": len(dataset), "tokens": pc.sum(lengths).as_py()}


def inputs(arguments: dict[str, Any]) -> dict[str, Any]:
    """Makes the tokenizer (unless one is given), and a file of chats for each requested number of rows."""
    work = Path(arguments["work"])
    source = Path(arguments["source"])
    questions = read_questions(source)
    tokenizer = arguments["tokenizer"]
    if tokenizer is None:
        tokenizer = str(work / "tokenizer")
        build_tokenizer(Path(tokenizer), source, questions)
    for rows in arguments["files"]:
        write_chats(work / f"{rows}.jsonl", questions, rows)
    if rows := arguments["compared"]:
        from transformers import AutoTokenizer

        write_rendered(work / "rendered.jsonl", work / f"{rows}.jsonl", AutoTokenizer.from_pretrained(tokenizer))
        write_chats(work / "distinct.jsonl", questions, rows, distinct=True)
    return {"tokenizer": tokenizer, "data": name_source(source)}


def ours(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs `data_handler.prepare_data`: from the file to packed sequences mapped from disk."""
    import data_handler
    from sft.config.schema import DataKeys
    from sft.model.fast_tokenizer import load_tokenizer_files

    tokenizer = load_tokenizer_files(arguments["tokenizer"])  # as every command does
    cache = arguments.get("cache") or f"{arguments['scratch']}/cache"
    keys = DataKeys(train_file=arguments["file"], packing="bfd", max_seq_length=MAX_LENGTH, cache_dir=cache)
    with Clock() as clock:
        prepared = data_handler.prepare_data(keys, tokenizer, seed=0)
    found = _rows_and_tokens(prepared.train)
    total = prepared.ledger["total"]
    if total["tokens"]["total"] != found["tokens"]:
        raise RuntimeError(f"the ledger counts {total['tokens']['total']} tokens, the rows hold {found['tokens']}")
    return {**clock.report, **found, "from_cache": prepared.from_cache, "rows_lost": sum(total["rows_lost"].values())}


def trl(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs TRL's SFTTrainer with its defaults: it loads the file, and its constructor calls `_prepare_dataset`."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(arguments["tokenizer"])
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH}
    model = LlamaForCausalLM(LlamaConfig(**size))
    clock = Clock()

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            with clock:
                return super()._prepare_dataset(*args, **kwargs)

    settings = SFTConfig(
        output_dir=f"{arguments['scratch']}/output",
        packing=True,
        packing_strategy="bfd",
        max_length=MAX_LENGTH,
        dataset_num_proc=arguments["processes"],
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    cache = f"{arguments['scratch']}/loaded"
    with clock:
        dataset = datasets.load_dataset("json", data_files=arguments["file"], split="train", cache_dir=cache)
    trainer = Timed(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    return {**clock.report, **_rows_and_tokens(trainer.train_dataset)}


def bare(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs only the Rust tokenizer, on rendered texts; the encodings are dropped batch by batch."""
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(arguments["tokenizer"]).backend_tokenizer
    with open(arguments["rendered"], encoding="utf-8") as lines:
        texts = [json.loads(line) for line in lines]
    tokens = 0
    with Clock() as clock:
        for batch in (texts[at : at + BATCH] for at in range(0, len(texts), BATCH)):
            tokens += sum(map(len, backend.encode_batch_fast(batch, add_special_tokens=False)))
    return {**clock.report, "tokens": tokens}


def our_packing(arguments: dict[str, Any]) -> dict[str, Any]:
    """Packs documents, given by their lengths, into sequences."""
    import numpy as np

    from sft.data.preparation.packing import best_fit_decreasing

    lengths = log_normal_lengths(arguments["lengths"], MEAN_LENGTH, MAX_LENGTH)
    with Clock() as clock:
        bins = best_fit_decreasing(lengths, MAX_LENGTH)
    members = np.concatenate(bins)
    held = np.add.reduceat(lengths[members], np.cumsum([0, *map(len, bins[:-1])]))
    if not np.array_equal(np.sort(members), np.arange(len(lengths))) or held.max() > MAX_LENGTH:
        raise RuntimeError("a document was lost, packed twice, or put into a sequence that is too full for it")
    return {**clock.report, "packed_rows": len(bins), "tokens": int(held.sum())}


def trl_packing(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs TRL's `pack_dataset` on documents of the same lengths, whose tokens are one byte each."""
    import datasets
    import numpy as np
    import pyarrow as pa
    from trl import pack_dataset

    lengths = log_normal_lengths(arguments["lengths"], MEAN_LENGTH, MAX_LENGTH)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
    documents = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(lengths.sum(), dtype=np.int8)))
    dataset = datasets.Dataset(pa.table({"input_ids": documents}))
    with Clock() as clock:
        packed = pack_dataset(dataset, MAX_LENGTH, "bfd")
    return {**clock.report, **_rows_and_tokens(packed)}


if __name__ == "__main__":
    run_as_worker({worker.__name__: worker for worker in (inputs, ours, trl, bare, our_packing, trl_packing)})

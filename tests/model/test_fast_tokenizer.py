"""Tokenizers that are loaded without AutoTokenizer are the same as those that it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sft.model.fast_tokenizer import KNOWN_CLASSES, load_tokenizer_files
from tests.builders import byte_level_tokenizer
from tests.runs import ROOT

CASES = [(name, kind) for name, (_, kinds) in KNOWN_CLASSES.items() for kind in (*sorted(kinds), None)]


def save(folder: Path, tokenizer_class: str, model_type: str | None) -> str:
    byte_level_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": tokenizer_class}))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "dtype": "bfloat16"}))
    return str(folder)


@pytest.mark.parametrize(("tokenizer_class", "model_type"), CASES)
def test_the_same_class_with_the_same_content(tmp_path: Path, tokenizer_class: str, model_type: str | None) -> None:
    folder = save(tmp_path, tokenizer_class, model_type)
    expected, found = AutoTokenizer.from_pretrained(folder), load_tokenizer_files(folder)
    assert type(found) is type(expected)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert found.special_tokens_map == expected.special_tokens_map
    assert found.chat_template == expected.chat_template
    assert found.init_kwargs == expected.init_kwargs


def test_a_class_that_is_not_known_is_loaded_by_auto_tokenizer(tmp_path: Path) -> None:
    folder = save(tmp_path, "PreTrainedTokenizerFast", "qwen2")  # AutoTokenizer ignores the class in the file
    assert type(load_tokenizer_files(folder)).__name__ == "Qwen2Tokenizer"


def test_neither_torch_nor_datasets_is_imported_to_prepare_data(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "import data_handler\n"
        "from sft.data.preparation.cache import make_once\n"
        "from sft.config.schema import DataKeys\n"
        "from sft.model.fast_tokenizer import load_tokenizer_files\n"
        "tokenizer = load_tokenizer_files(sys.argv[1])\n"
        "keys = DataKeys(train_file=sys.argv[2], packing='bfd', cache_dir=sys.argv[3])\n"
        "data_handler.read_rows = lambda file: file.is_file()\n"  # what follows the preparation maps its files
        "assert data_handler.prepare_data(keys, tokenizer, seed=0).train\n"
        "print(sorted({'torch', 'datasets', 'peft'} & set(sys.modules)))"
    )
    folder = save(tmp_path / "tokenizer", "PreTrainedTokenizerFast", "llama")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "Hi", "answer": "Yes"}\n')
    command = [sys.executable, "-c", code, folder, str(file), str(tmp_path / "cache")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"

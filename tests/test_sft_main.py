"""The entry: verbs, exit codes, and quick answers without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sft_main
from tests.runs import ROOT


def test_one_of_several_processes_prints_that_they_were_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft_main, "run_verb", pressed)
    for rank, said in (("0", "stopped\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert sft_main.main([]) == 130
        assert capsys.readouterr().err == said


def test_unreadable_yaml_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("train_file: a.jsonl\nlora_config: {r: 8\n")
    assert sft_main.main(["--config_file", str(broken)]) == 2
    assert "broken.yaml:" in capsys.readouterr().err


def test_no_config_file_is_a_mistake_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert sft_main.main([]) == 2
    assert "--config_file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["--config_file", "gone.yaml"]])
def test_quick_answers_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, sft_main\n"
        "try: sft_main.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert sft_main.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["learning_rate"]["default"] == 5e-5
    assert "lora_config" in schema["properties"]


@pytest.mark.parametrize("verb", ["train", "check", "preview", "estimate"])
def test_torch_is_imported_only_after_the_data_was_read(verb: str) -> None:
    code = f"import sys, commands.{verb}; print(sorted({{'torch', 'datasets', 'peft'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr

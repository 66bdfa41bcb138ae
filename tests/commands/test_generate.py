"""`generate`: prompts from files, chat, models that bring their own code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sft_main
from sft.inference import generate as replies
from sft.inference.generate import encode_prompt
from tests.runs import ROOT, write_rows


def test_a_training_file_is_prompted_with_the_tokens_that_were_trained(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Who is he?", "context": "Bob is a cat.", "response": "Bob"},
        {"instruction": "And now?", "history": [["Hi", "Hello"]], "output": "Now"},
        {"question": "Who?", "context": "Bob is a cat.", "answer": "Bob"},
        {"conversations": [{"from": "human", "value": "g"}, {"from": "gpt", "value": "h"}]},
    ]
    file = write_rows(tmp_path / "mixed.jsonl", rows)
    keys = [f"train_file={file}", "validation_split=0", "system_prompt=Be brief.", "train_on=last_assistant"]
    command = ["--config_file", str(config_file), *keys]
    assert sft_main.main([*command, "--save_steps=4"]) == 0
    capsys.readouterr()
    assert sft_main.main(["preview", *command, "--num_samples=4", "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    trained = [s["input_ids"][: next(i for i, label in enumerate(s["labels"]) if label >= 0)] for s in samples]
    assert all("Be brief." in sample["rendered"] for sample in samples)

    asked: list[list[int]] = []

    def overheard(*arguments: Any) -> list[int]:
        asked.append(encode_prompt(*arguments))
        return asked[-1]

    monkeypatch.setattr(replies, "encode_prompt", overheard)
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert sft_main.main(["merge", "--model", str(out), "--output_dir", str(merged)]) == 0
    for folder in (out, out / "checkpoint-4", merged):
        asked.clear()
        generate = ["generate", "--model", str(folder), "--prompts", str(file), "--max_new_tokens=1"]
        assert sft_main.main(generate) == 0
        assert asked == trained
    assert sft_main.main([*generate, "--system", ""]) == 0
    assert len(asked[-1]) < len(trained[-1])


def test_a_model_with_its_own_code_generates_and_merges_only_if_trusted(
    config_file: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    own = tmp_path / "own"
    shutil.copytree(model_dir, own)
    (own / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((own / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (own / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    out, merged, prompts = tmp_path / "out", tmp_path / "merged", tmp_path / "p.txt"
    prompts.write_text("x\n")
    train = ["--config_file", str(config_file), f"model_name_or_path={own}"]
    merge = ["merge", "--model", str(out), "--output_dir", str(merged)]
    assert sft_main.main(train) == 2
    for command in (
        [*train, "--trust_remote_code=true"],
        ["generate", "--model", str(out), "--prompts", str(prompts), "--max_new_tokens=1"],
        merge,
        ["generate", "--model", str(merged), "--prompts", str(prompts), "--max_new_tokens=1"],
    ):
        if command[0] in ("generate", "merge"):
            assert sft_main.main(command) == 2
            command.append("--trust_remote_code")
        assert sft_main.main(command) == 0


def test_generate_answers_a_file(config_file: Path, tmp_path: Path) -> None:
    sft_main.main(["--config_file", str(config_file)])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 1 and 7?\nWhat is 2 and 14?\n")
    answers = tmp_path / "answers.jsonl"
    arguments = ["generate", "--model", str(tmp_path / "out"), "--prompts", str(prompts), "--output", str(answers)]
    assert sft_main.main([*arguments, "--max_new_tokens", "5"]) == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["What is 1 and 7?", "What is 2 and 14?"]
    assert all(isinstance(row["response"], str) for row in rows)


@pytest.mark.slow
def test_chat_reads_from_a_pipe_and_ends_with_its_input(config_file: Path, tmp_path: Path) -> None:
    sft_main.main(["--config_file", str(config_file)])
    command = [sys.executable, "sft_main.py", "generate", "--model", str(tmp_path / "out"), "--chat"]
    done = subprocess.run(
        [*command, "--max_new_tokens", "4"], cwd=ROOT, input="Hello\n/quit\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

"""What a run writes down; the numbers of its logs are compared in test_gsm8k.py, its resumes in test_equivalence.py."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import sft_main
from sft.checkpoint.discovery import find_damage
from tests.builders import byte_level_tokenizer, tiny_llama
from tests.runs import arithmetic, run, write_config, write_rows

SLOW_DISK = """
import os, sys, time
import distributed_utils, sft_main
import transformers.trainer as upstream

rank = os.environ["RANK"]
write, rotate = upstream.Trainer._save_rng_state, upstream.rotate_checkpoints

def slow_write(self, folder):
    time.sleep(1.5 * (rank == "1"))
    write(self, folder)

def tell(output_dir, **options):
    newest = max(entry for entry in os.listdir(output_dir) if entry.startswith("checkpoint-"))
    print("ROTATES", newest, sorted(f for f in os.listdir(f"{output_dir}/{newest}") if f.startswith("rng")), flush=True)
    rotate(output_dir=output_dir, **options)

upstream.Trainer._save_rng_state, upstream.rotate_checkpoints = slow_write, tell
distributed_utils.end_process(sft_main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_no_checkpoint_is_deleted_before_all_ranks_have_written_the_next(model_dir: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        train_file=str(write_rows(tmp_path / "train.jsonl", arithmetic(16))),
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        save_steps=1,
        save_total_limit=1,
    )
    script = tmp_path / "slow_disk.py"
    script.write_text(SLOW_DISK)
    done = run("--config_file", config, processes=2, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("ROTATES")]
    both = "['rng_state_0.pth', 'rng_state_1.pth']"
    assert told == [f"ROTATES checkpoint-1 {both}", f"ROTATES checkpoint-2 {both}"]
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert find_damage(tmp_path / "out" / "checkpoint-2") is None
    (tmp_path / "out" / "checkpoint-2" / "rng_state_1.pth").unlink()
    assert find_damage(tmp_path / "out" / "checkpoint-2") == "rng_state_1.pth is missing"


def test_tied_weights_are_not_missed_in_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two names stands in the file; upstream warns of the other at each resume."""
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    config = write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(tmp_path / "tied"),
        dtype="float32",
        train_file=str(write_rows(tmp_path / "train.jsonl", arithmetic(16))),
        output_dir=str(tmp_path / "out"),
        save_steps=1,
    )
    assert sft_main.main(["--config_file", str(config), "max_steps=1"]) == 0
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    assert sft_main.main(["--config_file", str(config), "max_steps=2", "--resume_from_checkpoint", "auto"]) == 0
    assert "missing keys" not in caplog.text

"""The contestants of the training benchmarks, each in its own process (`python -m benchmarks._train_contestants ...`).

All get the same model folder, the same chats, AdamW, clipping at 1, and as many tokens per optimizer step as their
batching allows. Each reports

    seconds, tokens   of the steps after the first `warm_up` ones; tokens are counted in the batches, without padding
    steps             the number of these steps
    loss              of the last log
    wall_s            from the start of the process to its end (`run_worker` adds it where a contestant does not)
    own_peak_mib      peak memory of the process
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import _bare_loop
from benchmarks._bare_loop import LEARNING_RATE
from benchmarks._measure import ROOT, run_as_worker
from benchmarks._training_inputs import inputs, model_on_device

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


def ours(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs the command with its defaults, as a user does; `settings` adds keys to the config."""
    scratch = Path(arguments["scratch"])
    config = {
        "model_name_or_path": arguments["model"],
        "train_file": arguments["chats"],
        "output_dir": str(scratch / "run"),
        "cache_dir": str(scratch / "cache"),
        "max_seq_length": arguments["max_length"],
        "truncation": "right",  # as the others do
        "per_device_train_batch_size": arguments["packed_rows"],
        "gradient_accumulation_steps": arguments["micro_batches"],
        "max_steps": arguments["steps"],
        "learning_rate": LEARNING_RATE,
        "logging_steps": arguments["warm_up"],
        **({} if arguments["save"] else {"save_strategy": "no"}),
        **({"lora_config": {}} if arguments["lora"] else {}),
        **({"quantization_config": {"load_in_4bit": True}} if arguments["quantized"] else {}),
        **arguments["settings"],
    }
    file = scratch / "config.json"  # JSON is YAML
    file.write_text(json.dumps(config))
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "sft_main.py"), "--config_file", str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wall = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"the command ended with {done.returncode}:\n{done.stdout[-3000:]}")
    lines = [json.loads(line) for line in (scratch / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    logs = [line for line in lines if "loss" in line]
    first, last = logs[0], logs[-1]
    return {
        "seconds": last["time"] - first["time"],
        "tokens": last["num_tokens"] - first["num_tokens"],
        "steps": last["step"] - first["step"],
        "loss": last["loss"],
        "wall_s": wall,
        **({"device_peak_mib": last["memory_gb"] * 1024} if arguments["device"] == "cuda" else {}),
        "child_peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def real_tokens(batch: dict[str, Any]) -> Any:
    """Counts the tokens of a collated batch without padding, on its device, so no step waits for the number.

    A batch without a mask has no padding.
    """
    mask = batch.get("attention_mask")
    return mask.sum() if mask is not None and mask.dim() == 2 else batch["input_ids"].numel()


def add_clock(trainer_class: Any, warm_up: int) -> tuple[Any, dict[str, Any]]:
    """Returns a subclass of the Trainer that counts its tokens and times its steps, and the report that it fills."""
    from transformers import TrainerCallback

    report: dict[str, Any] = {"tokens": 0, "steps": 0, "seconds": 0.0}
    begun: dict[str, float] = {}

    class Clocked(trainer_class):  # type: ignore[misc]
        clock: type

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if begun:
                report["tokens"] = report["tokens"] + real_tokens(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (warm_up, state.max_steps):
                _bare_loop.synchronize(args.device)
            if state.global_step == warm_up:
                begun["at"] = time.perf_counter()
            elif begun:
                report["seconds"] = time.perf_counter() - begun["at"]
                report["steps"] = state.global_step - warm_up
            if state.global_step == state.max_steps:
                report["tokens"] = int(report["tokens"])

    Clocked.clock = Clock
    return Clocked, report


def adapter(arguments: dict[str, Any]) -> Any:
    """Returns the adapter's config, the same for all; None for full training."""
    if not arguments["lora"]:
        return None
    from peft import LoraConfig

    return LoraConfig(**LORA, task_type="CAUSAL_LM")


def quantization(arguments: dict[str, Any]) -> Any:
    """Returns the config of QLoRA's 4 bits (arXiv:2305.14314), or None."""
    if not arguments["quantized"]:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=arguments["dtype"],
    )


def with_device_peak(report: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Adds the peak memory of tensors on a GPU."""
    if arguments["device"] == "cuda":
        import torch

        report["device_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return report


def trainer_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that Trainer and TRL share; batches of at most 8 rows, their default."""
    rows = max(1, round(arguments["step_tokens"] / arguments["mean_length"]))
    micro = min(rows, arguments["micro_rows"])
    return {
        "output_dir": f"{arguments['scratch']}/run",
        "max_steps": arguments["steps"],
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(1, round(rows / micro)),
        "learning_rate": LEARNING_RATE,
        "logging_steps": arguments["warm_up"],
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "use_cpu": arguments["device"] == "cpu",
        **({} if arguments["save"] else {"save_strategy": "no"}),
    }


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs `transformers.Trainer` as its manual shows: rows tokenized by `map`, batches padded to their longest row."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer: Any = AutoTokenizer.from_pretrained(arguments["model"])
    max_length = arguments["max_length"]

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        options = {"tokenize": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **options)[:max_length]
        return {"input_ids": ids, "labels": ([-100] * len(prompt) + ids[len(prompt) :])[:max_length]}

    rows = load_dataset("json", data_files=arguments["pairs"], split="train")
    rows = rows.map(encode, remove_columns=rows.column_names)
    model: Any = AutoModelForCausalLM.from_pretrained(
        arguments["model"], dtype=getattr(torch, arguments["dtype"]), quantization_config=quantization(arguments)
    )
    if arguments["cut_cross_entropy"]:
        from cut_cross_entropy.transformers import cce_patch

        model = cce_patch(model)
    if arguments["lora"]:
        from peft import get_peft_model, prepare_model_for_kbit_training

        if arguments["quantized"]:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, adapter(arguments))
    trainer_class, report = add_clock(Trainer, arguments["warm_up"])
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**{**trainer_settings(arguments), **arguments["settings"]}),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[trainer_class.clock],
    )
    return finish(trainer, arguments, report)


def trl(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs TRL's SFTTrainer on a model's name, as its manual shows it; `settings` are passed to SFTConfig.

    A micro-batch is one packed sequence, which keeps the dense attention mask as small as possible.
    """
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = {**trainer_settings(arguments), "max_length": arguments["max_length"], **arguments["settings"]}
    if settings.get("packing"):
        micro_batches = max(1, round(arguments["step_tokens"] / settings["max_length"]))
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": micro_batches}
    trainer_class, report = add_clock(SFTTrainer, arguments["warm_up"])
    trainer = trainer_class(
        model=arguments["model"],
        args=SFTConfig(**settings),
        train_dataset=load_dataset("json", data_files=arguments["pairs"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(arguments["model"]),
        peft_config=adapter(arguments),
        quantization_config=quantization(arguments),
        callbacks=[trainer_class.clock],
    )
    return finish(trainer, arguments, report)


def finish(trainer: Any, arguments: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Trains, and saves the final model where the whole run is measured, as the command does."""
    trainer.train()
    report["loss"] = float([log["loss"] for log in trainer.state.log_history if "loss" in log][-1])
    if arguments["save"]:
        trainer.save_model()
    return with_device_peak(report, arguments)


def bare(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs the hand-written loop."""
    return with_device_peak(_bare_loop.train(arguments, adapter(arguments)), arguments)


if __name__ == "__main__":
    run_as_worker({worker.__name__: worker for worker in (inputs, model_on_device, ours, plain, trl, bare)})

"""A hand-written training loop with this pipeline's attention, loss, packed sequences and optimizer, and nothing else.

The difference between the command and this loop is the cost of Trainer, callbacks, logs and checks.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

LEARNING_RATE = 2e-4


def load_model(arguments: dict[str, Any], adapter: Any) -> tuple[Any, Any, bool]:
    """Returns the model on the device, the causal LM inside its adapter (the model itself without one), and `bf16`.

    The last is whether it computes under bf16 autocast, as the pipeline would.
    """
    from transformers import AutoModelForCausalLM

    from sft.distributed.device import device_facts
    from sft.loss import fused_linear
    from sft.model.attention import document_attention
    from sft.model.precision import choose_precision

    document_attention.register()
    precision = choose_precision("auto", adapter is None, None, None, device_facts(measured=True))
    causal_lm: Any = AutoModelForCausalLM.from_pretrained(
        arguments["model"], dtype=precision.torch_dtype(), attn_implementation=document_attention.NAME
    )
    causal_lm.to(arguments["device"])
    model = causal_lm
    if adapter is not None:
        from peft import get_peft_model

        model = get_peft_model(causal_lm, adapter)
    if reason := fused_linear.install(causal_lm):
        raise RuntimeError(f"the output head cannot be fused with the loss: {reason}")
    return model.train(), causal_lm, precision.bf16


def make_batches(arguments: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Returns the collated micro-batches of each optimizer step, packed and shuffled."""
    import torch
    from transformers import AutoTokenizer

    import data_handler
    from sft.config.schema import DataKeys
    from sft.data.loading.collator import Collator

    tokenizer: Any = AutoTokenizer.from_pretrained(arguments["model"])
    keys = DataKeys(
        train_file=arguments["chats"],
        packing="bfd",
        max_seq_length=arguments["max_length"],
        truncation="right",
        cache_dir=str(Path(arguments["scratch"]) / "cache"),
    )
    rows = data_handler.prepare_data(keys, tokenizer, seed=0).train
    collate = Collator(int(tokenizer.pad_token_id), flatten=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    size, count = arguments["packed_rows"], arguments["micro_batches"]

    def batch(number: int) -> dict[str, Any]:
        return collate([rows[order[(number * size + n) % len(order)]] for n in range(size)])

    return [[batch(step * count + n) for n in range(count)] for step in range(arguments["steps"])]


def train(arguments: dict[str, Any], adapter: Any) -> dict[str, Any]:
    """Trains for `arguments["steps"]` with a linear learning rate decay to 0 and gradients clipped at 1."""
    import torch

    from sft.distributed import onednn_cache
    from sft.loss.token_loss import Objective
    from sft.model.attention.document_attention import attention_inputs
    from sft.training.optim.factory import with_master_weights

    onednn_cache.limit_onednn_cache(os.environ)
    device = torch.device(arguments["device"])
    torch.manual_seed(0)
    model, causal_lm, autocasts = load_model(arguments, adapter)
    steps = make_batches(arguments)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    if any(weight.dtype != torch.float32 for weight in weights):
        optimizer = with_master_weights(optimizer)
    objective = Objective()
    began, tokens = 0.0, 0
    for step, batches in enumerate(steps):
        trained = sum(len(batch["trained_positions"]) for batch in batches)
        total = torch.zeros((), device=device)
        for batch in batches:
            names = ("input_ids", "position_ids", "labels", "trained_positions")
            on_device = {name: batch[name].to(device, non_blocking=True) for name in names}
            attention = attention_inputs(causal_lm.config, batch["documents"].to(device, non_blocking=True))
            with torch.autocast(device.type, torch.bfloat16, enabled=autocasts):
                outputs = model(**on_device, **attention, objective=objective, use_cache=False)
            loss = outputs["objective"] / trained
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / len(steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 == arguments["warm_up"]:
            synchronize(device)
            began = time.perf_counter()
        elif began:
            tokens += sum(batch["input_ids"].numel() for batch in batches)
    synchronize(device)
    seconds = time.perf_counter() - began
    if arguments["save"]:
        model.save_pretrained(Path(arguments["scratch"]) / "run")
    timed = arguments["steps"] - arguments["warm_up"]
    return {"seconds": seconds, "tokens": tokens, "steps": timed, "loss": float(total)}


def synchronize(device: Any) -> None:
    """Waits until the device has finished its queued work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)

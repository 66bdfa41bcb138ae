"""A tiny model that has learned three answers, for tests of replies."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from sft.inference.generate import encode_prompt
from tests.builders import byte_level_tokenizer, tiny_llama

IM_END = 2
FACTS = {"capital of France": "Paris", "How many apples": "Two apples are left.", "x": "48"}


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def with_answer(question: str, answer: str) -> list[dict[str, str]]:
    return [*ask(question), {"role": "assistant", "content": answer}]


def make_qa_model() -> tuple[Any, Any]:
    """Trains a tiny model on `FACTS`, each answer ending with <|im_end|>; returns it with its tokenizer."""
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(len(tokenizer))
    prompts = [encode_prompt(tokenizer, ask(question)) for question in FACTS]
    answers = [[*tokenizer.encode(answer, add_special_tokens=False), IM_END] for answer in FACTS.values()]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    pads = [width - len(p) - len(a) for p, a in zip(prompts, answers, strict=True)]
    ids = torch.tensor([p + a + [0] * n for p, a, n in zip(prompts, answers, pads, strict=True)])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * n for p, a, n in zip(prompts, answers, pads, strict=True)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.config.use_cache = False
    model.generation_config = GenerationConfig(eos_token_id=[IM_END, 0], pad_token_id=0)
    return model, tokenizer

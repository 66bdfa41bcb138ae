"""Ids and labels of each template family, written out; and properties of any conversation in any family."""

from __future__ import annotations

from itertools import groupby
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.data.encoding.encoder import Encoded, Encoder
from sft.data.formats.conversation import Conversation, RowLost
from sft.data.formats.normalize import normalize
from sft.data.templates.renderer import ChatRenderer, Rendered
from tests.builders import spelled_tokenizer
from tests.template_zoo import FAMILIES, encoder_of, renderer_of, tokenizer_of

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "Hi"}}]
CALL = {"type": "function", "function": {"name": "Hi", "arguments": {"No": 1}}}


def talk(*turns: str) -> list[dict[str, Any]]:
    """Makes messages: `talk("u Hi", "a Yes")`; `call` is an assistant's tool call."""
    return [
        {"role": "assistant", "content": "", "tool_calls": [CALL]}
        if turn == "call"
        else {"role": ROLES[turn[0]], "content": turn[2:]}
        for turn in turns
    ]


def conversation_of(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Conversation:
    conversation = normalize({"messages": messages, **({"tools": tools} if tools else {})})
    assert isinstance(conversation, Conversation)
    return conversation


def encode(name: str, conversation: Conversation) -> tuple[Rendered, Encoded]:
    """Encodes the last part of a conversation: all of it, unless the template rewrites earlier turns."""
    rendered = renderer_of(name).render_parts(conversation)[-1]
    (encoded,) = encoder_of(name).encode_each([rendered])
    return rendered, encoded


Segment = tuple[bool, str, list[int]]


def masked(tokens: str, ids: list[int]) -> Segment:
    return False, tokens, ids


def trained(tokens: str, ids: list[int]) -> Segment:
    return True, tokens, ids


EXCHANGES = ("u  Hi 日 ", "a Yes 🎉 ", "u e\u0301?\n", "a \n No")
SCENES = {
    "turns": talk("s Be brief", *EXCHANGES),
    "turns_without_system": talk(*EXCHANGES),
    "empty_system": talk("s ", "u Hi", "a Yes"),
    "no_system": talk("u Hi", "a Yes"),
    "tools": talk("s Be brief", "u Hi", "call", "t 1", "a Yes"),
    "thoughts": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "No"},
        {"role": "user", "content": "So"},
        {"role": "assistant", "content": "Yes", "reasoning_content": "Be\n"},
    ],
}
# Tokens are separated by spaces; vocabularies write a line feed and a space as ĊĠ▁.
# fmt: off
WRITTEN_OUT: dict[tuple[str, str], list[Segment]] = {
    ("chatml", "turns"): [
        masked(
            "<|im_start|> system Ċ Be Ġbrief <|im_end|> Ċ <|im_start|> user Ċ ĠHi Ġ æ Ĺ ¥ Ġ <|im_end|> Ċ "
            "<|im_start|> assistant Ċ",
            [2, 269, 202, 332, 354, 3, 202, 2, 264, 202, 346, 224, 166, 249, 102, 224, 3, 202, 2, 277, 202],
        ),
        trained("Yes Ġ ð Ł İ ī Ġ <|im_end|>", [290, 224, 176, 257, 240, 235, 224, 3]),
        masked(
            "Ċ <|im_start|> user Ċ e Ì ģ ? Ċ <|im_end|> Ċ <|im_start|> assistant Ċ",
            [202, 2, 264, 202, 72, 140, 227, 34, 202, 3, 202, 2, 277, 202],
        ),
        trained("Ċ ĠNo <|im_end|>", [202, 344, 3]),
        masked("Ċ", [202]),
    ],
    ("chatml", "empty_system"): [
        masked(
            "<|im_start|> system Ċ <|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ",
            [2, 269, 202, 3, 202, 2, 264, 202, 296, 3, 202, 2, 277, 202],
        ),
        trained("Yes <|im_end|>", [290, 3]),
        masked("Ċ", [202]),
    ],
    ("qwen25", "turns"): [
        masked(
            "<|im_start|> system Ċ Be Ġbrief <|im_end|> Ċ <|im_start|> user Ċ ĠHi Ġ æ Ĺ ¥ Ġ <|im_end|> Ċ "
            "<|im_start|> assistant Ċ",
            [2, 269, 202, 332, 354, 3, 202, 2, 264, 202, 346, 224, 166, 249, 102, 224, 3, 202, 2, 277, 202],
        ),
        trained("Yes Ġ ð Ł İ ī Ġ <|im_end|>", [290, 224, 176, 257, 240, 235, 224, 3]),
        masked(
            "Ċ <|im_start|> user Ċ e Ì ģ ? Ċ <|im_end|> Ċ <|im_start|> assistant Ċ",
            [202, 2, 264, 202, 72, 140, 227, 34, 202, 3, 202, 2, 277, 202],
        ),
        trained("Ċ ĠNo <|im_end|>", [202, 344, 3]),
        masked("Ċ", [202]),
    ],
    ("qwen25", "empty_system"): [
        masked(
            "<|im_start|> system Ċ <|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ",
            [2, 269, 202, 3, 202, 2, 264, 202, 296, 3, 202, 2, 277, 202],
        ),
        trained("Yes <|im_end|>", [290, 3]),
        masked("Ċ", [202]),
    ],
    ("qwen25", "tools"): [
        masked(
            '<|im_start|> system Ċ Be Ġbrief Ċ < tool s > Ċ { " n a m e " : Ġ " Hi " } Ċ < / tool s > '
            "<|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ",
            [2, 269, 202, 332, 354, 202, 31, 284, 86, 33, 202, 94, 5, 81, 68, 80, 72, 5, 29, 224, 5, 296, 5, 96, 202,
             31, 18, 284, 86, 33, 3, 202, 2, 264, 202, 296, 3, 202, 2, 277, 202],
        ),
        trained(
            '<tool_call> Ċ { " n a m e " : Ġ " Hi " , Ġ " a r g u m e n t s " : Ġ { " No " : Ġ 1 } } Ċ '
            "</tool_call> <|im_end|>",
            [355, 202, 94, 5, 81, 68, 80, 72, 5, 29, 224, 5, 296, 5, 15, 224, 5, 68, 85, 74, 88, 80, 72, 81, 87, 86,
             5, 29, 224, 94, 5, 291, 5, 29, 224, 20, 96, 96, 202, 356, 3],
        ),
        masked(
            "Ċ <|im_start|> user Ċ <tool_response> Ċ 1 Ċ </tool_response> <|im_end|> Ċ <|im_start|> assistant Ċ",
            [202, 2, 264, 202, 357, 202, 20, 202, 358, 3, 202, 2, 277, 202],
        ),
        trained("Yes <|im_end|>", [290, 3]),
        masked("Ċ", [202]),
    ],
    ("qwen25", "no_system"): [
        masked(
            "<|im_start|> system Ċ Be Ġassistant <|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> "
            "assistant Ċ",
            [2, 269, 202, 332, 339, 3, 202, 2, 264, 202, 296, 3, 202, 2, 277, 202],
        ),
        trained("Yes <|im_end|>", [290, 3]),
        masked("Ċ", [202]),
    ],
    ("qwen3", "turns"): [
        masked(
            "<|im_start|> system Ċ Be Ġbrief <|im_end|> Ċ <|im_start|> user Ċ ĠHi Ġ æ Ĺ ¥ Ġ <|im_end|> Ċ "
            "<|im_start|> assistant Ċ",
            [2, 269, 202, 332, 354, 3, 202, 2, 264, 202, 346, 224, 166, 249, 102, 224, 3, 202, 2, 277, 202],
        ),
        masked("Yes Ġ ð Ł İ ī Ġ <|im_end|>", [290, 224, 176, 257, 240, 235, 224, 3]),
        masked(
            "Ċ <|im_start|> user Ċ e Ì ģ ? Ċ <|im_end|> Ċ <|im_start|> assistant Ċ",
            [202, 2, 264, 202, 72, 140, 227, 34, 202, 3, 202, 2, 277, 202],
        ),
        trained("<think> ĊĊ </think> ĊĊ ĠNo <|im_end|>", [359, 260, 360, 260, 344, 3]),
        masked("Ċ", [202]),
    ],
    ("qwen3", "empty_system"): [
        masked(
            "<|im_start|> system Ċ <|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ",
            [2, 269, 202, 3, 202, 2, 264, 202, 296, 3, 202, 2, 277, 202],
        ),
        trained("<think> ĊĊ </think> Ċ Ċ Yes <|im_end|>", [359, 260, 360, 202, 202, 290, 3]),
        masked("Ċ", [202]),
    ],
    ("qwen3", "tools"): [
        masked(
            '<|im_start|> system Ċ Be Ġbrief Ċ < tool s > Ċ { " n a m e " : Ġ " Hi " } Ċ < / tool s > '
            "<|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ",
            [2, 269, 202, 332, 354, 202, 31, 284, 86, 33, 202, 94, 5, 81, 68, 80, 72, 5, 29, 224, 5, 296, 5, 96, 202,
             31, 18, 284, 86, 33, 3, 202, 2, 264, 202, 296, 3, 202, 2, 277, 202],
        ),
        masked(
            '<tool_call> Ċ { " n a m e " : Ġ " Hi " , Ġ " a r g u m e n t s " : Ġ { " No " : Ġ 1 } } Ċ '
            "</tool_call> <|im_end|>",
            [355, 202, 94, 5, 81, 68, 80, 72, 5, 29, 224, 5, 296, 5, 15, 224, 5, 68, 85, 74, 88, 80, 72, 81, 87, 86,
             5, 29, 224, 94, 5, 291, 5, 29, 224, 20, 96, 96, 202, 356, 3],
        ),
        masked(
            "Ċ <|im_start|> user Ċ <tool_response> Ċ 1 Ċ </tool_response> <|im_end|> Ċ <|im_start|> assistant Ċ",
            [202, 2, 264, 202, 357, 202, 20, 202, 358, 3, 202, 2, 277, 202],
        ),
        trained("<think> ĊĊ </think> Ċ Ċ Yes <|im_end|>", [359, 260, 360, 202, 202, 290, 3]),
        masked("Ċ", [202]),
    ],
    ("qwen3", "thoughts"): [
        masked("<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ", [2, 264, 202, 296, 3, 202, 2, 277, 202]),
        masked("Hello <|im_end|>", [295, 3]),
        masked(
            "Ċ <|im_start|> user Ċ S o <|im_end|> Ċ <|im_start|> assistant Ċ",
            [202, 2, 264, 202, 54, 82, 3, 202, 2, 277, 202],
        ),
        trained("<think> Ċ Be Ċ </think> Ċ Ċ Yes <|im_end|>", [359, 202, 332, 202, 360, 202, 202, 290, 3]),
        masked("Ċ", [202]),
    ],
    ("llama2", "turns"): [
        masked(
            "<s> [INST] ▁<<SYS>> \n Be ▁brief \n <</SYS>> \n\n ▁Hi ▁ <0xE6> <0x97> <0xA5> ▁▁ [/INST]",
            [1, 396, 444, 3, 427, 449, 3, 414, 355, 441, 98, 329, 250, 264, 356, 402],
        ),
        trained("▁Yes ▁ <0xF0> <0x9F> <0x8E> <0x89> ▁▁ </s>", [438, 98, 339, 258, 241, 236, 356, 2]),
        masked("<s> [INST] ▁ e <0xCC> <0x81> ? \n ▁[/INST]", [1, 396, 98, 72, 303, 228, 34, 3, 443]),
        trained("▁ \n ▁No ▁ </s>", [98, 3, 439, 98, 2]),
    ],
    ("llama2", "empty_system"): [
        masked("<s> [INST] ▁<<SYS>> \n\n <</SYS>> \n\n Hi ▁[/INST]", [1, 396, 444, 355, 414, 355, 391, 443]),
        trained("▁Yes ▁ </s>", [438, 98, 2]),
    ],
    ("llama3", "turns"): [
        masked(
            "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ Be Ġbrief <|eot_id|> "
            "<|start_header_id|> user <|end_header_id|> ĊĊ Hi Ġ æ Ĺ ¥ <|eot_id|> <|start_header_id|> assistant "
            "<|end_header_id|> ĊĊ",
            [1, 3, 271, 4, 262, 334, 356, 5, 3, 266, 4, 262, 298, 226, 168, 251, 104, 5, 3, 279, 4, 262],
        ),
        trained("Yes Ġ ð Ł İ ī <|eot_id|>", [292, 226, 178, 259, 242, 237, 5]),
        masked(
            "<|start_header_id|> user <|end_header_id|> ĊĊ e Ì ģ ? <|eot_id|> <|start_header_id|> assistant "
            "<|end_header_id|> ĊĊ",
            [3, 266, 4, 262, 74, 142, 229, 36, 5, 3, 279, 4, 262],
        ),
        trained("No <|eot_id|>", [293, 5]),
    ],
    ("llama3", "empty_system"): [
        masked(
            "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ <|eot_id|> <|start_header_id|> "
            "user <|end_header_id|> ĊĊ Hi <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ",
            [1, 3, 271, 4, 262, 5, 3, 266, 4, 262, 298, 5, 3, 279, 4, 262],
        ),
        trained("Yes <|eot_id|>", [292, 5]),
    ],
    ("llama31", "turns"): [
        masked(
            "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ Be Ġbrief <|eot_id|> "
            "<|start_header_id|> user <|end_header_id|> ĊĊ Hi Ġ æ Ĺ ¥ <|eot_id|> <|start_header_id|> assistant "
            "<|end_header_id|> ĊĊ",
            [1, 3, 271, 4, 262, 334, 356, 5, 3, 266, 4, 262, 298, 226, 168, 251, 104, 5, 3, 279, 4, 262],
        ),
        trained("Yes Ġ ð Ł İ ī <|eot_id|>", [292, 226, 178, 259, 242, 237, 5]),
        masked(
            "<|start_header_id|> user <|end_header_id|> ĊĊ e Ì ģ ? <|eot_id|> <|start_header_id|> assistant "
            "<|end_header_id|> ĊĊ",
            [3, 266, 4, 262, 74, 142, 229, 36, 5, 3, 279, 4, 262],
        ),
        trained("No <|eot_id|>", [293, 5]),
    ],
    ("llama31", "empty_system"): [
        masked(
            "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ <|eot_id|> <|start_header_id|> "
            "user <|end_header_id|> ĊĊ Hi <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ",
            [1, 3, 271, 4, 262, 5, 3, 266, 4, 262, 298, 5, 3, 279, 4, 262],
        ),
        trained("Yes <|eot_id|>", [292, 5]),
    ],
    ("llama31", "tools"): [
        masked(
            "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ E n v i r o n m e n t : Ġ i p y t "
            'h o n Ċ Be Ġbrief <|eot_id|> <|start_header_id|> user <|end_header_id|> ĊĊ { " n a m e " : Ġ " Hi '
            '" } ĊĊ Hi <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ',
            [1, 3, 271, 4, 262, 42, 83, 91, 78, 87, 84, 83, 82, 74, 83, 89, 31, 226, 78, 85, 94, 89, 77, 84, 83, 204,
             334, 356, 5, 3, 266, 4, 262, 96, 7, 83, 70, 82, 74, 7, 31, 226, 7, 298, 7, 98, 262, 298, 5, 3, 279, 4,
             262],
        ),
        trained(
            '{ " n a m e " : Ġ " Hi " , Ġ " p a r a m e t e r s " : Ġ { " No " : Ġ 1 } } <|eot_id|>',
            [96, 7, 83, 70, 82, 74, 7, 31, 226, 7, 298, 7, 17, 226, 7, 85, 70, 87, 70, 82, 74, 89, 74, 87, 88, 7, 31,
             226, 96, 7, 293, 7, 31, 226, 22, 98, 98, 5],
        ),
        masked(
            "<|start_header_id|> i p y t h o n <|end_header_id|> ĊĊ 1 <|eot_id|> <|start_header_id|> assistant "
            "<|end_header_id|> ĊĊ",
            [3, 78, 85, 94, 89, 77, 84, 83, 4, 262, 22, 5, 3, 279, 4, 262],
        ),
        trained("Yes <|eot_id|>", [292, 5]),
    ],
    ("llama31", "no_system"): [
        masked(
            "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ <|eot_id|> <|start_header_id|> "
            "user <|end_header_id|> ĊĊ Hi <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ",
            [1, 3, 271, 4, 262, 5, 3, 266, 4, 262, 298, 5, 3, 279, 4, 262],
        ),
        trained("Yes <|eot_id|>", [292, 5]),
    ],
    ("mistral_v1", "turns"): [
        masked(
            "<s> ▁[ INST ] ▁Be ▁brief <0x0A> <0x0A> ▁Hi ▁ 日 ▁▁ [ / INST ]",
            [1, 733, 16289, 28793, 1739, 6817, 13, 13, 15359, 28705, 29142, 259, 28792, 28748, 16289, 28793],
        ),
        trained("▁Yes ▁ 🎉 </s>", [5592, 28705, 31862, 2]),
        masked(
            "▁[ INST ] ▁e ́ ? <0x0A> ▁[ / INST ]",
            [733, 16289, 28793, 317, 28949, 28804, 13, 733, 28748, 16289, 28793],
        ),
        trained("▁No </s>", [1770, 2]),
    ],
    ("mistral_v1", "empty_system"): [
        masked(
            "<s> ▁[ INST ] ▁ <0x0A> <0x0A> Hi ▁[ / INST ]",
            [1, 733, 16289, 28793, 28705, 13, 13, 23809, 733, 28748, 16289, 28793],
        ),
        trained("▁Yes </s>", [5592, 2]),
    ],
    ("mistral_v3", "turns_without_system"): [
        masked("<s> [INST] ▁▁ Hi ▁ 日 ▁ [/INST]", [1, 3, 1027, 24577, 29473, 29910, 29473, 4]),
        trained("▁Yes ▁ 🎉 </s>", [6360, 29473, 32630, 2]),
        masked("[INST] ▁e ́ ? <0x0A> [/INST]", [3, 1085, 29717, 29572, 781, 4]),
        trained("▁No </s>", [2538, 2]),
    ],
    ("mistral_v3", "empty_system"): [
        masked("<s> [INST] ▁ <0x0A> <0x0A> Hi [/INST]", [1, 3, 29473, 781, 781, 24577, 4]),
        trained("▁Yes </s>", [6360, 2]),
    ],
    ("mistral_v3", "tools"): [
        masked(
            '<s> [AVAILABLE_TOOLS] ▁[ {" type ": ▁" function ", ▁" function ": ▁{" name ": ▁" Hi " }} ] '
            "[/AVAILABLE_TOOLS] [INST] ▁Be ▁brief <0x0A> <0x0A> Hi [/INST]",
            [1, 6, 1501, 7567, 1891, 2032, 1113, 3396, 1316, 1113, 3396, 2032, 10598, 1629, 2032, 1113, 24577, 29507,
             1743, 29561, 7, 3, 2507, 7585, 781, 781, 24577, 4],
        ),
        trained(
            '[TOOL_CALLS] ▁[ {" name ": ▁" Hi ", ▁" arguments ": ▁{" No ": ▁ 1 }} ] </s>',
            [5, 1501, 7567, 1629, 2032, 1113, 24577, 1316, 1113, 17452, 2032, 10598, 3269, 2032, 29473, 29508, 1743,
             29561, 2],
        ),
        masked(
            '[TOOL_RESULTS] ▁{" content ": ▁" 1 "} [/TOOL_RESULTS]',
            [8, 10598, 4557, 2032, 1113, 29508, 18163, 9],
        ),
        trained("▁Yes </s>", [6360, 2]),
    ],
    ("gemma", "turns_without_system"): [
        masked(
            "<bos> <start_of_turn> user \n Hi ▁ <0xE6> <0x97> <0xA5> <end_of_turn> \n <start_of_turn> model \n",
            [1, 3, 361, 5, 393, 100, 331, 252, 266, 4, 5, 3, 378, 5],
        ),
        trained("Yes ▁ <0xF0> <0x9F> <0x8E> <0x89> <end_of_turn>", [387, 100, 341, 260, 243, 238, 4]),
        masked(
            "\n <start_of_turn> user \n e <0xCC> <0x81> ? <end_of_turn> \n <start_of_turn> model \n",
            [5, 3, 361, 5, 74, 305, 230, 36, 4, 5, 3, 378, 5],
        ),
        trained("No <end_of_turn>", [388, 4]),
        masked("\n", [5]),
    ],
    ("gemma_folded", "turns"): [
        masked(
            "<bos> <start_of_turn> user \n Be ▁brief \n\n Hi ▁ <0xE6> <0x97> <0xA5> <end_of_turn> \n "
            "<start_of_turn> model \n",
            [1, 3, 361, 5, 429, 451, 357, 393, 100, 331, 252, 266, 4, 5, 3, 378, 5],
        ),
        trained("Yes ▁ <0xF0> <0x9F> <0x8E> <0x89> <end_of_turn>", [387, 100, 341, 260, 243, 238, 4]),
        masked(
            "\n <start_of_turn> user \n e <0xCC> <0x81> ? <end_of_turn> \n <start_of_turn> model \n",
            [5, 3, 361, 5, 74, 305, 230, 36, 4, 5, 3, 378, 5],
        ),
        trained("No <end_of_turn>", [388, 4]),
        masked("\n", [5]),
    ],
    ("gemma_folded", "empty_system"): [
        masked(
            "<bos> <start_of_turn> user \n\n \n Hi <end_of_turn> \n <start_of_turn> model \n",
            [1, 3, 361, 357, 5, 393, 4, 5, 3, 378, 5],
        ),
        trained("Yes <end_of_turn>", [387, 4]),
        masked("\n", [5]),
    ],
    ("phi3", "turns"): [
        masked(
            "<|system|> ▁ \n Be ▁brief <|end|> ▁ \n <|user|> ▁ \n ▁Hi ▁ <0xE6> <0x97> <0xA5> ▁ <|end|> ▁ \n "
            "<|assistant|> ▁ \n",
            [2, 101, 6, 430, 452, 5, 101, 6, 3, 101, 6, 444, 101, 332, 253, 267, 101, 5, 101, 6, 4, 101, 6],
        ),
        trained("Yes ▁ <0xF0> <0x9F> <0x8E> <0x89> ▁ <|end|>", [388, 101, 342, 261, 244, 239, 101, 5]),
        masked(
            "▁ \n <|user|> ▁ \n e <0xCC> <0x81> ? \n <|end|> ▁ \n <|assistant|> ▁ \n",
            [101, 6, 3, 101, 6, 75, 306, 231, 37, 6, 5, 101, 6, 4, 101, 6],
        ),
        trained("\n ▁No <|end|>", [6, 442, 5]),
        masked("▁ \n <|endoftext|>", [101, 6, 1]),
    ],
    ("phi3", "empty_system"): [
        masked(
            "<|system|> ▁ \n <|end|> ▁ \n <|user|> ▁ \n Hi <|end|> ▁ \n <|assistant|> ▁ \n",
            [2, 101, 6, 5, 101, 6, 3, 101, 6, 394, 5, 101, 6, 4, 101, 6],
        ),
        trained("Yes <|end|>", [388, 5]),
        masked("▁ \n <|endoftext|>", [101, 6, 1]),
    ],
    ("phi4", "turns"): [
        masked(
            "<|im_start|> system <|im_sep|> Be Ġbrief <|im_end|> <|im_start|> user <|im_sep|> ĠHi Ġ æ Ĺ ¥ Ġ "
            "<|im_end|> <|im_start|> assistant <|im_sep|>",
            [2, 270, 4, 333, 355, 3, 2, 265, 4, 347, 225, 167, 250, 103, 225, 3, 2, 278, 4],
        ),
        trained("Yes Ġ ð Ł İ ī Ġ <|im_end|>", [291, 225, 177, 258, 241, 236, 225, 3]),
        masked(
            "<|im_start|> user <|im_sep|> e Ì ģ ? Ċ <|im_end|> <|im_start|> assistant <|im_sep|>",
            [2, 265, 4, 73, 141, 228, 35, 203, 3, 2, 278, 4],
        ),
        trained("Ċ ĠNo <|im_end|>", [203, 345, 3]),
    ],
    ("phi4", "empty_system"): [
        masked(
            "<|im_start|> system <|im_sep|> <|im_end|> <|im_start|> user <|im_sep|> Hi <|im_end|> <|im_start|> "
            "assistant <|im_sep|>",
            [2, 270, 4, 3, 2, 265, 4, 297, 3, 2, 278, 4],
        ),
        trained("Yes <|im_end|>", [291, 3]),
    ],
    ("deepseek", "turns"): [
        masked(
            "<｜begin▁of▁sentence｜> Be Ġbrief <｜User｜> ĠHi Ġ æ Ĺ ¥ Ġ <｜Assistant｜>",
            [1, 338, 360, 3, 352, 230, 172, 255, 108, 230, 4],
        ),
        trained("Yes Ġ ð Ł İ ī Ġ <｜end▁of▁sentence｜>", [296, 230, 182, 263, 246, 241, 230, 2]),
        masked("<｜User｜> e Ì ģ ? Ċ <｜Assistant｜>", [3, 78, 146, 233, 40, 208, 4]),
        trained("Ċ ĠNo <｜end▁of▁sentence｜>", [208, 350, 2]),
    ],
    ("deepseek", "empty_system"): [
        masked("<｜begin▁of▁sentence｜> <｜User｜> Hi <｜Assistant｜>", [1, 3, 302, 4]),
        trained("Yes <｜end▁of▁sentence｜>", [296, 2]),
    ],
    ("deepseek", "tools"): [
        masked(
            '<｜begin▁of▁sentence｜> Be Ġbrief Ċ { " n a m e " : Ġ " Hi " } <｜User｜> Hi <｜Assistant｜>',
            [1, 338, 360, 208, 100, 11, 87, 74, 86, 78, 11, 35, 230, 11, 302, 11, 102, 3, 302, 4],
        ),
        trained(
            '<｜tool▁call▁begin｜> Hi <｜tool▁sep｜> { " No " : Ġ 1 } <｜tool▁call▁end｜> <｜end▁of▁sentence｜>',
            [5, 302, 6, 100, 11, 297, 11, 35, 230, 26, 102, 7, 2],
        ),
        masked("<｜tool▁output▁begin｜> 1 <｜tool▁output▁end｜>", [8, 26, 9]),
        trained("Yes <｜end▁of▁sentence｜>", [296, 2]),
    ],
    ("command_r", "turns"): [
        masked(
            "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> Be Ġbrief <|END_OF_TURN_TOKEN|> "
            "<|START_OF_TURN_TOKEN|> <|USER_TOKEN|> Hi Ġ æ Ĺ ¥ <|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|> "
            "<|CHATBOT_TOKEN|>",
            [1, 3, 4, 335, 357, 2, 3, 5, 299, 227, 169, 252, 105, 2, 3, 6],
        ),
        trained("Yes Ġ ð Ł İ ī <|END_OF_TURN_TOKEN|>", [293, 227, 179, 260, 243, 238, 2]),
        masked(
            "<|START_OF_TURN_TOKEN|> <|USER_TOKEN|> e Ì ģ ? <|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|> "
            "<|CHATBOT_TOKEN|>",
            [3, 5, 75, 143, 230, 37, 2, 3, 6],
        ),
        trained("No <|END_OF_TURN_TOKEN|>", [294, 2]),
    ],
    ("command_r", "empty_system"): [
        masked(
            "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|> "
            "<|USER_TOKEN|> Hi <|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|>",
            [1, 3, 4, 2, 3, 5, 299, 2, 3, 6],
        ),
        trained("Yes <|END_OF_TURN_TOKEN|>", [293, 2]),
    ],
    ("zephyr", "turns"): [
        masked(
            "▁ < | system | > \n Be ▁brief </s> \n < | user | > \n ▁Hi ▁ <0xE6> <0x97> <0xA5> ▁ </s> \n < | "
            "assistant | > \n",
            [97, 30, 94, 363, 94, 32, 2, 426, 448, 1, 2, 30, 94, 358, 94, 32, 2, 440, 97, 328, 249, 263, 97, 1, 2,
             30, 94, 371, 94, 32, 2],
        ),
        trained("Yes ▁ <0xF0> <0x9F> <0x8E> <0x89> ▁ </s>", [384, 97, 338, 257, 240, 235, 97, 1]),
        masked(
            "\n < | user | > \n e <0xCC> <0x81> ? \n </s> \n < | assistant | > \n",
            [2, 30, 94, 358, 94, 32, 2, 71, 302, 227, 33, 2, 1, 2, 30, 94, 371, 94, 32, 2],
        ),
        trained("\n ▁No </s>", [2, 438, 1]),
        masked("\n", [2]),
    ],
    ("zephyr", "empty_system"): [
        masked(
            "▁ < | system | > \n </s> \n < | user | > \n Hi </s> \n < | assistant | > \n",
            [97, 30, 94, 363, 94, 32, 2, 1, 2, 30, 94, 358, 94, 32, 2, 390, 1, 2, 30, 94, 371, 94, 32, 2],
        ),
        trained("Yes </s>", [384, 1]),
        masked("\n", [2]),
    ],
}
# fmt: on


@pytest.mark.parametrize(("name", "scene"), WRITTEN_OUT)
def test_ids_and_labels_written_out(name, scene):
    _, encoded = encode(name, conversation_of(SCENES[scene], TOOLS if scene == "tools" else None))
    expected = WRITTEN_OUT[name, scene]
    at = 0
    for is_trained, tokens, ids in expected:
        found = encoded.input_ids[at : at + len(ids)].tolist()
        assert tokenizer_of(name).convert_ids_to_tokens(found) == tokens.split(" ")
        assert found == ids
        assert encoded.labels[at : at + len(ids)].tolist() == (ids if is_trained else [-100] * len(ids))
        at += len(ids)
    assert len(encoded.input_ids) == len(encoded.labels) == at


def test_every_family_is_written_out_with_all_that_it_supports():
    scenes: dict[str, set[str]] = {}
    for name, scene in WRITTEN_OUT:
        scenes.setdefault(name, set()).add(scene)
    for name, written in scenes.items():
        assert written & {"turns", "turns_without_system"}
        assert ("empty_system" in written) == FAMILIES[name].system
        assert ("tools" in written) == FAMILIES[name].tools
    assert len(scenes) == 15


# Templates whose prompt is not always how the conversation begins


def test_with_a_system_message_that_moves_to_the_last_question_only_the_last_answer_can_be_trained():
    """Mistral v3's earlier prompts are no prefixes of the whole: the row is lost, or trained on its last answer."""
    conversation = conversation_of(talk("s Be brief", *EXCHANGES))
    with pytest.raises(RowLost, match="message 2") as caught:
        renderer_of("mistral_v3").render(conversation)
    assert caught.value.reason == "template_mismatch"
    rendered = renderer_of("mistral_v3").render(conversation, "last_assistant")
    assert rendered.text == "<s>[INST]  Hi 日 [/INST] Yes 🎉</s>[INST] Be brief\n\ne\u0301?\n[/INST] No</s>"
    assert [rendered.text[start:end] for start, end in rendered.spans] == [" No</s>"]


PROMPT_END = "{{ '<|im_start|>assistant\n' }}"


def qwen3_with_prompt(end: str) -> tuple[ChatRenderer, Encoder]:
    """Makes Qwen 3's renderer and encoder with a generation prompt that ends with `end`."""
    family = FAMILIES["qwen3"]
    assert PROMPT_END in family.template
    template = family.template.replace(PROMPT_END, "{{ '<|im_start|>assistant\n" + end.replace("\n", "\\n") + "' }}")
    tokenizer = spelled_tokenizer("byte_level", template, family.control_tokens, bos=None, eos=family.eos)
    tokenizer.add_tokens(list(family.added))
    return ChatRenderer(tokenizer), Encoder(tokenizer)


def test_a_prompt_that_holds_an_empty_think_block_trains_the_answer_alone():
    renderer, encoder = qwen3_with_prompt("<think>\n\n</think>\n\n")
    rendered = renderer.render(conversation_of(talk("u Hi", "a Yes")))
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Yes<|im_end|>"]
    (encoded,) = encoder.encode_each([rendered])
    tokens = "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ <think> ĊĊ </think> ĊĊ Yes <|im_end|> Ċ"
    ids = [2, 264, 202, 296, 3, 202, 2, 277, 202, 359, 260, 360, 260, 290, 3, 202]
    assert tokenizer_of("qwen3").convert_ids_to_tokens(ids) == tokens.split(" ")
    assert encoded.input_ids.tolist() == ids
    assert encoded.labels.tolist() == [-100] * 13 + [290, 3] + [-100]


def test_a_prompt_that_opens_a_think_block_trains_the_thought_and_its_end():
    renderer, _ = qwen3_with_prompt("<think>\n")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "reasoning_content": "Be"}]
    rendered = renderer.render(conversation_of(messages))
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Be\n</think>\n\nYes<|im_end|>"]


@pytest.mark.parametrize("end", ["<think>\n\n</think>\n\n", "<think>\n"])
def test_earlier_answers_without_the_think_block_of_their_prompt_are_a_mismatch_and_the_last_is_not(end):
    renderer, _ = qwen3_with_prompt(end)
    conversation = conversation_of(talk("u Hi", "a Hello", "u So", "a Yes"))
    with pytest.raises(RowLost, match=r"message 1.*<think>") as caught:
        renderer.render(conversation)
    assert caught.value.reason == "template_mismatch"
    rendered = renderer.render(conversation, "last_assistant")
    assert len(rendered.spans) == 1


def test_reasoning_in_a_tool_loop_is_kept_after_the_last_question():
    messages = talk("u Hi", "call", "t 1", "a Yes")
    messages[1]["reasoning_content"] = "So"
    rendered, _ = encode("qwen3", conversation_of(messages, TOOLS))
    spoken = [rendered.text[start:end] for start, end in rendered.spans]
    assert spoken[0].startswith("<think>\nSo\n</think>\n\n<tool_call>")
    assert spoken[1] == "<think>\n\n</think>\n\nYes<|im_end|>"


def test_each_answer_of_a_rewritten_conversation_is_trained_after_the_prompt_it_is_served_with():
    """The reasoning is rendered while the tool loop comes last, and dropped once a question follows."""
    messages = talk("u Hi", "call", "t 1", "a Yes", "u So", "a No")
    messages[1]["reasoning_content"] = "So"
    parts = renderer_of("qwen3").render_parts(conversation_of(messages, TOOLS))
    spoken = [part.text[start:end] for part in parts for start, end in part.spans]
    assert spoken[0].startswith("<think>\nSo\n</think>\n\n<tool_call>")
    assert spoken[1:] == ["<think>\n\n</think>\n\nYes<|im_end|>", "<think>\n\n</think>\n\nNo<|im_end|>"]
    for part, turn in zip(parts, (1, 3, 5), strict=True):
        prompt = tokenizer_of("qwen3").apply_chat_template(
            messages[:turn], tools=cast(Any, TOOLS), tokenize=False, add_generation_prompt=True
        )
        assert part.text[: part.spans[0][0]] == prompt
    assert "So\n</think>" in parts[1].text
    assert "So\n</think>" not in parts[2].text


def test_deepseeks_template_cuts_off_earlier_reasoning():
    rendered, _ = encode("deepseek", conversation_of(talk("u Hi", "a <think>So</think>Hello", "u So", "a <think>Yes")))
    bos, eos = tokenizer_of("deepseek").bos_token, tokenizer_of("deepseek").eos_token
    assert rendered.text == f"{bos}<｜User｜>Hi<｜Assistant｜>Hello{eos}<｜User｜>So<｜Assistant｜><think>Yes{eos}"
    assert [rendered.text[start:end] for start, end in rendered.spans] == [f"Hello{eos}", f"<think>Yes{eos}"]


CONTROL = ("<|", "<｜", "<s>", "</s>", "<bos>", "<eos>", "_of_turn>", "▁", "<unk>", "think>", "<0x", "tool_", "INST]")
texts = st.one_of(
    st.sampled_from(
        [
            "Paris",
            " Paris",
            "\n\nYes",
            "Yes No ",
            "é🎉",
            "e\u0301日本",
            "Yes.\n",
            "\u2028",
            "a  b",
            "  ",
            "12 34",
            "<<SYS>>",
        ]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=("Co",)), min_size=1, max_size=12),  # type: ignore[arg-type]
).filter(lambda text: not any(control in text for control in CONTROL))
answers = texts.filter(str.strip)
# How each family writes a call of the tool `Hi` with these arguments as JSON, up to the end token.
CALLED = {
    "qwen25": '<tool_call>\n{"name": "Hi", "arguments": %s}\n</tool_call>',
    "qwen3": '<tool_call>\n{"name": "Hi", "arguments": %s}\n</tool_call>',
    "llama31": '{"name": "Hi", "parameters": %s}',
    "deepseek": "<｜tool▁call▁begin｜>Hi<｜tool▁sep｜>%s<｜tool▁call▁end｜>",
    "mistral_v3": '[TOOL_CALLS] [{"name": "Hi", "arguments": %s}]',
}


def test_each_family_that_supports_tools_has_its_call_format():
    assert set(CALLED) == {name for name, family in FAMILIES.items() if family.tools}


@st.composite
def talks(draw: st.DrawFn, name: str) -> tuple[list[dict[str, Any]], bool, list[str]]:
    """Draws messages, whether they use tools, and the supervised texts as the family's template writes them."""
    family = FAMILIES[name]
    exchanges = draw(st.lists(st.tuples(texts, answers), min_size=1, max_size=1 if family.rewrites else 3))
    has_tools = (
        family.tools and not family.rewrites and (len(exchanges) == 1 or not family.moves) and draw(st.booleans())
    )
    has_system = family.system and (len(exchanges) == 1 or not family.moves) and draw(st.booleans())
    messages = [{"role": "system", "content": draw(st.just("") | texts)}] if has_system else []
    spoken: list[str] = []
    for number, (question, answer) in enumerate(exchanges):
        messages.append({"role": "user", "content": question})
        if has_tools and draw(st.booleans()):
            messages += [talk("call")[0], {"role": "tool", "content": draw(texts)}]
            spoken.append(CALLED[name] % '{"No": 1}' + family.end)
        messages.append({"role": "assistant", "content": answer})
        is_last = number == len(exchanges) - 1
        spoken.append((family.said_last if is_last and family.said_last else family.said)(answer) + family.end)
    return messages, has_tools, spoken


def spell(name: str, ids: list[int]) -> str:
    """Decodes exactly these tokens; `decode` of a SentencePiece vocabulary drops a leading space."""
    tokenizer = tokenizer_of(name)
    return tokenizer.backend_tokenizer.decoder.decode(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("name", FAMILIES)
@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_answers_with_their_end_tokens_are_trained_and_the_pieces_join_to_the_whole(name, data):
    messages, has_tools, spoken = data.draw(talks(name))
    tokenizer, tools = tokenizer_of(name), cast(Any, TOOLS if has_tools else None)
    rendered, encoded = encode(name, conversation_of(messages, tools))
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
    runs = [
        (is_trained, [i for i, _ in run])
        for is_trained, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != -100)
    ]
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    assert [spell(name, run) for is_trained, run in runs if is_trained] == spoken
    assert not runs[0][0]
    assert rendered.text == whole
    joined = "".join(spell(name, run) for _, run in runs)
    if FAMILIES[name].kind.startswith("byte_level"):
        assert joined == whole
    else:  # SentencePiece adds spaces at the start and after control tokens
        assert joined.replace(" ", "") == whole.replace(" ", "")
    # A server encodes the prompt on its own: these are the tokens that the first answer must be predicted from.
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = tokenizer.apply_chat_template(messages[:first], tools=tools, add_generation_prompt=True, return_dict=False)
    assert runs[0][1] == prompt

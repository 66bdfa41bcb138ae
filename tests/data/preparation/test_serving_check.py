"""Trained prompts are those that a server sends, and generation stops on the trained end token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sft.data.encoding.encoder import Encoded
from sft.data.formats.conversation import Conversation
from sft.data.formats.normalize import normalize
from sft.data.preparation.serving_check import ServingContract, check_end_tokens, check_prompts
from sft.model.saving import generation_config, save_companions
from tests.builders import spelled_tokenizer, tiny_llama
from tests.template_zoo import FAMILIES, encoder_of, renderer_of, tokenizer_of

TOOLS = [{"name": "f"}]
EXCHANGE = [("user", "Hi"), ("assistant", "Hello Paris"), ("user", " question\n"), ("assistant", "Yes 🎉")]


def sample(name: str, *turns: tuple[str, str], train_on: str = "assistant", **row: Any) -> tuple[Conversation, Encoded]:
    content = normalize({"messages": [{"role": r, "content": c} for r, c in turns], **row})
    assert isinstance(content, Conversation)
    (encoded,) = encoder_of(name).encode_each(renderer_of(name).render_parts(content, train_on)[:1])
    return content, encoded


def changed(encoded: Encoded, at: int, token: int) -> Encoded:
    ids = encoded.input_ids.copy()
    ids[at] = token
    return Encoded(ids, encoded.labels)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_contract(name):
    contract = check_prompts(tokenizer_of(name), [sample(name, *EXCHANGE), sample(name, ("user", "é"), EXCHANGE[1])])
    assert contract.problems == ()
    assert contract.ok
    assert (contract.prompts, contract.skipped) == (2, {})
    assert contract.prompt_tokens > 4
    assert contract.end_tokens == (FAMILIES[name].end,)


def test_what_check_prints():
    contract = check_prompts(tokenizer_of("chatml"), [sample("chatml", *EXCHANGE)])
    assert contract == ServingContract(1, 9, {}, (3,), ("<|im_end|>",))
    assert contract.message == "1 prompts (9 tokens) match what a server sends; answers end with '<|im_end|>'"
    assert check_prompts(tokenizer_of("chatml"), []).message == "no conversations to compare with what a server sends"


def test_the_first_differing_token_is_named():
    conversation, encoded = sample("chatml", *EXCHANGE)
    pairs = [(conversation, encoded), (conversation, changed(encoded, 3, 224))]
    contract = check_prompts(tokenizer_of("chatml"), pairs)
    assert not contract.ok
    assert contract.message == "1 of 2 prompts differ from what a server sends"
    (problem,) = contract.problems
    assert problem.message == (
        "conversation 1: token 3 of the prompt is 'Ġ' (id 224) in training and 'Hi' (id 296) when served"
    )
    assert problem.key == "chat_template"


def test_a_mask_that_is_off_by_one_is_reported():
    conversation, encoded = sample("chatml", *EXCHANGE)
    first = int((encoded.labels != -100).argmax())
    late, early = encoded.labels.copy(), encoded.labels.copy()
    late[first] = -100
    early[first - 1] = encoded.input_ids[first - 1]
    for labels, token, found in (
        (late, 9, "'Hello' (id 295) in training and missing when served"),
        (early, 8, "missing"),
    ):
        contract = check_prompts(tokenizer_of("chatml"), [(conversation, Encoded(encoded.input_ids, labels))])
        (problem,) = contract.problems
        assert f"token {token} of the prompt is {found}" in problem.message


def test_a_template_that_changed_since_training_is_found():
    conversation, encoded = sample("chatml", *EXCHANGE)
    tokenizer = spelled_tokenizer(
        "byte_level",
        FAMILIES["chatml"].template.replace("assistant\n{% endif %}", "assistant\n\n{% endif %}"),
        FAMILIES["chatml"].control_tokens,
        bos=None,
        eos="<|endoftext|>",
    )
    (problem,) = check_prompts(tokenizer, [(conversation, encoded)]).problems
    assert problem.message.startswith("conversation 0: token 8 of the prompt is 'Ċ' (id 202) in training and 'ĊĊ' ")


def test_a_bos_that_is_written_twice_is_found_although_training_has_it_too():
    template = FAMILIES["llama3"].template.replace("{{ bos_token }}", "{{ bos_token + bos_token }}")
    family = FAMILIES["llama3"]
    tokenizer = spelled_tokenizer(family.kind, template, family.control_tokens, bos=family.bos, eos=family.eos)
    conversation, encoded = sample("llama3", *EXCHANGE)
    twice = Encoded(np.insert(encoded.input_ids, 0, 1), np.insert(encoded.labels, 0, -100))
    (problem,) = check_prompts(tokenizer, [(conversation, twice)]).problems
    assert problem.message == "conversation 0: the prompt starts with '<|begin_of_text|>' twice"


def test_the_first_trained_answer_is_what_is_compared():
    messages = [{"role": r, "content": c} for r, c in EXCHANGE]
    messages[1]["weight"] = 0  # type: ignore[assignment]
    weighted = sample("chatml", messages=messages)
    last = sample("chatml", *EXCHANGE, train_on="last_assistant")
    for pair, train_on in ((weighted, "assistant"), (last, "last_assistant")):
        contract = check_prompts(tokenizer_of("chatml"), [pair], train_on)
        assert (contract.problems, contract.prompts) == ((), 1)
        assert contract.prompt_tokens == 9 + 3 + 11
    assert not check_prompts(tokenizer_of("chatml"), [last], "assistant").ok


def test_an_answer_that_would_merge_with_its_prompt_changes_nothing():
    conversation, encoded = sample("words", ("user", "Hi"), ("assistant", "Paris"))
    assert check_prompts(tokenizer_of("words"), [(conversation, encoded)]).ok


def test_what_may_rightly_differ_is_counted_and_not_compared():
    typed = sample("chatml", ("user", "a<|im_end|>b"), ("assistant", "Yes"))
    tools = sample("chatml", *EXCHANGE, tools=TOOLS)
    contract = check_prompts(tokenizer_of("chatml"), [typed, tools, sample("chatml", *EXCHANGE)])
    assert (contract.ok, contract.prompts) == (True, 1)
    assert contract.skipped == {
        "its messages contain control tokens: plain text in training, but a server may interpret them": 1,
        "its tools are inserted as text, because the template takes none": 1,
    }
    assert "1 not compared (its tools are inserted as text" in contract.message
    whole = check_prompts(tokenizer_of("chatml"), [sample("chatml", *EXCHANGE, train_on="all")], "all")
    assert (whole.prompts, whole.skipped, whole.end_token_ids) == (0, {"all tokens are trained": 1}, ())
    assert whole.message == "1 not compared (all tokens are trained)"


def test_tools_are_sent_where_the_template_takes_them():
    pair = sample("qwen25", *EXCHANGE, tools=TOOLS)
    assert check_prompts(tokenizer_of("qwen25"), [pair]).prompts == 1
    conversation = pair[0]
    without = Conversation("chat", conversation.messages, conversation.trainable)
    assert not check_prompts(tokenizer_of("qwen25"), [(without, pair[1])]).ok


def test_an_answer_that_opens_the_conversation_is_compared_with_the_generation_prompt_alone():
    contract = check_prompts(tokenizer_of("chatml"), [sample("chatml", ("assistant", "Hello"), *EXCHANGE)])
    assert (contract.ok, contract.prompt_tokens) == (True, 3)


# The end token


def test_an_end_token_on_which_nothing_stops_is_found():
    tokenizer = tokenizer_of("chatml")
    assert check_end_tokens(tokenizer, [3], 3) == check_end_tokens(tokenizer, [3], [1, 3]) == []
    (problem,) = check_end_tokens(tokenizer, [3, 1], [1])
    assert problem.message == (
        "answers are trained to end with '<|im_end|>' (id 3), but the saved generation config stops on "
        "'<|endoftext|>' (id 1): a server would generate past the end of the answer"
    )
    assert "stops on nothing" in check_end_tokens(tokenizer, [3], None)[0].message


def test_the_generation_config_that_a_run_saves_stops_on_what_was_trained(tmp_path):
    tokenizer = tokenizer_of("chatml")
    model = tiny_llama(len(tokenizer))
    ends = check_prompts(tokenizer, [sample("chatml", *EXCHANGE)]).end_token_ids
    assert check_end_tokens(tokenizer, ends, model.generation_config.eos_token_id) != []
    assert check_end_tokens(tokenizer, ends, generation_config(model, tokenizer, ends).eos_token_id) == []
    save_companions(model, tokenizer, tmp_path, ends)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert check_end_tokens(tokenizer, ends, saved["eos_token_id"]) == []

"""Tokens and labels written out, and properties of every conversation, template and tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from sft.data.encoding.encoder import Encoded, Encoder
from sft.data.formats.conversation import Conversation
from sft.data.formats.normalize import normalize
from sft.data.templates.renderer import ChatRenderer, Rendered
from tests.builders import byte_level_tokenizer, spelled_tokenizer
from tests.template_zoo import FAMILIES, encoder_of, renderer_of, tokenizer_of


def encode(name: str, *turns: tuple[str, str]) -> tuple[Rendered, Encoded]:
    conversation = normalize({"messages": [{"role": role, "content": content} for role, content in turns]})
    assert isinstance(conversation, Conversation)
    rendered = renderer_of(name).render(conversation)
    (encoded,) = encoder_of(name).encode_each([rendered])
    return rendered, encoded


def assert_tokens(tokenizer: PreTrainedTokenizerFast, encoded: Encoded, *segments: str) -> None:
    """`segments` are tokens separated by blanks, alternately masked and supervised; line feeds stay as they are."""
    tokens, trained = [], []
    for number, segment in enumerate(segments):
        for token in segment.split(" "):
            tokens.append(token)
            trained.append(number % 2 == 1)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist()) == tokens
    ids = [tokenizer.get_vocab()[token] for token in tokens]
    assert encoded.labels.tolist() == [i if t else -100 for i, t in zip(ids, trained, strict=True)]
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32


TWO_TURNS = (("user", "Hi"), ("assistant", "Hello Paris"), ("user", "question\n"), ("assistant", "Yes 🎉"))
BLANKS = (("user", " Hi "), ("assistant", "\n Yes\n"))
PARTY = "ð Ł İ ī"
PARTY_BYTES = "<0xF0> <0x9F> <0x8E> <0x89>"
WRITTEN_OUT = {
    "chatml": [
        "<|im_start|> system Ċ Be Ġbrief <|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ",
        "Hello ĠParis <|im_end|>",
        "Ċ <|im_start|> user Ċ question Ċ <|im_end|> Ċ <|im_start|> assistant Ċ",
        f"Yes Ġ {PARTY} <|im_end|>",
        "Ċ",
    ],
    "llama3": [
        "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ Be Ġbrief <|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> ĊĊ Hi <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ",
        "Hello ĠParis <|eot_id|>",
        "<|start_header_id|> user <|end_header_id|> ĊĊ question <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ",
        f"Yes Ġ {PARTY} <|eot_id|>",
    ],
    "gpt2_lines": [
        "<|start_header_id|> system <|end_header_id|> Ċ Ċ Be Ġbrief <|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> Ċ Ċ Hi <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ",
        "Hello ĠParis <|eot_id|>",
        "<|start_header_id|> user <|end_header_id|> Ċ Ċ question <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ",
        f"Yes Ġ {PARTY} <|eot_id|>",
    ],
    "llama2_legacy": [
        "<s> ▁[INST] ▁<<SYS>> \n Be ▁brief \n <</SYS>> \n\n Hi ▁[/INST]",
        "▁Hello ▁Paris ▁ </s>",
        "<s> ▁[INST] ▁question \n ▁[/INST]",
        f"▁Yes ▁ {PARTY_BYTES} ▁ </s>",
    ],
    "llama2": [
        "<s> [INST] ▁<<SYS>> \n Be ▁brief \n <</SYS>> \n\n Hi ▁[/INST]",
        "▁Hello ▁Paris ▁ </s>",
        "<s> [INST] ▁question \n ▁[/INST]",
        f"▁Yes ▁ {PARTY_BYTES} ▁ </s>",
    ],
    "gemma": [
        "<bos> <start_of_turn> user \n Hi <end_of_turn> \n <start_of_turn> model \n",
        "Hello ▁Paris <end_of_turn>",
        "\n <start_of_turn> user \n question <end_of_turn> \n <start_of_turn> model \n",
        f"Yes ▁ {PARTY_BYTES} <end_of_turn>",
        "\n",
    ],
    "phi3": [
        "<|system|> ▁ \n Be ▁brief <|end|> ▁ \n <|user|> ▁ \n Hi <|end|> ▁ \n <|assistant|> ▁ \n",
        "Hello ▁Paris <|end|>",
        "▁ \n <|user|> ▁ \n question \n <|end|> ▁ \n <|assistant|> ▁ \n",
        f"Yes ▁ {PARTY_BYTES} <|end|>",
        "▁ \n <|endoftext|>",
    ],
    "zephyr": [
        "▁ < | system | > \n Be ▁brief </s> \n < | user | > \n Hi </s> \n < | assistant | > \n",
        "Hello ▁Paris </s>",
        "\n < | user | > \n question \n </s> \n < | assistant | > \n",
        f"Yes ▁ {PARTY_BYTES} </s>",
        "\n",
    ],
    "words": [
        "system : ĠBe Ġbrief Ċ user : ĠHi Ċ assistant : Ġ",
        "Hello ĠParis </s>",
        "user : Ġquestion Ċ Ċ assistant : Ġ",
        f"Yes Ġ {PARTY} </s>",
    ],
    "words_metaspace_always": [
        "▁system : ▁Be ▁brief \n user : ▁Hi \n assistant : ▁",
        "Hello ▁Paris </s>",
        "▁user : ▁question \n\n assistant : ▁",
        f"Yes ▁ {PARTY_BYTES} </s>",
    ],
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_tokens_and_labels_of_two_turns(name):
    system = (("system", "Be brief"),) if FAMILIES[name].system else ()
    _, encoded = encode(name, *system, *TWO_TURNS)
    assert_tokens(tokenizer_of(name), encoded, *WRITTEN_OUT[name])


@pytest.mark.parametrize(
    ("name", "segments"),
    [
        ("chatml", ["<|im_start|> user Ċ ĠHi Ġ <|im_end|> Ċ <|im_start|> assistant Ċ", "Ċ ĠYes Ċ <|im_end|>", "Ċ"]),
        ("llama2_legacy", ["<s> ▁[INST] ▁▁ Hi ▁▁ [/INST]", "▁ \n ▁Yes \n ▁ </s>"]),
        ("phi3", ["<|user|> ▁ \n ▁Hi ▁ <|end|> ▁ \n <|assistant|> ▁ \n", "\n ▁Yes \n <|end|>", "▁ \n <|endoftext|>"]),
        ("words_metaspace", ["▁user : ▁▁ Hi ▁ \n assistant : ▁", "\n ▁Yes \n </s>"]),
    ],
)
def test_tokens_and_labels_with_blanks_around_the_texts(name, segments):
    _, encoded = encode(name, *BLANKS)
    assert_tokens(tokenizer_of(name), encoded, *segments)


def test_thoughts_that_the_template_strips_later_are_trained_where_it_shows_them():
    tokenizer = tokenizer_of("thinking")
    turns = [("user", "Hi"), ("assistant", "<think>No</think>\n\nHello"), ("user", "Hi"), ("assistant", "Yes")]
    messages = [{"role": role, "content": content} for role, content in turns]
    conversation = normalize({"messages": messages})
    assert isinstance(conversation, Conversation)
    first, second = Encoder(tokenizer).encode_each(ChatRenderer(tokenizer).render_parts(conversation))
    prompt = "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ"
    assert_tokens(tokenizer, first, prompt, "< t h i n k > No < / t h i n k > Ċ Ċ Hello <|im_end|>", "Ċ")
    assert_tokens(tokenizer, second, f"{prompt} Hello <|im_end|> Ċ {prompt}", "Yes <|im_end|>", "Ċ")


# Where a prompt meets its answer


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.startswith("words")])
def test_a_token_never_spans_a_prompt_and_its_answer(name):
    """`assistant: ` and `Paris` would become `assistant`, `:`, ` Paris`: a token that no prompt ever ends inside."""
    tokenizer = tokenizer_of(name)
    blank = "Ġ" if FAMILIES[name].kind == "byte_level" else "▁"
    rendered, encoded = encode(name, ("user", "Hi"), ("assistant", "Paris"))
    joined = tokenizer.backend_tokenizer.encode(rendered.text, add_special_tokens=False).tokens
    assert joined[-2:] == [f"{blank}Paris", "</s>"]
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    assert tokens == [*joined[:-2], blank, "Paris", "</s>"]
    _, encoded = encode(name, *[("user", "Hi"), ("assistant", "Paris")] * 3)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist()).count("Paris") == 3


@pytest.mark.parametrize(("name", "is_split"), [("gpt2_lines", True), ("llama3", False)])
def test_blanks_that_end_a_prompt_are_the_tokens_of_the_prompt_alone(name, is_split):
    """GPT-2's pattern makes two line feeds one token at a prompt's end, and two before an answer."""
    tokenizer = tokenizer_of(name)
    assert tokenizer.tokenize("Yes\n\n") == ["Yes", "ĊĊ"]
    assert tokenizer.tokenize("\n\nYes") == (["Ċ", "Ċ", "Yes"] if is_split else ["ĊĊ", "Yes"])
    rendered, encoded = encode(name, *TWO_TURNS)
    prompt = tokenizer.backend_tokenizer.encode(rendered.text[: rendered.spans[0][0]], add_special_tokens=False).ids
    assert encoded.input_ids[: len(prompt) + 1].tolist() == [*prompt, tokenizer.get_vocab()["Hello"]]


def test_an_answer_that_starts_like_the_anchor_keeps_all_its_tokens():
    """A line feed put in front of a SentencePiece continuation merges with the answer's own."""
    _, encoded = encode("phi3", ("user", "Hi"), ("assistant", "\n\nYes"))
    assert_tokens(
        tokenizer_of("phi3"),
        encoded,
        "<|user|> ▁ \n Hi <|end|> ▁ \n <|assistant|> ▁ \n",
        "\n\n Yes <|end|>",
        "▁ \n <|endoftext|>",
    )


def test_a_control_token_that_takes_blanks_leaves_those_of_the_answer():
    """Phi-3's `<|assistant|>` is declared with rstrip: it takes the line feed, and would take the answer's blanks."""
    from tokenizers import AddedToken

    tokenizer = spelled_tokenizer("byte_level", FAMILIES["phi3"].template, ("<|user|>", "<|end|>"), bos=None)
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)], special_tokens=True)
    conversation = normalize(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "  Yes"}]}
    )
    assert isinstance(conversation, Conversation)
    (encoded,) = Encoder(tokenizer).encode_each([ChatRenderer(tokenizer).render(conversation)])
    assert_tokens(tokenizer, encoded, "<|user|> Ċ Hi <|end|> Ċ <|assistant|>", "Ġ ĠYes <|end|>", "Ċ </s>")


def test_an_answer_right_after_a_control_token_has_the_blank_that_the_tokenizer_puts_there():
    """Like Mistral v3, without blanks in the template, with the older files of SentencePiece vocabularies."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = spelled_tokenizer("prepend", template, ("[INST]", "[/INST]"))
    conversation = normalize({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]})
    assert isinstance(conversation, Conversation)
    rendered = ChatRenderer(tokenizer).render(conversation)
    one_pass = tokenizer.backend_tokenizer.encode(rendered.text, add_special_tokens=False).tokens
    assert one_pass == ["<s>", "[INST]", "▁Hi", "[/INST]", "▁Yes", "</s>"]
    (encoded,) = Encoder(tokenizer).encode_each([rendered])
    assert_tokens(tokenizer, encoded, "<s> [INST] ▁Hi [/INST]", "▁Yes </s>")


# Properties of every conversation

CONTROL = ("<|", "<s>", "</s>", "<bos>", "<eos>", "_of_turn>", "▁", "<unk>", "</think>", "<0x")
texts = st.one_of(
    st.sampled_from(
        ["Paris", " Paris", "\n\nYes", "Yes No ", "é🎉", "Yes.\n", "\u2028", "a  b", "  ", "12 34", "<<SYS>>"]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=("Co",)), min_size=1, max_size=12),  # type: ignore[arg-type]
).filter(lambda text: not any(control in text for control in CONTROL))
answers = texts.filter(str.strip)


def spell(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of exactly these tokens; `decode` of a SentencePiece vocabulary drops a leading blank."""
    return tokenizer.backend_tokenizer.decoder.decode(tokenizer.convert_ids_to_tokens(ids))


@given(st.lists(st.tuples(texts, answers), min_size=1, max_size=2))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_training_on_all_trains_every_token_but_the_first(exchanges):
    tokenizer = tokenizer_of("chatml")
    messages = [{"role": r, "content": c} for q, a in exchanges for r, c in (("user", q), ("assistant", a))]
    conversation = normalize({"messages": messages})
    assert isinstance(conversation, Conversation)
    rendered = ChatRenderer(tokenizer).render(conversation, "all")
    (encoded,) = Encoder(tokenizer).encode_each([rendered])
    assert encoded.labels.tolist() == [-100, *encoded.input_ids[1:].tolist()]
    assert spell(tokenizer, encoded.input_ids.tolist()) == rendered.text


# Texts


def documents(*texts: str) -> list[Rendered]:
    return [Rendered(text, [(0, len(text))], is_document=True) for text in texts]


def test_all_tokens_of_a_text_are_trained_and_eos_is_appended():
    tokenizer = byte_level_tokenizer(None)
    plain, ended = Encoder(tokenizer).encode_each(documents("Paris", "Paris<|endoftext|>"))
    ids = tokenizer.encode("Paris")
    assert plain.input_ids.tolist() == ended.input_ids.tolist() == [*ids, tokenizer.eos_token_id]
    assert plain.labels.tolist() == [-100, *ids[1:], tokenizer.eos_token_id]


def test_a_text_gets_the_bos_that_the_tokenizer_sets():
    tokenizer = spelled_tokenizer("metaspace_first")
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    (encoded,) = Encoder(tokenizer).encode_each(documents("Paris Yes"))
    assert_tokens(tokenizer, encoded, "<s>", "▁Paris ▁Yes </s>")


def test_truncation_and_padding_set_in_the_tokenizer_file_are_ignored():
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    (encoded,) = Encoder(tokenizer).encode_each(documents("Paris is the capital of France."))
    assert tokenizer.decode(encoded.input_ids) == "Paris is the capital of France.<|endoftext|>"

"""Prompt templates: where they are found, what they must hold, how many tokens they have."""

from __future__ import annotations

import pytest

from llmrec.errors import ConfigError
from llmrec.finetune.prompt import read_template, tokenize, tokenize_words


@pytest.mark.real_data
def test_the_published_prompts_have_the_published_lengths(real_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_data.parent / "models" / "llama3-tokenizer")
    chat = tokenize("chat", tokenizer)
    assert (len(chat.instruction), len(chat.response)) == (33, 4)
    short = tokenize("official17", tokenizer)
    assert (len(short.instruction), len(short.response)) == (17, 4)
    assert chat.instruction[0] == tokenizer.bos_token_id
    assert chat.response == short.response


def test_braces_are_written_twice():
    before, _ = read_template("official17")
    assert before.startswith("<|begin_of_text|>{ Given")


def test_words_get_one_id_each_and_repeat(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('text = "<|go|> buy, buy: {history} then buy"\n')
    prompt = tokenize_words(str(path))
    assert prompt.instruction == [0, 1, 2, 1, 3] and prompt.response == [4, 1]
    assert prompt.vocab_size == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text = 'no slot'", r"\{history\} exactly once"),
        ("text = '{history} and {history}!'", r"\{history\} exactly once"),
        ("text = 'nothing after {history} '", "something must follow"),
        ("source = 'x'", r"`text` must be a string"),
        ("text = 3", r"`text` must be a string"),
        ("text = {", "is not a TOML file"),
    ],
)
def test_bad_templates_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_template(str(path))
    assert "bad.toml" in str(caught.value)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"known: chat, chatml, compact, gemma, mistral, official17"):
        read_template("chatty")
    with pytest.raises(ConfigError, match="no such file"):
        read_template(str(tmp_path / "absent.toml"))


@pytest.mark.real_data
def test_markers_foreign_to_the_tokenizer_are_refused(real_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_data.parent / "models" / "all-MiniLM-L6-v2")
    with pytest.raises(ConfigError, match=r"<\|begin_of_text\|>, which is not a token"):
        tokenize("chat", tokenizer)

"""Bytes in, bytes out: against str.encode, and through a saved artifact directory."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from pipeline.models.byte_tokenizer import byte_tokenizer, is_byte_tokenizer

HOSTILE = "def  f( x ) :\r\n\t'naïve ☃ \U0001f600' , don 't . <s> </s> <pad> <|endoftext|>\x00\x7f\x80 \n\n"
TOKENIZER = byte_tokenizer()


def test_every_id_is_its_byte() -> None:
    assert len(TOKENIZER) == 256
    assert TOKENIZER(HOSTILE)["input_ids"] == list(HOSTILE.encode())
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(256))
    assert TOKENIZER.all_special_ids == []


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_cut_characters_decode_to_the_replacement_character_without_error() -> None:
    assert TOKENIZER.decode([0x61, 0xE2, 0x98]) == b"a\xe2\x98".decode(errors="replace")


def test_auto_tokenizer_reopens_it_beside_an_opt_config(tmp_path: Path) -> None:
    OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    reopened = AutoTokenizer.from_pretrained(tmp_path)
    assert OPTForCausalLM.config_class.model_type == "opt"
    assert len(reopened) == 256
    assert reopened(HOSTILE)["input_ids"] == list(HOSTILE.encode())
    assert reopened.decode(list(HOSTILE.encode())) == HOSTILE
    assert (reopened.bos_token_id, reopened.eos_token_id, reopened.pad_token_id) == (None, None, None)
    assert is_byte_tokenizer(reopened)


def test_a_byte_tokenizer_with_an_added_token_is_not_taken_for_plain_bytes() -> None:
    changed = byte_tokenizer()
    changed.add_special_tokens({"eos_token": "<s>"})
    assert is_byte_tokenizer(TOKENIZER)
    assert not is_byte_tokenizer(changed)

"""Prompts as ids: the reference's prefixes, the built-in tokenizers, hostile prompts."""

import io
import json
import logging

import numpy as np
import pytest
from golden.loading import GOLDEN

from tokenflow_jax.data import text
from tokenflow_jax.data.built_in_text import ByteTokenizer, WordsAndBytes
from tokenflow_jax.data.text import PromptEncoder

REFERENCE = json.loads((GOLDEN / "t2i_prompts.json").read_text(encoding="utf-8"))


class Llama2Table:
    """LLaMA-2's tokenizer for the recorded texts: its real ids, without its files."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def __len__(self):
        return 32000

    def encode(self, prompt, add_special_tokens=True):
        marks = {text.OPEN: REFERENCE["img_start_ids"], text.CLOSE: REFERENCE["img_end_ids"]}
        if prompt in marks:
            assert not add_special_tokens
            return marks[prompt]
        return next(c["encoded"] for c in REFERENCE["cases"] if c["text"] == prompt)


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda c: str(c["max_text_tokens"]))
def test_prefix_is_the_reference_s(case):
    encoder = PromptEncoder(Llama2Table(), case["max_text_tokens"])
    np.testing.assert_array_equal(encoder.encode(case["text"]), case["generation_ids"])
    assert encoder.prefix_length + 1 == case["prefix_len_plus_one"]
    assert bool(encoder.cut_notes()) == (len(case["encoded"]) > case["max_text_tokens"])


def test_ids_around_the_prompt_are_the_reference_s():
    encoder = PromptEncoder(Llama2Table(), 16)
    assert (encoder.pad_id, encoder.image_start) == (32000, 32001)
    assert encoder.close_ids == tuple(REFERENCE["img_end_ids"])
    assert (encoder.start_id, encoder.end_id) == (1, 2)
    (first, *_) = REFERENCE["cases"]
    codes = [encoder.image_start + code for code in first["training_codes"]]
    prefix = PromptEncoder(Llama2Table(), 128).encode(first["text"])
    whole = [*prefix, *codes, *encoder.close_ids, encoder.end_id]
    np.testing.assert_array_equal(whole, first["training_ids"])


def test_byte_prefix():
    encoder = PromptEncoder(ByteTokenizer(), 8)
    assert (encoder.pad_id, encoder.image_start) == (0, 259)
    marks = [byte + 3 for byte in b"<img>"]
    np.testing.assert_array_equal(encoder.encode("ab"), [0, 0, 0, 0, 0, 1, 100, 101, *marks])
    np.testing.assert_array_equal(encoder.encode(""), [0] * 7 + [1, *marks])
    batch = encoder.encode_all(["", "ab"])
    assert (batch.shape, batch.dtype) == ((2, 13), np.int32)


def test_long_prompts_are_cut_named_once_and_counted(caplog):
    encoder = PromptEncoder(ByteTokenizer(), 8)
    with caplog.at_level(logging.WARNING):
        for prompt in ("a much longer one", "and another, longer still", "a much longer one", "ab"):
            ids = encoder.encode(prompt)
            assert len(ids) == encoder.prefix_length
    np.testing.assert_array_equal(encoder.encode("abcdefghij")[:8], encoder.encode("abcdefg")[:8])
    assert sum("is cut to the 8" in r.getMessage() for r in caplog.records) == 1
    (note,) = encoder.cut_notes()
    assert note.startswith("3 different prompts") and "longest has 26" in note


class Startless(ByteTokenizer):
    """Like Qwen's: no start id, and padding that is also the end."""

    bos_token_id = None
    pad_token_id = 2

    def encode(self, prompt, add_special_tokens=True):
        return super().encode(prompt, add_special_tokens=False)


def test_without_a_start_id_prompts_start_with_the_end_and_pad_with_a_new_id():
    encoder = PromptEncoder(Startless(), 4)
    assert (encoder.pad_id, encoder.image_start) == (259, 260)
    np.testing.assert_array_equal(encoder.encode("a")[:4], [259, 259, 2, 100])


def test_bad_prompts_and_budgets():
    encoder = PromptEncoder(ByteTokenizer(), 8)
    with pytest.raises(ValueError, match="text is wanted, not NoneType: None"):
        encoder.encode(None)
    with pytest.raises(ValueError, match="budget 0 must be at least 1"):
        PromptEncoder(ByteTokenizer(), 0)


def test_loading(tmp_path):
    assert isinstance(text.load_text_tokenizer("bytes"), ByteTokenizer)
    assert isinstance(text.load_text_tokenizer("words_and_bytes"), WordsAndBytes)
    with pytest.raises(ValueError, match=r"is not 'bytes', 'words', 'words_and_bytes' or a folder"):
        text.load_text_tokenizer("meta-llama/Llama-2-7b-hf")
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="holds no text tokenizer"):
        text.load_text_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer", "BertTokenizer"])
def test_a_folder_without_a_vocabulary_is_refused(tmp_path, kind):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(ValueError, match=f"{tmp_path}.*(vocabulary is missing|holds no text)"):
        text.load_text_tokenizer(tmp_path)


def test_code_of_a_tokenizer_folder_never_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizer\n"
        "class Own(PreTrainedTokenizer): pass\n"
    )
    automatic = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(automatic))
    (tmp_path / "config.json").write_text('{"model_type": "own"}')
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match="without running code"):
        text.load_text_tokenizer(tmp_path)
    assert not ran.exists()


def test_a_folder_of_hugging_face(tmp_path):
    """A byte-level vocabulary as transformers saves it, opened without network."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(tmp_path)
    encoder = PromptEncoder(text.load_text_tokenizer(tmp_path), 12)
    assert (encoder.pad_id, encoder.image_start) == (258, 259)
    ids = encoder.encode("née")
    assert list(ids[:8]) == [258] * 7 + [0]  # a start id, though this one puts none
    assert encoder.text_tokenizer.decode(ids[8:12]) == "née"


def test_half_a_surrogate_pair_reaches_no_text_tokenizer():
    class Strict(ByteTokenizer):  # as those of Hugging Face
        def encode(self, text, add_special_tokens=True):
            text.encode()
            return super().encode(text, add_special_tokens)

    prefix = PromptEncoder(Strict(), 8).encode("a\ud83d")
    assert ByteTokenizer().decode(prefix, skip_special_tokens=True) == "a?<img>"

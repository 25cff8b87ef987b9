"""Names of tokens: the text that each adds, spaces in front included, whatever kind of tokenizer it is."""

from typing import Any

import pytest
import torch

from fasttc.attribution.prompt import token_names

TEXT = "the patient's pain, they said: pains"


def _fast(backend: Any, **special: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def names_of(tokenizer: Any, text: str) -> list[str]:
    return token_names(torch.tensor(tokenizer(text)["input_ids"]), tokenizer)


def test_sentencepiece_words_keep_their_spaces(shared_data):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "models/stories260K")
    names = names_of(tokenizer, "Once upon a time, Lily\u00e4\u4e00s dog")
    assert names[:7] == ["<s>", " Once", " upon", " a", " time", ",", " Lily"]
    assert names[-3:] == ["s", " do", "g"]
    assert names.count("\ufffd") >= 3  # the bytes of one character
    every = token_names(torch.arange(len(tokenizer)), tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(list(range(3 + 256, len(tokenizer))))
    assert every[3 + 256 :] == [piece.replace("\u2581", " ") for piece in pieces]


def test_byte_level_pairs():
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    backend.train_from_iterator([TEXT] * 20, trainer)
    tokenizer = _fast(backend, eos_token="<end>")
    names = names_of(tokenizer, TEXT + "\n")
    assert "".join(names) == TEXT + "\n"
    assert " patient" in names
    assert token_names(torch.tensor([tokenizer.eos_token_id]), tokenizer) == ["<end>"]
    assert names_of(tokenizer, "\u00e9") == ["\ufffd", "\ufffd"]


def test_word_pieces():
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "[CLS]", "##s", ",", "the", "pain", "patient", "##ing", "they"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    tokenizer = _fast(backend, cls_token="[CLS]", unk_token="[UNK]")
    assert names_of(tokenizer, "the pains, paining") == [" the", " pain", "s", ",", " pain", "ing"]
    assert token_names(torch.tensor([1, 0]), tokenizer) == ["[CLS]", "[UNK]"]


def test_whole_words_and_none(tiny_tokenizer):
    assert names_of(tiny_tokenizer, "t4 t60 t4") == ["<bos>", " t4", " t60", " t4"]
    assert token_names(torch.tensor([4, 2]), None) == ["4", "2"]
    assert token_names(torch.tensor([], dtype=torch.int64), tiny_tokenizer) == []


class _OnlySpecial:
    """No token of it is a word."""

    all_special_ids = (0,)

    def __len__(self) -> int:
        return 2

    def decode(self, ids: list[int]) -> str:
        return "".join("#!"[number] for number in ids)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [self.decode(ids) for ids in rows]


def test_without_any_word_tokens_stand_alone():
    assert token_names(torch.tensor([1, 0]), _OnlySpecial()) == ["!", "#"]

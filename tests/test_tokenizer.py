"""Text survives every tokenizer, what was saved loads the same, and no file can do harm."""

import json
import random
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken
from test_hostile import within_limits

import tokenizer as module
from huggingface import read_hf_tokenizer, tokenizer_to_hf
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, StreamDecoder, load_tokenizer

TEXTS = [
    "",
    "Hello, world! It's 2019; they'll   come.\n\n\tyes\r\n",
    "红楼梦：满纸荒唐言，一把辛酸泪。都云作者痴，谁解其中味？",
    "😀👩‍👩‍👧 ça coûte 5 €, e\u0301 \u3000 ｶﾅ 한국어",
    "".join(map(chr, range(32))) + "\x7f\x80\x85\xa0",
    "plain <|endoftext|> text",
    "\ufeff\ufffd\uffff\U0010ffff",
]
ALL = "".join(TEXTS)
# what GPT-2's rule for words treats specially, and what Unicode versions may disagree on
SPECIAL = [*" '\n\t\rsdtmlrve.,!?aéñ0中文字，。😀\u3000\x1c\x85\xa0١\u0301\u200d"]
SPECIAL += ["'ll", "   ", "\n\n"]


def nasty_text(seed, length):
    return "".join(random.Random(seed).choices(SPECIAL, k=length))


@pytest.fixture(scope="session")
def gpt2(gpt2_vocabulary):
    return GPT2Tokenizer()


@pytest.fixture(scope="module", params=["char", "bpe", "gpt2"])
def tokenizer(request):
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2")
    is_char = request.param == "char"
    return CharTokenizer.train(ALL) if is_char else BPETokenizer.train([ALL * 3, ALL], 400)


def test_text_survives_encoding_and_decoding(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids)) == text
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    for wrong in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(ValueError, match=f"token id {wrong} is not below"):
            tokenizer.decode([0, wrong])


def test_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for source in tmp_path / "tokenizer.json", tokenizer.to_dict():
        loaded = load_tokenizer(source)
        assert type(loaded) is type(tokenizer) and loaded.hash() == tokenizer.hash()
        assert loaded.encode(ALL) == tokenizer.encode(ALL)
        assert (loaded.vocab_size, loaded.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)


def test_streamed_text_equals_decoded_text_for_random_ids(tokenizer):
    rng = random.Random(0)
    decoder = StreamDecoder(tokenizer)
    for _ in range(1000):
        # ids below 256 are single bytes: most sequences are broken UTF-8
        top = rng.choice([256, tokenizer.vocab_size]) if tokenizer.kind != "char" else 20
        ids = [rng.randrange(top) for _ in range(rng.randrange(30))]
        streamed = "".join([decoder.push(i) for i in ids]) + decoder.flush()
        assert streamed == tokenizer.decode(ids)
    bpe = BPETokenizer.train("abc", 257)  # bytes alone: an emoji is four ids
    assert [*map(StreamDecoder(bpe).push, bpe.encode("😀!"))] == ["", "", "", "😀", "!"]


def test_char_vocabulary_is_the_sorted_characters_and_an_unknown_one_is_named():
    char = CharTokenizer.train("hello\n")
    assert char.characters == ["\n", "e", "h", "l", "o"] and char.eot_id is None
    assert char.encode("hole") == [2, 4, 3, 1]
    for text, where in [("hé", r"U\+00E9 'é'"), ("h😀", r"U\+1F600 '😀'"), ("h\udcff", r"U\+DCFF")]:
        with pytest.raises(ValueError, match=rf"^character {where}.* at position 1 .* \(5 char"):
            char.encode(text)
    with pytest.raises(ValueError, match=r"U\+0061 'a' at position 0 .* \(0 characters\)"):
        CharTokenizer.train("").encode("a")


def test_bpe_has_all_bytes_then_merges_then_end_of_text_and_no_more_than_there_is():
    bpe = BPETokenizer.train("low lower lowest " * 10, 261)
    assert bpe.vocab_size == 261 and bpe.eot_id == 260 and len(bpe.encode(" low")) < 4
    assert sorted(bpe.decode_bytes([i]) for i in range(256)) == [bytes([b]) for b in range(256)]
    assert bpe.decode([260]) == "<|endoftext|>" and 260 not in bpe.encode("<|endoftext|>")
    text = nasty_text(3, 20_000)
    assert len({BPETokenizer.train([text, text[:500]], 500).hash() for _ in range(3)}) == 1
    assert BPETokenizer.train("abcdefg", 1000).vocab_size == 257  # no pair occurs twice
    one_word = "".join(random.Random(0).choices("ACGT", k=200_000))
    assert BPETokenizer.train(one_word, 400).vocab_size == 400  # and soon


def test_gpt2_equals_tiktoken(gpt2):
    """Also where runs of white space of every kind are split."""
    reference, spaces = tiktoken.get_encoding("gpt2"), map(chr, range(0x10000))
    units = [*filter(str.isspace, spaces), *"a1!'s   \n\n\0\u180e\u200b\ufeffé", "\0\0"]
    runs = ("".join(random.Random(seed).choices(units, k=12)) for seed in range(3000))
    for text in [*TEXTS, *(nasty_text(seed, 60) for seed in range(2000)), *runs]:
        assert gpt2.encode(text) == reference.encode_ordinary(text), text
    assert gpt2.encode("Hello, world") == [15496, 11, 995]
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"


def test_gpt2_without_a_network_or_with_one_that_never_answers(gpt2, monkeypatch):
    fields, answer = gpt2.to_dict(), threading.Event()
    monkeypatch.setattr(module, "DOWNLOAD_SECONDS", 0.05)
    for get in (Mock(side_effect=OSError("no network")), lambda name: answer.wait()):
        monkeypatch.setattr(tiktoken, "get_encoding", get)
        assert load_tokenizer(fields).encode("Hello, world") == [15496, 11, 995]
        with pytest.raises(ValueError, match=r"^.*TIKTOKEN_CACHE_DIR.*--tokenizer bpe$"):
            GPT2Tokenizer()
    answer.set()


def test_safe_cut_changes_no_token_and_finds_the_last_place(tokenizer):
    cuts = 0
    for seed in range(3000):
        text = nasty_text(seed, 40) if tokenizer.kind != "char" else ALL[seed % 50 :]
        cut = tokenizer.safe_cut(text)
        cuts += 0 < cut < len(text)
        parts = tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:])
        assert parts == tokenizer.encode(text), (text, cut)
    if tokenizer.kind != "char":
        texts = ("one two three", "他说，好的。再见", "x" * 1000, "", " " * 1000)
        assert cuts > 2000 and [*map(tokenizer.safe_cut, texts)] == [7, 0, 0, 0, 0]


CHAR = {"format": 1, "kind": "char", "characters": ["a", "b"]}
BPE = BPETokenizer.train("low low", 258).to_dict()
DAMAGED = {
    "unknown kind": CHAR | {"kind": "word"},
    "another format": CHAR | {"format": 2},
    "no characters": {"format": 1, "kind": "char"},
    "no tokens": {"format": 1, "kind": "gpt2"},
    "two in one": CHAR | {"characters": ["ab"]},
    "twice": CHAR | {"characters": ["a", "b", "a"]},
    "empty token": BPE | {"tokens": BPE["tokens"] + "  lo"},
    "strange symbol": BPE | {"tokens": BPE["tokens"] + " 中"},
    "a byte missing": BPE | {"tokens": BPE["tokens"].removeprefix("! ")},
    "an id twice": BPE | {"special": {"<a>": 257, "<b>": 257}},
    "special beyond": BPE | {"special": {"<eot>": 9999}},
    "a million tokens": BPE | {"tokens": BPE["tokens"] + " a" * 2**20},
    "20,000 special tokens": BPE | {"special": {f"<{i}>": 257 + i for i in range(20_000)}},
    "two million characters": CHAR | {"characters": ["a", "b"] * 2**20},
    "20 MB": b"[" * 20_000_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_refused_by_name_within_limits(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    def refused():
        with pytest.raises(ValueError, match=r"tokenizer\.json( cannot be used)?: .") as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

    within_limits(refused)


def theirs(tokens, special, normalizer=None):
    """A tokenizer.json as Hugging Face's library writes it; each token is the last one twice."""
    spec = json.loads(tokenizer_to_hf(BPETokenizer(module.SYMBOLS)).to_str())
    long = [token for token in tokens if len(token) > 1]
    spec["model"]["vocab"] = {token: i for i, token in enumerate(tokens)} | special
    spec["model"]["merges"] = [[token[: len(token) // 2]] * 2 for token in long]
    added = [spec["added_tokens"][0] | {"id": i, "content": text} for text, i in special.items()]
    return json.dumps(spec | {"normalizer": normalizer, "added_tokens": added})


LONG = [*module.SYMBOLS, *("a" * 2**n for n in range(1, 18))]  # the last of 131,072 symbols
PANIC = {"type": "Precompiled", "precompiled_charsmap": ""}
THEIRS = {  # what is said: tokenizer.json, the model's tokens
    "BPETokenizer object": (theirs(module.SYMBOLS, {"<e>": 256}), 257),
    "must be distinct, short": (theirs(LONG, {"<e>": 273}), 274),
    "at most 1000 characters": (theirs(module.SYMBOLS, {"x" * 10**7: 256}), 257),
    "tokens, not 16,777,216": (theirs(module.SYMBOLS, {"<e>": 256}), 2**24),
    "its normalizer": (theirs(module.SYMBOLS, {"<e>": 256}, PANIC), 257),
}


@pytest.mark.parametrize("said", THEIRS)
def test_hugging_faces_tokenizers_are_read_or_left_out_within_limits(said, tmp_path, capfd):
    text, size = THEIRS[said]
    (tmp_path / "tokenizer.json").write_text(text)
    within_limits(lambda: print(read_hf_tokenizer(tmp_path, size)))
    printed = "".join(capfd.readouterr())
    assert "panicked" not in printed and said in printed

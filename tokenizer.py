"""Text to ids and back: by characters, by a BPE trained on the text, or by GPT-2's own BPE.

    from tokenizer import BPETokenizer, GPT2Tokenizer, load_tokenizer
    ids = GPT2Tokenizer().encode("Hello, world")
    BPETokenizer.train(text, vocab_size=4096).save("tokenizer.json")
    text = load_tokenizer("tokenizer.json").decode(ids)

A saved tokenizer is one JSON object and whole: nothing else is needed to use it again.
"""

import codecs
import hashlib
import json
import math
import os
import re
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

FORMAT = 1  # of the JSON; raised when an older reader would misread a newer file
END_OF_TEXT = "<|endoftext|>"
DOWNLOAD_SECONDS = 30  # for GPT-2's vocabulary, 1.5 MB; from tiktoken's cache it takes under one

# GPT-2's rule for words (Radford 2019): contractions, letters, digits, other signs, each with the
# space before it, and white space. GPT-2's own last rules, \s+(?!\S)|\s, leave the last sign of a
# run of white space to the word after it; we cut the text there (_cut_runs), and a rule without
# looking ahead takes half the time.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+)|\s+"
CUT = "\0"  # stands between the parts of a text while it is encoded
# all that \s matches: Unicode's White_Space
SPACES = [*range(9, 14), *range(0x2000, 0x200B)]
SPACES = [*SPACES, 0x20, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
IS_SPACE = np.isin(np.arange(0x3002), SPACES)  # the last place stands for all code points above

# Where no word of WORDS can reach across, whatever comes later: before white space that follows a
# sign, and between a letter and punctuation. Only characters that every Unicode version has where
# this needs them. The greedy .* makes it the last such place.
LAST_CUT = re.compile(
    r"(?s:.*)(?:(?<=\S)(?=[ \t\r\n\u3000])"
    r"|(?<=[A-Za-z\xc0-\xd6\xd8-\xf6\xf8-\xff\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])"
    r"(?=[!-/:-@\[-`{-~\u3001\u3002\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f\u201c\u201d\u2026]))"
)

# GPT-2 writes each byte as one printable character (a space is Ġ), and so do we, in tokens on disk.
# Their order is that of its first 256 ids: the printable bytes, then the others.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
SYMBOLS = [chr(byte) for byte in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]
BYTE_OF = dict(zip(SYMBOLS, BYTES, strict=True))
SYMBOL_OF = dict(zip(BYTES, SYMBOLS, strict=True))


class CharTokenizer:
    """Every character of the vocabulary is a token; ids are in the order of the code points."""

    kind = "char"
    eot_id = None

    def __init__(self, characters: list[str]):
        self.characters = characters
        self.vocab_size = len(characters)
        codes = np.array([ord(character) for character in characters], dtype=np.int64)
        # code point -> id, -1 for a stranger; the last place stands for all code points above
        self._id_of = np.full(codes.max(initial=-1) + 2, -1, dtype=np.int32)
        self._id_of[codes] = np.arange(len(codes))

    @classmethod
    def train(cls, text) -> "CharTokenizer":
        """The characters that occur in text (a string, or any iterable of characters)."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """Ids of text; ValueError naming a character that is not in the vocabulary."""
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._id_of[np.minimum(codes, len(self._id_of) - 1)]
        if ids.min(initial=0) < 0:
            position = int(np.argmax(ids < 0))
            raise ValueError(
                f"character U+{codes[position]:04X} {text[position]!r} at position {position} "
                f"is not in the vocabulary ({self.vocab_size} characters)"
            )
        return ids.astype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def decode(self, ids) -> str:
        """Text of ids; ValueError naming an id that is out of range."""
        return "".join([self.characters[i] for i in _checked(ids, self.vocab_size)])

    def safe_cut(self, text: str) -> int:
        """Where text can be cut without changing its tokens: anywhere, so at its end."""
        return len(text)

    def to_dict(self) -> dict:
        return {"format": FORMAT, "kind": self.kind, "characters": self.characters}

    @classmethod
    def from_dict(cls, fields: dict) -> "CharTokenizer":
        characters = fields.get("characters")
        if not isinstance(characters, list) or not all(
            isinstance(character, str) and len(character) == 1 for character in characters
        ):
            raise ValueError("'characters' is not a list of single characters")
        _refuse_duplicates(characters)
        return cls(characters)

    def save(self, path):
        _save(self.to_dict(), path)

    def hash(self) -> str:
        """sha256 of what save writes."""
        return hashlib.sha256(_canonical_json(self.to_dict())).hexdigest()


class BPETokenizer:
    """Byte-level BPE: 256 bytes, then the merges in the order of their learning, then end of text.

    `tokens` are spelt in SYMBOLS and stand at their ids. Text is never refused: whatever looks
    like <|endoftext|> in it is encoded as plain text, and half a surrogate pair as U+FFFD.

    A vocabulary from elsewhere may have other special tokens, at any ids: `special` is text -> id,
    `eot` the text of the one that ends a document. `tokens` then fill the other ids, in order.
    """

    kind = "bpe"

    def __init__(self, tokens: list[str], special: dict[str, int] | None = None, eot=END_OF_TEXT):
        self.tokens = tokens
        self.special = {END_OF_TEXT: len(tokens)} if special is None else special
        self.eot = eot if eot in self.special else None
        self.eot_id = self.special.get(eot)
        self.vocab_size = len(tokens) + len(self.special)
        free = sorted(set(range(self.vocab_size)) - set(self.special.values()))
        self.id_of = dict(zip(tokens, free, strict=True))
        ranks = {bytes([BYTE_OF[symbol] for symbol in t]): i for t, i in self.id_of.items()}
        self._encoding = tiktoken.Encoding(
            self.kind,
            pat_str=WORDS,
            mergeable_ranks=ranks,
            special_tokens=self.special | {CUT: self.vocab_size},
        )

    @classmethod
    def train(cls, text, vocab_size: int) -> "BPETokenizer":
        """Learn merges from text (a string, or an iterable of strings); the same text, the same
        merges. There may be fewer than asked: a pair that occurs once is not merged.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # only for this

        if vocab_size < 257:
            raise ValueError(
                f"--vocab_size {vocab_size}: a BPE needs at least 257, 256 bytes and {END_OF_TEXT}"
            )
        learner = Tokenizer(models.BPE())
        # a "word" of a megabyte (a DNA sequence, a page of Chinese) would take hours to merge
        learner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(100)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=SYMBOLS,
            show_progress=False,
        )
        learner.train_from_iterator([text] if isinstance(text, str) else text, trainer)
        id_of = learner.get_vocab()
        return cls(sorted(id_of, key=id_of.get))

    def encode(self, text: str) -> list[int]:
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Ids of text, uint32; other threads run meanwhile."""
        try:
            parts = _cut_runs(text)
        except UnicodeEncodeError:
            parts = _cut_runs(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        if CUT in text:
            return np.concatenate([self._encode_part(part) for part in parts])
        ids = self._encode_part(CUT.join(parts), allowed_special={CUT})
        return ids[ids < self.vocab_size]

    def _encode_part(self, part, **special):
        return self._encoding.encode_to_numpy(part, disallowed_special=(), **special)

    def decode(self, ids) -> str:
        """Text of ids, U+FFFD for bytes that are not UTF-8; ValueError for an id out of range."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids) -> bytes:
        return self._encoding.decode_bytes(_checked(ids, self.vocab_size))

    def safe_cut(self, text: str) -> int:
        """The last place where text can be cut so that its parts, encoded one by one, give the
        tokens of the whole; 0 where there is none.
        """
        found = LAST_CUT.match(text)
        return found.end() if found else 0

    def merges(self) -> list[list[str]]:
        """For each token but the bytes the two that are merged into it, in the order of learning.

        ValueError naming a token that no merging of earlier ones makes.
        """
        return [_last_two(token, self.id_of) for token in self.tokens if len(token) > 1]

    def to_dict(self) -> dict:
        fields = {"format": FORMAT, "kind": self.kind, "tokens": " ".join(self.tokens)}
        if (self.special, self.eot) != ({END_OF_TEXT: len(self.tokens)}, END_OF_TEXT):
            fields |= {"special": self.special, "eot": self.eot}
        return fields

    @classmethod
    def from_dict(cls, fields: dict) -> "BPETokenizer":
        if not isinstance(fields.get("tokens"), str):
            raise ValueError("'tokens' is not a string of tokens")
        tokens = fields["tokens"].split(" ")
        for token in tokens:
            if not token or not BYTE_OF.keys() >= set(token):
                raise ValueError(f"token {token!r} is not spelt in GPT-2's 256 symbols")
        _refuse_duplicates(tokens)
        if not set(tokens) >= set(SYMBOLS):
            raise ValueError("some of the 256 bytes have no token")
        if "special" not in fields:
            return cls(tokens)
        special = fields["special"]
        if type(special) is not dict or not all(type(i) is int for i in special.values()):
            raise ValueError("'special' is not a dict of texts and ids")
        free = range(len(tokens) + len(special))
        if len({i for i in special.values() if i in free}) < len(special):
            raise ValueError("'special' has ids that are taken or out of range")
        return cls(tokens, special, fields.get("eot"))

    def save(self, path):
        _save(self.to_dict(), path)

    def hash(self) -> str:
        """sha256 of what save writes."""
        return hashlib.sha256(_canonical_json(self.to_dict())).hexdigest()


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own vocabulary of 50,257: from tiktoken, or from what an earlier one has saved."""

    kind = "gpt2"

    def __init__(self, tokens: list[str] | None = None):
        tokens = _gpt2_tokens() if tokens is None else tokens
        if len(tokens) != 50256:
            raise ValueError(f"GPT-2 has 50,256 tokens and {END_OF_TEXT}, not {len(tokens):,}")
        super().__init__(tokens)


def _last_two(token, rank):
    """The two parts at which merging the token's bytes, lowest rank first, arrives before it."""
    parts = list(token)
    while len(parts) > 2:
        ranks = [rank.get(a + b, math.inf) for a, b in pairwise(parts)]
        lowest = min(ranks)
        if lowest >= rank[token]:
            break
        i = ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) > 2:
        raise ValueError(f"token {token!r} is not made of two earlier ones")
    return parts


def _cut_runs(text) -> list[str]:
    """text, cut before the last sign of white space of each run that a word follows."""
    if text.isascii():
        codes = np.frombuffer(text.encode(), dtype=np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    space = IS_SPACE.take(codes, mode="clip")
    cuts = np.flatnonzero(space[:-2] & space[1:-1] & ~space[2:]) + 1
    return [text[i:j] for i, j in pairwise([0, *cuts.tolist(), len(text)])]


def _gpt2_tokens():
    """GPT-2's tokens from tiktoken, which downloads them once.

    In a thread, because tiktoken waits for a silent network without end.
    """
    found = []

    def load():
        try:
            found.append(tiktoken.get_encoding("gpt2"))
        except (OSError, ValueError) as error:
            found.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    encoding = found[0] if found else TimeoutError()
    if isinstance(encoding, Exception):
        raise ValueError(
            f"GPT-2's vocabulary cannot be downloaded ({type(encoding).__name__}); set "
            "TIKTOKEN_CACHE_DIR to a folder where tiktoken has it, or use --tokenizer bpe"
        )
    tokens = map(encoding.decode_single_token_bytes, range(encoding.eot_token))
    return ["".join([SYMBOL_OF[byte] for byte in token]) for token in tokens]


KINDS = {kind.kind: kind for kind in (CharTokenizer, BPETokenizer, GPT2Tokenizer)}


def load_tokenizer(source) -> CharTokenizer | BPETokenizer | GPT2Tokenizer:
    """The tokenizer of a file that save wrote, or of a dict from to_dict.

    Raises ValueError naming the file where its content is anything else.
    """
    from_dict = isinstance(source, dict)
    name = "tokenizer" if from_dict else str(source)
    try:
        fields = source if from_dict else json.loads(Path(source).read_bytes())
        if not isinstance(fields, dict) or fields.get("kind") not in KINDS:
            raise ValueError(f"'kind' is not one of {', '.join(KINDS)}")
        if fields.get("format") != FORMAT:
            raise ValueError(f"'format' is {fields.get('format')!r}, this code reads {FORMAT}")
        return KINDS[fields["kind"]].from_dict(fields)
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: 'kind' is a list
        raise ValueError(f"{name} is not a tokenizer: {error}") from None


class StreamDecoder:
    """Decodes ids as they come; what is pushed and flushed adds up to decode of all ids.

    A character whose bytes are spread over several tokens comes out with the last of them.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is complete with this id; often empty inside Chinese or emoji."""
        if self.tokenizer.kind == "char":
            return self.tokenizer.decode([token_id])
        return self._utf8.decode(self.tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the next push starts anew."""
        return self._utf8.decode(b"", final=True)


def _checked(ids, vocab_size):
    """ids as a list of int; ValueError naming the first that is out of range."""
    ids = [int(i) for i in ids]
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise ValueError(
                f"token id {i} at position {position} is not in the vocabulary of {vocab_size:,}"
            )
    return ids


def _refuse_duplicates(tokens):
    for token, count in Counter(tokens).most_common(1):
        if count > 1:
            raise ValueError(f"token {token!r} is there {count} times")


def _canonical_json(fields) -> bytes:
    """The same bytes for the same tokenizer, on every machine."""
    text = json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _save(fields, path):
    """Write beside the place, fsync, rename: a file that can be seen is whole."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(_canonical_json(fields))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

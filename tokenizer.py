"""Text to ids and back: by characters, by a BPE trained on the text, or by GPT-2's own BPE.

    from tokenizer import BPETokenizer, GPT2Tokenizer, load_tokenizer
    ids = GPT2Tokenizer().encode("Hello, world")
    BPETokenizer.train(text, vocab_size=4096).save("tokenizer.json")
    text = load_tokenizer("tokenizer.json").decode(ids)

A saved tokenizer is one JSON object (Fields). A new kind is a subclass of Tokenizer, in KINDS.
"""

import codecs
import hashlib
import json
import re
import sys
from itertools import pairwise
from typing import Annotated, Literal, NotRequired

import numpy as np
import tiktoken
from pydantic import AfterValidator, Field, NonNegativeInt
from typing_extensions import TypedDict

from files import check_json, in_thread, read_bytes, write_file

TOKENIZER_FORMAT = 1  # of the JSON; incremented when an older reader would misread a newer file
END_OF_TEXT = "<|endoftext|>"
MOST_BYTES, MOST_TOKENS, MOST_SPECIAL = 16 << 20, 1 << 20, 1 << 14  # nothing real comes near
MOST_MERGING = 1 << 26  # sum over the tokens of their length squared: what `merges` takes
DOWNLOAD_SECONDS = 30  # for GPT-2's vocabulary, 1.5 MB; from tiktoken's cache it takes under one

# GPT-2's rule for words (Radford 2019): contractions, letters, digits, other symbols, each with the
# space before it, and white space. GPT-2's own last rules, \s+(?!\S)|\s, leave the last character
# of a run of white space to the next word; cutting the text there first takes half the time.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+)|\s+"
CUT = "\0"  # separates the parts of a text while it is encoded
# whether \s matches a code point, the last entry for all above; isspace knows four separators more
IS_SPACE = np.array([chr(c).isspace() and not 0x1C <= c <= 0x1F for c in range(0x3002)])
# up to the last white space that follows anything else, or nothing: no word of WORDS crosses it
LAST_CUT = re.compile(r"(?s:.*\S)(?=[ \t\r\n\u3000])|")

# GPT-2 writes each byte as one printable character (a space is Ġ), and so do our tokens on disk.
# The order is that of its first 256 ids: the printable bytes, then the others.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
SYMBOLS = [*map(chr, PRINTABLE), *map(chr, range(0x100, 0x144))]
BYTE_OF = dict(zip(SYMBOLS, BYTES, strict=True))
SYMBOL_OF = dict(zip(BYTES, SYMBOLS, strict=True))


class Tokenizer:
    """A kind has `kind`, `vocab_size`, `_bytes` (by id), `encode_to_numpy`, `to_dict` ("format",
    "kind", the constructor's arguments), `safe_cut` unless any cut will do, `train` if it learns.
    """

    eot = eot_id = None  # what ends a document

    def encode(self, text: str) -> list[int]:
        return self.encode_to_numpy(text).tolist()

    def decode(self, ids) -> str:
        """Text of ids, U+FFFD for bytes that are not UTF-8; ValueError for an id out of range."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids) -> bytes:
        try:
            return b"".join([self._bytes[int(i)] for i in ids])
        except KeyError as error:
            raise ValueError(f"token id {error} is not below {self.vocab_size:,}") from None

    def safe_cut(self, text: str) -> int:
        """The last position where a cut changes no token, else 0; here the end, or before \\r."""
        return len(text) - text.endswith("\r")

    def save(self, path):
        write_file(path, self.to_json())

    def hash(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """The same bytes for the same tokenizer, on every machine."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return text.encode()


class CharTokenizer(Tokenizer):
    """Every character of the vocabulary is a token; ids are in the order of the code points."""

    kind = "char"

    def __init__(self, characters: list[str]):
        if len(set(characters)) < len(characters):
            raise ValueError("'characters' has one of them twice")
        self.characters, self.vocab_size = characters, len(characters)
        self._bytes = {i: character.encode() for i, character in enumerate(characters)}
        codes = np.array([ord(character) for character in characters], dtype=np.int64)
        # code point -> id, -1 if unknown; the last entry is for all code points above
        self._id_of = np.full(codes.max(initial=-1) + 2, -1, dtype=np.int32)
        self._id_of[codes] = np.arange(len(codes))

    @classmethod
    def train(cls, text) -> "CharTokenizer":
        """The characters that occur in text (a string, or any iterable of characters)."""
        return cls(sorted(set(text)))

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Ids of text; ValueError naming a character that is not in the vocabulary."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._id_of[np.minimum(codes, len(self._id_of) - 1)]
        if ids.min(initial=0) < 0:
            i = int(np.argmax(ids < 0))
            what = f"character U+{codes[i]:04X} {text[i]!r} at position {i}"
            raise ValueError(f"{what} is not in the vocabulary ({self.vocab_size} characters)")
        return ids.astype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def to_dict(self) -> dict:
        return {"format": TOKENIZER_FORMAT, "kind": self.kind, "characters": self.characters}


class BPETokenizer(Tokenizer):
    """Byte-level BPE: 256 bytes, then the merges in the order they were learned, then end of text.

    `tokens` are spelt in SYMBOLS; `special`: text -> id of tokens that no text is encoded to,
    `eot` the one of them that ends a document.
    """

    kind = "bpe"

    def __init__(self, tokens: list[str], special: dict | None = None, eot=END_OF_TEXT):
        self.special = {END_OF_TEXT: len(tokens)} if special is None else special
        self.tokens, self.eot, self.eot_id = tokens, eot, self.special.get(eot)
        self.vocab_size = len(tokens) + len(self.special)
        free = sorted(set(range(self.vocab_size)) - set(self.special.values()))
        distinct, symbols = set(tokens) - {""}, set(SYMBOLS)
        is_spelt = distinct >= symbols == set("".join(tokens))
        is_short = sum(len(token) ** 2 for token in tokens) <= MOST_MERGING
        if not (is_spelt and is_short and len(tokens) == len(distinct) == len(free)):
            what = "'tokens' must be distinct, short, in GPT-2's 256 symbols, with each of them"
            raise ValueError(f"{what}; the ids of 'special' distinct, in the vocabulary")
        self.id_of = dict(zip(tokens, free, strict=True))
        ranks = {bytes([BYTE_OF[symbol] for symbol in t]): i for t, i in self.id_of.items()}
        self._bytes = {i: raw for raw, i in ranks.items()}
        self._bytes |= {i: text.encode() for text, i in self.special.items()}
        how = {"mergeable_ranks": ranks, "special_tokens": {CUT: self.vocab_size}}
        self._encoding = tiktoken.Encoding(self.kind, pat_str=WORDS, **how)

    @classmethod
    def train(cls, text, vocab_size: int) -> "BPETokenizer":
        """Learn merges from text (a string, or strings); fewer than asked if no pair repeats."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # only for this

        learner = Tokenizer(models.BPE())
        # a "word" of a megabyte (a DNA sequence, a page of Chinese) would take hours to merge
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(100)])
        limits = {"vocab_size": vocab_size - 1, "min_frequency": 2, "initial_alphabet": SYMBOLS}
        trainer = trainers.BpeTrainer(**limits, show_progress=sys.stdout.isatty())
        learner.train_from_iterator([text] if isinstance(text, str) else text, trainer)
        id_of = learner.get_vocab()
        return cls(sorted(id_of, key=id_of.get))

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Ids of text, uint32, with U+FFFD for half a surrogate pair; releases the GIL."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        encoding, dtype = ("ascii", np.uint8) if text.isascii() else ("utf-32-le", "<u4")
        space = IS_SPACE.take(np.frombuffer(text.encode(encoding), dtype), mode="clip")
        # before the last character of each run of white space that a word follows
        cuts = np.flatnonzero(space[:-2] & space[1:-1] & ~space[2:]) + 1
        parts = [text[i:j] for i, j in pairwise([0, *cuts.tolist(), len(text)])]
        encode = self._encoding.encode_to_numpy
        if CUT in text:
            return np.concatenate([encode(part, disallowed_special=()) for part in parts])
        ids = encode(CUT.join(parts), allowed_special={CUT})
        return ids[ids < self.vocab_size]

    def safe_cut(self, text: str) -> int:
        return LAST_CUT.match(text).end()

    def merges(self) -> list[list[str]]:
        """For each token but single bytes the two that merge into it, in the order of learning;
        ValueError naming a token that is not made of two earlier ones.
        """
        merges, rank = [], self.id_of
        for token in (token for token in self.tokens if len(token) > 1):
            parts = list(token)
            while len(parts) > 2:  # merge the lowest rank first, as encoding does
                pairs = [rank.get(a + b, rank[token]) for a, b in pairwise(parts)]
                i = pairs.index(min(pairs))
                if pairs[i] >= rank[token]:
                    raise ValueError(f"token {token!r} is not made of two earlier ones")
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            merges.append(parts)
        return merges

    def to_dict(self) -> dict:
        fields = {"format": TOKENIZER_FORMAT, "kind": self.kind, "tokens": " ".join(self.tokens)}
        if (self.special, self.eot) != ({END_OF_TEXT: len(self.tokens)}, END_OF_TEXT):
            fields |= {"special": self.special, "eot": self.eot}
        return fields


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own vocabulary of 50,257: from tiktoken, or from one that was saved."""

    kind = "gpt2"

    def __init__(self, tokens: list[str] | None = None, special=None, eot=END_OF_TEXT):
        if tokens is None:
            try:  # tiktoken downloads them once, and would wait forever
                found = in_thread(tiktoken.get_encoding, "gpt2").result(DOWNLOAD_SECONDS)
            except (OSError, ValueError):  # the first is TimeoutError, too
                cache = "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bpe"
                raise ValueError(f"GPT-2's vocabulary cannot be downloaded; {cache}") from None
            words = map(found.decode_single_token_bytes, range(found.eot_token))
            tokens = ["".join(map(SYMBOL_OF.get, word)) for word in words]
        super().__init__(tokens, special, eot)


Special = dict[Annotated[str, Field(max_length=1000)], NonNegativeInt]
# more than MOST_TOKENS leave a rest with spaces, which are no symbols
Tokens = Annotated[str, AfterValidator(lambda text: text.split(" ", MOST_TOKENS))]
KINDS = {kind.kind: kind for kind in (CharTokenizer, BPETokenizer, GPT2Tokenizer)}


class Fields(TypedDict):
    """What a tokenizer.json holds: of char its characters, of the others the rest."""

    format: Literal[TOKENIZER_FORMAT]
    kind: Literal[*KINDS]
    characters: NotRequired[list[Annotated[str, Field(min_length=1, max_length=1)]]]
    tokens: NotRequired[Tokens]  # with spaces between
    special: NotRequired[Annotated[Special, Field(max_length=MOST_SPECIAL)]]
    eot: NotRequired[str | None]


def load_tokenizer(source, vocab_size: int | None = None) -> Tokenizer:
    """A tokenizer, of vocab_size tokens if given, from its file's path or its dict; ValueError."""
    content = source if isinstance(source, dict) else read_bytes(source, MOST_BYTES)
    try:
        fields = check_json(content, Fields)
        del fields["format"]
        if not fields.keys() - {"kind", "special", "eot"}:  # gpt2's would be downloaded
            raise ValueError("it has no tokens")
        made = KINDS[fields.pop("kind")](**fields)
        if vocab_size not in (None, made.vocab_size):
            raise ValueError(f"it has {made.vocab_size:,} tokens, not {vocab_size:,}")
        return made
    except (TypeError, ValueError) as error:
        name = "its tokenizer" if content is source else source
        raise ValueError(f"{name} cannot be used: {error}") from None


class StreamDecoder:
    """Decodes ids one by one; all that push and flush return together is decode of all ids."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is complete with this id."""
        return self._utf8.decode(self.tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the next push starts afresh."""
        return self._utf8.decode(b"", final=True)

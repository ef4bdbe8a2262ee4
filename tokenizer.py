"""Text to ids and back: by characters, by a BPE trained on the text, or by GPT-2's own BPE.

    from tokenizer import BPETokenizer, GPT2Tokenizer, load_tokenizer
    ids = GPT2Tokenizer().encode("Hello, world")
    BPETokenizer.train(text, vocab_size=4096).save("tokenizer.json")
    text = load_tokenizer("tokenizer.json").decode(ids)

A saved tokenizer is one JSON object (Fields). A new kind is a subclass of Tokenizer, in KINDS.
"""

import codecs
import functools
import hashlib
import json
import re
import sys
from concurrent.futures import TimeoutError
from itertools import pairwise
from typing import Annotated, Literal, NotRequired

import numpy as np
import tiktoken
from pydantic import Field, NonNegativeInt
from typing_extensions import TypedDict

from files import atomic_write, check_json, in_thread, read_bytes

TOKENIZER_FORMAT = 1  # of the JSON; incremented when an older reader would misread a newer file
END_OF_TEXT = "<|endoftext|>"
MOST_BYTES, MOST_TOKENS = 16 << 20, 1 << 20  # of a tokenizer.json; nothing real comes near
MOST_SPECIAL = 1 << 14  # special tokens, those included that no text is encoded to
MOST_MERGING = 1 << 26  # sum over the tokens of their length squared: what `merges` takes
DOWNLOAD_SECONDS = 30  # for GPT-2's vocabulary, 1.5 MB; from tiktoken's cache it takes under one

# GPT-2's rule for words (Radford 2019): contractions, letters, digits, other symbols, each with the
# space before it, and white space. GPT-2's own last rules, \s+(?!\S)|\s, leave the last character
# of a run of white space to the next word; cutting the text there first takes half the time.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+)|\s+"
CUT = "\0"  # separates the parts of a text while it is encoded
# whether \s matches a code point, the last entry for all above; isspace knows four separators more
IS_SPACE = np.array([chr(c).isspace() and not 0x1C <= c <= 0x1F for c in range(0x3002)])
# up to the last white space that follows anything else: no word of WORDS reaches across that place
LAST_CUT = re.compile(r"(?s:.*\S)(?=[ \t\r\n\u3000])")

# GPT-2 writes each byte as one printable character (a space is Ġ), and so do our tokens on disk.
# The order is that of its first 256 ids: the printable bytes, then the others.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
SYMBOLS = [chr(byte) for byte in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]
BYTE_OF = dict(zip(SYMBOLS, BYTES, strict=True))
SYMBOL_OF = dict(zip(BYTES, SYMBOLS, strict=True))


class Tokenizer:
    """A kind has `kind`, `vocab_size`, `_bytes` (of each id), `to_dict` (with "format" and "kind"),
    `from_dict`, `encode_to_numpy`, and `train` if it learns from the text.
    """

    eot_id = None  # the id that ends a document

    def encode(self, text: str) -> list[int]:
        return self.encode_to_numpy(text).tolist()

    def decode(self, ids) -> str:
        """Text of ids, U+FFFD for bytes that are not UTF-8; ValueError for an id out of range."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids) -> bytes:
        ids = [int(i) for i in ids]
        for n, i in enumerate(ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} at position {n} is not below {self.vocab_size:,}")
        return b"".join([self._bytes[i] for i in ids])

    def safe_cut(self, text: str) -> int:
        """The last position where a cut changes no token, else 0; here the end, or before \\r."""
        return len(text) - text.endswith("\r")

    def save(self, path):
        with atomic_write(path) as file:
            file.write(self.to_json())

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
        self.characters = characters
        self.vocab_size, self._bytes = len(characters), [c.encode() for c in characters]
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
            where = f"character U+{codes[i]:04X} {text[i]!r} at position {i}"
            raise ValueError(f"{where} is not in the vocabulary ({self.vocab_size} characters)")
        return ids.astype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def to_dict(self) -> dict:
        return {"format": TOKENIZER_FORMAT, "kind": self.kind, "characters": self.characters}

    @classmethod
    def from_dict(cls, fields: dict) -> "CharTokenizer":
        if len(set(fields["characters"])) < len(fields["characters"]):
            raise ValueError("'characters' has one of them twice")
        return cls(fields["characters"])


class BPETokenizer(Tokenizer):
    """Byte-level BPE: 256 bytes, then the merges in the order they were learned, then end of text.

    `tokens` are spelt in SYMBOLS; half a surrogate pair is encoded as U+FFFD. `special`: text -> id
    of tokens that no text is encoded to, `eot` the one of them that ends a document.
    """

    kind = "bpe"

    def __init__(self, tokens: list[str], special: dict[str, int] | None = None, eot=END_OF_TEXT):
        self.tokens = tokens
        self.special = {END_OF_TEXT: len(tokens)} if special is None else special
        self.eot = eot if eot in self.special else None
        self.eot_id = self.special.get(eot)
        self.vocab_size = len(tokens) + len(self.special)
        free = sorted(set(range(self.vocab_size)) - set(self.special.values()))
        if len(free) > len(tokens):
            raise ValueError("'special' has an id twice, or one beyond the vocabulary")
        self.id_of = dict(zip(tokens, free, strict=True))
        ranks = {bytes([BYTE_OF[symbol] for symbol in t]): i for t, i in self.id_of.items()}
        names = {text.encode(): i for text, i in self.special.items()}
        self._bytes = {i: raw for raw, i in [*ranks.items(), *names.items()]}
        cut = {CUT: self.vocab_size}
        self._encoding = tiktoken.Encoding(
            self.kind, pat_str=WORDS, mergeable_ranks=ranks, special_tokens=cut
        )

    @classmethod
    def train(cls, text, vocab_size: int) -> "BPETokenizer":
        """Learn merges from text (a string, or strings); fewer than asked if no pair repeats."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # only for this

        learner = Tokenizer(models.BPE())
        # a "word" of a megabyte (a DNA sequence, a page of Chinese) would take hours to merge
        learner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(100)]
        )
        limits = {"vocab_size": vocab_size - 1, "min_frequency": 2, "initial_alphabet": SYMBOLS}
        trainer = trainers.BpeTrainer(**limits, show_progress=sys.stdout.isatty())
        learner.train_from_iterator([text] if isinstance(text, str) else text, trainer)
        id_of = learner.get_vocab()
        return cls(sorted(id_of, key=id_of.get))

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Ids of text, uint32; releases the GIL."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        encoding, dtype = ("ascii", np.uint8) if text.isascii() else ("utf-32-le", "<u4")
        space = IS_SPACE.take(np.frombuffer(text.encode(encoding), dtype), mode="clip")
        # before the last character of each run of white space that a word follows
        cuts = np.flatnonzero(space[:-2] & space[1:-1] & ~space[2:]) + 1
        parts = [text[i:j] for i, j in pairwise([0, *cuts.tolist(), len(text)])]
        encode = functools.partial(self._encoding.encode_to_numpy, disallowed_special=())
        if CUT in text:
            return np.concatenate([encode(part) for part in parts])
        ids = encode(CUT.join(parts), allowed_special={CUT})
        return ids[ids < self.vocab_size]

    def safe_cut(self, text: str) -> int:
        found = LAST_CUT.match(text)
        return found.end() if found else 0

    def merges(self) -> list[list[str]]:
        """For each token but single bytes the two that merge into it, in the order of learning;
        ValueError naming a token that is not made of two earlier ones.
        """
        merges, rank = [], self.id_of
        for token in (token for token in self.tokens if len(token) > 1):
            parts = list(token)
            while len(parts) > 2:  # merge the lowest rank first, as encoding does
                pairs = [rank.get(a + b, rank[token]) for a, b in pairwise(parts)]
                i = min(range(len(pairs)), key=pairs.__getitem__)
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

    @classmethod
    def from_dict(cls, fields: dict) -> "BPETokenizer":
        if fields["tokens"].count(" ") + len(fields.get("special", ())) >= MOST_TOKENS:
            raise ValueError(f"'tokens' has more than {MOST_TOKENS:,}")
        tokens, symbols = fields["tokens"].split(" "), set(SYMBOLS)
        if sum(len(token) ** 2 for token in tokens) > MOST_MERGING:
            raise ValueError(f"'tokens' are too long, up to {max(map(len, tokens)):,} bytes")
        distinct = set(tokens) - {""}
        if len(distinct) < len(tokens) or not distinct >= symbols == set("".join(tokens)):
            raise ValueError("'tokens' must be distinct, in GPT-2's 256 symbols, with each of them")
        if "special" in fields:
            return BPETokenizer(tokens, fields["special"], fields.get("eot"))
        return cls(tokens)


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own vocabulary of 50,257: from tiktoken, or from one that was saved."""

    kind = "gpt2"

    def __init__(self, tokens: list[str] | None = None):
        if tokens is None:
            try:  # tiktoken downloads them once, and would wait forever
                found = in_thread(tiktoken.get_encoding, "gpt2").result(DOWNLOAD_SECONDS)
            except (OSError, ValueError, TimeoutError):
                cache = "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bpe"
                raise ValueError(f"GPT-2's vocabulary cannot be downloaded; {cache}") from None
            words = map(found.decode_single_token_bytes, range(found.eot_token))
            tokens = ["".join(map(SYMBOL_OF.get, word)) for word in words]
        if len(tokens) != 50256:
            raise ValueError(f"GPT-2 has 50,256 tokens and {END_OF_TEXT}, not {len(tokens):,}")
        super().__init__(tokens)


Special = dict[Annotated[str, Field(max_length=1000)], NonNegativeInt]
KINDS = {kind.kind: kind for kind in (CharTokenizer, BPETokenizer, GPT2Tokenizer)}


class Fields(TypedDict):
    """What a tokenizer.json holds: of char its characters, of the others the rest."""

    format: Literal[TOKENIZER_FORMAT]
    kind: Literal[*KINDS]
    characters: NotRequired[list[Annotated[str, Field(min_length=1, max_length=1)]]]
    tokens: NotRequired[str]
    special: NotRequired[Annotated[Special, Field(max_length=MOST_SPECIAL)]]
    eot: NotRequired[str | None]


def load_tokenizer(source) -> Tokenizer:
    """A tokenizer from the path of its file or from its dict; ValueError naming the file."""
    content = source if isinstance(source, dict) else read_bytes(source, MOST_BYTES)
    try:
        fields = check_json(content, Fields)
        return KINDS[fields["kind"]].from_dict(fields)
    except (KeyError, ValueError) as error:
        name = "tokenizer" if content is source else source
        raise ValueError(f"{name} is not a tokenizer: {error}") from None


class StreamDecoder:
    """Decodes ids one by one; all that push and flush return together is decode of all ids."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is complete with this id; often empty inside Chinese or emoji."""
        return self._utf8.decode(self.tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the next push starts afresh."""
        return self._utf8.decode(b"", final=True)

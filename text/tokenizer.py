"""Tokenizers: `bytes`, tiktoken encodings by name, rank files, which `vocab` trains, folders with tokenizer.json."""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken

from runtime.errors import UserError, first_line, optional
from runtime.files import read_bytes

# cl100k's pattern as trainers accept it, without possessive quantifiers: contractions, words, 1 to 3 digits, ..
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = re.compile(r"<.+>|\[.+\]", re.DOTALL)  # how added tokens that steer a model are written
CHATML = ("<|im_start|>", "<|im_end|>")
RUN = 999_998  # white space at a stretch that tiktoken and rustbpe can match; tokenizers can a few times as much
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # end of a document: GPT-2, Qwen and ours; Llama 3; Llama 2
HF_FILES = "tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja generation_config.json"


class Tokenizer:
    """Text <-> token ids. Text that looks like a special token is encoded as ordinary text."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hf: Any = None  # a tokenizers.Tokenizer, if `name` is a folder
        self.markers: dict[str, int] = {}  # the ids of ChatML's markers, if tokenizer.json has them
        # not every folder of the working directory that is called as an encoding
        self.is_folder = (Path(name) / "tokenizer.json").is_file() or (os.sep in name and Path(name).is_dir())
        self.is_file = not self.is_folder and (os.sep in name or name.endswith(".tiktoken"))
        self.sha256 = hashlib.sha256(name.encode()).hexdigest()  # of the file, if there is one
        if self.is_folder:
            self._load_folder(Path(name))
        else:
            self.encoding = self._load_encoding()
            self.eot, self.vocab_size = self.encoding.eot_token, self.encoding.n_vocab
            self.eos = self.start = self.eot  # as transformers has them: end of an answer, token before a text

    def _load_encoding(self) -> tiktoken.Encoding:
        if self.is_file:
            pattern = PATTERN
            try:
                content = read_bytes(Path(self.name))
                lines = [line.split() for line in content.splitlines() if line]
                ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
                complete = all(bytes([b]) in ranks for b in range(256))
                if not complete or sorted(ranks.values()) != list(range(len(lines))):
                    raise ValueError("ranks must be 0, 1, 2, .., each token there once, all 256 bytes among them")
            except (OSError, ValueError) as e:
                raise UserError(f"tokenizer {self.name}: not a rank file as tiktoken reads it: {e}") from None
            self.sha256 = hashlib.sha256(content).hexdigest()
        elif self.name == "bytes":
            pattern, ranks = r"[\s\S]", {bytes([b]): b for b in range(256)}
        else:
            try:
                return tiktoken.get_encoding(self.name)
            except Exception as e:  # an unknown name, or one of many network errors
                expected = "bytes, a rank file, or an encoding that tiktoken has in TIKTOKEN_CACHE_DIR or can fetch"
                raise UserError(f"tokenizer {self.name}: {first_line(e)[:120]}; expected {expected}") from None
        special = {"<|endoftext|>": len(ranks)}
        return tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def _load_folder(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{file}: is not there; make it with transformers' AutoTokenizer and save_pretrained")
        library = optional("tokenizers", "tokenizers", str(file))
        config = json_object(folder / "config.json")
        if type(rows := config.get("vocab_size", 0)) is not int:
            raise UserError(f"{folder / 'config.json'}: vocab_size: got {rows!r:.40}, expected a whole number")
        try:
            with library_errors():
                content = read_bytes(file)
                self.hf = library.Tokenizer.from_str(content.decode())
                added = self.hf.get_added_tokens_decoder()
                # in a text they are text: words and spaces that a vocabulary was extended by stay tokens
                self.hf.add_special_tokens([t.content for t in added.values() if CONTROL.fullmatch(t.content)])
                if "中" not in self.hf.decode(self.hf.encode("é 中 \0").ids):  # or it raises
                    raise ValueError("its vocabulary cannot encode every text, such as 中")
        except ValueError as e:
            raise UserError(f"{file}: is no tokenizer of Hugging Face: {e}") from None
        self.hf.encode_special_tokens = True
        self.hf.no_truncation()
        self.hf.no_padding()
        known = self.hf.get_vocab(with_added_tokens=True)
        self.vocab_size = max(rows, 1 + max(known.values()))  # released models have rows without a token
        end = next((e for e in ENDS if e in known), None)
        if end is None:
            raise UserError(f"{file}: has no token that ends a document; expected one of {', '.join(ENDS)}")
        for token in known.keys() & {end, *CHATML}:
            if known[token] in self.encode(f"{token} {token}a{token}\n{token}"):
                raise UserError(f"{file}: encodes {token} in a text as the control token; expected other ids for it")
        # older folders name the special tokens in a file of their own
        named = json_object(folder / "special_tokens_map.json") | json_object(folder / "tokenizer_config.json")
        eos, bos = (t.get("content") if isinstance(t, dict) else t for t in map(named.get, ("eos_token", "bos_token")))
        self.markers = {m: known[m] for m in CHATML if known.keys() >= set(CHATML)}
        self.eot = known[end]
        self.eos = known[eos] if isinstance(eos, str) and eos in known else self.eot
        self.start = known[bos] if isinstance(bos, str) and bos in known else self.eos
        self.sha256 = hashlib.sha256(content).hexdigest()
        # `tools.huggingface export` records which tokenizer this tokenizer.json reproduces: data prepared with it fits
        made = config.get("pathswitch")
        if isinstance(made, dict) and made.get("tokenizer_json") == self.sha256:
            self.sha256 = str(made.get("tokenizer"))

    def encode(self, text: str) -> list[int]:
        """The ids of a text. White space that is too long for the library is cut. UserError if it still fails."""
        try:
            with library_errors():
                if self.hf:
                    return self.hf.encode(text, add_special_tokens=False).ids
                return self.encoding.encode_ordinary(text)
        except ValueError as e:
            if len(pieces := cut_runs(text)) == 1:
                raise UserError(f"{text[:60]!r}: tokenizer {self.name} cannot encode it: {e}") from None
        return [i for piece in pieces for i in self.encode(piece)]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on all cores where the library can."""
        with contextlib.suppress(ValueError), library_errors():  # if one fails, `encode` says which
            if self.hf:
                return [e.ids for e in self.hf.encode_batch(texts, add_special_tokens=False)]
            return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text up to the first <|endoftext|>. Invalid UTF-8 and ids without a token become U+FFFD."""
        ids = list(itertools.takewhile(lambda i: i != self.eot, ids))
        if self.hf:
            return self.hf.decode(ids, skip_special_tokens=False)
        return b"".join(map(self._token_bytes, ids)).decode(errors="replace")

    def _token_bytes(self, i: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:  # cl100k_base has ids without a token, and a model can sample one
            return b"\xff"


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Raise a library's errors as ValueError, its panics too."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # panics derive from it
        raise ValueError(first_line(e)[:120]) from None


def cut_runs(text: str) -> list[str]:
    """The text, each longer run of white space than RUN cut into pieces of RUN at most."""
    runs = [run.span() for run in re.finditer(r"\s+", text)] if len(text) > RUN else []
    cuts = [at for start, end in runs for at in range(start + RUN, end, RUN)]
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer out of a Hugging Face folder, and config.json, which has the size of its vocabulary."""
    target.mkdir(exist_ok=True)
    for name in [*HF_FILES.split(), "config.json"]:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file, an empty one if there is no file. UserError if it is something else."""
    try:
        found = json.loads(read_bytes(file))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is not JSON: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: got {str(found)[:40]!r}, expected a JSON object")
    return found

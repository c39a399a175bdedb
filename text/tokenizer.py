"""Tokenizers: bytes, tiktoken encodings, rank files, and Hugging Face's tokenizer.json."""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import read_bytes
from text.sources import optional

# cl100k's pattern in its plain form, which trainers accept too: contractions, words, numbers of up to 3 digits, punctuation, spaces
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # what ends a document: GPT-2, Qwen and ours; Llama 3; Llama 2


class Tokenizer:
    """`bytes`, a tiktoken encoding by name, a rank file (lines of base64 and rank, as tiktoken reads them), or a folder with
    Hugging Face's tokenizer.json. Text that looks like a special token is ordinary text.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.hf: Any = None
        self.is_folder = Path(name).is_dir()
        self.is_file = not self.is_folder and (os.sep in name or name.endswith(".tiktoken"))
        self.sha256 = hashlib.sha256(name.encode()).hexdigest()
        if self.is_folder:
            self._hugging_face(Path(name))
            return
        if name == "bytes":
            self.eot, self.vocab_size = 256, 257
            return
        import tiktoken

        if self.is_file:
            try:
                text = read_bytes(Path(name))
                lines = [line.split() for line in text.splitlines() if line]
                ranks = {base64.b64decode(k, validate=True): int(v) for k, v in lines}
                if sorted(ranks.values()) != list(range(len(lines))) or any(
                    bytes([b]) not in ranks for b in range(256)
                ):
                    raise ValueError("ranks must be 0, 1, 2, .., each token there once, all 256 bytes among them")
                self.encoding = tiktoken.Encoding(
                    "ranks", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
                )
            except OSError as e:
                raise UserError(
                    f"tokenizer {name}: {e.strerror}; expected a rank file, a tiktoken encoding or bytes"
                ) from None
            except ValueError as e:
                raise UserError(
                    f"tokenizer {name}: not a rank file: {e}; expected lines of base64 and rank, as tiktoken's"
                ) from None
            self.sha256 = hashlib.sha256(text).hexdigest()
        else:
            if name not in tiktoken.list_encoding_names():
                raise UserError(
                    f"tokenizer {name}: unknown; expected bytes, a .tiktoken rank file or one of {', '.join(tiktoken.list_encoding_names())}"
                )
            try:
                self.encoding = tiktoken.get_encoding(name)
            except Exception as e:  # whatever the network does
                why = str(e).splitlines()[0][:120]
                raise UserError(
                    f"tokenizer {name}: tiktoken fetches its file once from the network, and could not ({why}); set TIKTOKEN_CACHE_DIR to a folder that has it, or use bytes or a rank file"
                ) from None
        self.eot, self.vocab_size = self.encoding.eot_token, self.encoding.n_vocab

    def _hugging_face(self, folder: Path) -> None:
        """The vocabulary is as large as config.json beside it says: released models have rows that no token uses."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{file}: is not there; make it: transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        library = optional("tokenizers", "tokenizers", str(file))
        try:
            text = read_bytes(file)
            self.hf = library.Tokenizer.from_str(text.decode())
            rows, known = (
                json_object(folder / "config.json").get("vocab_size", 0),
                self.hf.get_vocab(with_added_tokens=True),
            )
            if type(rows) is not int:
                raise ValueError(f"vocab_size of config.json is {rows!r:.40}")
            self.hf.encode("é 中 \0")  # one that has no token for some texts says so
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as e:  # the library's errors have no type of their own, and its panics are no Exception
            raise UserError(f"{file}: is no tokenizer of Hugging Face: {str(e)[:120]}") from None
        self.hf.encode_special_tokens = True
        self.hf.no_truncation()
        self.hf.no_padding()
        end = next((e for e in ENDS if e in known), None)
        if end is None:
            raise UserError(f"{file}: has no token that ends a document; expected one of {', '.join(ENDS)}")
        self.eot, self.vocab_size = known[end], max(rows, 1 + max(known.values()))
        self.sha256 = hashlib.sha256(text).hexdigest()
        made = json_object(folder / "config.json").get(
            "pathswitch"
        )  # huggingface export has written it: the same ids as another tokenizer's
        if (
            isinstance(made, dict)
            and made.get("tokenizer_json") == self.sha256
            and re.fullmatch("[0-9a-f]{64}", str(made.get("tokenizer")))
        ):
            self.sha256 = made["tokenizer"]

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """The ids of each text."""
        if self.hf and threads > 1:
            return [e.ids for e in self.hf.encode_batch(texts, add_special_tokens=False)]
        if self.hf:
            return [self.hf.encode(t, add_special_tokens=False).ids for t in texts]
        return (
            [list(t.encode()) for t in texts]
            if self.name == "bytes"
            else self.encoding.encode_ordinary_batch(texts, num_threads=threads)
        )

    def special(self, token: str) -> int | None:
        """The id of a special token; none: it has no such token, and the same characters are text."""
        return self.hf.token_to_id(token) if self.hf else None

    def decode(self, ids: list[int]) -> str:
        """The text up to the first <|endoftext|>; bytes that are not UTF-8, and ids without a token, become replacement characters."""
        ids = list(itertools.takewhile(lambda i: i != self.eot, ids))
        if self.hf:
            return self.hf.decode(ids, skip_special_tokens=False)
        with contextlib.suppress(KeyError):
            return (bytes(ids) if self.name == "bytes" else self.encoding.decode_bytes(ids)).decode(errors="replace")

        def token(i: int) -> bytes:
            try:
                return self.encoding.decode_single_token_bytes(i)
            except KeyError:  # cl100k_base has such ids, and a model may draw one
                return b"\xff"

        return b"".join(map(token, ids)).decode(errors="replace")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what a folder of Hugging Face's holds of a tokenizer, and config.json, which says how large its vocabulary is."""
    target.mkdir(exist_ok=True)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
    ):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def json_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds, an empty object if it is not there. UserError if it is no object."""
    try:
        found = json.loads(read_bytes(file))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is not JSON: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: got {str(found)[:40]!r}, expected a JSON object")
    return found

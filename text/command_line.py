"""The commands of data.py: prepare, add, verify, bins, vocab."""

import argparse
from pathlib import Path
from typing import Any

from runtime.command_line import Parser
from runtime.errors import UserError
from text.bins import bins
from text.prepare import RANKS, ROOT, TEXT, add, prepare
from text.sources import KINDS
from text.token_files import check_files, tokenizer_of
from text.tokenizer import vocab


def proportions(text: str) -> list[float]:
    """1,1,2 as positive numbers."""
    try:
        found = [float(v) for v in text.split(",")]
    except ValueError:
        found = []
    if not 0 < len(found) <= 10000 or not all(0 < v < float("inf") for v in found):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected positive numbers such as 1,1,2")
    return found


def increments(text: str) -> list[float]:
    """4 as four equal increments, 1,1,2 as proportions."""
    if "," in text:
        return proportions(text)
    if not text.isdecimal() or not 0 < int(text) <= 10000:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected how many or their proportions such as 1,1,2")
    return [1.0] * int(text)


COMMANDS = {
    "prepare": "make a folder of increments and a validation set",
    "add": "append an increment to a folder",
    "verify": "check a folder's sizes and SHA-256",
    "bins": "make a folder of token files of nanoGPT or llm.c",
    "vocab": "train a rank file on the first increment (needs rustbpe)",
}
TOKENIZER = "bytes, a tiktoken encoding (cl100k_base), a rank file, or a folder with tokenizer.json"
NEW = "a path that does not exist"
OPTIONS: list[tuple[str, str, str, dict[str, Any]]] = [  # flag, its commands, help, other arguments of add_argument
    ("out", "verify", "the folder", {"metavar": "FOLDER"}),
    ("files", "bins", "v1, v2, ..", {"nargs": "+", "metavar": "BIN"}),
    ("--out", "prepare", f"{NEW} [data/demo]", {"default": "data/demo"}),
    ("--out", "add", "the folder", {"required": True}),
    ("--out", "bins vocab", NEW, {"required": True}),
    ("--tokenizer", "prepare", f"{TOKENIZER} [{RANKS.relative_to(ROOT)}]", {"default": str(RANKS)}),
    ("--tokenizer", "bins", f"of the token files: {TOKENIZER}", {"required": True}),
    ("--source", "prepare vocab", f"text; again for more [{TEXT.relative_to(ROOT)}]", {"action": "append"}),
    ("--source", "add", "text; again for more", {"action": "append", "required": True}),
    ("--weights", "prepare add", "ratio of the sources' tokens, such as 3,1 [all there is]", {"type": proportions}),
    ("--increments", "prepare vocab", "how many, or proportions as 1,1,2 [4]", {"type": increments, "default": "4"}),
    ("--val", "prepare vocab", "share of the documents for validation [0.05]", {"type": float, "default": 0.05}),
    ("--val", "bins", "the validation set", {"required": True, "metavar": "BIN"}),
    ("--jobs", "prepare add", "processes [one a core]", {"type": int, "default": 0}),
    ("--vocab_size", "vocab", "ranks and <|endoftext|>", {"type": int, "required": True}),
]


def run(o: argparse.Namespace) -> None:
    if o.command == "verify":
        size = check_files(Path(o.out))
        tokenizer_of(Path(o.out))
        print(f"{o.out}: {size:,} bytes as they were written")
    elif o.command == "bins":
        bins(o.out, o.val, o.files, o.tokenizer)
    elif o.command == "add":
        add(o.out, o.source, o.weights, o.jobs)
    elif not 0 < o.val < 1:
        raise UserError(f"--val: got {o.val}, expected above 0 and below 1")
    elif o.command == "vocab":
        vocab(o.out, o.source or [str(TEXT)], o.vocab_size, o.increments, o.val)
    else:
        prepare(o.out, o.source or [str(TEXT)], o.tokenizer, o.increments, o.val, o.weights, o.jobs)


def main(argv: list[str] | None = None) -> None:
    sources = f"{', '.join(KINDS)}, a folder or glob of them, or hf:NAME[:SUBSET] (its train split, streamed)"
    parser = Parser(prog="data.py", description="Text to token files by increment.", epilog=f"sources: {sources}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    parsers = {command: commands.add_parser(command, help=text) for command, text in COMMANDS.items()}
    for flag, users, text, rest in OPTIONS:
        for command in users.split():
            parsers[command].add_argument(flag, help=text, **rest)
    run(parser.parse_args(argv))

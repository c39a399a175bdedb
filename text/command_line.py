"""The commands of data.py: prepare, add, drop, verify, vocab."""

import argparse
import signal
import sys
from pathlib import Path

from runtime.command_line import Parser
from runtime.errors import UserError, user_errors
from text.prepare import RANKS, TEXT, add, drop, prepare, vocab
from text.sources import KINDS
from text.token_files import check_files, tokenizer_of


def proportions(text: str) -> list[float]:
    """1,1,2 as positive numbers, 4 as four equal ones."""
    if text.isdecimal() and 0 < int(text) <= 10_000:
        return [1.0] * int(text)
    try:
        found = [float(v) for v in text.split(",")]
    except ValueError:
        found = []
    if not 2 <= len(found) <= 10_000 or not all(1e-9 <= v <= 1e9 for v in found):
        expected = "how many, or proportions from 1e-9 to 1e9 such as 1,1,2"
        raise argparse.ArgumentTypeError(f"got {text[:60]!r}, expected {expected}")
    return found


def arguments() -> Parser:
    sources = f"{', '.join(KINDS)}, a folder or glob of them, or hf:NAME[:SUBSET] (its train split, streamed)"
    tokenizer = "bytes, a tiktoken encoding (cl100k_base), a rank file, or a folder with tokenizer.json"
    parser = Parser(prog="data.py", description="Text to token files by increment.", epilog=f"sources: {sources}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    make = commands.add_parser("prepare", help="make a folder of increments and a validation set")
    extend = commands.add_parser("add", help="append an increment to a folder")
    undo = commands.add_parser("drop", help="undo the last add, unless a checkpoint below out/ was trained on it")
    verify = commands.add_parser("verify", help="check a folder's sizes and SHA-256")
    train = commands.add_parser("vocab", help="train a rank file on the first increment (needs rustbpe)")
    make.add_argument("--out", default="data/demo", help="a path that does not exist [data/demo]")
    make.add_argument("--tokenizer", default=str(RANKS), help=f"{tokenizer} [corpus/{RANKS.name}]")
    extend.add_argument("--out", required=True, help="the folder")
    undo.add_argument("--out", required=True, help="the folder")
    undo.add_argument("--last", action="store_true", required=True, help="the only one that can be taken out")
    verify.add_argument("out", metavar="FOLDER")
    train.add_argument("--out", required=True, help="a path that does not exist")
    train.add_argument("--vocab_size", type=int, required=True, help="ranks and <|endoftext|>")
    extend.add_argument("--source", action="append", required=True, help="text; again for more")
    for p in (make, extend):
        p.add_argument("--weights", type=proportions, help="ratio of the sources' tokens, such as 3,1 [all there is]")
        p.add_argument("--jobs", type=int, default=0, help="processes [one a core]")
    for p in (make, train):
        p.add_argument("--source", action="append", help=f"text; again for more [corpus/{TEXT.name}]")
        p.add_argument("--increments", type=proportions, default="4", help="how many, or proportions as 1,1,2 [4]")
    for p in (make, train, extend):
        p.add_argument("--val", type=float, default=0.05, help="share of the documents for validation [0.05]")
    return parser


def run(o: argparse.Namespace) -> None:
    sources = vars(o).get("source") or [str(TEXT)]
    lowest = {"prepare": 1e-9, "vocab": 1e-9, "add": 0.0}.get(o.command)
    if lowest is not None and not lowest <= o.val <= 1 - 1e-9:
        raise UserError(f"--val: got {o.val}, expected a part between 0 and 1, such as 0.05")
    if o.command in ("prepare", "add"):
        if o.weights and len(o.weights) != len(sources):
            raise UserError(f"--weights: got {len(o.weights)} for {len(sources)} sources, expected one each")
        if not 0 <= o.jobs <= 1024:
            raise UserError(f"--jobs: got {o.jobs}, expected 1 to 1024, or 0 for one a core")
    if o.command == "verify":
        size = check_files(Path(o.out))
        tokenizer_of(Path(o.out))
        print(f"{o.out}: {size:,} bytes as they were written")
    elif o.command == "vocab":
        vocab(o.out, sources, o.vocab_size, o.increments, o.val)
    elif o.command == "drop":
        drop(o.out)
    elif o.command == "add":
        add(o.out, sources, o.weights, o.jobs, o.val)
    else:
        prepare(o.out, sources, o.tokenizer, o.increments, o.val, o.weights, o.jobs)


def main(argv: list[str] | None = None) -> None:
    with user_errors("data.py"):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # clean up, as after Ctrl-C
        run(arguments().parse_args(argv))

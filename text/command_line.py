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
from text.vocab import vocab


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
    """3 as three equal increments, 1,1,2 as their proportions."""
    if text.isdecimal() and 0 < int(text) <= 10000:
        return [1.0] * int(text)
    if "," in text:
        return proportions(text)
    raise argparse.ArgumentTypeError(
        f"got {text!r}, expected a number of increments or their proportions such as 1,1,2"
    )


def share(text: str) -> float:
    """A number above 0 and below 1."""
    if not 0 < (found := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {found}, expected above 0 and below 1")
    return found


def processes(text: str) -> int:
    if not 0 <= (found := int(text)) <= 1024:
        raise argparse.ArgumentTypeError(f"got {found}, expected 1 to 1024, or 0 for one a core")
    return found


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def option(help: str, **kw: Any) -> dict[str, Any]:
    """The arguments of argparse for an option."""
    return {"help": help, **kw}


NEW = option("what is made; it must not exist", required=True)
SOURCE = option(f"text; again for more [{name(TEXT)}]", action="append")
WEIGHTS = option("tokens of the sources in this ratio, such as 3,1 [all there is]", type=proportions)
JOBS = option("processes [one a core]", type=processes, default=0)
INCREMENTS = option("how many, or their proportions, such as 1,1,2 [4]", type=increments, default="4")
VAL = option("share of the documents for validation [0.05]", type=share, default=0.05)
TOKENIZER = "bytes, a tiktoken encoding (cl100k_base), a rank file, or a folder with tokenizer.json"

COMMANDS = {
    "prepare": (
        "make a folder of increments and a validation set",
        {
            "--out": option("[data/demo]", default="data/demo"),
            "--tokenizer": option(f"{TOKENIZER} [{name(RANKS)}]", default=str(RANKS)),
            "--source": SOURCE,
            "--weights": WEIGHTS,
            "--increments": INCREMENTS,
            "--val": VAL,
            "--jobs": JOBS,
        },
    ),
    "add": (
        "append an increment to a folder",
        {
            "--out": option("the folder", required=True),
            "--source": option("text; again for more", action="append", required=True),
            "--weights": WEIGHTS,
            "--jobs": JOBS,
        },
    ),
    "verify": ("check a folder's sizes and SHA-256", {"out": option("the folder", metavar="FOLDER")}),
    "bins": (
        "make a folder of token files of nanoGPT or llm.c",
        {
            "files": option("v1, v2, ..", nargs="+", metavar="BIN"),
            "--val": option("the validation set", required=True, metavar="BIN"),
            "--tokenizer": option(f"that made them: {TOKENIZER}", required=True),
            "--out": NEW,
        },
    ),
    "vocab": (
        "train a rank file on the first increment (needs rustbpe)",
        {
            "--out": NEW,
            "--vocab_size": option("with <|endoftext|>", type=int, required=True),
            "--source": SOURCE,
            "--increments": INCREMENTS,
            "--val": VAL,
        },
    ),
}


def run(o: argparse.Namespace) -> None:
    sources = getattr(o, "source", None) or [str(TEXT)]
    weights = getattr(o, "weights", None)
    if weights and len(weights) != len(sources):
        raise UserError(f"--weights: got {len(weights)} for {len(sources)} sources, expected one each")
    if o.command == "prepare":
        prepare(o.out, sources, o.tokenizer, o.increments, o.val, weights, o.jobs)
    elif o.command == "add":
        add(o.out, sources, weights, o.jobs)
    elif o.command == "bins":
        bins(o.out, o.val, o.files, o.tokenizer)
    elif o.command == "vocab":
        vocab(o.out, sources, o.vocab_size, o.increments, o.val)
    else:
        size = check_files(Path(o.out))
        tokenizer_of(Path(o.out))
        print(f"{o.out}: {size:,} bytes as they were written")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="data.py",
        description="Text to token files by increment.",
        epilog=f"sources: {', '.join(KINDS)}, a folder or glob of them, or hf:NAME[:SUBSET] (its train split, streamed)",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for command, (help, options) in COMMANDS.items():
        p = commands.add_parser(command, help=help)
        for flag, kw in options.items():
            p.add_argument(flag, **kw)
    run(parser.parse_args(argv))

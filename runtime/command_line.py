"""The command line of every script: its own options, and a flag for each key of the config."""

import argparse
import json
import typing
from pathlib import Path
from typing import Any

from config import Config, flatten, load, suggest
from runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""

    def __init__(self, **kw: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kw)

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: --"):
            option = message.split()[2].partition("=")[0]
            message += f"; {suggest(option, list(self._option_string_actions))}"
        raise UserError(message)

    def add_checkpoints(self, paths: str = "checkpoints, or one run's folder", several: bool = False) -> None:
        """The arguments of every command that reads checkpoints; `several`: --data again and again."""
        self.add_argument("path", nargs="+", type=lambda name: Path(folder(name)), help=paths)
        says = "a prepared folder [the one that the checkpoint was trained on]" + "; again for more" * several
        self.add_argument("--data", type=folder, action="append" if several else "store", help=says)
        self.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
        self.add_argument("--json", action="store_true")

    def add_config(self, name: bool = True) -> None:
        """--config (if `name`) and a flag for every key of the config."""
        if name:
            self.add_argument("--config", help="a name in configs/ or a .toml file [tiny, but for benchmarks]")
        group = self.add_argument_group("keys of the config, each also a flag")
        for k, (f, v) in flatten(Config()).items():
            choices = f" ({', '.join(f.metadata['choices'])})" if "choices" in f.metadata else ""
            shown = "none" if v is None else v if isinstance(v, str) else json.dumps(v)
            group.add_argument(f"--{k}", metavar="VALUE", help=f"{f.metadata['help']}{choices} [{shown}]")

    def parse_config(self, argv: list[str] | None = None, default: str = "tiny") -> tuple[argparse.Namespace, Config]:
        """The script's own options, and the config with its overrides. --mode sft has a default config of its own."""
        args = self.parse_args(argv)
        default = "sft" if getattr(args, "mode", "") == "sft" else default
        return args, load(default if args.config is None else args.config, given(args))


def folder(name: str) -> str:
    """argparse's type of a folder's name, which may not be empty: Path("") is the current folder."""
    if not name:
        raise argparse.ArgumentTypeError("got '', expected a folder")
    return name


def given(args: argparse.Namespace) -> dict[str, str]:
    """{key: text} of the config's keys that the command line names."""
    return {k: text for k in flatten(Config()) if (text := getattr(args, k)) is not None}


def aligned(rows: list[list[str]]) -> str:
    """A table as text: the first column flush left, the others right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, cells, widths)]).rstrip() for name, *cells in rows)

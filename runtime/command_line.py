"""The command line of every script: its own options, and a flag for each key of the config."""

import argparse
import json
import typing
from pathlib import Path
from typing import Any

from config import Config, flatten, load, type_name
from runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, whose errors join the other one-line errors."""

    def __init__(self, **kw: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kw)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)

    def add_checkpoints(self) -> None:
        """What every command that reads checkpoints takes."""
        self.add_argument("path", nargs="+", type=Path, help="checkpoints, or one run's folder")
        self.add_argument("--data", help="a prepared folder [the one that the checkpoint was trained on]")
        self.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
        self.add_argument("--json", action="store_true")

    def add_config(self, name: bool = True) -> None:
        """--config (if `name`) and a flag for every key of the config."""
        if name:
            self.add_argument("--config", help="a name in configs/ or a .toml file")
        group = self.add_argument_group("keys of the config, each also a flag")
        for k, (f, v) in flatten(Config()).items():
            choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
            shown = "none" if v is None else v if isinstance(v, str) else json.dumps(v)
            group.add_argument(
                f"--{k}",
                metavar=type_name(f.type).removesuffix(" or none").split()[-1].upper().replace("FALSE", "BOOL"),
                help=f"{f.metadata['help']}{choices} [{shown}]",
            )

    def parse_config(
        self, argv: list[str] | None = None, default: str = "tiny", modes: dict[str, str] | None = None
    ) -> tuple[argparse.Namespace, Config]:
        """The script's own arguments and the config that they name, with its overrides. `modes`: other defaults for some --mode."""
        args, unknown = self.parse_known_args(argv)
        overrides = {k: getattr(args, k) for k in flatten(Config()) if getattr(args, k) is not None}
        return args, load(args.config or (modes or {}).get(getattr(args, "mode", ""), default), overrides, unknown)

"""The subcommands of `icestream`, one module each; every module has `register(app)`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import typer

COMMAND_MODULES = (
    "demo", "simulate", "run", "status", "report", "quality", "decide", "preprocess", "score", "classify", "reconstruct", "orientation", "export", "train", "generate", "evaluate", "evaluate_cryogem", "bench",
)  # fmt: skip


def _register_of(module: str) -> Callable[[typer.Typer], None]:
    register: Callable[[typer.Typer], None] = import_module(f"stream.commands.{module}").register
    return register


REGISTERS = [_register_of(name) for name in COMMAND_MODULES]

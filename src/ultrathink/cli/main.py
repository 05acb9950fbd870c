"""The command ``ultrathink``: finds the subcommand, and turns errors into messages."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ultrathink import __version__
from ultrathink.cli.arguments import takes_config
from ultrathink.core.errors import UltrathinkError, closest, suggestion
from ultrathink.core.registry import load_plugin
from ultrathink.core.streams import discard, print_stderr

# Name -> its one line of help. The module of that name in this package is imported only when its
# command is used, and offers `configure(parser)`, `run(args) -> exit status` and EPILOG, the end of
# its help.
COMMANDS = {
    "train": "train a model, or resume a run",
    "launch": "train on several processes, on one machine or more",
    "generate": "continue a text with a trained model",
    "export": "write a run's model for Hugging Face transformers",
    "runs": "list the runs, or verify the files of one",
    "checkpoint": "list what a checkpoint holds, or write its model as one file",
    "compare": "set runs side by side: settings, curves, figures",
    "audit": "replay a run's decisions, and measure what they were worth",
    "watch": "find what went wrong in a training log",
    "report": "write a page that explains a run",
    "config": "show, check and explain configurations",
    "doctor": "check this machine, and measure how fast it is",
}
# What argparse says, and what a person understands.
_PLAINER = {
    r"argument (\S+): invalid int value: (.*)": r"\1 \2: give a whole number",
    r"argument (\S+): invalid float value: (.*)": r"\1 \2: give a number",
    r"argument (\S+): expected one argument": r"\1: give a value",
    r"argument (\S+): invalid choice": r"\1: invalid choice",
}
USER_ERROR = 2
SYSTEM_ERROR = 1
INTERRUPTED = 130
READER_GONE = 141  # what a shell reports of a program that SIGPIPE ended


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are the user's mistakes, each with a suggestion."""

    def error(self, message: str) -> NoReturn:
        for pattern, words in _PLAINER.items():
            message = re.sub(pattern, words, message)
        raise UltrathinkError(f"{message}. See: {self.prog} --help")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Read the arguments of one command; flags may stand between key=value pairs."""
        args, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            flags = [word for word in unknown if word.startswith("-")] or unknown
            lines = "\n".join(self._unknown(flag, arguments) for flag in flags)
            raise UltrathinkError(f"{lines} See: {self.prog} --help")
        return args

    def _unknown(self, word: str, arguments: Sequence[str]) -> str:
        """What is meant by a flag that the command does not have."""
        flag, equals, value = word.partition("=")
        if takes_config(self):
            from ultrathink.config.explain import known_flag
            from ultrathink.config.schema import Config

            following = [*arguments[arguments.index(word) + 1 :], "--"][0]
            given = value if equals else None if following.startswith("--") else following
            meant = known_flag(flag, given, Config)
            if meant is not None:
                return f"{flag} is not known here. {meant}"
        near = closest(flag, self._option_string_actions)
        return f"{flag} is not known here{f'; did you mean {near}?' if near else '.'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 is success, 1 a fault of the system (a full disk), 2 a mistake of the user, 130 an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    _spell_out_what_the_terminal_lacks()
    try:
        status = _dispatch([word for word in arguments if word != "--debug"])
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse, after --help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (UltrathinkError, KeyboardInterrupt, OSError) as error:
        if debug and not isinstance(error, BrokenPipeError):
            raise
        return report(error)
    except (MemoryError, RuntimeError) as error:
        if debug or not _is_out_of_memory(error):
            raise
        _complain("memory did not suffice; take a smaller model or shorter sequences.")
        return SYSTEM_ERROR


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether it says so; torch, whose errors say it in words, is not imported for that."""
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from ultrathink.training.out_of_memory import is_out_of_memory

    return is_out_of_memory(error)


def report(error: UltrathinkError | KeyboardInterrupt | OSError) -> int:
    """Print in a sentence what ended a command; returns its exit status."""
    if isinstance(error, UltrathinkError):
        _complain(str(error))
        return USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        print_stderr("interrupted")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        discard(sys.stdout)
        return READER_GONE
    _complain(_system_message(error))
    return SYSTEM_ERROR


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name in ("-V", "--version"):
        print(f"ultrathink {__version__}")
        return 0
    parser, run = load_command(name)
    args = parser.parse(arguments[1:])
    for path in getattr(args, "plugin", ()):
        load_plugin(path)
    return run(args)


def load_command(name: str) -> tuple[CommandParser, Callable[[argparse.Namespace], int]]:
    """The parser of the command called ``name``, and the function that runs it."""
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        known = suggestion(name, COMMANDS)
        raise UltrathinkError(f"there is no {kind} {name!r}. {known} See: ultrathink --help")
    summary = COMMANDS[name]
    module = importlib.import_module(f"ultrathink.cli.{name}")
    parser = CommandParser(
        prog=f"ultrathink {name}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=module.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.configure(parser)
    parser.add_argument(
        "--debug", action="store_true", help="show where in the code an error arose"
    )
    return parser, module.run


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return f"""\
usage: ultrathink COMMAND [...]

Train a language model from one YAML file, on a laptop, one GPU or a cluster.

commands:
{commands}

options:
  --help     this text; ultrathink COMMAND --help for one command
  --version  the version
  --debug    show where in the code an error arose

examples:
  ultrathink train                              five minutes to a small model
  ultrathink train demo training.max_minutes=1  the same, shorter
  ultrathink train data.train=books/            your own text
  ultrathink config show demo --why             every option, and its origin"""


def _complain(message: str) -> None:
    """Print a message; the lines of a longer one stand below each other."""
    print_stderr("error: " + message.replace("\n", "\n       "))


def _system_message(error: OSError) -> str:
    reason = (error.strerror or str(error) or type(error).__name__).rstrip(".")
    place = f": {error.filename}" if error.filename is not None else ""
    advice = {
        errno.ENOSPC: "; free some space on that disk, or choose another folder with run.dir",
        errno.EDQUOT: "; your quota on that disk is used up",
        errno.EACCES: "; choose a folder that you may write to, for example with run.dir",
        errno.EROFS: "; choose a folder that you may write to, for example with run.dir",
    }.get(error.errno or 0, " (--debug shows where)")
    return f"{reason}{place}{advice}."


def _spell_out_what_the_terminal_lacks() -> None:
    """A character that the terminal's encoding lacks is spelled out instead of an error."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")

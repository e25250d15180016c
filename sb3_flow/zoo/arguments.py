"""A strict parser of command lines, for our commands and for the programs of rl-zoo3."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sb3_flow.zoo.errors import InputError, did_you_mean, one_line


class Default(str):
    """An argument that we add to those of the user, who can give it too."""


def wrong(found: Any, expected: str, hint: str = "") -> argparse.ArgumentTypeError:
    """
    :param found: What the user gave
    :param expected: What is expected
    :param hint: What to do about it, " (did you mean ...?)"
    :return: error of a type of an argument, which ``argparse`` completes with the name of the argument
    """
    return argparse.ArgumentTypeError(f"found {found!r}, expected {expected}{hint}")


def whole_number(text: str, expected: str = "a whole number") -> int:
    """
    Type of an argument.

    :param text: What the user gave
    :param expected: What is expected
    :return: number
    """
    try:
        return int(text)
    except ValueError:
        try:
            is_whole = float(text) == int(float(text))
        except (ValueError, OverflowError):
            is_whole = False
        raise wrong(text, expected, f" (did you mean {int(float(text))}?)" if is_whole else "") from None


def integer(minimum: int, maximum: int | None = None, default: int | None = None) -> Callable[[str], int]:
    """
    Type of an argument.

    :param minimum: Smallest value
    :param maximum: Largest value
    :param default: Another value, which stands for a default
    :return: what makes an int of a string
    """
    expected = f"a whole number, {minimum} or more" if maximum is None else f"a whole number from {minimum} to {maximum}"
    expected += "" if default is None else f" (or {default}, the default)"

    def parse(text: str) -> int:
        value = whole_number(text, expected)
        if value != default and (value < minimum or (maximum is not None and value > maximum)):
            raise wrong(value, expected)
        return value

    return parse


def count_or_never(text: str) -> int:
    """Type of a number of steps: negative for never, but not 0."""
    expected = "a whole number of steps, 1 or more (or -1 for never)"
    value = whole_number(text, expected)
    if value == 0:
        raise wrong(value, expected)
    return value


def finite(text: str) -> float:
    """Type of a number."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise wrong(text, "a number")
    return value


def boolean(text: str) -> bool:
    """Type of an argument that is True or False. (``bool("False")`` would be True.)"""
    if text not in ("True", "False"):
        raise wrong(text, "True or False", did_you_mean(text, ("True", "False")))
    return text == "True"


#: What NumPy takes for a seed
seed = integer(0, 2**32 - 1)


def device(text: str) -> str:
    """Type of a PyTorch device, which has to be there: SB3 would take the CPU instead of a GPU that is not."""
    import torch as th

    if text != "auto":
        try:
            th.zeros(1, device=text).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            names = ["auto", "cpu", *(["cuda"] if th.cuda.is_available() else [])]
            reason = f" ({one_line(error).split('. ')[0]})" if text.partition(":")[0] in ("cuda", "mps", "xpu") else ""
            expected = f"a PyTorch device that is there: {', '.join(names)}{reason}"
            raise wrong(text, expected, did_you_mean(text, names)) from None
    return text


def folder(text: str) -> str:
    """Type of a folder to read. (Where it was not asked for, it need not be there.)"""
    if not isinstance(text, Default) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"the {text!r} folder was not found{_or_what_it_is(text)}, expected a log folder")
    return text


def _or_what_it_is(text: str) -> str:
    return " (it is a file)" if Path(text).exists() else ""


def new_folder(text: str) -> str:
    """Type of a folder to write into, which need not exist."""
    if text:
        parent = Path(text).absolute()
        while not os.path.lexists(parent):
            parent = parent.parent
        if not parent.is_dir():
            raise wrong(text, f"a folder: {parent} is a file")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise wrong(text, f"a folder that can be written: {parent} cannot")
    return text


def new_file(text: str) -> Path:
    """Type of a file to write."""
    path = Path(text)
    if path.is_dir():
        raise wrong(text, "the name of a file (it is a folder)")
    if not path.absolute().parent.is_dir():
        raise wrong(text, f"a file in a folder that exists: {path.parent} is none")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise wrong(text, "a file that can be written")
    return path


def image_format(text: str) -> str:
    """Type of a format of figures."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if text not in formats:
        raise wrong(text, f"one of {', '.join(formats)}", did_you_mean(text, formats))
    return text


def figure(text: str) -> Path:
    """Type of a figure to write."""
    path = new_file(text)
    if path.suffix:
        image_format(path.suffix[1:])
    return path


class KeyValue:
    """Type of several ``KEY:VALUE``, where a value is an expression of Python. rl-zoo3, which evaluates it, gets the text."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def __call__(self, text: str) -> str:
        import rl_zoo3.utils

        key, colon, expression = text.partition(":")
        if not colon or not key.isidentifier():
            key, equals, expression = text.partition("=")
            hint = f" (did you mean {f'{key}:{expression}'!r}?)" if equals and key.isidentifier() and expression else ""
            raise wrong(text, "KEY:VALUE", hint)
        try:
            # With the names that rl-zoo3 knows
            eval(expression, dict(vars(rl_zoo3.utils)))
        except (Exception, SystemExit) as error:
            reason = one_line(error).removesuffix(" (<string>, line 1)")
            quoted = f"{key}:{expression!r}"
            hint = f' (did you mean "{quoted}"?)' if isinstance(error, NameError) and "'" not in expression else ""
            raise wrong(text, f"KEY:VALUE with an expression of Python ({reason})", hint) from None
        if key in self.keys:
            raise argparse.ArgumentTypeError(f"found {key!r} twice, expected each key once")
        self.keys.add(key)
        return text


class Parser(argparse.ArgumentParser):
    """
    ``ArgumentParser`` that takes nothing for what it may not be, and whose errors are those of the user's input. Options are
    given by their whole names, those with several values once, and not with an empty text.

    :param args: See ``ArgumentParser``
    :param kwargs: See ``ArgumentParser``
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        for type_, parse in ((int, whole_number), (float, finite), (bool, boolean)):
            self.register("type", type_, parse)
        # -1e-3 is a number too, and not an option
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf|-nan", re.IGNORECASE | re.ASCII)
        if self.add_help:
            self.add_debug()

    def add_debug(self) -> None:
        """Show ``--debug`` in the help. :func:`sb3_flow.zoo.cli.main` takes it from the arguments."""
        self.add_argument("--debug", help="Show the traceback of an error", action="store_true", default=argparse.SUPPRESS)

    # (it never returns, as that of ArgumentParser, whose overloads these are not)
    def error(self, message: str):  # type: ignore[override]
        raise InputError(message)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        args = sys.argv[1:] if args is None else list(args)
        self._check_repeated_or_empty(args)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # The values of an option that is not known come after it
            options = [arg for arg in unknown if arg.startswith("-")]
            found = (options or unknown)[0].split("=")[0]
            hint = did_you_mean(found, self._option_string_actions) if options else ""
            self.error(
                f"argument {found}: {'unknown option' if options else 'expected an option before it'}, see --help{hint}"
            )
        return parsed

    def _check_repeated_or_empty(self, args: Sequence[str]) -> None:
        seen = []
        name = ""
        for arg in args:
            action = self._option_string_actions.get(arg.split("=")[0]) if arg.startswith("-") else None
            if action is not None and not isinstance(arg, Default):
                name = f"argument {'/'.join(action.option_strings)}: "
                if action in seen and action.nargs is not None:
                    # The values of the first one would be lost
                    self.error(f"{name}found twice, expected once, with all its values")
                seen.append(action)
            if arg == "" or (action is not None and arg.endswith("=")):
                self.error(f"{name}found '', expected a value")

    def _get_option_tuples(self, option_string):
        # Of those with one dash (-params), ``allow_abbrev`` lets the beginnings pass
        return [match for match in super()._get_option_tuples(option_string) if len(match[1]) == 2]

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            hint = did_you_mean(value, choices)
            raise argparse.ArgumentError(action, f"found {value!r}, expected one of {', '.join(choices)}{hint}")


@contextmanager
def rl_zoo3_arguments(
    check: Callable[[argparse.Namespace], None],
    types: dict[str, Callable[[str], Any]],
    defaults: dict[str, Any] | None = None,
    options: Sequence[tuple[str, dict[str, Any]]] = (),
    choices: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Iterator[None]:
    """
    The program of rl-zoo3 in the body, which makes a parser of its own, parses its arguments as :class:`Parser` does.

    :param check: Checks what was parsed before the program goes on, and may change it
    :param types: Types of arguments that are stricter than those of rl-zoo3
    :param defaults: Other defaults than those of rl-zoo3
    :param options: Options that the program does not have
    :param choices: Choices of arguments beside those of rl-zoo3
    """

    from sb3_flow.zoo import patches

    def parse_strictly(parser: argparse.ArgumentParser, args=None, namespace=None) -> argparse.Namespace:
        strict = Parser(prog=sys.argv[0], description=parser.description, parents=[parser], add_help=False)
        strict.add_debug()
        for name, kwargs in options:
            strict.add_argument(name, **kwargs)
        for action in strict._actions:
            is_key_value = type(action).__name__ == "StoreDict"
            action.type = KeyValue() if is_key_value else types.get(action.dest, action.type)
            if action.choices is not None:
                action.choices = [*action.choices, *choices.get(action.dest, ())]
        strict.set_defaults(**(defaults or {}))
        parsed = strict.parse_args(args, namespace)
        check(parsed)
        return parsed

    with patches.parsed_by(parse_strictly):
        yield

"""
Wrong inputs of the command line: one line each, without a traceback.

What is known to be wrong with an input is an :class:`InputError`. What others raise about it becomes one where the input is
used, by :func:`user_input`, and only there: any other exception is a bug, and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A wrong input: its message names the argument or the file, and tells what was found and what was expected."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """
    What to add to an error message about a name that is not known.

    :param name: What was found
    :param names: The names that are known
    :return: " (did you mean 'NAME'?)", or nothing if none of them is close
    """
    by_lower_case = {known.lower(): known for known in map(str, names)}
    close = difflib.get_close_matches(str(name).lower(), by_lower_case, 1)
    return f" (did you mean {by_lower_case[close[0]]!r}?)" if close else ""


def one_line(error: BaseException) -> str:
    """
    :param error: Any exception
    :return: its message in one line, with the type where the message alone would not be understood
    """
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, AssertionError, OSError, ImportError)) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def user_input(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """
    Exceptions in the body are about an input of the user, and become an :class:`InputError`.

    :param what: The argument or file that they are about, which the message begins with
    :param kinds: Kinds of exceptions. By default all of them, for a body that does nothing but read the input.
    """
    kinds = kinds or (Exception,)
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{what}: {one_line(error)}") from error

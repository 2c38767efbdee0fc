"""The run-time checker behind jaxtyping's import hook: shapes and dtypes of annotated arrays, nothing else.

beartype would also check every other annotation and numpy against jax arrays, which is mypy's business and hinders test
doubles. What has no shape (None, a Python number, a placeholder in a pytree) passes.
"""

import functools
import inspect
import sys
import types
import typing

import jaxtyping


def check(function):
    """``function`` that raises TypeError where an array is not of the shape or dtype its annotation states."""
    signature = inspect.signature(function)
    hints = None

    @functools.wraps(function)
    def checked(*args, **kwargs):
        nonlocal hints
        if hints is None:
            hints = _hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _require(function, name, value, hints.get(name))
        result = function(*args, **kwargs)
        _require(function, "return", result, hints.get("return"))
        return result

    return checked


def _hints(function):
    try:
        return typing.get_type_hints(function, vars(sys.modules[function.__module__]))
    except NameError:  # a function within a function, annotated with local names
        return {}


def _require(function, name, value, hint):
    if not _fits(value, hint):
        raise TypeError(f"{function.__qualname__}: {name} is {value.dtype}{list(value.shape)}, annotated {hint}")


def _is_array(hint):
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _fits(value, hint):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_array(hint):
        return not hasattr(value, "shape") or isinstance(value, hint.dtype[typing.Any, hint.dim_str])
    if origin in (typing.Union, types.UnionType) and any(_is_array(arg) for arg in args):
        return any(_fits(value, arg) for arg in args if _is_array(arg))
    return True

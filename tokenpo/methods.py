"""The registry: what methods exist, where they come from, what each needs, and its defaults.

A method is a function; `@method` records it and returns it unchanged. Hyperparameters are its keyword-only
arguments, annotated with a `Range` where not every number makes sense, so that a configuration can be checked
before any model loads.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from tokenpo.errors import InputError

Function = typing.TypeVar("Function", bound=Callable[..., Any])

ROOMS = ("tokenpo.losses", "tokenpo.credit", "tokenpo.advantages", "tokenpo.reward_models")


@dataclass(frozen=True)
class Range:
    """The numbers an argument accepts; an open end excludes its bound."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


Positive = Annotated[float, Range(0.0, open_low=True, open_high=True)]
NonNegative = Annotated[float, Range(0.0, open_high=True)]
Fraction = Annotated[float, Range(0.0, 1.0)]
AtLeastOne = Annotated[int, Range(1)]
AboveOne = Annotated[float, Range(1.0, open_low=True, open_high=True)]
BelowHalf = Annotated[float, Range(0.0, 0.5, open_high=True)]
Finite = Annotated[float, Range(open_low=True, open_high=True)]


@dataclass(frozen=True)
class Method:
    """One entry.

    `kind` fixes the signature: a 'pairwise' loss takes (chosen, rejected) and returns a LossOutput; 'credit' returns
    (B, T) token rewards or weights. `learns`: the fields besides `logps` and KLs that gradient flows into. For
    credit: do the rewards sum to the row's reward, and does each depend on its own past only (`causal`).
    """

    name: str
    kind: str
    function: Callable[..., Any]
    title: str
    paper: str
    needs: tuple[str, ...]
    golden: tuple[str, ...]
    learns: tuple[str, ...] = ()
    sums_to_reward: bool | None = None
    causal: bool | None = None

    @functools.cached_property
    def hyperparameters(self) -> dict[str, inspect.Parameter]:
        return keyword_only(self.function)

    @property
    def defaults(self) -> dict[str, Any]:
        return {n: None if p.default is p.empty else p.default for n, p in self.hyperparameters.items()}

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n")[0]


_REGISTRY: dict[str, Method] = {}


def method(
    name: str,
    *,
    kind: str,
    title: str,
    paper: str,
    needs: tuple[str, ...] = (),
    golden: tuple[str, ...] = (),
    learns: tuple[str, ...] = (),
    sums_to_reward: bool | None = None,
    causal: bool | None = None,
) -> Callable[[Function], Function]:
    """Record the decorated function under `name` and return it as it is.

    `title` and `paper` (an address) of its source; `needs`: the TokenStats fields it reads beyond `logps`;
    `golden`: the golden vectors that hold it; the rest as in `Method`.
    """

    def record(function: Function) -> Function:
        known = _REGISTRY.get(name)
        if known is not None and known.function.__qualname__ != function.__qualname__:
            raise InputError(f"the name '{name}' is taken by {known.function.__module__}: give the method another one")
        _REGISTRY[name] = Method(name, kind, function, title, paper, needs, golden, learns, sums_to_reward, causal)
        return function

    return record


def all_methods(kind: str | None = None) -> dict[str, Method]:
    """Every registered method by name, or those of one kind; imports the rooms that hold them."""
    for room in ROOMS:
        importlib.import_module(room)
    return {n: m for n, m in sorted(_REGISTRY.items()) if kind is None or m.kind == kind}


def get(name: str, kind: str | None = None) -> Method:
    """The method called `name`; an unknown name says which names are near."""
    known = all_methods(kind)
    if name not in known:
        raise InputError(f"unknown {kind or ''} method '{name}'{nearest(name, known)}".replace("  ", " "))
    return known[name]


def configure(name: str, kind: str | None = None, **hyperparameters: Any) -> Callable[..., Any]:
    """The method with its hyperparameters fixed, every name, type and range checked first."""
    return bind(name, get(name, kind).function, hyperparameters)


def bind(name: str, function: Callable[..., Any], hyperparameters: typing.Mapping[str, Any]) -> Callable[..., Any]:
    """Any function with its keyword-only arguments fixed, checked like a method's; `name` is for the errors."""
    known = keyword_only(function)
    for argument, value in hyperparameters.items():
        if argument not in known:
            raise InputError(f"{name} has no hyperparameter '{argument}'{nearest(argument, known)}")
        _check(name, function, argument, value)
    missing = [n for n, p in known.items() if p.default is p.empty and n not in hyperparameters]
    if missing:
        raise InputError(f"{name} needs a value for '{missing[0]}'")
    return functools.partial(function, **hyperparameters)


def keyword_only(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function by name: the hyperparameters, by convention."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest names, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if close:
        return f": did you mean {' or '.join(repr(c) for c in close)}?"
    return f": there is {', '.join(repr(k) for k in known)}" if known else ": there is none"


def _check(name: str, function: Callable[..., Any], argument: str, value: Any) -> None:
    called = function.__init__ if inspect.isclass(function) else function
    hint = typing.get_type_hints(called, include_extras=True).get(argument, Any)
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            choices = ", ".join(map(repr, typing.get_args(hint)))
            raise InputError(f"{name}: {argument} must be one of {choices}, got {value!r}")
        return
    optional = type(None) in typing.get_args(hint) and typing.get_origin(hint) is not Annotated
    if optional:
        if value is None:
            return
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    bounds = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)]
    base = typing.get_args(hint)[0] if bounds else hint
    accepted = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}.get(base)
    if accepted is not None and (not isinstance(value, accepted) or (base is not bool and isinstance(value, bool))):
        raise InputError(f"{name}: {argument} must be a {base.__name__}, got {value!r}")
    for bound in bounds:
        if value not in bound:
            raise InputError(f"{name}: {argument} must lie in {bound}, got {value!r}")

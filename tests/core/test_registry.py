"""The registry: complete entries, checked hyperparameters, errors that name what is near."""

import dataclasses
import re

import pytest

from tokenpo import methods
from tokenpo.errors import InputError
from tokenpo.types import TokenStats

EVERY = pytest.mark.parametrize("method", methods.all_methods().values(), ids=methods.all_methods().keys())


SOURCES = r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}$|aclanthology\.org/|github\.com/|(dl\.acm\.|doi\.)org/)"


@EVERY
def test_entries_are_complete(method):
    assert re.match(SOURCES, method.paper), method.paper
    assert method.title and method.summary.endswith(".")
    assert all(p.annotation is not p.empty for p in method.hyperparameters.values())


@EVERY
def test_defaults_are_accepted(method):
    for argument, parameter in method.hyperparameters.items():
        if parameter.default is not parameter.empty:
            methods._check(method.name, method.function, argument, parameter.default)


@pytest.mark.parametrize("method", methods.all_methods("pairwise").values(), ids=lambda m: m.name)
def test_pairwise_needs_are_fields_of_the_statistics(method):
    assert set(method.needs) | set(method.learns) <= {f.name for f in dataclasses.fields(TokenStats)}


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("tdpo3", {}, "unknown pairwise method 'tdpo3': did you mean 'tgdpo' or 'tdpo2' or 'tdpo1'?"),
        ("tdpo2", {"betta": 1}, "tdpo2 has no hyperparameter 'betta': did you mean 'beta'?"),
        ("tdpo2", {"beta": 0}, "tdpo2: beta must lie in (0, inf), got 0"),
        ("tdpo2", {"beta": float("nan")}, "tdpo2: beta must lie in (0, inf), got nan"),
        ("tdpo2", {"alpha": "much"}, "tdpo2: alpha must be a float, got 'much'"),
        ("tdpo2", {"alpha": True}, "tdpo2: alpha must be a float, got True"),
        ("dpo", {"label_smoothing": 0.5}, "dpo: label_smoothing must lie in [0, 0.5), got 0.5"),
    ],
)
def test_mistakes_are_named(name, arguments, sentence):
    with pytest.raises(InputError) as error:
        methods.configure(name, kind="pairwise", **arguments)
    assert str(error.value) == sentence


def test_a_taken_name_is_refused():
    with pytest.raises(InputError, match=r"'dpo' is taken by tokenpo\.losses\.dpo"):

        @methods.method("dpo", kind="pairwise", title="x", paper="x")
        def other(chosen, rejected):
            """Other."""


def test_configure_fixes_hyperparameters():
    assert methods.configure("dpo", beta=0.5).keywords == {"beta": 0.5}
    assert methods.configure("tgdpo", min_weight=None).keywords == {"min_weight": None}

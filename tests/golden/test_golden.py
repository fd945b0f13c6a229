"""Every method held to its authors' numbers: `TOKENPO_GOLDEN=<folder> pytest tests/golden`."""

import pytest
from adapters import ADAPTERS
from cases import Case, files, root, slugs

FOUND = [(slug, path) for slug in slugs() if slug in ADAPTERS for path in files(slug)]


@pytest.mark.parametrize(("slug", "path"), FOUND, ids=[f"{slug}-{path.stem}" for slug, path in FOUND])
def test_golden(slug, path):
    case = Case.read(path)
    ADAPTERS[slug](case)
    assert not case.uncompared(), f"outputs that the adapter did not compare: {case.uncompared()}"


@pytest.mark.parametrize("slug", slugs())
def test_every_slug_has_an_adapter(slug):
    assert slug in ADAPTERS, f"golden vectors '{slug}' lie under {root()}, and nothing here is held to them"


def test_methods_name_adapted_slugs():
    from tokenpo.methods import all_methods

    for method in all_methods().values():
        assert set(method.golden) <= set(ADAPTERS), f"{method.name} names a slug that no adapter holds"

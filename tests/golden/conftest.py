"""A closing line that names the slugs under the folder that nothing here adapts yet."""


def pytest_terminal_summary(terminalreporter):
    import cases
    from adapters import ADAPTERS

    without = [slug for slug in cases.slugs() if slug not in ADAPTERS]
    if without:
        terminalreporter.section("golden vectors without an adapter")
        terminalreporter.line(f"{len(without)} slugs under {cases.root()}: {', '.join(without)}")

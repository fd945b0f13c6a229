"""verl on Ray: estimators and objectives of this library under names verl looks up (`pip install tokenpo[verl]`).

`fields.py` is what verl calls things and what they are here; `functions.py` makes functions with verl's signatures;
`check.py` says what is registered and refuses a run that cannot work. These import no verl. `plugin.py` registers, and
is loaded by `import verl` in every process (entry point group `verl.plugins`); `config.py` and `trainer.py` are classes
that verl finds by name. `python -m tokenpo.integrations.verl` lists and checks.
"""

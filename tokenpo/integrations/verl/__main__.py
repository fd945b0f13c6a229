"""`python -m tokenpo.integrations.verl [overrides of verl.trainer.main_ppo]`: what is registered; can this run work.

Without arguments it lists; with the overrides of a launch line it composes verl's configuration and checks it. Exit
code 0, or 2 with one sentence.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from tokenpo.errors import InputError, TokenpoError
from tokenpo.integrations.verl.check import check, listing
from tokenpo.integrations.verl.fields import LIST
from tokenpo.integrations.verl.functions import registered


def main(argv: Sequence[str]) -> int:
    """List, or check a launch line."""
    try:
        if importlib.util.find_spec("verl") is None:
            raise InputError("verl is not installed: pip install 'tokenpo[verl]', in an environment of its own")
        verify()
        for line in checked(argv) if argv else listed():
            print(line)
    except TokenpoError as error:
        print(f"tokenpo: {error}", file=sys.stderr)
        return 2
    return 0


def verify() -> None:
    """Raise unless verl's registries, as `import verl` left them, hold our functions."""
    import verl.trainer.ppo.core_algos as core

    estimators, objectives = registered()
    missing = [n for n, f in estimators.items() if core.ADV_ESTIMATOR_REGISTRY.get(n) is not f]
    missing += [n for n, f in objectives.items() if core.POLICY_LOSS_REGISTRY.get(n) is not f]
    if missing:
        raise InputError(
            f"verl did not load this plugin, {missing[0]} is missing: install tokenpo (a path on PYTHONPATH has no "
            "entry points), or set VERL_USE_EXTERNAL_MODULES=tokenpo.integrations.verl.plugin"
        )


def listed() -> list[str]:
    """The listing, and whether the trainer is there."""
    from tokenpo.integrations.verl.plugin import TRAINER_ERROR

    lines = [f"{kind:26} {name:40} {how}" for kind, name, how in listing()]
    trainer = f"not registered: {TRAINER_ERROR}" if TRAINER_ERROR else "registered"
    return [*lines, f"{'trainer':26} {LIST:40} {trainer}"]


def checked(overrides: Sequence[str]) -> list[str]:
    """verl's configuration with these overrides, composed and checked."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException

    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return check(compose("ppo_trainer", overrides=list(overrides)))
    except HydraException as error:
        raise InputError(" ".join(str(error).split())) from error


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

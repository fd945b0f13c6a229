"""Reference models: the modes, the check that a fresh policy agrees with its reference, and the cache."""

from tokenpo.reference.modes import (
    MODES,
    Reference,
    check_mode,
    disable_dropout,
    make_reference,
    start_difference,
    unwrap,
)

__all__ = ["MODES", "Reference", "check_mode", "disable_dropout", "make_reference", "start_difference", "unwrap"]

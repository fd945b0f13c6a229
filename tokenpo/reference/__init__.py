"""Reference models: the modes, and the check that a fresh policy agrees with its reference."""

from tokenpo.reference.modes import MODES, Reference, disable_dropout, make_reference, start_difference, unwrap

__all__ = ["MODES", "Reference", "disable_dropout", "make_reference", "start_difference", "unwrap"]

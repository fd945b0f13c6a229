"""The reward-redistribution layer: any signal becomes token rewards."""

from tokenpo.credit.implicit import implicit_rewards

__all__ = ["implicit_rewards"]

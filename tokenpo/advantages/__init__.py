"""Grouped rollouts to token advantages. The estimators of online RL live here."""

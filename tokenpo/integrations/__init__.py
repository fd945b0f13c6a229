"""Engines that other people run: TRL on one node. Nothing is imported here, so that none of them has to be there."""

"""Evaluators, one file each; see `bigmed.evaluators.features` for the contract."""

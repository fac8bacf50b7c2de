"""Training objectives, one file each; see `bigmed.objectives.base` for the contract."""

"""Training objectives, one file each; see `bigmed.objectives.simclr` for the contract."""

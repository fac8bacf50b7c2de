"""MICLe (arXiv 2101.05224): the positive pair is two distinct images of one patient case.

A row of the batch holds two images of a case, drawn anew at every visit; each gives one augmented
view. The loss is SimCLR's, unchanged (`bigmed.objectives.simclr`); what differs is the data
(`config.data.pairs = 'case'`). Cases with one image give two views of that image, or are dropped
(`config.data.single_image`).
"""

from bigmed.objectives import simclr


class Objective(simclr.Objective):
    """SimCLR's objective on pairs of images of a case."""

    IMAGES_PER_EXAMPLE = (2,)

"""The one exception a user of ltd_fx sees."""


class LTDError(ValueError):
    """What the user asked for cannot be done correctly.

    The message names the layer or argument at fault and the remedy. It is raised before the model,
    the scheduler or a file is changed.
    """

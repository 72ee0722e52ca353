"""How a benchmark ends that cannot go on."""


class Failed(Exception):
    """The benchmark cannot go on; the text says why and what to do."""

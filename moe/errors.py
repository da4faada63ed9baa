"""What can go wrong, by whose mistake it is.

Every message names the argument, the value it had and the rule it broke.
"""


class MoEError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(MoEError, ValueError):
    """An option has a value it cannot have, alone or beside the others."""


class ShapeError(MoEError, ValueError):
    """A tensor has another shape than the call needs."""


class DtypeError(MoEError, TypeError):
    """A tensor has a dtype the call cannot work with."""


class DataError(MoEError, ValueError):
    """A corpus is empty, too short, or of a kind that cannot be read."""


class CheckpointError(MoEError, RuntimeError):
    """A checkpoint is damaged, incomplete, or of another architecture."""


class TrainingError(MoEError, RuntimeError):
    """A training run cannot go on, and says where its last good state lies."""


class RecomputationError(MoEError, RuntimeError):
    """An activation checkpoint recomputes a call in a way that cannot be made safe."""


class ParallelError(MoEError, RuntimeError):
    """A rank failed, or does not answer."""

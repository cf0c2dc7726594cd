"""Errors of the measuring package. Each says what failed, with which values, and the next step."""


class ProfilerError(Exception):
    """Base of every error a user of ``profilers`` can cause."""


class BackendUnavailable(ProfilerError):
    """The runtime or the device asked for is not there."""


class TableError(ProfilerError):
    """A latency table cannot be read, or two tables do not belong together."""


class ProvenanceMismatch(TableError):
    """The table was measured under other conditions than the ones asked for."""


class MissingMeasurement(ProfilerError):
    """A layer or a width was never measured, and nothing may be guessed in its place."""


class MeasuringStopped(ProfilerError):
    """The time was over before everything had been measured that is needed; what was is kept."""

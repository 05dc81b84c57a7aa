"""The few errors that are meant for users. Commands print them as one line and exit with 2."""


class LlmrecError(ValueError):
    """What a user gave cannot work. The message says what is wrong, got, expected, what to do."""


class ConfigError(LlmrecError):
    """A setting is unknown, impossible, or contradicts another one."""


class DataError(LlmrecError):
    """A data file is missing or does not hold what it should; names file, row and column."""


class MissingArtifactError(LlmrecError):
    """A stage's output folder is absent, unfinished or damaged."""


class StaleArtifactError(LlmrecError):
    """A stage's output folder was made with another config or from other inputs."""


class BusyError(StaleArtifactError):
    """Another process is computing this very output."""


class ArtifactMismatchError(LlmrecError):
    """Two artefacts do not belong together, or an artefact breaks its own contract."""


class StorageError(LlmrecError):
    """The disk is full, or a folder may not be written; what was there before still is."""


class StoppedError(LlmrecError):
    """The process was asked to stop and has done so; what it had done is kept where the message says so."""


class TrainingError(LlmrecError):
    """Training went wrong in a way that more epochs will not mend (collapse, NaN loss)."""

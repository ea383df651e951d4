"""Everything nanovlm refuses, as one tree.

    NanoVLMError (a ValueError)
    |-- ConfigError            a config contradicts itself, or is out of bounds
    |   |-- UnknownPreset      no preset of that name
    |   `-- UnknownBackbone    no vision encoder or language model of that name
    |-- WeightsError           a weight file cannot be read, or does not fit the model
    |   `-- SourceNotFound     neither a folder nor a repository, or a file is missing there
    |-- UploadError            the Hub does not take what is pushed
    |-- CheckpointError        a run's checkpoint cannot be written, or gone on with
    |-- NonFiniteLoss          too many steps in a row made NaN or infinity
    |-- TokenizerError         no usable tokenizer, or one that does not fit the model
    |-- ImageError             not a picture, or pixels of the wrong shape, type or value
    |-- PromptError            a prompt or chat template cannot be used
    |   |-- ImageTokenMismatch image tokens and image features differ in number
    |   `-- PromptTooLong      more tokens than the model has positions
    |-- DataError              no such data set, or nothing in it can be read
    |   `-- BadRow             one row cannot be used; training skips and counts it
    `-- NoLabels               a loss was asked for, and not one position has a label

A message names the thing, both values and the way out.
"""


class NanoVLMError(ValueError):
    """Base of all errors raised by nanovlm on purpose."""


class ConfigError(NanoVLMError):
    """A config contradicts itself, or is out of bounds."""


class UnknownPreset(ConfigError):
    """No preset of that name."""


class UnknownBackbone(ConfigError):
    """No vision encoder or language model of that name."""


class WeightsError(NanoVLMError):
    """A weight file cannot be read, or does not fit the model."""


class SourceNotFound(WeightsError):
    """Neither a folder nor a repository, or a file is missing there."""


class UploadError(NanoVLMError):
    """The Hub does not take what is pushed."""


class CheckpointError(NanoVLMError):
    """A run's checkpoint cannot be written, or gone on with."""


class NonFiniteLoss(NanoVLMError):
    """Too many training steps in a row made NaN or infinity."""


class TokenizerError(NanoVLMError):
    """No usable tokenizer, or one that does not fit the model."""


class ImageError(NanoVLMError):
    """Not a picture, or pixels of the wrong shape, type or value."""


class PromptError(NanoVLMError):
    """A prompt or chat template cannot be used."""


class ImageTokenMismatch(PromptError):
    """Image tokens and image features differ in number."""


class PromptTooLong(PromptError):
    """More tokens than the model has positions."""


class DataError(NanoVLMError):
    """No such data set, or nothing in it can be read."""


class BadRow(DataError):
    """One row cannot be used. ``kind`` is the reason under which rows are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):
        return type(self), (self.kind, str(self))  # arguments other than the message: pickle must be told


class NoLabels(NanoVLMError):
    """A loss was asked for, and not one position has a label."""

"""What can be wrong with a release, or with the keys that sign it."""


class ArtifactError(RuntimeError):
    """A release or repository is invalid; the message says what and why."""


class KeyFileError(RuntimeError):
    """A key for signatures can not be used; the message says which and why."""

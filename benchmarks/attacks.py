"""The attacks live in tests/attacks; this module goes when its last importer has changed."""

from tests.attacks.attacks import *  # noqa: F403

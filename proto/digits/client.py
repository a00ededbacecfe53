"""A client of the digit classifier: ``DigitClient`` for threads, ``AsyncDigitClient`` for asyncio.

Needs grpcio, protobuf and numpy only. Transient errors are retried within the deadline, when the
server asks for it or with exponential backoff.
"""

from digits.answers import Classification, Model, Prediction
from digits.async_client import AsyncDigitClient
from digits.channel import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Tls
from digits.errors import ClientStateError, DigitError
from digits.inputs import Picture, Pictures
from digits.progress import Progress, progress_bar
from digits.sync_client import DigitClient

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_TIMEOUT_S",
    "AsyncDigitClient",
    "Classification",
    "ClientStateError",
    "DigitClient",
    "DigitError",
    "Model",
    "Picture",
    "Pictures",
    "Prediction",
    "Progress",
    "Tls",
    "progress_bar",
]

"""A client of the digit classifier: ``DigitClient`` for threads, ``AsyncDigitClient`` for asyncio.

Needs grpcio, protobuf and numpy only. Calls that the server refuses for a passing reason are tried
again within the deadline, when the server asks for it or after a growing pause.
"""

from digits.answers import Classification, Model, Prediction
from digits.async_client import AsyncDigitClient
from digits.channel import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Tls
from digits.errors import DigitError
from digits.progress import Progress, progress_bar
from digits.requests import Picture, Pictures
from digits.sync_client import DigitClient

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_TIMEOUT_S",
    "AsyncDigitClient",
    "Classification",
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

"""Server reflection, v1 and v1alpha: the same messages under two names."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.message import DecodeError
from grpc import StatusCode
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._base import BaseReflectionServicer

from service.rpc.call import RpcCall
from service.rpc.open_streams import OpenStreams
from service.rpc.status import Status, fail, unavailable

SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
METHOD = "ServerReflectionInfo"
MAX_STREAMS = 256
MAX_STREAMS_PER_CONNECTION = 16
# A question names a symbol or a file.
MAX_MESSAGE_BYTES = 4096
MALFORMED = Status(
    StatusCode.INVALID_ARGUMENT, "request: expected a ServerReflectionRequest, got malformed bytes"
)
SHUTTING_DOWN = unavailable("the server is shutting down")


class Reflection(BaseReflectionServicer):  # type: ignore[misc] # grpcio-reflection has no types
    """Answers questions about services.

    Args:
        names: Of the services.
    """

    def __init__(self, names: Sequence[str]) -> None:
        _describe_v1()
        super().__init__([*names, *SERVICES])
        self._streams: OpenStreams[_Questions] = OpenStreams(
            MAX_STREAMS, MAX_STREAMS_PER_CONNECTION
        )

    def open(self, call: RpcCall) -> _Questions | None:
        """Begins a stream of questions, unless too many are open."""
        return self._streams.open(call, partial(_Questions, self))

    def close(self) -> None:
        """Ends streams, which would otherwise keep the server from stopping in time."""
        self._streams.close()

    def remove(self, stream: _Questions) -> None:
        """A stream has ended."""
        self._streams.remove(stream.call)

    def answer(self, question: Any) -> Any:
        """A ServerReflectionResponse to a ServerReflectionRequest."""
        kind = question.WhichOneof("message_request")
        if kind == "file_containing_extension":
            extension = question.file_containing_extension
            return self._file_containing_extension(
                question, extension.containing_type, extension.extension_number
            )
        if kind == "list_services":
            return self._list_services(question)
        if kind is not None:
            return getattr(self, f"_{kind}")(question, getattr(question, kind))
        error = reflection_pb2.ErrorResponse(
            error_code=StatusCode.INVALID_ARGUMENT.value[0],
            error_message="message_request: expected a question, got none",
        )
        return reflection_pb2.ServerReflectionResponse(
            error_response=error, original_request=question
        )


class _Questions:
    """One stream of questions: the receiver of its messages."""

    def __init__(self, reflection: Reflection, call: RpcCall) -> None:
        self.call = call
        self._reflection = reflection

    def message(self, message: bytes) -> None:
        try:
            question = reflection_pb2.ServerReflectionRequest.FromString(message)
        except (DecodeError, UnicodeDecodeError):
            self._end(MALFORMED)
            return
        self.call.send(self._reflection.answer(question).SerializeToString())
        if self.call.unsent:  # an answer is much longer than a question
            self.call.pause()

    def sent(self) -> None:
        self.call.resume()

    def close(self) -> None:
        self._end(SHUTTING_DOWN)

    def _end(self, status: Status) -> None:
        fail(self.call, status)
        self._reflection.remove(self)

    def half_closed(self) -> None:
        self.call.end()
        self._reflection.remove(self)

    def cancelled(self) -> None:
        self._reflection.remove(self)

    def failed(self, _: int, __: str) -> None:
        self._reflection.remove(self)


def _describe_v1() -> None:
    """Puts the description of v1, which grpcio-reflection lacks, into the default pool."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = text_format.MessageToString(file).replace("v1alpha", "v1")
    v1 = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    with contextlib.suppress(TypeError):  # it is there already
        descriptor_pool.Default().AddSerializedFile(v1.SerializeToString())

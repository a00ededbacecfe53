"""The methods of the protocol that describe the server and its model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

from google.protobuf.message import Message

from digits.oip import inference_pb2
from service.oip import tensors
from service.oip.messages import check_model
from service.rpc.codec import parse
from service.rpc.get_model import LOADING
from service.rpc.status import Status
from service.serving.gate import Gate
from service.serving.model import ServedModel

DISTRIBUTION = "digits-serving"
# Triton's name for ModelConfig.
EXTENSIONS = ("model_configuration",)


class Descriptions:
    """Answers the methods other than ModelInfer.

    Args:
        gate: The model in service.
        max_images: Images in one request at most.
        is_live: What ServerLive says.
        is_ready: What ServerReady says.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        max_images: int,
        is_live: Callable[[], bool],
        is_ready: Callable[[], bool],
    ) -> None:
        self._gate = gate
        self._max_images = max_images
        self._is_live = is_live
        self._is_ready = is_ready

    def methods(self) -> dict[str, Callable[[bytes], Message | Status]]:
        """Each method's answer to a serialised request, by its name."""
        return {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
        }

    def _server_live(self, message: bytes) -> Message | Status:
        parse(inference_pb2.ServerLiveRequest, message)
        return inference_pb2.ServerLiveResponse(live=self._is_live())

    def _server_ready(self, message: bytes) -> Message | Status:
        parse(inference_pb2.ServerReadyRequest, message)
        return inference_pb2.ServerReadyResponse(ready=self._is_ready())

    def _server_metadata(self, message: bytes) -> Message | Status:
        parse(inference_pb2.ServerMetadataRequest, message)
        version = importlib.metadata.version(DISTRIBUTION)
        return inference_pb2.ServerMetadataResponse(
            name=DISTRIBUTION, version=version, extensions=EXTENSIONS
        )

    def _model_ready(self, message: bytes) -> Message | Status:
        asked = parse(inference_pb2.ModelReadyRequest, message)
        model = self._gate.model
        if model is None or not self._is_ready():
            return inference_pb2.ModelReadyResponse(ready=False)
        is_ours = asked.name == model.name and asked.version in ("", model.version)
        return inference_pb2.ModelReadyResponse(ready=is_ours)

    def _model_metadata(self, message: bytes) -> Message | Status:
        asked = parse(inference_pb2.ModelMetadataRequest, message)
        return self._of_model(asked, tensors.metadata)

    def _model_config(self, message: bytes) -> Message | Status:
        asked = parse(inference_pb2.ModelConfigRequest, message)
        return self._of_model(asked, partial(tensors.config, max_images=self._max_images))

    def _of_model(self, asked: Any, answer: Callable[[ServedModel], Message]) -> Message | Status:
        """An answer about the model in service, if that is the one asked for."""
        model = self._gate.model
        if model is None:
            return LOADING
        check_model(model, asked.name, asked.version)
        return answer(model)

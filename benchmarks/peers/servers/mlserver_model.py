"""MLServer: the Open Inference Protocol over gRPC, raw pixels in, raw probabilities out."""

from __future__ import annotations

from digits_model import DigitsModel
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Digits(MLModel):
    async def load(self) -> bool:
        self._model = DigitsModel()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = NumpyCodec.decode_input(payload.inputs[0]).reshape(-1, 28, 28)
        output = NumpyCodec.encode_output("probabilities", self._model(images))
        return InferenceResponse(model_name=self.name, outputs=[output])

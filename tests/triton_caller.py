"""Calls a server with NVIDIA's tritonclient, in whose environment it runs; prints what it got.

The project's own packages are not there: tritonclient needs protobuf 6, and brings messages of the
same names as digits.oip.
"""

import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton


def infer(client: Any, images: np.ndarray, datatype: Any, **rest: Any) -> Any:
    tensor = triton.InferInput("image", images.shape, datatype)
    tensor.set_data_from_numpy(images)
    return client.infer("digits", [tensor], **rest)


def refusal(call: Any) -> list[Any] | None:
    try:
        call()
    except triton.InferenceServerException as error:
        return [error.status(), error.message()]
    return None


address, sample = sys.argv[1:]
images = np.load(sample)["images"][:100]
client = triton.InferenceServerClient(address)
whole = infer(client, images, "UINT8", request_id="seven", parameters={"note": "x"})
floats = infer(client, (images / np.float32(255)).reshape(-1, 784), "FP32")
output = triton.InferRequestedOutput("digit")
chosen = infer(client, images[:, None], "UINT8", outputs=[output])
print(
    json.dumps(
        {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": [client.is_model_ready(name) for name in ("digits", "cats")],
            "server": client.get_server_metadata(as_json=True),
            "metadata": client.get_model_metadata("digits", as_json=True),
            "config": client.get_model_config("digits", as_json=True)["config"],
            "id": whole.get_response().id,
            "digits": whole.as_numpy("digit").tolist(),
            "dtype": str(whole.as_numpy("digit").dtype),
            "probabilities": whole.as_numpy("probabilities").shape,
            "same_in_fp32": bool(
                (whole.as_numpy("probabilities") == floats.as_numpy("probabilities")).all()
            ),
            "chosen": [tensor.name for tensor in chosen.get_response().outputs],
            "same_chosen": bool((chosen.as_numpy("digit") == whole.as_numpy("digit")).all()),
            "unknown": refusal(lambda: client.get_model_metadata("cats")),
            "of_0_to_255": refusal(lambda: infer(client, images.astype(np.float32), "FP32")),
        }
    )
)

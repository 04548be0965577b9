"""Stand-in until the runner's own module arrives by merge."""

from fastseq.bench.report import load, to_json, from_json  # noqa
from fastseq.bench.runner import COMPILED, ONNX, OURS, OURS_FUNCTIONAL, TORCH, CaseResult  # noqa

OPENVINO = "openvino"
PEERS = {"torch": TORCH, "torch-compile": COMPILED, "onnxruntime": ONNX, "openvino": OPENVINO}

"""A TensorRT made of onnxruntime, for tests of the TensorRT backend's logic where there is no GPU. A "plan" is an ONNX file and its
profiles; it runs on fake_cuda."""

from __future__ import annotations

import ctypes
import importlib.machinery
import json
import struct
import types
from enum import Enum
from typing import Any

import numpy as np
import onnxruntime
from fake_cuda import ALIGNMENT, FakeCuda

TAG = b"ftrt"


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        """What who derives from it replaces."""


Profiles = list[dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]  # of each: least and largest shape of an input


def make_plan(model: bytes, profiles: Profiles, activation_bytes: int) -> bytes:
    """What FakeTensorRT deserializes."""
    head = json.dumps({"profiles": profiles, "activation_bytes": activation_bytes}).encode()
    return TAG + struct.pack("<I", len(head)) + head + model


class FakeTensorRT(types.ModuleType):
    """Takes the place of tensorrt, 8.6 or 10. deserialized: plans it was given; engines: made of them, in order. refuse: makes it
    refuse all plans; fails: what else fails, of "capture", "step", "profile"."""

    ILogger = ILogger

    def __init__(self, cuda: FakeCuda, version: str = "8.6.1") -> None:
        super().__init__("tensorrt")
        self.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)  # torch looks for it
        self.cuda, self.__version__ = cuda, version
        self.kernels: Any = None  # the fake CUDA kernels beside it
        self.kernels: Any = None  # the fake CUDA kernels beside it
        self.deserialized = 0
        self.refuse = False
        self.fails: set[str] = set()
        self.engines: list[FakeEngine] = []
        self.modern = int(version.partition(".")[0]) >= 10
        if self.modern:
            self.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")

    def Runtime(self, logger: Any) -> FakeRuntime:
        return FakeRuntime(self, logger)


class FakeRuntime:
    def __init__(self, module: FakeTensorRT, logger: Any) -> None:
        self.module, self.logger = module, logger

    def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
        self.module.deserialized += 1
        if self.module.refuse:
            self.logger.log(Severity.ERROR, "the plan was made by another version")
            return None
        assert plan.startswith(TAG), "bytes that are no plan reached TensorRT"
        engine = FakeEngine(self.module, self.logger, plan)
        self.module.engines.append(engine)
        return engine


class FakeEngine:
    def __init__(self, module: FakeTensorRT, logger: Any, plan: bytes) -> None:
        (length,) = struct.unpack_from("<I", plan, 4)
        head = json.loads(plan[8 : 8 + length])
        self.module, self.logger = module, logger
        self.profiles = head["profiles"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(plan[8 + length :], options, ["CPUExecutionProvider"])
        values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(values)
        self.get_tensor_name = lambda index: values[index].name
        self.used: set[int] = set()
        self.shapes_run: list[tuple[int, ...]] = []  # B and S of each run, where the plan knows them
        setattr(self, "device_memory_size_v2" if module.modern else "device_memory_size", head["activation_bytes"])
        self.activation_bytes = head["activation_bytes"]
        if module.modern:
            self.create_execution_context = lambda strategy: FakeContext(self)
        else:
            self.create_execution_context_without_device_memory = lambda: FakeContext(self)


_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.cuda = engine, engine.module.cuda
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.device_memory = 0
        if engine.module.modern:
            self.set_device_memory = lambda address, size: setattr(self, "device_memory", address)

    def _refuse(self, message: str) -> bool:
        self.engine.logger.log(Severity.ERROR, message)
        return False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not 0 <= index < len(self.engine.profiles):
            return self._refuse(f"no profile {index}")
        if "profile" in self.engine.module.fails and self.engine.module.modern:
            raise RuntimeError("Error in set optimization profile async.")
        if not self.engine.module.modern and index in self.engine.used:
            return self._refuse(f"profile {index} is used by another context")
        self.engine.used.add(index)
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        least, most = self.engine.profiles[self.profile][name]
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return self._refuse(f"shape {shape} of {name} is outside the profile {least} to {most}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        if name not in names:
            return self._refuse(f"there is no tensor {name}")
        if address % ALIGNMENT:
            return self._refuse(f"the address of {name} is not aligned")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        module, session = self.engine.module, self.engine.session
        capturing = self.cuda.streams[stream].recording is not None
        if "step" in module.fails or (capturing and "capture" in module.fails):
            return self._refuse("it was told to fail")
        self.cuda.check(self.device_memory, self.engine.activation_bytes, "device")
        shapes, addresses = dict(self.shapes), dict(self.addresses)

        def run() -> None:
            feeds = {}
            for value in session.get_inputs():
                shape = shapes.get(value.name) or tuple(value.shape)
                feeds[value.name] = self._read(shape, addresses[value.name], _NUMPY[value.type])
            self.engine.shapes_run += [feeds[name].shape[:2] for name in ("input_ids", "e", "result") if name in feeds][
                :1
            ]
            names = [value.name for value in session.get_outputs()]
            for name, array in zip(names, session.run(names, feeds), strict=True):
                self.cuda.check(addresses[name], array.nbytes, "device")
                ctypes.memmove(addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)

        self.cuda.put(stream, run)
        return True

    def _read(self, shape: tuple[int, ...], address: int, dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.cuda.check(address, size, "device")
        raw = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(raw).view(dtype).reshape(shape) if size else np.empty(shape, dtype)

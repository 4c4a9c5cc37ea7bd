"""A loaded cubin and its launches, through the CUDA driver's Python binding.

A launch costs a few microseconds: the arguments are packed into one buffer per kernel, whose
addresses the driver was given once. Everything that must not happen while a CUDA graph is being
captured, such as loading code, happens when the module is loaded.
"""

from __future__ import annotations

import ctypes
import importlib
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from cqtool.errors import KernelError, KernelsUnavailable
from cqtool.kernels.variants import Variant

_DEFAULT_SHARED = 48 << 10  # bytes of dynamic shared memory that need no attribute
_FORMATS = {(8, int): "q", (4, int): "i", (4, float): "f"}

T = TypeVar("T")
Dim = tuple[int, int, int]
Arg = int | float


@cache
def driver() -> Any:
    """The module ``cuda.bindings.driver``, with the driver initialized.

    Raises:
        KernelsUnavailable: the binding is not installed, or there is no NVIDIA driver.
    """
    try:
        binding: Any = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise KernelsUnavailable(
            f"The package cuda-bindings, which launches CUDA kernels, cannot be imported ({error})"
            "; run: pip install 'cuda-core>=1.2' 'cuda-bindings>=13,<14'."
        ) from error
    try:
        (code,) = binding.cuInit(0)
    except RuntimeError as error:
        raise KernelsUnavailable(
            "The CUDA driver (libcuda.so) cannot be loaded; install the NVIDIA driver."
        ) from error
    if int(code) != 0:
        raise KernelsUnavailable(f"The CUDA driver does not start ({code}); repair or update it.")
    return binding


def call(what: str, function: Any, *args: Any) -> Any:
    """Call a driver function; its one result, or None.

    Raises:
        KernelError: with `what`, and the driver's word on the failure.
    """
    code, *values = function(*args)
    if int(code) != 0:
        raise KernelError(f"{what} failed: {_explain(code)}.")
    return values[0] if values else None


def _explain(code: Any) -> str:
    _, text = driver().cuGetErrorString(code)
    name = getattr(code, "name", str(code))
    return f"{text.decode()} ({name})" if isinstance(text, bytes) else name


@dataclass(frozen=True)
class Device:
    """A GPU by torch's index, with the primary context that torch works in."""

    index: int
    capability: tuple[int, int]
    context: Any


@cache
def open_device(index: int) -> Device:
    """The GPU with torch's index `index` (both obey CUDA_VISIBLE_DEVICES).

    Raises:
        KernelError: there is no such GPU, or it cannot be used.
    """
    cuda = driver()
    names = cuda.CUdevice_attribute
    what = f"Opening GPU {index}"
    handle = call(what, cuda.cuDeviceGet, index)
    major, minor = (
        call(what, cuda.cuDeviceGetAttribute, attribute, handle)
        for attribute in (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    # Retained and never released: torch keeps it for the life of the process, too.
    context = call(what, cuda.cuDevicePrimaryCtxRetain, handle)
    return Device(index, (int(major), int(minor)), context)


def _within(device: Device, function: Callable[..., T], *args: Any) -> T:
    """Call `function` with the GPU's primary context as the calling thread's current one.

    A launch on the null stream goes to the current context, which is another one while torch's
    current device is another GPU, and none at all on a thread that has not used CUDA yet.
    """
    cuda = driver()
    before = call("Reading the current CUDA context", cuda.cuCtxGetCurrent)
    if int(before) == int(device.context):
        return function(*args)
    call("Setting the current CUDA context", cuda.cuCtxSetCurrent, device.context)
    try:
        return function(*args)
    finally:
        cuda.cuCtxSetCurrent(before)


class LoadedModule:
    """The kernels of one variant, ready on one GPU.

    Attributes:
        variant: what was asked for.
        device_index: torch's index of the GPU.
        arch: the architecture of the cubin; the GPU's own or an earlier one of its kind.
        origin: where the cubin came from, for people.
        entries: the names of the kernels in it.
    """

    def __init__(
        self, variant: Variant, device: Device, arch: str, cubin: bytes, origin: str
    ) -> None:
        """Load the cubin and all its kernels.

        Raises:
            KernelError: the driver refuses it.
        """
        self.variant = variant
        self.device_index = device.index
        self.arch = arch
        self.origin = origin
        self._device = device
        self._kernels = _within(device, self._load, cubin)

    @property
    def entries(self) -> tuple[str, ...]:
        """The kernels' names, sorted."""
        return tuple(sorted(self._kernels))

    def _load(self, cubin: bytes) -> dict[str, _Kernel]:
        cuda = driver()
        what = f"Loading {self.variant} for {self.arch}"
        module = call(what, cuda.cuModuleLoadData, cubin)
        count = call(what, cuda.cuModuleGetFunctionCount, module)
        kernels = {}
        for function in call(what, cuda.cuModuleEnumerateFunctions, count, module):
            name = call(what, cuda.cuFuncGetName, function).decode()
            # The driver loads lazily, and a graph capture would not stand that.
            call(what, cuda.cuFuncLoad, function)
            kernels[name] = _Kernel(name, function)
        return kernels

    def launch(
        self,
        entry: str,
        grid: Dim,
        block: Dim,
        shared_bytes: int,
        stream_handle: int,
        *args: Arg,
        overlap: bool = False,
    ) -> None:
        """Launch one kernel; returns as soon as it is queued.

        Args:
            entry: the kernel's name.
            grid: blocks in x, y and z.
            block: threads per block in x, y and z.
            shared_bytes: dynamic shared memory per block.
            stream_handle: such as ``torch.cuda.current_stream(device).cuda_stream``.
            args: the kernel's parameters in order. A pointer (``tensor.data_ptr()``) and an int64
                or int32 are given as int, a float32 as float: write ``float(x)`` for it, since an
                int in a float's place cannot be told from an int32.
            overlap: let the kernel start while the one before it on the stream still runs
                (programmatic dependent launch, from compute capability 9.0 on); it has to wait for
                that one itself.

        Raises:
            KernelError: no such kernel, or the driver refuses the launch.
            TypeError: a wrong number of arguments, or one of a type that its parameter is not of.
            struct.error: an int that does not fit its parameter.
        """
        kernel = self._kernels.get(entry)
        if kernel is None:
            raise KernelError(f"{self.variant} has no kernel {entry!r}, only {self.entries}.")
        overlap = overlap and self._device.capability >= (9, 0)
        _within(
            self._device, kernel.launch, grid, block, shared_bytes, stream_handle, args, overlap
        )


class _Kernel:
    """One kernel, with the buffer that its arguments are packed into."""

    def __init__(self, name: str, function: Any) -> None:
        cuda = driver()
        self._name = name
        self._function = function
        self._launch = cuda.cuLaunchKernel
        self._parameters: list[tuple[int, int]] = []  # (offset, size) of each, in bytes
        while True:
            code, *place = cuda.cuFuncGetParamInfo(function, len(self._parameters))
            if int(code) != 0:  # past the last one
                break
            self._parameters.append((int(place[0]), int(place[1])))
        # Kernels that split L1 and shared memory alike follow one another without a pause.
        carveout = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        call(f"Preparing {name}", cuda.cuFuncSetAttribute, function, carveout, 100)
        end = max((offset + size for offset, size in self._parameters), default=0)
        self._buffer = ctypes.create_string_buffer(max(end, 1))
        start = ctypes.addressof(self._buffer)
        addresses = [start + offset for offset, _ in self._parameters]
        self._pointers = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
        self._address = ctypes.addressof(self._pointers)
        self._packers: dict[tuple[type, ...], struct.Struct] = {}
        self._configs: dict[tuple[Dim, Dim, int, int], Any] = {}
        self._shared_limit = _DEFAULT_SHARED
        self._lock = threading.Lock()

    def launch(
        self,
        grid: Dim,
        block: Dim,
        shared_bytes: int,
        stream: int,
        args: tuple[Arg, ...],
        overlap: bool = False,
    ) -> None:
        types = tuple(map(type, args))
        packer = self._packers.get(types)
        if packer is None:
            packer = self._packers[types] = self._packer(types)
        # The driver reads the buffer during the call, in which other threads of Python may run.
        with self._lock:
            if shared_bytes > self._shared_limit:
                self._allow_shared(shared_bytes)
            packer.pack_into(self._buffer, 0, *args)
            if overlap:
                config = self._config(grid, block, shared_bytes, stream)
                (code,) = driver().cuLaunchKernelEx(config, self._function, self._address, 0)
            else:
                (code,) = self._launch(
                    self._function, *grid, *block, shared_bytes, stream, self._address, 0
                )
        if int(code) != 0:
            raise KernelError(
                f"Launching {self._name} with grid {grid}, block {block} and {shared_bytes} bytes "
                f"of shared memory failed: {_explain(code)}."
            )

    def _config(self, grid: Dim, block: Dim, shared_bytes: int, stream: int) -> Any:
        """An overlapping launch's settings; kept, since making them takes longer than launching."""
        key = (grid, block, shared_bytes, stream)
        config = self._configs.get(key)
        if config is None:
            cuda = driver()
            attribute = cuda.CUlaunchAttribute()
            attribute.id = (
                cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            config = cuda.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.blockDimX, config.blockDimY, config.blockDimZ = block
            config.sharedMemBytes = shared_bytes
            config.hStream = stream
            config.attrs = [attribute]
            config.numAttrs = 1
            if len(self._configs) > 256:
                self._configs.clear()
            self._configs[key] = config
        return config

    def _packer(self, types: tuple[type, ...]) -> struct.Struct:
        if len(types) != len(self._parameters):
            raise TypeError(
                f"{self._name} takes {len(self._parameters)} arguments, not {len(types)}"
            )
        layout, end = "<", 0
        for index, (kind, (offset, size)) in enumerate(zip(types, self._parameters, strict=True)):
            code = _FORMATS.get((size, kind))
            if code is None:
                raise TypeError(
                    f"argument {index} of {self._name} has {size} bytes and cannot be given as "
                    f"{kind.__name__}: pass int for pointers and integers, float for float32"
                )
            layout += f"{offset - end}x{code}"
            end = offset + size
        return struct.Struct(layout)

    def _allow_shared(self, size: int) -> None:
        cuda = driver()
        attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        what = f"Asking for {size} bytes of shared memory for {self._name}"
        call(what, cuda.cuFuncSetAttribute, self._function, attribute, size)
        self._shared_limit = size

"""The hardware JPEG engines of an NVIDIA GPU: how many there are (nvJPEG says), and how busy they are (NVML says).

Both libraries are the system's or NVIDIA's wheels', asked by ctypes: neither needs a package for it.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_NVML = "libnvidia-ml.so.1"
_NVJPEG = "libnvjpeg.so"
_NOT_HERE = (7, 9)
"""nvJPEG's ARCH_MISMATCH and IMPLEMENTATION_NOT_SUPPORTED."""


@dataclass
class JpegEngines:
    """What is known of a device's engines. Numbers are None where nobody says."""

    count: int | None
    cores: int | None
    """Of each engine."""
    why: str
    """As a phrase."""
    busy: list[int] = field(default_factory=list)
    """Percent of the last moments that they worked, each time it was asked."""
    meter: Any = None
    """(NVML's library, its handle of the device)."""

    def look(self) -> None:
        """Ask how busy they are. Costs some microseconds, and nothing where NVML does not tell."""
        if self.meter is None:
            return
        library, handle = self.meter
        percent, period = ctypes.c_uint(), ctypes.c_uint()
        if library.nvmlDeviceGetJpgUtilization(handle, ctypes.byref(percent), ctypes.byref(period)) == 0:
            self.busy.append(percent.value)


NO_GPU = JpegEngines(0, 0, "no GPU here: JPEG engines are parts of some of them")


def find_engines(device: torch.device) -> JpegEngines:
    """Those of a device."""
    if device.type != "cuda":
        return NO_GPU
    try:
        with torch.cuda.device(device):
            count, cores = _counted(_library(_NVJPEG))
    except (OSError, AttributeError, ValueError) as error:
        return JpegEngines(None, None, f"nvJPEG does not say how many there are ({error})", meter=_meter(device))
    if not count:
        return JpegEngines(0, 0, "this GPU has none; CUDA decodes")
    return JpegEngines(count, cores, "nvJPEG says so", meter=_meter(device))


def _counted(library: Any) -> tuple[int, int]:
    """(engines, cores of each) of the current device. Raises `AttributeError` for an older nvJPEG, and `ValueError`."""
    handle = ctypes.c_void_p()
    status = library.nvjpegCreateSimple(ctypes.byref(handle))
    if status:
        raise ValueError(f"status {status}")
    try:
        engines, cores = ctypes.c_uint(), ctypes.c_uint()
        status = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    finally:
        library.nvjpegDestroy(handle)
    if status in _NOT_HERE:
        return 0, 0
    if status:
        raise ValueError(f"status {status}")
    return engines.value, cores.value


def _meter(device: torch.device) -> Any:
    """NVML, and its handle of the device; None where it cannot tell."""
    try:
        library, handle = _library(_NVML), ctypes.c_void_p()
        uuid = f"GPU-{str(torch.cuda.get_device_properties(device).uuid).removeprefix('GPU-')}".encode()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return None
        percent, period = ctypes.c_uint(), ctypes.c_uint()
        told = library.nvmlDeviceGetJpgUtilization(handle, ctypes.byref(percent), ctypes.byref(period)) == 0
    except (OSError, AttributeError):
        return None
    return (library, handle) if told else None


def _library(name: str) -> Any:
    """A shared library: of NVIDIA's wheels where they have it, else the system's. Raises `OSError`."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(place).glob(f"*/lib/{name}*"), reverse=True):
            return ctypes.CDLL(str(path))
    return ctypes.CDLL(name)

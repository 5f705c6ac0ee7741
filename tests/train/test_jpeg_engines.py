"""Hardware JPEG engines, as libraries of NVIDIA's that stand in for the real ones tell of them."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch

from sdmp_train import jpeg_engines
from sdmp_train.jpeg_engines import NO_GPU, find_engines


class Libraries:
    """nvJPEG of a card with seven engines of two cores, and NVML that sees them work ever more."""

    status = told = 0
    engines = 7

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, name: str) -> Libraries:
        return self

    def nvjpegCreateSimple(self, handle) -> int:
        self.calls.append("create")
        handle._obj.value = 5
        return 0

    def nvjpegGetHardwareDecoderInfo(self, handle, engines, cores) -> int:
        assert handle.value == 5
        engines._obj.value, cores._obj.value = self.engines, 2
        return self.status

    def nvjpegDestroy(self, handle) -> int:
        self.calls.append("destroy")
        return 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle) -> int:
        assert uuid == b"GPU-12-34"
        handle._obj.value = 6
        return 0

    def nvmlDeviceGetJpgUtilization(self, handle, percent, period) -> int:
        assert handle.value == 6 and isinstance(period._obj, ctypes.c_uint)
        self.calls.append("look")
        percent._obj.value = 10 * self.calls.count("look")
        return self.told


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Libraries:
    made = Libraries()
    monkeypatch.setattr(jpeg_engines, "_library", made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    return made


CUDA = torch.device("cuda", 0)


def test_they_are_counted_and_watched(libraries: Libraries) -> None:
    found = find_engines(CUDA)
    assert (found.count, found.cores, found.busy) == (7, 2, [])
    found.look()
    found.look()
    assert found.busy == [20, 30] and libraries.calls[:2] == ["create", "destroy"]


@pytest.mark.parametrize(("status", "engines"), [(0, 0), (7, 7)])
def test_a_card_without_any(libraries: Libraries, status: int, engines: int) -> None:
    libraries.status, libraries.engines = status, engines
    found = find_engines(CUDA)
    assert (found.count, found.meter) == (0, None) and "none" in found.why


def test_libraries_that_do_not_say(libraries: Libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.status, libraries.told = 6, 3
    found = find_engines(CUDA)
    found.look()
    assert (found.count, found.busy) == (None, []) and "status 6" in found.why
    monkeypatch.delattr(Libraries, "nvjpegGetHardwareDecoderInfo")  # before CUDA 12
    assert find_engines(CUDA).count is None

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(jpeg_engines, "_library", absent)
    assert "cannot open" in find_engines(CUDA).why


def test_a_cpu_has_none() -> None:
    assert find_engines(torch.device("cpu")) is NO_GPU


def test_nvidias_wheel_is_found_where_it_is_installed() -> None:
    """Its library loads without a GPU, and says with a status that it cannot work."""
    pytest.importorskip("nvidia.dali")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(ValueError, match="status"):
        jpeg_engines._counted(jpeg_engines._library("libnvjpeg.so"))

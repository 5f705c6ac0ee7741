"""`python -m sdmp_kernels`: what runs on this machine, and why."""

import torch

import sdmp_kernels
from sdmp_train.advice import no_traceback


def main() -> None:
    """Print versions, devices and the backend of every op."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"sdmp_kernels {sdmp_kernels.__version__}, torch {torch.__version__}, GPU: {gpu}")
    for op, devices in sdmp_kernels.backends().items():
        for device, choice in devices.items():
            print(f"  {op:<20} {device:<5} {choice}")


if __name__ == "__main__":
    with no_traceback("sdmp_kernels"):
        main()

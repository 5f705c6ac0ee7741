"""Command line: `python -m sdmp_train`. Everything is in cli.py; here is what comes before its imports."""

import signal
import sys

EXTRA = ("timm", "torchvision", "PIL", "safetensors", "tyro", "yaml", "rich", "matplotlib")
"""What the extra `train` installs, as it is imported."""


def leave_without(error: ModuleNotFoundError) -> None:
    """Exit with code 2 where a package of the extra is missing; raises any other error again."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA:
        raise error
    print(
        f"error: {package} is not installed, which sdmp_train needs: pip install 'sdmp-kernels[train]'", file=sys.stderr
    )
    sys.exit(2)


if __name__ == "__main__":
    # While torch is imported Ctrl-C ends the process, and prints no traceback; a run then has handlers of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from sdmp_train.cli import main
        from sdmp_train.stop import ignore_stop_signals

        code = main(sys.argv[1:])
    except ModuleNotFoundError as error:
        leave_without(error)
    ignore_stop_signals()  # what is left is to leave, with this code
    sys.exit(code)

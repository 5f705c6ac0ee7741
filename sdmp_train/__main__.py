"""Command line: `python -m sdmp_train`. Everything is in cli.py; here is what comes before its imports."""

import signal
import sys

from sdmp_train.advice import no_traceback

if __name__ == "__main__":
    # While packages are imported Ctrl-C ends the process, and prints no traceback; a run then has handlers of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = 0
    with no_traceback("sdmp_train"):
        from sdmp_train.cli import main
        from sdmp_train.stop import ignore_stop_signals

        code = main(sys.argv[1:])
    ignore_stop_signals()  # what is left is to leave, with this code
    sys.exit(code)

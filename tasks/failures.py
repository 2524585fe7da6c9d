"""What ends a run and is no fault of the program: told to people without a traceback."""


class RunFailed(RuntimeError):
    """A run cannot go on; the message says why, and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does, after it has saved its state."""

"""How a program starts: it looks at its command, loads its libraries, then works."""

import gc

from common.failure import catch_signals, leave_on_signal, run


def look_first(look, *arguments) -> None:
    """look(*arguments) as a program, before the libraries load. From here on a signal ends it at once, with one line.

    The KeyboardInterrupt of Python is lost where it comes while an import clears up after itself: the program goes on.
    The garbage collector rests from here until `work`: of half a million new objects, most for good, it finds nothing to
    free, and takes a sixth of the time that torch, transformers and gradio need to load.
    """
    catch_signals(leave_on_signal)
    run(look, *arguments)
    gc.disable()


def work(main, *arguments) -> None:
    """main(*arguments) as a program, after the libraries have loaded. The collector passes over what they are."""
    gc.freeze()
    gc.enable()
    run(main, *arguments)

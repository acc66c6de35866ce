"""What the processes of one run do together, all with one outcome.

Answers to nothing in the official scripts, whose processes each act alone.
"""

from torch import distributed


def on_first_rank(function, *arguments):
    """function(*arguments), called by the first process alone; every process gets its result, or its exception."""
    if not distributed.is_initialized():
        return function(*arguments)
    outcome = [None, None]
    if distributed.get_rank() == 0:
        try:
            outcome[0] = function(*arguments)
        except Exception as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_writing_ranks(writes, function, *arguments):
    """function(*arguments) in the processes where `writes`; an exception of any of them is raised by all."""
    problem = None
    if writes:
        try:
            function(*arguments)
        except Exception as error:
            problem = error
    for error in gather(problem):
        if error is not None:
            raise error


def gather(value) -> list:
    """[value of rank 0, value of rank 1, …], the same in every process."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values

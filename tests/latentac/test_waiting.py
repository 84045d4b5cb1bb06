"""A call that talks to somebody else ends, whatever happens there."""

import os
import subprocess
import sys
import threading
import time

import pytest

from latentac.system.waiting import Bounds, TimeUp, within


def test_what_ends_in_time_gives_what_it_gives() -> None:
    """A value, or the very error."""
    assert within(5, lambda: 7) == 7
    error = KeyError("x")

    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        within(5, fail)
    assert caught.value is error


def test_what_does_not_end_is_given_up() -> None:
    """With an OSError, which callers of servers catch."""
    never, began = threading.Event(), time.monotonic()
    with pytest.raises(OSError, match=r"no answer within 0.2 s") as caught:
        within(0.2, never.wait)
    never.set()
    assert isinstance(caught.value, TimeUp)
    assert 0.2 <= time.monotonic() - began < 2


def test_a_process_ends_while_a_call_is_still_given_up() -> None:
    """The interpreter waits for no thread of it."""
    code = (
        "import time\nfrom latentac.system.waiting import TimeUp, within\n"
        "try:\n    within(0.1, lambda: time.sleep(60))\nexcept TimeUp:\n    print('given up')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "given up\n")


def test_calls_within_calls_have_threads_of_their_own() -> None:
    """And one that is given up keeps its own until it ends."""
    assert within(5, lambda: within(5, lambda: within(5, lambda: 7))) == 7
    never = threading.Event()
    with pytest.raises(TimeUp):
        within(0.1, never.wait)
    assert within(5, lambda: 8) == 8
    never.set()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_waits_for_no_thread_of_its_parent() -> None:
    """Threads stay where they are when a process is forked."""
    within(5, lambda: 1)
    child = os.fork()
    if child == 0:
        try:
            os._exit(within(5, lambda: 7))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_bound_is_the_last_attempt_and_its_answer() -> None:
    assert Bounds(answer_seconds=3, retry_seconds=4).total_seconds == 7

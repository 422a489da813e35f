"""Signals set a flag that ranks look at together."""

import os
import signal
import threading

import pytest

from medground.job.interruption import InterruptedRun, Interruption


class Ranks:
    """Of which others may have got a signal."""

    def __init__(self, others: list[str | None]):
        self.others = others

    def any(self, flag: bool) -> bool:
        return flag or any(self.others)

    def gather(self, value):
        return [value, *self.others]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_and_handlers_come_back(name: str):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with Interruption() as interruption:
        interruption.agree(Ranks([None]))
        os.kill(os.getpid(), number)
        assert interruption.requested == name
        with pytest.raises(InterruptedRun, match=name):
            interruption.agree(Ranks([None]))
    assert signal.getsignal(number) is before


def test_a_signal_to_another_rank():
    with pytest.raises(InterruptedRun, match="SIGUSR1"):
        Interruption().agree(Ranks([None, "SIGUSR1"]))


def test_another_thread_cannot_listen_and_does_not_try():
    failures = []

    def enter():
        try:
            with Interruption():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failures

import os
import signal
import threading

import pytest

from clip_cid.errors import RunError
from clip_cid.training.stop_requests import stop_requests


def test_a_first_ctrl_c_waits_and_a_second_does_not(capfd: pytest.CaptureFixture[str]):
    with stop_requests() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number != 0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.obey(3)
    assert "once more ends at once" in capfd.readouterr().err


def test_without_a_request_there_is_nothing_to_obey():
    with stop_requests() as stop:
        assert stop.number == 0
        stop.obey(3)  # would raise


def test_a_scheduler_s_kill_becomes_an_error_with_its_remedy():
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(RunError, match="Stopped by SIGTERM after step 1,200, which is saved") as error:
            stop.obey(1200)
    assert "Run the same command again" in error.value.fix


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_ignored_stays_ignored(number: signal.Signals):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), number)
            assert stop.number == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with stop_requests():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]

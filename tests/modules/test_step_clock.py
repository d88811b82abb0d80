"""Time of steps, by a clock that is set by hand."""

from lightning_mixcn.modules.step_clock import StepClock


def test_pauses_do_not_count() -> None:
    time = iter([0.0, 10.0, 12.0, 15.0, 16.0])
    clock = StepClock(lambda: next(time))
    clock.start()
    assert clock.seconds is None
    clock.pause()
    clock.resume()
    clock.stop()
    assert clock.seconds == 3.0

"""How exceptions become one message and an exit status."""

import pytest

from spd.config import RunError, Unreachable, UserError
from spd.runs.console import user_errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RunError("x"), 1),
        (UserError("x"), 2),
        (Unreachable("x"), 3),
    ],
)
def test_the_exit_status_says_what_went_wrong(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise error
    assert stopped.value.code == status and capsys.readouterr().err == "error: x\n"


def test_an_interruption_is_no_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"

"""What was typed in the terminal, kept between runs for Arrow-Up and Ctrl-R."""

from __future__ import annotations

import os
from pathlib import Path

MOST_LINES = 1000


def history_file() -> Path | None:
    """$CHATGLM_HISTORY (empty: None, nothing is kept), else a file in the user's state folder.

    Raises OSError if the user has no home folder.
    """
    chosen = os.environ.get("CHATGLM_HISTORY")
    if chosen is not None:
        return Path(chosen).expanduser() if chosen else None
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "chatglm" / "history"
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        # By the XDG specification, a relative path counts as none.
        return (state if state.is_absolute() else Path.home() / ".local" / "state") / "chatglm" / "history"
    except RuntimeError as error:
        raise OSError("this user has no home folder; set CHATGLM_HISTORY to a file") from error


class InputHistory:
    """The history of `input()`, which readline keeps, and its file, which only the user can read.

    Raises:
        ImportError: there is no readline here.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        import readline

        self._readline, self._path = readline, path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        readline.set_history_length(MOST_LINES)
        readline.read_history_file(path)
        self._kept = readline.get_current_history_length()

    def keep(self) -> None:
        """Appends what has been typed since the last call, so that a second chat loses nothing. Raises OSError."""
        count = self._readline.get_current_history_length()
        new, self._kept = count - self._kept, count
        if new <= 0:
            return
        if hasattr(self._readline, "append_history_file"):
            self._readline.append_history_file(new, self._path)
        else:  # a Python that was built with libedit
            self._readline.write_history_file(self._path)
        self._path.chmod(0o600)

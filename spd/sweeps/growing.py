"""Files of a run that grow while they are read."""

import os
from pathlib import Path

from spd.run_files import parsed_lines


class GrowingLines:
    """The objects of numbers in a file that is being written, each line read once.

    A file that has taken its place is read anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file, self.end = -1, 0

    def new_lines(self) -> tuple[list[dict[str, float]], bool]:
        """What has been written since the last call, and whether the file is another one than before."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                anew = found.st_ino != self.file or found.st_size < self.end
                if anew:
                    self.file, self.end = found.st_ino, 0
                file.seek(self.end)
                content = file.read()
        except FileNotFoundError:
            return [], False
        whole = content[: content.rfind(b"\n") + 1]
        self.end += len(whole)
        return parsed_lines(self.path, whole), anew

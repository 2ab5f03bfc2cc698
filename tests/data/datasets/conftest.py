"""A folder to lay out small copies of published data sets in."""

from pathlib import Path

import pytest

from tests.data.helpers import write_audio


class Tree:
    """A folder that text files and short tones are written to."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def text(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def audio(self, *names: str) -> None:
        for name in names:
            write_audio(self.root / name)


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)

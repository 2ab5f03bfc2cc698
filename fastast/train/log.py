"""What a run measures goes to metrics.jsonl, and to TensorBoard where that is installed."""

from __future__ import annotations

from fastast.train.run import RunDirectory


class RunLog:
    """Writes records of numbers.

    Args:
        run: where to.
        step: of the run so far; what TensorBoard has been told of later steps is overwritten.
        enabled: False writes nothing, on all ranks but the first.
    """

    def __init__(self, run: RunDirectory, step: int, *, enabled: bool = True) -> None:
        self.run, self.enabled = run, enabled
        self._board = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(run.path / "tensorboard", purge_step=step + 1)

    def write(self, kind: str, record: dict) -> None:
        """Appends a record of a kind, which has a ``step``."""
        if not self.enabled:
            return
        self.run.log({"kind": kind} | record)
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._board.add_scalar(f"{kind}/{name}", value, record["step"])

    def size(self) -> int:
        """Bytes of metrics.jsonl, all of them on disk. TensorBoard's file is brought up to date."""
        if self._board is not None:
            self._board.flush()
        return self.run.log_size()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._board is not None:
            self._board.close()

"""What a result holds for: the network, its data, the device and how it was timed."""

from dataclasses import dataclass

from dsa_hw.reports.fields import Fields
from dsa_hw.runs.console import counted


@dataclass(frozen=True, slots=True)
class Setting:
    """The head of a run's and of a comparison's ``result.json``. None: not recorded."""

    model: str | None
    data: str | None
    epochs: str | None
    device: str | None
    backend: str | None
    precision: str | None
    batch_size: float | None
    threads: float | None
    statistic: str | None

    @classmethod
    def read(cls, fields: Fields) -> "Setting":
        return cls(
            model=fields.text("model"),
            data=fields.text("data"),
            epochs=fields.shown("epochs"),
            device=fields.text("device"),
            backend=fields.text("backend"),
            precision=fields.text("precision"),
            batch_size=fields.number("batch_size"),
            threads=fields.number("threads"),
            statistic=fields.text("statistic"),
        )

    @property
    def threads_text(self) -> str | None:
        """``2 threads``"""
        return None if self.threads is None else counted(self.threads, "thread")

    def line(self, *more: str | None) -> str:
        """What the times hold for, in one line, with what else belongs there."""
        batch = None if self.batch_size is None else f"batch {self.batch_size:g}"
        items = (self.device, self.backend, self.precision, batch, self.threads_text, *more)
        return " · ".join(item for item in items if item) or "Setting not recorded"

"""Where a measured latency table goes when no ``--table`` says so."""

from __future__ import annotations

from pathlib import Path

TABLE_FOLDER = "latency_tables"


def table_folder() -> Path:
    """``latency_tables/`` of the working folder where there is one, else of the user's data.

    A command that is run anywhere leaves no folder behind there, and finds its tables again.
    """
    here = Path(TABLE_FOLDER)
    if here.is_dir():
        return here
    from platformdirs import user_data_path  # here: --help need not pay for it

    return user_data_path("dsa_hw", appauthor=False) / TABLE_FOLDER

"""Errors a user can cause. The commands print them as one message and exit with code 2."""


class UserError(Exception):
    """Something the user asked for cannot be done as asked; the message says what to change."""


class UnsupportedModel(UserError):
    """The model has a part whose channels or cost cannot be followed."""


class InfeasibleBudget(UserError):
    """No allowed widths meet the budget; the message has the least that can be reached."""


class SearchWarning(UserWarning):
    """Something looks wrong in a search whose history nobody receives."""


class RunFolderError(UserError):
    """The run folder cannot be used: it holds another run, or cannot be written."""


class MainProcessFailed(UserError):
    """Raised in the other processes of a run when the main one has failed; that one says why."""

"""The error of tasks that cannot run as they are set up."""


class TaskError(ValueError):
    """A file, package or variable that a task needs is not there or is not as expected."""

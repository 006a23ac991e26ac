"""The one exception that a user is meant to see."""


class MoepruneError(Exception):
    """Something is wrong with the call, the input or a file; the command exits with 2.

    message: what is wrong, with the file, key or option in backticks, what was found and what was expected.
    hint: what to do next.
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message

"""The one exception for what a user can mend."""


class UserError(Exception):
    """Bad input, told in one paragraph: what offends, what was expected, and what to do about it.

    `main` prints the message without a traceback and exits with code 2. Everything else is a bug and keeps its traceback.
    """

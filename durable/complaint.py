"""What is wrong for a while, is met again and again meanwhile, and is logged once."""

from __future__ import annotations

import logging


class Complaint:
    """See above. One for each thing that may be wrong; for one thread."""

    def __init__(self, logger: logging.Logger, level: int = logging.WARNING) -> None:
        self._logger = logger
        self._level = level
        self._reason: str | None = None
        """Of what was logged last."""

    def say(self, text: str, *arguments: object, reason: str = "") -> None:
        """Log that, unless it was logged last, and has not `ended` since. `reason`: what makes it
        another, if not all of its text does."""
        reason = reason or text % arguments
        if reason != self._reason:
            self._reason = reason
            self._logger.log(self._level, text, *arguments, stacklevel=2)

    def ended(self) -> None:
        """It is right again."""
        self._reason = None

"""Errors that name the item, the value and the rule.

Everything that icestream raises on purpose derives from `IcestreamError`. An `InputError` belongs to one
item (it goes to quarantine and the stream goes on); a `ResourceError` belongs to the machine (the item is
tried again); a `ConfigurationError` ends a command with exit code 2; an `InvariantError` stops the process.
"""

from __future__ import annotations


class IcestreamError(Exception):
    """An error with one clear line: what item, which value, which rule.

    Parameters
    ----------
    item
        The file, exposure or setting that the error speaks of.
    rule
        The rule that was broken, as a sentence fragment ("a movie has at least one frame").
    value
        The offending value, if there is one.
    """

    def __init__(self, item: object, rule: str, value: object | None = None) -> None:
        self.item = str(item)
        self.rule = rule
        self.value = None if value is None else str(value)
        super().__init__(self.item, self.rule, self.value)

    def __str__(self) -> str:
        found = "" if self.value is None else f" (found: {self.value})"
        return f"{self.item}: {self.rule}{found}"

    def __reduce__(self) -> tuple[type[IcestreamError], tuple[str, str, str | None]]:
        return type(self), (self.item, self.rule, self.value)


class InputError(IcestreamError):
    """An input file is not what it has to be; the item goes to quarantine."""


class ResourceError(IcestreamError):
    """The machine could not do it now (disk, memory, dead worker); the item is tried again."""


class ConfigurationError(IcestreamError):
    """Settings are wrong or contradict each other or the data."""


class InvariantError(IcestreamError):
    """A state that must not exist; the process stops."""

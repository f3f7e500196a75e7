"""What was not read of a source, and why: one damaged picture in a million must not end a day of extraction."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_REASONS = 1000  # kept of what was skipped: a shard's header holds them
MAX_NAME = 255  # characters of a name among them; a tar may call its members anything


@dataclass
class Skipped:
    """What was not read, and why: the first `MAX_REASONS` by name, ``unnamed`` counts the others.

    ``noted`` and ``unnamed_noted`` are the same of pictures that were taken although something is amiss.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    unnamed: int = 0
    noted: dict[str, str] = field(default_factory=dict)
    unnamed_noted: int = 0

    def add(self, name: str, reason: str) -> None:
        self.unnamed += not _remember(self.reasons, name, reason)

    def note(self, name: str, reason: str) -> None:
        self.unnamed_noted += not _remember(self.noted, name, reason)

    def update(self, other: Skipped) -> None:
        """Add what ``other`` holds."""
        for name, reason in other.reasons.items():
            self.add(name, reason)
        for name, reason in other.noted.items():
            self.note(name, reason)
        self.unnamed += other.unnamed
        self.unnamed_noted += other.unnamed_noted

    def __len__(self) -> int:
        return len(self.reasons) + self.unnamed

    def __str__(self) -> str:
        shown = [f"{name} ({reason})" for name, reason in list(self.reasons.items())[:5]]
        more = len(self) - len(shown)
        return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def _remember(kept: dict[str, str], name: str, reason: str) -> bool:
    name = name[:MAX_NAME]
    if name not in kept and len(kept) >= MAX_REASONS:
        return False
    kept[name] = reason
    return True

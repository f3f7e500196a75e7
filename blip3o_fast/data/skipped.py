"""What was not read of a source, and why: one damaged picture in a million must not end a day of extraction."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_REASONS = 1000  # kept of what was skipped: an entry of parts holds them
MAX_NAME = 255  # characters of a name among them; a tar may call its members anything


@dataclass
class Skipped:
    """What was not read, and why: the first `MAX_REASONS` by name, ``unnamed`` counts the others."""

    reasons: dict[str, str] = field(default_factory=dict)
    unnamed: int = 0

    def add(self, name: str, reason: str) -> None:
        name = name[:MAX_NAME]
        if name in self.reasons or len(self.reasons) < MAX_REASONS:
            self.reasons[name] = reason
        else:
            self.unnamed += 1

    def __len__(self) -> int:
        return len(self.reasons) + self.unnamed

    def __str__(self) -> str:
        shown = [f"{name} ({reason})" for name, reason in list(self.reasons.items())[:5]]
        more = len(self) - len(shown)
        return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")

"""The device's time in each graph. Recording it does not wait for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from trio_edge.runtime.devices.interface import Device, Event, PreparedLaunch


@final
class Timeline:
    """One pair of events around launches for each name; the events are made once and reused."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._events: dict[str, tuple[Event, Event]] = {}
        self._recorded: list[str] = []

    def clear(self) -> None:
        """Forget what was recorded."""
        self._recorded.clear()

    def enqueue(self, name: str, *launches: PreparedLaunch) -> None:
        """Enqueue ``launches`` between two events; a later call with the same name replaces the time."""
        if name not in self._events:
            self._events[name] = self._device.event(), self._device.event()
        start, end = self._events[name]
        start.record()
        for launch in launches:
            launch.enqueue()
        end.record()
        if name not in self._recorded:
            self._recorded.append(name)

    def milliseconds(self) -> dict[str, float]:
        """Return the times by name in order; the device must have reached their end."""
        return {
            name: end.milliseconds_since(start)
            for name, (start, end) in self._events.items()
            if name in self._recorded
        }

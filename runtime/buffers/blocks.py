"""Device memory that one copy moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from trio_edge.runtime.devices.interface import DeviceTensor, PitchedRows, aligned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.devices.interface import Allocator, Device


@final
class Block:
    """Named tensors in one piece of device memory, with a pinned copy on the host. One copy moves all of them."""

    def __init__(
        self, allocator: Allocator, fields: Mapping[str, tuple[str, tuple[int, ...]]], *, purpose: str
    ) -> None:
        """Allocate both copies for ``fields``: dtype and largest shape by name."""
        self._fields: dict[str, DeviceTensor] = {}
        """By name; addresses are offsets from the block's start."""
        end = 0
        for name, (dtype, shape) in fields.items():
            self._fields[name] = DeviceTensor(end, shape, dtype)
            end += aligned(self._fields[name].num_bytes)
        self._whole = DeviceTensor(allocator.allocate(end, purpose=purpose), (end,), "uint8")
        self._host = allocator.allocate_pinned(end, purpose=purpose)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def _field(self, name: str, shape: tuple[int, ...] | None) -> DeviceTensor:
        field = self._fields[name]
        return field if shape is None else field._replace(shape=shape)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> DeviceTensor:
        """Return a field on the device, at ``shape`` or its largest shape."""
        field = self._field(name, shape)
        return field._replace(address=self._whole.address + field.address)

    def host(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """Return a view of a field's copy on the host, at ``shape`` or its largest shape."""
        field = self._field(name, shape)
        found = self._host[field.address : field.address + field.num_bytes]
        return found.view(field.dtype).reshape(field.shape)

    def upload(self, device: Device) -> None:
        """Copy all fields to the device."""
        device.upload(self._whole, self._host)

    def upload_field(self, device: Device, name: str, shape: tuple[int, ...]) -> None:
        """Copy one field, at ``shape``, to the device."""
        device.upload(self.tensor(name, shape), self.host(name, shape))

    def download(self, device: Device) -> None:
        """Copy all fields to the host."""
        device.download(self._host, self._whole)


def copy_tensor(device: Device, target: DeviceTensor, source: DeviceTensor) -> None:
    """Enqueue a copy of ``source`` to the start of ``target``, cut to the smaller of both."""
    size = min(target.num_bytes, source.num_bytes)
    device.copy_rows(
        PitchedRows(target.address, size), PitchedRows(source.address, size), row_bytes=size, num_rows=1
    )

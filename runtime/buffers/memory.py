"""The memory of a bundle's programs except the weights: one allocation for each place, at addresses that never change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from trio_edge.runtime.buffers.blocks import Block
from trio_edge.runtime.buffers.kv_cache import KVCache, Stack
from trio_edge.runtime.bundle.manifest import shape_at
from trio_edge.runtime.bundle.programs.program import CACHE, JOINT, SINGLE, stack_of, stacks_of
from trio_edge.runtime.devices.interface import DeviceTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile
    from trio_edge.runtime.bundle.programs.program import Launch
    from trio_edge.runtime.devices.interface import Allocator, Device


@final
class Memory:
    """The places of all programs. Those that the host sends or reads have a pinned copy on the host."""

    def __init__(self, manifest: Manifest, allocator: Allocator) -> None:
        """Allocate each place at its largest shape over all launches and profiles.

        Raises:
            BackendError: If there is too little memory.
        """
        self._manifest, self._graphs = manifest, {spec.name: spec for spec in manifest.graphs}
        largest, stacks = self._largest(manifest)
        self._blocks = {
            name: Block(
                allocator,
                {place: (found.dtype, found.shape) for place, found in places.items()},
                purpose=name,
            )
            for name, places in _blocks(largest).items()
        }
        self._tensors = {
            place: tensor._replace(address=allocator.allocate(tensor.num_bytes, purpose=place))
            for place, tensor in largest.items()
            if _block_of(place) is None
        }
        self._stacks = {
            name: stack.moved(allocator.allocate(stack.num_bytes, purpose=name))
            for name, stack in stacks.items()
        }
        self.caches = [KVCache(stack) for name, stack in self._stacks.items() if name.startswith(CACHE)]
        """KV caches in the order of the layer ranges."""
        self._images: list[DeviceTensor] = []
        if manifest.max_images > 1:
            self.images(allocator)
        self._nothing = allocator.allocate(1, purpose="tensors without elements")

    def _largest(self, manifest: Manifest) -> tuple[dict[str, DeviceTensor], dict[str, Stack]]:
        """Return the largest tensor of each place, and the largest of each stack."""
        tensors: dict[str, DeviceTensor] = {}
        stacks: dict[str, Stack] = {}
        for launch, index in _graph_launches(manifest):
            spec, profile = self._graph_at(launch, index)
            for tensor in spec.tensors:
                place = launch.places.get(tensor.name)
                if place is None or stack_of(place) is not None:
                    continue
                found = DeviceTensor(0, shape_at(tensor.shape, profile), tensor.dtype)
                if place not in tensors or found.num_bytes > tensors[place].num_bytes:
                    tensors[place] = found
            for name, stack in _stacks_at(spec, launch, profile).items():
                if name not in stacks or stack.num_bytes > stacks[name].num_bytes:
                    stacks[name] = stack
        return tensors, stacks

    def _graph_at(self, launch: Launch, index: int) -> tuple[GraphSpec, Profile]:
        spec = self._graphs[launch.runs]
        return spec, next(profile for profile in spec.profiles if profile.name == launch.profiles[index])

    def __contains__(self, place: object) -> bool:
        return place in self._tensors or any(place in block for block in self._blocks.values())

    def bound(self, launch: Launch, index: int) -> tuple[Profile, dict[str, DeviceTensor]]:
        """Return the profile and the tensors of a launch at the program's sizes number ``index``."""
        spec, profile = self._graph_at(launch, index)
        stacked = {
            name: stack.tensor(number)
            for base, stack in self.stacks(launch, index).items()
            for number, name in enumerate(stacks_of(launch.places)[base])
        }
        tensors = {}
        for tensor in spec.tensors:
            shape, place = shape_at(tensor.shape, profile), launch.places.get(tensor.name)
            if tensor.name in stacked:
                tensors[tensor.name] = stacked[tensor.name]
            elif place is None:
                tensors[tensor.name] = DeviceTensor(self._nothing, shape, tensor.dtype)
            else:
                tensors[tensor.name] = self.tensor(place, shape)
        return profile, tensors

    def stacks(self, launch: Launch, index: int) -> dict[str, Stack]:
        """Return the stacks that a launch reads or writes, as they lie at its profile."""
        found = _stacks_at(*self._with_launch(launch, index))
        return {name: stack.moved(self._stacks[name].address) for name, stack in found.items()}

    def _with_launch(self, launch: Launch, index: int) -> tuple[GraphSpec, Launch, Profile]:
        spec, profile = self._graph_at(launch, index)
        return spec, launch, profile

    def cache(self, name: str) -> KVCache:
        """Return the KV cache called ``name``."""
        names = [name for name in self._stacks if name.startswith(CACHE)]
        return self.caches[names.index(name)]

    def tensor(self, place: str, shape: tuple[int, ...] | None = None) -> DeviceTensor:
        """Return the device tensor at ``place``, at ``shape`` or its largest shape."""
        if (block := _block_of(place)) is not None:
            return self._blocks[block].tensor(place, shape)
        tensor = self._tensors[place]
        return tensor if shape is None else tensor._replace(shape=shape)

    def images(self, allocator: Allocator) -> list[DeviceTensor]:
        """Return the memory for visual tokens and planes of several images in a row: [largest N, D] each.

        A bundle for one image allocates it at its first prompt with several small images.
        """
        while len(self._images) <= self._manifest.num_deepstack:
            found = DeviceTensor(
                0, (self._manifest.max_visual, self._manifest.dimensions.hidden_size), self._manifest.dtype
            )
            address = allocator.allocate(found.num_bytes, purpose="several images")
            self._images.append(found._replace(address=address))
        return self._images

    # The pinned copies on the host

    def host(self, place: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """Return a view of the host's copy of ``place``, at ``shape`` or its largest shape."""
        return self._blocks[_block_of(place) or ""].host(place, shape)

    def write(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Write arrays to the host's copies; places that no launch reads are left out."""
        for place, array in values.items():
            block = self._blocks.get(_block_of(place) or "")
            if block is not None and place in block:
                block.host(place, array.shape)[...] = array

    def send(self, device: Device, block: str) -> None:
        """Enqueue a copy of all places of a namespace to the device."""
        if block in self._blocks:
            self._blocks[block].upload(device)

    def fetch_one(self, device: Device, place: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Enqueue a copy of a place that is fetched alone, and return its copy on the host."""
        device.download(self.host(place, shape), self.tensor(place, shape))
        return self.host(place, shape)

    def send_one(self, device: Device, place: str, array: NDArray[Any]) -> None:
        """Write ``array`` to a place that is sent alone, and enqueue its copy."""
        self.host(place, array.shape)[...] = array
        self._blocks[place].upload_field(device, place, array.shape)

    def fetch(self, device: Device, block: str) -> None:
        """Enqueue a copy of all places of a namespace to the host."""
        self._blocks[block].download(device)


def _graph_launches(manifest: Manifest) -> Iterator[tuple[Launch, int]]:
    """Yield every launch of a graph, at each of its program's sizes."""
    for program in manifest.programs:
        for launch in program.launches:
            for index in range(len(launch.profiles)):
                yield launch, index


def _stacks_at(spec: GraphSpec, launch: Launch, profile: Profile) -> dict[str, Stack]:
    """Return the stacks of a launch at a profile, at address 0."""
    found = {}
    for base, names in stacks_of(launch.places).items():
        tensor = spec.tensor(names[0])
        found[base] = Stack(0, count=len(names), shape=shape_at(tensor.shape, profile), dtype=tensor.dtype)
    return found


def _block_of(place: str) -> str | None:
    """Return the block with a pinned copy that a place lies in; None for places that stay on the device."""
    space = place.partition(".")[0]
    if space in JOINT:
        return space
    return place if space in SINGLE else None


def _blocks(largest: Mapping[str, DeviceTensor]) -> dict[str, dict[str, DeviceTensor]]:
    found: dict[str, dict[str, DeviceTensor]] = {}
    for place, tensor in largest.items():
        if (block := _block_of(place)) is not None:
            found.setdefault(block, {})[place] = tensor
    return found

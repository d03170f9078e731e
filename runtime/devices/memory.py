"""The memory of a bundle's programs: planned from the manifest, compared with what is free, allocated once.

weights      of all loaded graphs; with TensorRT, the sizes of the engine files
KV caches    at full capacity
buffers      inputs, results and tensors between the graphs: the sum of ``memory_plan``
workspace    the largest activations of a layer range, 3 S D b + max(S (H + 2 G) E b, 3 S I b), or of the vision graph,
             P (6 D b + 2 I b) with its own sizes; b bytes per element, and fused attention. TensorRT reports the real
             number once its engines are loaded
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, final

import numpy as np

from trio_edge.runtime.bundle.errors import BackendError, ShapeError
from trio_edge.runtime.bundle.manifest import JOINT, SINGLE, shape_at, stack_of, stacks_of
from trio_edge.runtime.devices.interface import ALIGNMENT, DeviceTensor, PitchedRows, aligned
from trio_edge.runtime.devices.machine import whole_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Launch, Manifest, Profile
    from trio_edge.runtime.devices.interface import Allocator, Device


@final
class Stack:
    """Equal tensors [B, G, rows, E] in a row: keys and values of the layers of one range, of B answers.

    Where B G rows of E elements are no multiple of ``ALIGNMENT``, each tensor is padded with further groups. So all tensors
    start at aligned addresses, and all groups of all tensors are equally far apart: one strided copy reaches them.
    """

    def __init__(self, address: int, *, count: int, shape: tuple[int, ...], dtype: str) -> None:
        self.address, self.shape, self._count, self._dtype = address, shape, count, dtype
        self._row_bytes = shape[-1] * np.dtype(dtype).itemsize
        self._pitch_bytes = shape[-2] * self._row_bytes
        multiple = ALIGNMENT // math.gcd(ALIGNMENT, self._row_bytes)
        groups = math.prod(shape[:-2])
        self._groups = -(-groups // multiple) * multiple
        self.num_bytes = count * self._groups * self._pitch_bytes
        """Bytes of the whole stack."""
        self.bytes_per_row = count * groups * self._row_bytes
        """Bytes of one row, summed over all tensors."""

    def moved(self, address: int) -> Stack:
        """Return the same stack at another address."""
        return Stack(address, count=self._count, shape=self.shape, dtype=self._dtype)

    def of_rows(self, allocator: Allocator, rows: int, *, purpose: str) -> Stack:
        """Return new memory for as many tensors of ``rows`` rows."""
        shape = (*self.shape[:-2], rows, self.shape[-1])
        found = Stack(0, count=self._count, shape=shape, dtype=self._dtype)
        return found.moved(allocator.allocate(found.num_bytes, purpose=purpose))

    def tensor(self, index: int) -> DeviceTensor:
        """Return the tensor at ``index``."""
        address = self.address + index * self._groups * self._pitch_bytes
        return DeviceTensor(address, self.shape, self._dtype)

    def copy_slot(
        self, device: Device, target: Stack, *, slot: tuple[int, int], first_row: int, num_rows: int
    ) -> None:
        """Enqueue a copy of the first rows of an answer to another stack's, from ``first_row`` on.

        ``slot`` has the places of the answer in both.
        """
        for group in range(self.shape[-3]):  # one strided copy reaches a group of all tensors
            device.copy_rows(
                target._group(slot[1], group, first_row=first_row),
                self._group(slot[0], group),
                row_bytes=num_rows * self._row_bytes,
                num_rows=self._count,
            )

    def _group(self, slot: int, group: int, *, first_row: int = 0) -> PitchedRows:
        """Return a row of an answer's group in each tensor."""
        start = (slot * self.shape[-3] + group) * self._pitch_bytes + first_row * self._row_bytes
        return PitchedRows(self.address + start, self._groups * self._pitch_bytes)

    def copy_whole(self, device: Device, target: Stack) -> None:
        """Enqueue a copy of all tensors to a stack of the same shape."""
        self.copy_to(device, target, first_row=0, num_rows=self.shape[-2])

    def copy_to(self, device: Device, target: Stack, *, first_row: int, num_rows: int) -> None:
        """Enqueue a copy of the first ``num_rows`` rows of all tensors to ``target``'s, from ``first_row`` on."""
        device.copy_rows(
            PitchedRows(target.address + first_row * target._row_bytes, target._pitch_bytes),
            PitchedRows(self.address, self._pitch_bytes),
            row_bytes=num_rows * self._row_bytes,
            num_rows=self._count * self._groups,
        )


@final
class KVCache:
    """Keys and values of the layers of one range, [1, G, C, E] each; the first ``length`` rows are valid.

    A range's graph writes new rows to another stack; ``append`` copies them to the end of the valid rows. A range without keys
    and values, whose layers all have states, has no stack, and counts its rows all the same.
    """

    def __init__(self, stack: Stack | None, capacity: int) -> None:
        self.stack, self.capacity = stack, capacity
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the valid rows."""
        return 0 if self.stack is None else self.stack.bytes_per_row * self.length

    def append(self, device: Device, new: Stack | None, *, num_rows: int) -> None:
        """Enqueue a copy of the first ``num_rows`` new rows to the end of the valid rows.

        Raises:
            ShapeError: If the cache is too small.
        """
        end = self.length + num_rows
        if end > self.capacity:
            raise ShapeError(
                f"KV cache: expected at most {self.capacity} rows, got {end}; export with a larger --max-new-tokens"
            )
        if new is not None and self.stack is not None:
            new.copy_to(device, self.stack, first_row=self.length, num_rows=num_rows)
        self.length = end


class MemoryPlan(NamedTuple):
    """Every place at its largest shape over all launches and profiles, at address 0."""

    tensors: dict[str, DeviceTensor]
    stacks: dict[str, Stack]
    images: tuple[DeviceTensor, ...]
    """[largest N, D] each, for the visual tokens and planes of several images in a row."""

    @property
    def num_bytes(self) -> int:
        """Bytes of everything on the device."""
        tensors = sum(aligned(tensor.num_bytes) for tensor in (*self.tensors.values(), *self.images))
        return tensors + sum(stack.num_bytes for stack in self.stacks.values())


def memory_plan(manifest: Manifest) -> MemoryPlan:
    """Return the memory that the programs of ``manifest`` need."""
    graphs = {spec.name: spec for spec in manifest.graphs}
    tensors: dict[str, DeviceTensor] = {}
    stacks: dict[str, Stack] = {}
    for launch in (launch for program in manifest.all_programs for launch in program.launches):
        for index in range(len(launch.profiles)):
            _, found, found_stacks = _launch_at(graphs, launch, index)
            for name, place in (launch.inputs | launch.outputs).items():
                is_larger = place not in tensors or found[name].num_bytes > tensors[place].num_bytes
                if is_larger and stack_of(place) is None:
                    tensors[place] = found[name]
            for name, stack in found_stacks.items():
                if name not in stacks or stack.num_bytes > stacks[name].num_bytes:
                    stacks[name] = stack
    count = manifest.num_deepstack + 1 if manifest.max_images > 1 else 0
    return MemoryPlan(tensors, stacks, (_image_tokens(manifest),) * count)


def _launch_at(
    graphs: Mapping[str, GraphSpec], launch: Launch, index: int
) -> tuple[Profile, dict[str, DeviceTensor], dict[str, Stack]]:
    """Return the profile, the tensors and the stacks of a launch at the program's sizes number ``index``, at address 0."""
    spec = graphs[launch.runs]
    profile = next(profile for profile in spec.profiles if profile.name == launch.profiles[index])
    tensors = {
        tensor.name: DeviceTensor(0, shape_at(tensor.shape, profile), tensor.dtype) for tensor in spec.tensors
    }
    stacks = {
        name: Stack(0, count=len(names), shape=tensors[names[0]].shape, dtype=tensors[names[0]].dtype)
        for name, names in stacks_of(launch.inputs | launch.outputs).items()
    }
    return profile, tensors, stacks


def _image_tokens(manifest: Manifest) -> DeviceTensor:
    return DeviceTensor(0, (manifest.max_visual, manifest.dimensions.hidden_size), manifest.dtype)


def check_memory(
    device: Device, manifest: Manifest, specs: Sequence[GraphSpec], *, weight_bytes: int
) -> dict[str, int]:
    """Return ``estimate`` if it fits the free memory of ``device``, or on the CPU the machine's whole memory.

    Raises:
        BackendError: If it does not fit.
    """
    needed = memory = estimate(manifest, specs, weight_bytes=weight_bytes)
    # Otherwise the system may kill the process, as on a Jetson, whose GPU shares the host's memory.
    free, what = device.free_bytes(), "free"
    if free is None:  # the CPU: weights are mapped files, whose pages the system can take back
        needed = {name: count for name, count in memory.items() if name != "weights"}
        free, what = whole_memory_bytes(), "in all"
    if free is not None and sum(needed.values()) > free:
        raise _too_little(device, needed, what, free)
    return memory


def _too_little(device: Device, needed: Mapping[str, int], what: str, free: int) -> BackendError:
    parts = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in needed.items())
    return BackendError(
        f"{device.name} memory: expected {sum(needed.values()) / 1e9:.2f} GB {what} ({parts}), got {free / 1e9:.2f} GB; close"
        " other programs, or export with fewer --image-size, --max-text or --max-new-tokens"
    )


def estimate(manifest: Manifest, specs: Sequence[GraphSpec], *, weight_bytes: int) -> dict[str, int]:
    """Return the bytes by purpose for loading ``specs``; buffers and KV caches only if these are all graphs."""
    rows = max((profile.sizes.get("S", 0) for spec in specs for profile in spec.profiles), default=0)
    size = np.dtype(manifest.dtype).itemsize
    workspace = manifest.dimensions.workspace_bytes(rows, element_bytes=size)
    vision, tower = next((spec for spec in specs if spec.role == "vision"), None), manifest.vision
    if vision is not None and tower is not None:
        # The first axis of the pixels has tiles or patches; a made-up manifest may lack both.
        pixels = (tensor.shape[:1] for tensor in vision.inputs[:1] for _ in vision.profiles)
        count = max(map(math.prod, map(shape_at, pixels, vision.profiles)), default=0)
        workspace = max(workspace, tower.workspace_bytes(count, element_bytes=size))
    memory = {"weights": weight_bytes, "workspace": workspace}
    # Single graphs are loaded for comparisons and bring their own buffers.
    if len(specs) == len(manifest.graphs):
        memory["KV caches"] = manifest.kv_bytes
        if manifest.state_bytes:
            memory["states"] = manifest.state_bytes
        memory["buffers"] = memory_plan(manifest).num_bytes - manifest.kv_bytes - manifest.state_bytes
    return memory


@final
class Memory:
    """The places of all programs. Those that the host sends or reads have a pinned copy on the host."""

    def __init__(self, manifest: Manifest, allocator: Allocator) -> None:
        """Allocate each place at its largest shape.

        Raises:
            BackendError: If there is too little memory.
        """
        self._manifest, self._graphs = manifest, {spec.name: spec for spec in manifest.graphs}
        plan = memory_plan(manifest)
        self._tensors: dict[str, DeviceTensor] = {}
        self._pinned: dict[str, NDArray[np.uint8]] = {}
        self._blocks: dict[str, tuple[DeviceTensor, NDArray[np.uint8]]] = {}
        """Memory that one copy moves, and its pinned copy: a namespace, or a place that is copied alone."""
        blocks: dict[str, list[str]] = {}
        for place in plan.tensors:
            space = place.partition(".")[0]
            blocks.setdefault(space if space in JOINT else place, []).append(place)
        for block, places in blocks.items():
            start, sizes = 0, [aligned(plan.tensors[place].num_bytes) for place in places]
            whole = DeviceTensor(allocator.allocate(sum(sizes), purpose=block), (sum(sizes),), "uint8")
            if block.partition(".")[0] in (*JOINT, *SINGLE):
                self._blocks[block] = whole, allocator.allocate_pinned(sum(sizes), purpose=block)
            for place, size in zip(places, sizes):
                self._tensors[place] = plan.tensors[place]._replace(address=whole.address + start)
                if block in self._blocks:
                    self._pinned[place] = self._blocks[block][1][start : start + size]
                start += size
        self._stacks = {
            name: stack.moved(allocator.allocate(stack.num_bytes, purpose=name))
            for name, stack in plan.stacks.items()
        }
        self._nothing = allocator.allocate(1, purpose="tensors without elements")
        self._images: list[DeviceTensor] = []
        if plan.images:
            self.images(allocator)

    def at(self, launch: Launch, index: int) -> tuple[Profile, dict[str, DeviceTensor], dict[str, Stack]]:
        """Return the profile, the tensors and the stacks of a launch at the program's sizes number ``index``."""
        profile, tensors, found = _launch_at(self._graphs, launch, index)
        stacks = {name: stack.moved(self._stacks[name].address) for name, stack in found.items()}
        for name, tensor in tensors.items():
            place = launch.inputs.get(name) or launch.outputs.get(name)
            stacked = None if place is None else stack_of(place)
            if stacked is not None:
                tensors[name] = stacks[stacked[0]].tensor(stacked[1])
            else:
                address = self._nothing if place is None else self._tensors[place].address
                tensors[name] = tensor._replace(address=address)
        return profile, tensors, stacks

    def stack(self, name: str) -> Stack:
        """Return the stack called ``name``, at its largest shape."""
        return self._stacks[name]

    def tensor(self, place: str, shape: tuple[int, ...] | None = None) -> DeviceTensor:
        """Return the device tensor at ``place``, at ``shape`` or its largest shape."""
        tensor = self._tensors[place]
        return tensor if shape is None else tensor._replace(shape=shape)

    def images(self, allocator: Allocator) -> list[DeviceTensor]:
        """Return the memory for visual tokens and planes of several images in a row: [largest N, D] each.

        A bundle for one image allocates it at its first prompt with several small images.
        """
        found = _image_tokens(self._manifest)
        while len(self._images) <= self._manifest.num_deepstack:
            address = allocator.allocate(found.num_bytes, purpose="several images")
            self._images.append(found._replace(address=address))
        return self._images

    # The pinned copies on the host

    def host(self, place: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """Return a view of the host's copy of ``place``, at ``shape`` or its largest shape."""
        tensor = self.tensor(place, shape)
        return self._pinned[place][: tensor.num_bytes].view(tensor.dtype).reshape(tensor.shape)

    def send(self, device: Device, block: str, values: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Write ``values`` to the host's copies, then enqueue a copy of all places of a namespace to the device.

        Places that no launch reads are left out.
        """
        for place, array in (values or {}).items():
            if place in self._pinned:
                self.host(place, array.shape)[...] = array
        if block in self._blocks:
            device.upload(*self._blocks[block])

    def fetch(self, device: Device, block: str) -> None:
        """Enqueue a copy of all places of a namespace to the host."""
        whole, pinned = self._blocks[block]
        device.download(pinned, whole)

    def send_one(self, device: Device, place: str, array: NDArray[Any]) -> None:
        """Write ``array`` to a place that is sent alone, and enqueue its copy."""
        self.host(place, array.shape)[...] = array
        device.upload(self.tensor(place, array.shape), self.host(place, array.shape))

    def fetch_one(self, device: Device, place: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Enqueue a copy of a place that is fetched alone, and return its copy on the host."""
        device.download(self.host(place, shape), self.tensor(place, shape))
        return self.host(place, shape)


def copy_tensor(device: Device, target: DeviceTensor, source: DeviceTensor) -> None:
    """Enqueue a copy of ``source`` to the start of ``target``, cut to the smaller of both."""
    size = min(target.num_bytes, source.num_bytes)
    device.copy_rows(
        PitchedRows(target.address, size), PitchedRows(source.address, size), row_bytes=size, num_rows=1
    )


Slot = TypeVar("Slot")


@final
class Recent(Generic[Slot]):
    """Slots of device memory by key; a new key replaces the least recently used one."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._free = list(slots)
        self._used: OrderedDict[bytes, Slot] = OrderedDict()

    def find(self, key: bytes) -> Slot | None:
        """Return the slot of ``key``, which is now the most recently used one; None if there is none."""
        if key not in self._used:
            return None
        self._used.move_to_end(key)
        return self._used[key]

    def take(self, key: bytes) -> Slot | None:
        """Return a slot to fill for ``key``; None without slots, or for an empty key."""
        if not key or not (self._free or self._used):
            return None
        self._used[key] = self._free.pop() if self._free else self._used.popitem(last=False)[1]
        return self._used[key]

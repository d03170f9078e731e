"""The exceptions of trio-edge: everything a user can cause, one line each.

    TrioEdgeError              base class; command lines print it as one line and exit with code 2
    ├── ManifestError          a bundle's description is broken or of another schema   (also a ValueError)
    ├── BundleError            a bundle's files are missing, changed or unfinished     (also a ValueError)
    ├── ShapeError             an array or a prompt does not fit the exported shapes   (also a ValueError)
    │   └── PromptTooLongError a prompt has more tokens than the bundle has room for
    ├── ScheduleError          an impossible reduction schedule                        (also a ValueError)
    ├── CheckpointError        a checkpoint cannot be exported                         (also a ValueError)
    ├── ImageError             an image cannot be read                                (also a ValueError)
    ├── TargetError            a device that nothing is known of                       (also a ValueError)
    ├── DataError              a file of questions or of outcomes is broken            (also a ValueError)
    └── BackendError           a backend cannot load or run a graph                    (also a RuntimeError)

A message reads ``<where>: expected <rule>, got <value>; <what to do>``.
"""


class TrioEdgeError(Exception):
    """Base class of all errors that a user can mend."""


class ManifestError(TrioEdgeError, ValueError):
    """The manifest is broken or written for another schema version."""


class BundleError(TrioEdgeError, ValueError):
    """A file of the bundle is missing, changed or unfinished."""


class ShapeError(TrioEdgeError, ValueError):
    """An array, prompt or request does not fit the exported shapes."""


class PromptTooLongError(ShapeError):
    """A prompt with more text or visual tokens than the bundle has room for."""


class ScheduleError(TrioEdgeError, ValueError):
    """A reduction schedule that the model cannot follow."""


class CheckpointError(TrioEdgeError, ValueError):
    """A checkpoint that cannot be read or exported."""


class ImageError(TrioEdgeError, ValueError):
    """An image that cannot be read or is out of bounds."""


class TargetError(TrioEdgeError, ValueError):
    """A device that is not in the table of targets."""


class DataError(TrioEdgeError, ValueError):
    """A file of questions, or a folder of outcomes, that cannot be used."""


class BackendError(TrioEdgeError, RuntimeError):
    """A backend is missing, or cannot load or run a graph."""

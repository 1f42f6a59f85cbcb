"""The errors a user can meet. Every message names the input, what was expected and the fix."""


class MythosError(Exception):
    """Base of all errors this project raises on purpose; the command line prints its message and exits with 2."""


class BundleError(MythosError):
    """A bundle that is damaged, foreign, unsafe or of an unknown format version."""


class InputError(MythosError, ValueError):
    """A request that the model or the backend cannot serve: ids out of range, too long a prompt, a wrong loop count."""


class MemoryLimitError(MythosError):
    """A request that does not fit into the memory_limit that was set, or into what memory there is."""


class BackendError(MythosError):
    """A backend that is missing, unknown, or that refuses the bundle's graphs."""

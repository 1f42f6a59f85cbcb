"""mythos-export: OpenMythos training checkpoints to ONNX bundles, and one Runner for them.

`load` and what belongs to it come from `runtimes` and need no torch; `export_bundle`, `verify_bundle` and `MythosForCausalLM`
do, and are imported when used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load": "runtimes.runner",
    "Runner": "runtimes.runner",
    "Token": "runtimes.generation",
    "Generation": "runtimes.generation",
    "MythosError": "runtimes.errors",
    "BundleError": "runtimes.errors",
    "InputError": "runtimes.errors",
    "BackendError": "runtimes.errors",
    "export_bundle": "mythos_export.export",
    "load_checkpoint": "mythos_export.checkpoint",
    "verify_bundle": "mythos_export.verify",
    "MythosForCausalLM": "mythos_export.integrations.transformers_model",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from mythos_export.checkpoint import load_checkpoint as load_checkpoint
    from mythos_export.export import export_bundle as export_bundle
    from mythos_export.integrations.transformers_model import MythosForCausalLM as MythosForCausalLM
    from mythos_export.verify import verify_bundle as verify_bundle
    from runtimes.errors import BackendError as BackendError
    from runtimes.errors import BundleError as BundleError
    from runtimes.errors import InputError as InputError
    from runtimes.errors import MythosError as MythosError
    from runtimes.generation import Generation as Generation
    from runtimes.generation import Token as Token
    from runtimes.runner import Runner as Runner
    from runtimes.runner import load as load


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

"""A step of bench's tests, kernel by kernel: `bench --profile`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mythos_export.bench import Workload, open_runner, runner_test, step_bytes
from mythos_export.power import Stopwatch
from mythos_export.profiling import Profile, profile
from mythos_export.traces import CuptiTrace, OnnxRuntimeTrace, Trace
from runtimes.bundle import open_bundle
from runtimes.onnxruntime_backend import OnnxRuntimeBackend
from runtimes.runner import Runner

_STEPS = 8  # of decode, whose mean is shown
_BEFORE = 3  # steps of decode before those: an engine captures its second one as a CUDA graph


class _TracedWatch(Stopwatch):
    """A stopwatch that also traces."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __enter__(self) -> _TracedWatch:
        self._trace.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._trace.__exit__(*error)


def profile_tests(
    bundle: str | Path, workload: Workload, on_device: bool, tests: Sequence[str], loops: int, bandwidth: float
) -> tuple[Profile, ...]:
    """A prefill and the mean of eight decode steps. The bundle is opened anew, as profilers must be on before anything is captured.
    bandwidth: GB/s to hold rates against. Raises BackendError where no profiler can be had."""
    new = min(_STEPS + _BEFORE, workload.new)
    before = min(_BEFORE, max(new - 1, 0))
    workload, steps = replace(workload, new=new), new - before
    found = []
    for name in tests:
        runner, trace = _on_device(bundle, workload) if on_device else _on_cpu(Path(bundle), workload)
        try:
            test = runner_test(runner, name, workload, loops, before=before)
            if name == "pp":
                test(Stopwatch())  # warm-up; decode has steps before
            watch = _TracedWatch(trace)
            test(watch)
            in_step = replace(workload, context=workload.context + before, new=steps)
            found.append(
                profile(
                    f"pp{workload.prompt}" if name == "pp" else f"tg{steps} @ d{in_step.context}",
                    trace.source,
                    trace.activities(),
                    watch.seconds * 1e6,
                    1 if name == "pp" else steps,
                    step_bytes(runner, name, in_step, loops),
                    bandwidth,
                )
            )
        finally:
            trace.close()
            runner.close()
    return tuple(found)


def _on_device(bundle: str | Path, workload: Workload) -> tuple[Runner, Trace]:
    trace = CuptiTrace()
    try:
        return open_runner(bundle, workload), trace
    except BaseException:
        trace.close()
        raise


def _on_cpu(bundle: Path, workload: Workload) -> tuple[Runner, Trace]:
    folder, manifest = open_bundle(bundle)
    place = tempfile.TemporaryDirectory(prefix="mythos-profile-")
    backend = OnnxRuntimeBackend(
        folder, manifest, workload.threads, workload.native, workload.memory_limit, Path(place.name) / "operators"
    )

    def end() -> str:
        text = backend.end_profile().read_text()
        place.cleanup()
        return text

    return Runner(manifest, backend, None), OnnxRuntimeTrace(backend.profile_start, end)

"""What `bench --profile` shows: a table a step."""

from __future__ import annotations

from mythos_export.profiling import Profile
from mythos_export.report import markdown_table, size

_NAME = 60  # letters of a kernel's name


def profile_report(profile: Profile) -> str:
    """A step of a test, kernel by kernel."""
    rows = [
        [
            kernel.name if len(kernel.name) <= _NAME else kernel.name[: _NAME - 1] + "…",
            f"{kernel.calls:g}",
            f"{kernel.microseconds:.1f}",
            f"{100 * kernel.share:.1f} %",
            "" if kernel.bytes is None else size(kernel.bytes),
            "" if kernel.gb_per_second is None else f"{kernel.gb_per_second:.1f}",
            "" if kernel.bandwidth_share is None else f"{100 * kernel.bandwidth_share:.0f} %",
            kernel.bound or "",
        ]
        for kernel in profile.kernels
    ]
    between = profile.between_microseconds
    rows.append(
        ["(between them)", "", f"{between:.1f}", f"{100 * between / profile.microseconds:.1f} %", "", "", "", ""]
    )
    what = "one prefill" if profile.steps == 1 else f"the mean of {profile.steps} steps"
    header = ["kernel or operator", "calls", "µs", "share", "must read", "GB/s", "of bandwidth", "bound by"]
    return f"{profile.test}, {what}: {profile.microseconds:.0f} µs, by {profile.source}\n{markdown_table(header, rows)}"

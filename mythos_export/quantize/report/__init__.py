"""The report on a quantization: one HTML page, its pictures as PNG files, and every figure in them as JSON."""

from mythos_export.quantize.report.request import ReportRequest
from mythos_export.quantize.report.write import write_report

__all__ = ["ReportRequest", "write_report"]

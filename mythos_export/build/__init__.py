"""TensorRT engines from a bundle. Needs onnx, onnxscript and onnx-ir, not torch: engines are built where they run."""

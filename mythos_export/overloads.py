"""The operators' domain, and the bodies (ONNX function overloads) that each may carry in a bundle's graph."""

DOMAIN = "ai.mythos"
DOMAIN_VERSION = 1
OPSET = 21  # the first with blocked DequantizeLinear, which quantized bundles use

PORTABLE = ""  # what any runtime inlines
DEQUANTIZED = "dequantized"  # the same, every quantized matrix dequantized before any is picked
# What engine builders inline: shapes depend on shapes alone, so that attention runs over the whole capacity of a cache;
# matrices are read as they are stored; quantization is QuantizeLinear and DequantizeLinear next to the product.
ENGINE = "engine"
# Those of a mixture of experts, whose stacks come in two parts (NAME_routed, and NAME_shared where there are shared experts):
FEW_TOKENS = "few_tokens"  # reads the experts chosen by each token
MANY_TOKENS = "many_tokens"  # reads every expert once, for all tokens
WITH_SHARED = "_with_shared"  # suffix of both where there are shared experts

"""The operators' domain, and the bodies (ONNX function overloads) that each may carry in a bundle's graph."""

DOMAIN = "ai.mythos"
DOMAIN_VERSION = 1
OPSET = 21  # the first with blocked DequantizeLinear, which quantized bundles use

PORTABLE = ""  # what any runtime inlines
DEQUANTIZED = "dequantized"  # the same, every quantized matrix dequantized before any is picked
# What engine builders inline: shapes depend on shapes alone, so that attention runs over the whole capacity of a cache;
# matrices are read as they are stored; quantization is QuantizeLinear and DequantizeLinear next to the product.
ENGINE = "engine"
# In place of that, where it pays to know how many tokens there are. A mixture of experts reads the experts chosen by each token, or
# every expert once for all; its stacks come in two parts, NAME_routed, and NAME_shared where there are shared experts.
FEW_TOKENS = "few_tokens"
MANY_TOKENS = "many_tokens"
WITH_SHARED = "_with_shared"  # suffix of both in a mixture with shared experts

// The library of TensorRT plugins: what IPluginRegistry::loadLibrary and trtexec --dynamicPlugins look for. Needs no symbol of TensorRT.
#include <tuple>

#include "operators.h"

namespace mythos::plugins {
namespace {

template <typename... Operators>
nvinfer1::IPluginCreatorInterface* const* creators_of(int32_t& count) {
  static std::tuple<Creator<Operators>...> creators;
  static nvinfer1::IPluginCreatorInterface* const all[] = {&std::get<Creator<Operators>>(creators)...};
  count = int32_t(sizeof...(Operators));
  return all;
}

}  // namespace
}  // namespace mythos::plugins

using namespace mythos::plugins;

extern "C" {

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  return creators_of<NormalizedLinear, ResidualLinear, FeedForward, MixtureOfExperts, LatentAttention, GroupedQueryAttention, RecurrentInput,
                     RecurrentUpdate>(count);
}

// These plugins log nothing: what fails is an error code of CUDA, which TensorRT reports.
__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

}  // extern "C"

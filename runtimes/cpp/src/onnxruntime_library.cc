#include "onnxruntime_library.h"

#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "error.h"

namespace mythos {
namespace fs = std::filesystem;

namespace {

constexpr char kName[] = "libonnxruntime.so.1";

std::vector<std::string> places() {
  if (const char* named = std::getenv("MYTHOS_ONNXRUNTIME"); named && *named) return {named};
  std::vector<std::string> found;
  std::error_code ignored;
  if (const fs::path beside = own_folder() / kName; fs::exists(beside, ignored)) found.push_back(beside.string());
  // Ours is <packages>/runtimes/cpp/sdk/lib there.
  for (const auto& entry : fs::directory_iterator(own_folder() / "../../../../onnxruntime/capi", ignored))
    if (entry.path().filename().string().rfind(kName, 0) == 0) found.push_back(entry.path().string());
  found.push_back(kName);
  return found;
}

const OrtApi* loaded() {
  std::string reasons;
  for (const auto& place : places()) {
    void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      reasons += (reasons.empty() ? "" : "; ") + std::string(dlerror());
      continue;
    }
    const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
    if (!base) failed(place + ": not a library of onnxruntime; name one in MYTHOS_ONNXRUNTIME");
    if (const OrtApi* api = base()->GetApi(ORT_API_VERSION)) return api;
    failed(place + ": onnxruntime " + base()->GetVersionString() + ", expected 1." + std::to_string(ORT_API_VERSION) +
           " or newer; install it, or name another library in MYTHOS_ONNXRUNTIME");
  }
  failed("found no library of onnxruntime (" + reasons + "); install onnxruntime, or name its library in MYTHOS_ONNXRUNTIME");
}

}  // namespace

fs::path own_folder() {
  Dl_info here;
  if (!dladdr(reinterpret_cast<const void*>(&mythos_version), &here) || !here.dli_fname) return {};
  return fs::path(here.dli_fname).parent_path();
}

void load_onnxruntime() {
  static const bool ready = (Ort::InitApi(loaded()), true);
  (void)ready;
}

}  // namespace mythos

// Errors inside the library are exceptions of one type; the C functions turn them into a status and a message.
#pragma once

#include <stdexcept>
#include <string>

#include "mythos/runtime.h"

namespace mythos {

class Error : public std::runtime_error {
 public:
  Error(mythos_status status, const std::string& message) : std::runtime_error(message), status(status) {}
  mythos_status status;
};

[[noreturn]] inline void refuse(const std::string& message) { throw Error(MYTHOS_ERROR_INPUT, message); }
[[noreturn]] inline void damaged(const std::string& message) { throw Error(MYTHOS_ERROR_BUNDLE, message); }
[[noreturn]] inline void failed(const std::string& message) { throw Error(MYTHOS_ERROR_BACKEND, message); }

}  // namespace mythos

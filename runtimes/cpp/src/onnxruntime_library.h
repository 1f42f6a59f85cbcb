// onnxruntime's library, opened when the first bundle is: programs need none to link with, and say what is missing where there is none.
#pragma once

#include <filesystem>

namespace mythos {

// The folder of this library.
std::filesystem::path own_folder();

// Makes onnxruntime's C++ interface usable, once a process: from the file that MYTHOS_ONNXRUNTIME names, else beside this library, in the
// Python package onnxruntime beside ours, or where the system looks. Throws Error.
void load_onnxruntime();

}  // namespace mythos

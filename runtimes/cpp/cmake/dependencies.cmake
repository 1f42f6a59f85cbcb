# onnxruntime: headers and library from ONNXRUNTIME_ROOT, else installed ones, else Debian's headers with the library of the Python
# package (PYTHON names an interpreter that has it). nlohmann_json: installed, or Debian's. OpenSSL's libcrypto for sha256.
find_package(Threads REQUIRED)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)
set(ONNXRUNTIME_ROOT "$ENV{ONNXRUNTIME_ROOT}" CACHE PATH "Folder with onnxruntime's include and lib")
set(PYTHON python3 CACHE STRING "Interpreter whose onnxruntime package has the library")
set(MYTHOS_DOWNLOADS ${CMAKE_BINARY_DIR} CACHE PATH "Folder for what has to be fetched, which several builds may share")
set(debian ${MYTHOS_DOWNLOADS}/debian)

function(find_parts)
  find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h HINTS ${ONNXRUNTIME_ROOT}/include ${debian}/usr/include
            PATH_SUFFIXES onnxruntime onnxruntime/core/session)
  find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp HINTS ${debian}/usr/include)
endfunction()

find_parts()
if(NOT ONNXRUNTIME_INCLUDE_DIR OR NOT NLOHMANN_JSON_INCLUDE_DIR)
  execute_process(COMMAND ${CMAKE_CURRENT_LIST_DIR}/../../native/debian_headers.sh ${debian} libonnxruntime-dev nlohmann-json3-dev
                  OUTPUT_VARIABLE reason OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_parts()
endif()
if(NOT ONNXRUNTIME_INCLUDE_DIR OR NOT NLOHMANN_JSON_INCLUDE_DIR)
  message(FATAL_ERROR "found no headers of onnxruntime and nlohmann_json, and Debian's cannot be had (${reason}); install \
libonnxruntime-dev and nlohmann-json3-dev, or set ONNXRUNTIME_ROOT and NLOHMANN_JSON_INCLUDE_DIR")
endif()

if(NOT ONNXRUNTIME_LIBRARY)
  find_library(ONNXRUNTIME_LIBRARY onnxruntime HINTS ${ONNXRUNTIME_ROOT}/lib)
endif()
if(NOT ONNXRUNTIME_LIBRARY)
  execute_process(
    COMMAND ${PYTHON} -c "import importlib.util as u, pathlib as p; \
print(next(p.Path(u.find_spec('onnxruntime').origin).parent.glob('capi/libonnxruntime.so.*')))"
    OUTPUT_VARIABLE library OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(library)
    # The package has the library without the name that programs look for; installed with ours, it has it.
    file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/onnxruntime)
    file(CREATE_LINK ${library} ${CMAKE_BINARY_DIR}/onnxruntime/libonnxruntime.so.1 SYMBOLIC)
    set(ONNXRUNTIME_LIBRARY ${CMAKE_BINARY_DIR}/onnxruntime/libonnxruntime.so.1 CACHE FILEPATH "onnxruntime's library" FORCE)
    set(MYTHOS_SHIPPED_ONNXRUNTIME ${library} CACHE FILEPATH "onnxruntime's library, to be installed beside ours" FORCE)
  endif()
endif()
if(NOT ONNXRUNTIME_LIBRARY)
  message(FATAL_ERROR "found no library of onnxruntime; install libonnxruntime-dev, set ONNXRUNTIME_ROOT, or name with PYTHON an \
interpreter that has the package onnxruntime")
endif()

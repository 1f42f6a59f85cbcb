# onnxruntime's headers from ONNXRUNTIME_ROOT, else installed ones, else Debian's. nlohmann_json: installed, or Debian's. OpenSSL's
# libcrypto for sha256. What cannot be had is said in MYTHOS_MISSING.
# onnxruntime's library is opened at run time; one found here is kept beside ours: of ONNXRUNTIME_ROOT, else of the Python package (PYTHON
# names an interpreter that has it). An installed one is found there anyway.
set(ONNXRUNTIME_ROOT "$ENV{ONNXRUNTIME_ROOT}" CACHE PATH "Folder with onnxruntime's include and lib")
set(PYTHON python3 CACHE STRING "Interpreter whose onnxruntime package has the library")
set(MYTHOS_DOWNLOADS ${CMAKE_BINARY_DIR} CACHE PATH "Folder for what has to be fetched, which several builds may share")
option(MYTHOS_OPTIONAL "build nothing, rather than fail, where something is missing" OFF)
set(debian ${MYTHOS_DOWNLOADS}/debian)
set(MYTHOS_MISSING "")
if(CMAKE_CROSSCOMPILING)
  include(${CMAKE_CURRENT_LIST_DIR}/cross.cmake)
endif()
find_package(Threads REQUIRED)
find_package(OpenSSL COMPONENTS Crypto)

function(find_headers_of_parts)
  find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h HINTS ${ONNXRUNTIME_ROOT}/include ${debian}/usr/include
            PATH_SUFFIXES onnxruntime onnxruntime/core/session NO_CMAKE_FIND_ROOT_PATH)
  find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp HINTS ${debian}/usr/include NO_CMAKE_FIND_ROOT_PATH)
endfunction()

find_headers_of_parts()
if(NOT ONNXRUNTIME_INCLUDE_DIR OR NOT NLOHMANN_JSON_INCLUDE_DIR)
  execute_process(COMMAND ${CMAKE_CURRENT_LIST_DIR}/../../native/debian_headers.sh ${debian} libonnxruntime-dev nlohmann-json3-dev
                  OUTPUT_VARIABLE reason OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_headers_of_parts()
endif()
if(NOT OpenSSL_FOUND)
  set(MYTHOS_MISSING "found no OpenSSL; install libssl-dev, or set OPENSSL_ROOT_DIR")
elseif(NOT ONNXRUNTIME_INCLUDE_DIR OR NOT NLOHMANN_JSON_INCLUDE_DIR)
  set(MYTHOS_MISSING "found no headers of onnxruntime and nlohmann_json, and Debian's cannot be had (${reason}); install \
libonnxruntime-dev and nlohmann-json3-dev, or set ONNXRUNTIME_ROOT and NLOHMANN_JSON_INCLUDE_DIR")
endif()

if(NOT ONNXRUNTIME_SHIPPED AND ONNXRUNTIME_ROOT)
  file(GLOB library ${ONNXRUNTIME_ROOT}/lib/libonnxruntime.so.1*)
elseif(NOT ONNXRUNTIME_SHIPPED AND NOT MYTHOS_OPTIONAL AND NOT CMAKE_CROSSCOMPILING)
  execute_process(
    COMMAND ${PYTHON} -c "import importlib.util as u, pathlib as p; \
print(next(p.Path(u.find_spec('onnxruntime').origin).parent.glob('capi/libonnxruntime.so.*')))"
    OUTPUT_VARIABLE library OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(library)
  list(GET library 0 library)
  file(REAL_PATH ${library} library)
  set(ONNXRUNTIME_SHIPPED ${library} CACHE FILEPATH "onnxruntime's library, to be kept beside ours")
endif()
if(ONNXRUNTIME_SHIPPED) # for what is run from the build folder
  file(CREATE_LINK ${ONNXRUNTIME_SHIPPED} ${CMAKE_CURRENT_BINARY_DIR}/libonnxruntime.so.1 SYMBOLIC)
endif()

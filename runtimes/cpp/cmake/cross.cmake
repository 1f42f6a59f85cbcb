# What another processor needs and this machine does not have installed for it: libcrypto of the Debian that runs here, linked in, and
# onnxruntime's library from the Python package for that processor.
set(target_files ${MYTHOS_DOWNLOADS}/${CMAKE_SYSTEM_PROCESSOR})
set(debian_names aarch64 arm64 x86_64 amd64)
list(FIND debian_names ${CMAKE_SYSTEM_PROCESSOR} at)
if(at GREATER_EQUAL 0)
  math(EXPR at "${at} + 1")
  list(GET debian_names ${at} debian_name)
endif()

if(NOT OPENSSL_ROOT_DIR AND debian_name)
  if(NOT EXISTS ${target_files}/usr/include/openssl)
    file(STRINGS /etc/os-release suite REGEX "^VERSION_CODENAME=")
    string(REPLACE "VERSION_CODENAME=" "" suite "${suite}")
    execute_process(COMMAND ${CMAKE_COMMAND} -E env SUITE=${suite} ARCHITECTURE=${debian_name}
                            ${CMAKE_CURRENT_LIST_DIR}/../../native/debian_headers.sh ${target_files} libssl-dev)
  endif()
  set(OPENSSL_USE_STATIC_LIBS ON)
  set(OPENSSL_INCLUDE_DIR ${target_files}/usr/include)
  set(OPENSSL_CRYPTO_LIBRARY ${target_files}/usr/lib/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu/libcrypto.a)
  # Its configuration, which differs between processors, lies apart from the other headers.
  include_directories(SYSTEM ${target_files}/usr/include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu)
endif()

if(NOT ONNXRUNTIME_SHIPPED AND NOT ONNXRUNTIME_ROOT)
  execute_process(COMMAND ${PYTHON} -m pip download --quiet --no-deps --only-binary :all: --platform
                          manylinux_2_28_${CMAKE_SYSTEM_PROCESSOR} --dest ${target_files} onnxruntime)
  file(GLOB wheel ${target_files}/onnxruntime-*.whl)
  if(wheel)
    file(ARCHIVE_EXTRACT INPUT ${wheel} DESTINATION ${target_files} PATTERNS onnxruntime/capi/libonnxruntime.so.*)
    file(GLOB library ${target_files}/onnxruntime/capi/libonnxruntime.so.1*)
  endif()
endif()

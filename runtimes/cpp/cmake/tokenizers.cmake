# Text: the package pytorch-tokenizers in C++, of which we build what byte-level BPE needs, from TOKENIZERS_ROOT, else from the Python
# package index by PYTHON's pip. Its regular expressions are RE2's: installed, else that of its sources, which takes longer to build.
set(MYTHOS_TEXT AUTO CACHE STRING "text with token ids: ON, OFF, or AUTO for where its sources can be had")
set(MYTHOS_INSTALLED_RE2 ON CACHE BOOL "use an installed RE2; OFF for a library that runs where none is")
set(TOKENIZERS_ROOT "" CACHE PATH "Unpacked sources of pytorch-tokenizers")
set(tokenizers_version 1.0.1)
set(tokenizers_sha256 19938c0efd5348fb0589610094c1c6bf6e055b20889f6250068d2b552a0b137b)

# Unpacks the sources, once, or says why they cannot be had.
function(fetch_tokenizers reason)
  set(folder ${MYTHOS_DOWNLOADS}/tokenizers)
  set(name pytorch_tokenizers-${tokenizers_version})
  set(TOKENIZERS_ROOT ${folder}/${name} CACHE PATH "Unpacked sources of pytorch-tokenizers" FORCE)
  if(EXISTS ${TOKENIZERS_ROOT}/CMakeLists.txt)
    return()
  endif()
  unset(TOKENIZERS_ROOT CACHE)
  file(WRITE ${folder}/requirement.txt "pytorch-tokenizers==${tokenizers_version} --hash=sha256:${tokenizers_sha256}\n")
  execute_process(COMMAND ${PYTHON} -m pip download --quiet --no-deps --no-binary pytorch-tokenizers --require-hashes
                          --requirement ${folder}/requirement.txt --dest ${folder}
                  RESULT_VARIABLE failed ERROR_VARIABLE message OUTPUT_QUIET)
  if(failed)
    string(REGEX REPLACE "\n.*" "" message "${message}")
    set(${reason} "${PYTHON} -m pip download: ${message}" PARENT_SCOPE)
    return()
  endif()
  file(ARCHIVE_EXTRACT INPUT ${folder}/${name}.tar.gz DESTINATION ${folder}
       PATTERNS */CMakeLists.txt */LICENSE */include/pytorch/* */src/*.cpp */llama.cpp-unicode/* */re2/* */abseil-cpp/*)
  file(GLOB_RECURSE scripts ${folder}/${name}/*.py) # not ours to check
  if(scripts)
    file(REMOVE ${scripts})
  endif()
  set(TOKENIZERS_ROOT ${folder}/${name} CACHE PATH "Unpacked sources of pytorch-tokenizers" FORCE)
endfunction()

function(find_re2)
  if(MYTHOS_INSTALLED_RE2)
    find_library(RE2_LIBRARY re2)
    find_path(RE2_INCLUDE_DIR re2/re2.h)
    if(RE2_LIBRARY AND RE2_INCLUDE_DIR)
      add_library(re2::re2 UNKNOWN IMPORTED GLOBAL)
      set_target_properties(re2::re2 PROPERTIES IMPORTED_LOCATION ${RE2_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${RE2_INCLUDE_DIR})
      return()
    endif()
  endif()
  set(CMAKE_POSITION_INDEPENDENT_CODE ON)
  set(CMAKE_CXX_STANDARD 17)
  set(ABSL_PROPAGATE_CXX_STD ON)
  set(ABSL_ENABLE_INSTALL ON) # RE2 wants it; nothing of either is installed
  set(BUILD_TESTING OFF)
  add_subdirectory(${TOKENIZERS_ROOT}/third-party/abseil-cpp ${CMAKE_BINARY_DIR}/abseil EXCLUDE_FROM_ALL)
  add_subdirectory(${TOKENIZERS_ROOT}/third-party/re2 ${CMAKE_BINARY_DIR}/re2 EXCLUDE_FROM_ALL)
endfunction()

function(add_tokenizers)
  set(unicode ${TOKENIZERS_ROOT}/third-party/llama.cpp-unicode)
  set(sources src/bpe_tokenizer_base.cpp src/hf_tokenizer.cpp src/normalizer.cpp src/pre_tokenizer.cpp src/re2_regex.cpp
              src/regex.cpp src/token_decoder.cpp)
  list(TRANSFORM sources PREPEND ${TOKENIZERS_ROOT}/)
  add_library(tokenizers STATIC ${sources} ${unicode}/src/unicode.cpp ${unicode}/src/unicode-data.cpp)
  set_target_properties(tokenizers PROPERTIES CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON POSITION_INDEPENDENT_CODE ON
                                              CXX_VISIBILITY_PRESET hidden)
  target_include_directories(tokenizers SYSTEM PUBLIC ${TOKENIZERS_ROOT}/include ${unicode}/include ${NLOHMANN_JSON_INCLUDE_DIR})
  target_compile_definitions(tokenizers PUBLIC TK_LOG_ENABLED=0)
  # Headers that it uses without including them, which newer compilers' libraries happen to bring.
  target_compile_options(tokenizers PUBLIC "SHELL:-include functional" "SHELL:-include algorithm" PRIVATE -w)
  target_link_libraries(tokenizers PUBLIC re2::re2)
endfunction()

if(MYTHOS_TEXT)
  if(NOT TOKENIZERS_ROOT)
    fetch_tokenizers(reason)
  endif()
  if(TOKENIZERS_ROOT)
    find_re2()
    add_tokenizers()
  elseif(MYTHOS_TEXT STREQUAL "AUTO")
    message(STATUS "without text, token ids only: ${reason}")
  else()
    message(FATAL_ERROR "MYTHOS_TEXT is ON, but its sources cannot be had (${reason}); set TOKENIZERS_ROOT to unpacked sources of \
pytorch-tokenizers, or MYTHOS_TEXT to OFF")
  endif()
endif()

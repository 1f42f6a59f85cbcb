# ONNXRUNTIME_INCLUDE_DIR and HIGHWAY_INCLUDE_DIR: the given ones (as CMake or environment variables), else installed ones, else
# those of Debian's packages, unpacked into the build folder.

# Ends the configuration where this machine lacks something, in words that `make native` finds again in the file.
function(not_built reason)
  file(WRITE "${CMAKE_BINARY_DIR}/not_built" "native operators are not built: ${reason}\n")
  message(FATAL_ERROR "native operators are not built: ${reason}")
endfunction()

# Of Highway, the kernels need what Debian 12's release lacks (LoadN, ReduceSum).
function(is_new_enough result folder)
  if(NOT EXISTS "${folder}/hwy/base.h")
    return()
  endif()
  file(STRINGS "${folder}/hwy/base.h" version REGEX "define HWY_M(AJOR|INOR) ")
  string(REGEX REPLACE ".*HWY_MAJOR ([0-9]+).*HWY_MINOR ([0-9]+).*" "\\1.\\2" version "${version}")
  if(NOT version VERSION_GREATER_EQUAL 1.2)
    set(${result} FALSE PARENT_SCOPE)
  endif()
endfunction()

function(find_header variable header owner)
  set(given "${${variable}}")
  if(NOT "$ENV{${variable}}" STREQUAL "")
    set(given "$ENV{${variable}}")
  endif()
  if(given)
    set(fits TRUE)
    is_new_enough(fits "${given}")
    if(NOT fits OR NOT EXISTS "${given}/${header}")
      unset(${variable} CACHE) # looked for next time
      message(FATAL_ERROR "${variable} is ${given}, which does not hold ${header} of ${owner}: name the folder that does, \
or none to have it looked for")
    endif()
    set(${variable} "${given}" CACHE PATH "Folder of ${header}" FORCE)
  endif()
  find_path(${variable} ${header} PATHS "${CMAKE_BINARY_DIR}/debian/usr/include" VALIDATOR is_new_enough ${ARGN})
endfunction()

function(find_installed)
  find_header(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h onnxruntime PATH_SUFFIXES onnxruntime onnxruntime/core/session)
  find_header(HIGHWAY_INCLUDE_DIR hwy/highway.h "Highway 1.2 or newer")
endfunction()

# Sets `reason` to why Debian's cannot be had, where any of the variables that follow is not found.
function(look_for_headers reason)
  find_installed()
  set(missing FALSE)
  foreach(variable IN LISTS ARGN)
    if(NOT ${variable})
      set(missing TRUE)
    endif()
  endforeach()
  if(missing)
    execute_process(COMMAND "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/debian_headers.sh" "${CMAKE_BINARY_DIR}/debian"
                    OUTPUT_VARIABLE why OUTPUT_STRIP_TRAILING_WHITESPACE)
    find_installed()
  endif()
  set(${reason} "${why}" PARENT_SCOPE)
endfunction()

function(find_headers)
  look_for_headers(reason ONNXRUNTIME_INCLUDE_DIR HIGHWAY_INCLUDE_DIR)
  if(NOT ONNXRUNTIME_INCLUDE_DIR OR NOT HIGHWAY_INCLUDE_DIR)
    not_built("found no headers of onnxruntime and of Highway 1.2 or newer, and Debian's cannot be had (${reason}); install \
libonnxruntime-dev and libhwy-dev, or set ONNXRUNTIME_INCLUDE_DIR and HIGHWAY_INCLUDE_DIR to folders that hold them")
  endif()
endfunction()

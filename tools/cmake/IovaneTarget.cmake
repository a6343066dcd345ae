# What every target of ours shares: warnings as errors, sanitizers, include roots. Nothing here reaches a consumer.

add_library(iovane_build INTERFACE)
target_compile_features(iovane_build INTERFACE cxx_std_20)
target_compile_options(iovane_build INTERFACE
  -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wnon-virtual-dtor -Wold-style-cast -Woverloaded-virtual
  -Wcast-qual -Wundef -Werror -fvisibility=hidden -fno-omit-frame-pointer)
target_include_directories(iovane_build INTERFACE
  ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/core ${PROJECT_SOURCE_DIR}/core/include)
if(IOVANE_SANITIZE)
  target_compile_options(iovane_build INTERFACE -fsanitize=${IOVANE_SANITIZE} -fno-sanitize-recover=all)
  target_link_options(iovane_build INTERFACE -fsanitize=${IOVANE_SANITIZE})
  target_compile_definitions(iovane_build INTERFACE IOVANE_SANITIZED=1)
endif()

# iovane_layer(NAME SOURCES... [USES targets...]): one rung of the ladder as a static library of position-independent
# code, linked into libiovane.
function(iovane_layer name)
  cmake_parse_arguments(arg "" "" "SOURCES;USES" ${ARGN})
  add_library(iovane_${name} STATIC ${arg_SOURCES})
  set_target_properties(iovane_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_link_libraries(iovane_${name} PUBLIC $<BUILD_INTERFACE:iovane_build> ${arg_USES})
endfunction()

# Debian's cross compiler for 64-bit Arm. The libraries that iovane links come either from Debian's multiarch (packages of
# architecture arm64, installed) or from a directory that `tools/sysroot arm64` made, without root.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(IOVANE_TRIPLE aarch64-linux-gnu)
set(IOVANE_SYSROOT_NAME arm64)
include(${CMAKE_CURRENT_LIST_DIR}/debian_cross.cmake)

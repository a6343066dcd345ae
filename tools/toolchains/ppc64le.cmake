# Debian's cross compiler for little-endian POWER. The libraries that iovane links come either from Debian's multiarch
# (packages of architecture ppc64el, installed) or from a directory that `tools/sysroot ppc64le` made, without root.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR ppc64le)
set(IOVANE_TRIPLE powerpc64le-linux-gnu)
set(IOVANE_SYSROOT_NAME ppc64le)
include(${CMAKE_CURRENT_LIST_DIR}/debian_cross.cmake)

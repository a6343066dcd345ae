# What `cmake --install` lays down: the library with its public headers, the guest front ends with the internal headers
# that theirs still name (apart, so that nobody finds them by accident), the command, and how CMake and pkg-config find it.
include(CMakePackageConfigHelpers)

set(layers iovane_base iovane_iova iovane_pinning iovane_backends iovane_engine iovane_viommu)
set(front_end_headers ${CMAKE_INSTALL_INCLUDEDIR}/iovane-viommu)
target_include_directories(iovane_base INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_include_directories(iovane_viommu INTERFACE $<INSTALL_INTERFACE:${front_end_headers}>)
target_compile_features(iovane_base INTERFACE cxx_std_20)
foreach(layer ${layers})
  string(REPLACE iovane_ "" exported ${layer})
  set_target_properties(${layer} PROPERTIES EXPORT_NAME ${exported})
endforeach()

set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/iovane)
install(TARGETS ${layers} EXPORT iovane ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT iovane NAMESPACE iovane:: FILE iovane-targets.cmake DESTINATION ${package_folder})
install(DIRECTORY core/include/iovane DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
foreach(folder core/viommu core/engine core/base backends)
  install(DIRECTORY ${folder} DESTINATION ${front_end_headers} FILES_MATCHING PATTERN "*.hpp" PATTERN model EXCLUDE)
endforeach()
if(IOVANE_TOOLS)
  install(TARGETS iovane RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/iovane-config.cmake.in iovane-config.cmake
  INSTALL_DESTINATION ${package_folder})
# Minor versions may break what is built against them until there is a 1.0.
write_basic_package_version_file(iovane-config-version.cmake COMPATIBILITY SameMinorVersion)
# The prefix is found from where the file lies, so that a tree may be moved; Debian's libdir is two folders deep.
file(RELATIVE_PATH up /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
set(relative_prefix "\${pcfiledir}/${up}")
configure_file(${CMAKE_CURRENT_LIST_DIR}/iovane.pc.in iovane.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/iovane-config.cmake ${PROJECT_BINARY_DIR}/iovane-config-version.cmake
  DESTINATION ${package_folder})
install(FILES ${PROJECT_BINARY_DIR}/iovane.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

# What runs inside POWER kernels, built by the preset ppc64le; tests_lab is all of it.
iovane_test(spapr_lab_test lab
  SOURCES kvm_tce_test.cpp papr_replay_test.cpp spapr_cost_test.cpp tiny_guest.cpp ../conformance/edu_witness.cpp
  USES iovane_viommu iovane_engine)
find_program(zstd zstd REQUIRED)
set(log ${CMAKE_CURRENT_BINARY_DIR}/papr-nvme-a.log)
add_custom_command(OUTPUT ${log}
  COMMAND ${zstd} -q -d -f ${PROJECT_SOURCE_DIR}/tests/data/viommu/papr-nvme-a.log.zst -o ${log}
  DEPENDS ${PROJECT_SOURCE_DIR}/tests/data/viommu/papr-nvme-a.log.zst)
add_custom_target(papr_log DEPENDS ${log})
add_dependencies(tests_lab conformance_test papr_log)

# iovane_power_test(NAME MACHINE LABEL PROGRAM [WORDS words for tools/lab ...] [FOR words for the program ...])
function(iovane_power_test name machine label program)
  cmake_parse_arguments(arg "" "" "WORDS;FOR" ${ARGN})
  add_test(NAME lab.${name}.${machine}
    COMMAND ${PROJECT_SOURCE_DIR}/tools/lab run --arch ppc64le --machine ${machine} --timeout 900
            ${arg_WORDS} -- $<TARGET_FILE:${program}> ${arg_FOR})
  set_tests_properties(lab.${name}.${machine} PROPERTIES LABELS ${label} TIMEOUT 1800)
endfunction()
set(traces --file ${PROJECT_SOURCE_DIR}/tests/data/traces)
set(hypercalls --file ${log}:/viommu/papr-nvme-a.log)

# Label lab: in every CI run. What depends on threads runs once more on two CPUs at a time.
iovane_power_test(conformance pseries lab conformance_test WORDS --hugepages 16 --counted ${traces} FOR --gtest_filter=*spapr*)
iovane_power_test(spapr pseries-kvm lab spapr_lab_test WORDS --counted ${hypercalls})
iovane_power_test(threads pseries lab conformance_test
  FOR --gtest_filter=*LimitContract.threads*spapr*:*LiveContract*spapr*:*EngineContract*spapr*)
# Label power: half an hour more, by hand; one device's open and close takes 5 s on powernv9.
iovane_power_test(conformance pseries-64k power conformance_test WORDS --hugepages 16 --counted ${traces} FOR --gtest_filter=*spapr*)
iovane_power_test(spapr pseries-64k power spapr_lab_test WORDS --counted ${hypercalls})
# Hash translation instead of radix.
iovane_power_test(hash pseries power conformance_test
  WORDS --append disable_radix FOR --gtest_filter=*SpaprContract*)
iovane_power_test(conformance powernv9 power conformance_test WORDS --hugepages 16 FOR --gtest_filter=*spapr*)

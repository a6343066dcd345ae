// Static probes for tracers outside the process (bpftrace, perf, systemtap): a no-op instruction and a note that says
// where it is and where its arguments are (Debian: systemtap-sdt-dev). Without sys/sdt.h at build time there are none.
#pragma once

#if __has_include(<sys/sdt.h>)
#include <sys/sdt.h>
#define IOVANE_HAVE_USDT 1
/// A probe iovane:NAME with four integer arguments.
#define IOVANE_USDT(name, a, b, c, d) STAP_PROBE4(iovane, name, a, b, c, d)
#else
#define IOVANE_HAVE_USDT 0
#define IOVANE_USDT(name, a, b, c, d) static_cast<void>(0)
#endif

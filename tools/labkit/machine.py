"""What the lab can boot: one Machine per kind of emulated computer.

To add an architecture: add a Machine here, its kernel's configuration to config/ (or name Debian's own kernel), and
its exact known warnings. Nothing else in the lab names an architecture.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .debian import Suite
from .report import LabError

EDU = "1234:11e8"  # QEMU's educational device: the DMA witness
EDU_OPTIONS = "dma_mask=0xffffffffffffffff"


@dataclass(frozen=True)
class Wish:
    """What the user asked of the machine, in words that every architecture shares."""

    cpus: int
    nodes: int
    memory_mib: int
    edu: int
    iommu: str


@dataclass(frozen=True)
class Edit:
    """One replacement in the kernel's sources, for the lab only. The old text must be there exactly once."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel built from a Debian source package and files in config/."""

    package: str  # a regular expression on the package's name; the highest version is taken
    suite: Suite
    configs: tuple[str, ...]
    make_architecture: str
    cross: str  # compiler prefix, empty for the host's own
    image: str  # what make leaves, and the make target is its last part
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class PackagedKernel:
    """Debian's own kernel, as its package has it."""

    package: str  # a regular expression on the package's name, which carries the version; the highest is taken
    suite: Suite
    modules: tuple[str, ...]  # to be loaded in the guest, each after what it depends on


@dataclass(frozen=True)
class Machine:
    name: str
    architecture: str  # as the lab names it; ELF_MACHINES in libraries has the same names
    emulator: str  # the program's name
    arguments: Callable[[Wish], list[str]]  # QEMU's, without memory, CPUs, kernel and the lab's own devices
    kernel: BuiltKernel | PackagedKernel
    command_line: Callable[[Wish], str]  # the kernel's
    iommus: tuple[str, ...]  # accepted values of --iommu; the first is the default
    compiler: str  # a C compiler that makes static programs for the guest
    cross_libraries: str  # where that compiler's shared libraries are; empty on the host's own architecture
    packages: tuple[str, ...]  # Debian packages to make its kernel ready and to run it
    emulator_version: tuple[int, ...] = ()  # at least
    emulator_package: str = ""  # where to take a newer emulator from, when the host's own is too old
    port_bus: str = ""  # where the lab's own device goes; empty for QEMU's choice
    known_warnings: tuple[str, ...] = ()  # texts of warnings that this machine's kernel always prints


def host_architecture() -> str:
    return {"x86_64": "x86_64", "ppc64le": "ppc64le", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def _numa(wish: Wish) -> list[str]:
    """Memory and CPUs, dealt out evenly over the nodes. A node is a socket: Linux warns about nodes that split one."""
    cores = wish.cpus // wish.nodes
    arguments = ["-smp", f"cpus={wish.cpus},sockets={wish.nodes},cores={cores},threads=1", "-m", f"{wish.memory_mib}M"]
    if wish.nodes == 1:
        return arguments
    for node in range(wish.nodes):
        arguments += ["-object", f"memory-backend-ram,id=node{node},size={wish.memory_mib // wish.nodes}M"]
        arguments += ["-numa", f"node,nodeid={node},memdev=node{node},cpus={node * cores}-{(node + 1) * cores - 1}"]
    return arguments


_BUILD_TOOLS = ("make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "xz-utils")


def _x86_arguments(wish: Wish) -> list[str]:
    arguments = ["-machine", "q35,kernel-irqchip=split", "-accel", "tcg", "-cpu", "max", "-nodefaults", *_numa(wish)]
    if wish.iommu != "none":
        scalable = ",x-scalable-mode=on" if wish.iommu == "scalable" else ""
        # Without interrupt remapping type1 refuses every group.
        arguments += ["-device", f"intel-iommu,intremap=on,caching-mode=off,aw-bits=48{scalable}"]
    for _ in range(wish.edu):
        arguments += ["-device", f"edu,{EDU_OPTIONS}"]
    return arguments


def _x86_command_line(wish: Wish) -> str:
    mode = {"legacy": "on,sm_off", "scalable": "on,sm_on", "none": "off"}[wish.iommu]
    # On a busy host the emulated timer can miss the moment at which Linux tests it, which then panics.
    return f"console=ttyS0 no_timer_check iommu.passthrough=0 iommu.strict=1 intel_iommu={mode}"


# What QEMU's software emulation does not offer of a real POWER9; without these it refuses to start or prints a warning each.
_PSERIES = "pseries,x-vof=on,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"
_PPC_SUITE = Suite("trixie", "ppc64el")
_PPC_KERNEL = r"linux-image-6\.12\.[0-9]+\+deb13-powerpc64le"
_PPC_KERNEL_64K = _PPC_KERNEL + "-64k"
_PPC_MODULES = ("vfio_iommu_spapr_tce", "vfio_pci")
_PPC_PACKAGES = ("qemu-system-ppc", "gcc-powerpc64le-linux-gnu", "libc6-dev-ppc64el-cross", "binutils", "xz-utils")

_PSERIES_WARNINGS = ("WARNING: nvram corruption detected: 0-length partition",)  # the emulated nvram starts empty
_POWERNV_WARNINGS = ()


def _pseries_arguments(wish: Wish, machine: str = _PSERIES) -> list[str]:
    arguments = ["-machine", machine, "-accel", "tcg", "-cpu", "POWER9", "-nodefaults", *_numa(wish)]
    for index in range(1, wish.edu + 1):  # one IOMMU group per host bridge: each device gets a bridge of its own
        arguments += ["-device", f"spapr-pci-host-bridge,index={index},id=phb{index}", "-device", f"edu,bus=phb{index}.0,{EDU_OPTIONS}"]
    return arguments


def _pseries_kvm_arguments(wish: Wish) -> list[str]:
    return _pseries_arguments(wish, f"{_PSERIES},cap-nested-hv=on")


def _powernv_arguments(wish: Wish) -> list[str]:
    # -nodefaults would take the host bridges away. The lab's own port goes to the last bridge.
    arguments = ["-machine", "powernv9", "-accel", "tcg", "-cpu", "POWER9", "-net", "none", *_numa(wish)]
    for index in range(wish.edu):
        arguments += ["-device", f"edu,bus=pcie.{index},{EDU_OPTIONS}"]
    return arguments


def _ppc_command_line(wish: Wish) -> str:
    return "console=hvc0 nowatchdog"  # on a busy host an emulated CPU may well stand still for a while


def _virt_arguments(wish: Wish) -> list[str]:
    # From 9.1 on the machine itself asks for both stages, and no option from outside changes that.
    machine = "virt" if wish.iommu in ("nested", "none") else "virt-9.0"
    smmu = ",iommu=smmuv3" if wish.iommu != "none" else ""
    arguments = ["-machine", f"{machine},gic-version=3,acpi=off{smmu}", "-accel", "tcg"]
    arguments += ["-cpu", "max,sve=off,pauth-impdef=on", "-nodefaults", *_numa(wish)]  # pauth: the real algorithm is slow to emulate
    if wish.iommu != "none":
        arguments += ["-global", "arm-smmuv3.stage=" + {"nested": "nested", "stage1": "1", "stage2": "2"}[wish.iommu]]
    for _ in range(wish.edu):
        arguments += ["-device", f"edu,{EDU_OPTIONS}"]
    return arguments


def _virt_command_line(wish: Wish) -> str:
    return "console=ttyAMA0 iommu.passthrough=0 iommu.strict=1"


# Nesting wants the firmware's promise that the device's DMA is fully coherent. QEMU's device tree cannot make it, although its
# emulation keeps it: every access goes to the same memory.
_COHERENT = Edit(
    path="drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3.h",
    old="\treturn dev_iommu_fwspec_get(master->dev)->flags &\n\t       IOMMU_FWSPEC_PCI_RC_CANWBS;\n",
    new="\treturn true; /* iovane lab: emulated DMA is coherent */\n",
)

MACHINES = (
    Machine(
        name="q35",
        architecture="x86_64",
        emulator="qemu-system-x86_64",
        arguments=_x86_arguments,
        kernel=BuiltKernel(
            package=r"linux-source-6\.12",
            suite=Suite("bookworm-security", "amd64"),
            configs=("common.config", "x86_64.config"),
            make_architecture="x86_64",
            cross="",
            image="arch/x86/boot/bzImage",
        ),
        command_line=_x86_command_line,
        iommus=("legacy", "scalable", "none"),
        compiler="x86_64-linux-gnu-gcc",
        cross_libraries="",
        packages=("qemu-system-x86", "gcc", "libc6-dev", "binutils", *_BUILD_TOOLS),
    ),
    Machine(
        name="pseries",
        architecture="ppc64le",
        emulator="qemu-system-ppc64",
        arguments=_pseries_arguments,
        kernel=PackagedKernel(_PPC_KERNEL, _PPC_SUITE, _PPC_MODULES),
        command_line=_ppc_command_line,
        iommus=("tce",),
        compiler="powerpc64le-linux-gnu-gcc",
        cross_libraries="/usr/powerpc64le-linux-gnu/lib",
        packages=_PPC_PACKAGES,
        port_bus="pci.0",
        known_warnings=_PSERIES_WARNINGS,
    ),
    Machine(
        name="pseries-kvm",
        architecture="ppc64le",
        emulator="qemu-system-ppc64",
        arguments=_pseries_kvm_arguments,
        kernel=PackagedKernel(_PPC_KERNEL, _PPC_SUITE, (*_PPC_MODULES, "kvm", "kvm_hv")),
        command_line=_ppc_command_line,
        iommus=("tce",),
        compiler="powerpc64le-linux-gnu-gcc",
        cross_libraries="/usr/powerpc64le-linux-gnu/lib",
        packages=_PPC_PACKAGES,
        port_bus="pci.0",
        known_warnings=_PSERIES_WARNINGS,
    ),
    Machine(
        name="pseries-64k",
        architecture="ppc64le",
        emulator="qemu-system-ppc64",
        arguments=_pseries_kvm_arguments,
        kernel=PackagedKernel(_PPC_KERNEL_64K, _PPC_SUITE, (*_PPC_MODULES, "kvm", "kvm_hv")),
        command_line=_ppc_command_line,
        iommus=("tce",),
        compiler="powerpc64le-linux-gnu-gcc",
        cross_libraries="/usr/powerpc64le-linux-gnu/lib",
        packages=_PPC_PACKAGES,
        port_bus="pci.0",
        known_warnings=_PSERIES_WARNINGS,
    ),
    Machine(
        name="powernv9",
        architecture="ppc64le",
        emulator="qemu-system-ppc64",
        arguments=_powernv_arguments,
        kernel=PackagedKernel(_PPC_KERNEL, _PPC_SUITE, _PPC_MODULES),
        command_line=_ppc_command_line,
        iommus=("tce",),
        compiler="powerpc64le-linux-gnu-gcc",
        cross_libraries="/usr/powerpc64le-linux-gnu/lib",
        packages=_PPC_PACKAGES,
        port_bus="pcie.5",
        known_warnings=_POWERNV_WARNINGS,
    ),
    Machine(
        name="virt",
        architecture="arm64",
        emulator="qemu-system-aarch64",
        emulator_version=(9, 1),  # the first with nested translation in its SMMUv3
        emulator_package="qemu-system-arm",
        arguments=_virt_arguments,
        kernel=BuiltKernel(
            package=r"linux-source-7\.\d+",
            suite=Suite("sid", "amd64"),
            configs=("common.config", "arm64.config"),
            make_architecture="arm64",
            cross="aarch64-linux-gnu-",
            image="arch/arm64/boot/Image",
            edits=(_COHERENT,),
        ),
        command_line=_virt_command_line,
        iommus=("nested", "stage1", "stage2", "none"),
        compiler="aarch64-linux-gnu-gcc",
        cross_libraries="/usr/aarch64-linux-gnu/lib",
        packages=("gcc", "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross", "binutils", *_BUILD_TOOLS),
    ),
)


def find(architecture: str, name: str | None) -> Machine:
    """The machine of that name, or the architecture's first one."""
    fitting = [machine for machine in MACHINES if machine.architecture == architecture]
    for machine in fitting:
        if name in (None, machine.name):
            return machine
    known = ", ".join(f"{machine.architecture}/{machine.name}" for machine in MACHINES)
    raise LabError(f"no machine {architecture}/{name or '*'}; there are {known}")


def check(wish: Wish, machine: Machine) -> None:
    if wish.iommu not in machine.iommus:
        raise LabError(f"{machine.name} has no IOMMU mode {wish.iommu!r}; it has {', '.join(machine.iommus)}")
    if wish.nodes < 1 or wish.cpus < 1 or wish.cpus % wish.nodes or wish.memory_mib % wish.nodes:
        raise LabError("at least one NUMA node, and CPUs and memory that divide evenly among the nodes")
    if wish.memory_mib < 256 * wish.nodes:
        raise LabError("at least 256 MiB of memory for each NUMA node")


def cross_root(machine: Machine) -> Path | None:
    return Path(machine.cross_libraries) if machine.cross_libraries else None

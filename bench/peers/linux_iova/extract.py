#!/usr/bin/env python3
"""Takes the kernel's IOVA allocator out of Debian's linux-source package, for the benchmark that compares with it.

usage: extract.py SOURCE DIRECTORY

SOURCE is linux-source-6.12.tar.xz, or the .deb package that holds it (as the lab keeps it). DIRECTORY gets the few files
of the kernel that are compiled, unchanged, and an empty header for each other one that they include: what those would
declare is in shim.h, which the compiler includes first. Nothing of it is ever installed or shipped.
"""

import subprocess
import sys
from pathlib import Path

TAKEN = {
    "drivers/iommu/iova.c": "iova.c",
    "lib/rbtree.c": "rbtree.c",
    "include/linux/iova.h": "linux/iova.h",
    "include/linux/rbtree.h": "linux/rbtree.h",
    "include/linux/rbtree_types.h": "linux/rbtree_types.h",
    "include/linux/rbtree_augmented.h": "linux/rbtree_augmented.h",
}
EMPTY = "bitops compiler container_of cpu dma-mapping export kernel kmemleak module rcupdate slab smp stddef types workqueue"


def main() -> int:
    source, directory = Path(sys.argv[1]), Path(sys.argv[2])
    unpacked = directory / "unpacked"
    unpacked.mkdir(parents=True, exist_ok=True)
    commands = [f"xz -dc '{source}'"]
    if source.suffix == ".deb":
        commands = [f"dpkg-deb --fsys-tarfile '{source}'", "tar -xO --wildcards '*/usr/src/linux-source-*.tar.xz'", "xz -dc"]
    # The first of each name is enough, and tar then stops reading: what writes to it ends early, which is no error.
    wanted = " ".join(f"'*/{path}'" for path in TAKEN)
    commands.append(f"tar -x -C '{unpacked}' --strip-components=1 --wildcards --no-wildcards-match-slash --occurrence=1 {wanted}")
    run = subprocess.run(["bash", "-c", " | ".join(commands)], stderr=subprocess.PIPE, text=True)
    missing = [path for path in TAKEN if not (unpacked / path).is_file()]
    if missing:
        print(f"{source}: does not hold {', '.join(missing)}\n{run.stderr}", file=sys.stderr)
        return 1
    (directory / "linux").mkdir(exist_ok=True)
    for path, name in TAKEN.items():
        (unpacked / path).replace(directory / name)
    for name in EMPTY.split():
        (directory / "linux" / f"{name}.h").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())

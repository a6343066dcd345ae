"""The lab: boots a real Linux in an emulated machine, runs one program inside, brings back what it said and left.

Reading order: machine (what can be booted), kernel (where its kernel comes from), initramfs and libraries (what the guest
is given), guest (one run from start to verdict), dmesg (what counts as a kernel splat), cli (the command).
guest/init.c is the other side: PID 1 in the guest.
"""

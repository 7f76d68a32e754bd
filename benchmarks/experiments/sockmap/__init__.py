"""A relay whose bytes never leave the kernel (BPF sockmap), beside tproxyd and HAProxy: docs/adr/0007-no-sockmap.md.

`bpf` makes the maps and the program, `relay` is the smallest transparent TCP relay on top of them, `__main__` measures.
Nothing of it is used by tproxyd.
"""

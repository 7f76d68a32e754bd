"""From the configuration to the kernel: a pure plan, two ways to write it down, and the edges that apply it.

`plan` and the two renderers (`nft`, `iptables`) are pure. Kernel calls stand in `libnftables`, `nft_part`,
`iptables_part` and `routing`; `apply` puts the parts together.
"""

"""Correctness at speed: hundreds of flows at a time through tproxyd, every byte accounted for at both ends.

| file | what lives there |
|---|---|
| `ledger` | what each end of each flow sent and got; contents and checksums |
| `tcp`, `udp` | both ends of a flow of random size and behaviour |
| `__main__` | laps of such flows, and what the workers hold after each |
"""
